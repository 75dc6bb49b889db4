"""The Trainer of transformers, Lightning and accelerate over two ranks: one training, as one rank makes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sparsae.config.rules import MicroBatchConfig
from sparsae.integrations.held_out import HeldOutBatches
from tests.support.ranks import by_launcher
from tests.support.trainers import (
    States,
    assert_close,
    assert_same_on_all,
    of_accelerate,
    of_lightning,
    of_transformers,
)
from tests.support.versions import IS_OLD

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@pytest.mark.skipif(IS_OLD, reason="torch.load of an old torch knows no place cpu:0, which the Trainer names")
def test_two_ranks_of_transformers_train_as_one(tmp_path: Path) -> None:
    """`load_best_model_at_end` goes back over two updates of the topology."""
    by_launcher(_by_transformers, tmp_path / "two", of_transformers("rigl, taught", tmp_path / "one"))


def _by_transformers(folder: Path, expected: States) -> None:
    found = of_transformers("rigl, taught", folder)
    assert_same_on_all(found)
    assert_close(found, expected, 1e-9)
    assert found["swaps"][-1]
    assert_close(found["end"]["model"], found[3]["model"])
    resumed = of_transformers("rigl, taught", folder, resumed=6)
    assert_close(resumed[9], found[9])
    assert_close(resumed["end"], found["end"])


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # advice of Lightning's
def test_two_ranks_of_lightning_train_as_one(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    by_launcher(_by_lightning, tmp_path / "two", of_lightning("rigl, taught", tmp_path / "one", epochs=2))


def _by_lightning(folder: Path, expected: States) -> None:
    found = of_lightning("rigl, taught", folder, epochs=2)
    assert_same_on_all(found)
    assert_close(found, expected, 1e-9)
    assert found["swaps"][-1]
    assert_close(found["end"]["model"], found[1]["model"])
    assert_close(of_lightning("rigl, taught", folder, epochs=2, resumed=1)[2], found[2])


def test_two_ranks_of_accelerate_train_as_one(tmp_path: Path) -> None:
    """A layer's number of connections changes with the state that the wrapped model gets, too."""
    alone = {rule: of_accelerate(rule, tmp_path / "one", passes=2) for rule in ("rigl, taught", "gmp")}
    by_launcher(_by_accelerate, tmp_path / "two", alone)


def _by_accelerate(folder: Path, alone: dict[str, States]) -> None:
    for rule, expected in alone.items():
        found = of_accelerate(rule, folder, passes=2)
        assert_same_on_all(found)
        assert_close(found, expected, 1e-9)
        assert_close(of_accelerate(rule, folder, resumed=1, passes=2)[2], found[2])


class _Augmented(list[int]):
    def __getitem__(self, index: Any) -> Any:
        return torch.rand(3) + index


def test_held_out_samples_that_are_augmented_are_those_of_every_rank() -> None:
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        found.append(HeldOutBatches(_Augmented([0] * 9), torch.stack, MicroBatchConfig(), 5).at(40))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*found)
