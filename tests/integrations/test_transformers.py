"""The callback for the Trainer of transformers, and the Trainer that listens to the teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from sparsae.config.schema import TeacherConfig
from sparsae.integrations.transformers import SparsaeCallback, SparsaeTrainer
from sparsae.rules import EvolutionConfig, GenerationsConfig, GmpConfig, RiglConfig, SetConfig
from tests.support.hf import Counting, gpt2, trainer

TEACHER = TeacherConfig(alpha=0.5, warmup_fraction=0.25, share=0.5, beta=0.9, storage="union")
KINDS: dict[str, dict[str, Any]] = {
    "default": {"topology": GenerationsConfig(every=5)},
    "rigl": {"topology": RiglConfig(every=4, window=3)},
    "gmp": {"topology": GmpConfig(every=4), "sparsity": 0.9},
    "evolution": {"topology": EvolutionConfig(every=5, candidates=2), "held_out": Counting(16, 1000)},
    "taught": {"topology": SetConfig(every=5), "teacher": TEACHER},
}


def same(one: Any, two: Any) -> bool:
    """Whether two states are equal, bit for bit."""
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two


def assert_same(one: Trainer, two: Trainer, mine: SparsaeCallback, other: SparsaeCallback) -> None:
    assert same(one.model.state_dict(), two.model.state_dict())
    assert same(one.optimizer.state_dict(), two.optimizer.state_dict())
    assert same(mine.sparsifier.state_dict(), other.sparsifier.state_dict())
    assert [row["step"] for row in mine.rows] == [row["step"] for row in other.rows]


@pytest.mark.parametrize("name", KINDS)
def test_what_is_resumed_ends_as_what_was_not_interrupted(name: str, tmp_path: Path) -> None:
    callbacks = [SparsaeCallback(**KINDS[name]) for _ in range(2)]
    sparsity = 0.0 if name == "gmp" else 0.8
    kind = SparsaeTrainer if name == "taught" else Trainer
    # Batches that the accumulation does not divide, so that an epoch ends with a step of fewer passes.
    whole, resumed = (
        trainer(tmp_path, each, model=gpt2(sparsity), kind=kind, gradient_accumulation_steps=2, train_dataset=Counting(36))
        for each in callbacks
    )
    whole.train()
    assert len(callbacks[0].rows) > 2
    assert callbacks[0].rows[-1]["itop_rate"] > callbacks[0].rows[0]["itop_rate"] or name == "gmp"
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    assert_same(whole, resumed, *callbacks)
