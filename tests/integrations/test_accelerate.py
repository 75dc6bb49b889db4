"""A Sparsifier in a loop of accelerate's: attached to the optimizer's step, and registered for checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sparsae import AdamW, Sparsifier, SparsifierConfig, parameter_groups, sparsify
from sparsae.config.teacher import TeacherConfig
from sparsae.errors import InputError
from sparsae.losses import distillation_loss
from sparsae.rules import EvolutionConfig, RiglConfig, SetConfig
from tests.integrations.test_transformers import same

TEACHER = TeacherConfig(alpha=0.5, beta=0.9, storage="union")
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"topology": SetConfig(every=4)},
    "accumulation, rigl": {"topology": RiglConfig(every=4, window=3), "passes": 2},
    "taught": {"topology": SetConfig(every=4), "teacher": TEACHER},
    "scored, bfloat16": {"topology": EvolutionConfig(every=4, candidates=2), "precision": "bf16"},
    "float16": {"topology": RiglConfig(every=4, window=3), "scales": True},
}
EPOCHS = 4


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class Loop:
    """As docs/trainers.md has it."""

    def __init__(
        self, *, topology: Any, teacher: Any = None, passes: int = 1, precision: str = "no", scales: bool = False
    ) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 48), nn.Dropout(0.1), nn.Linear(48, 16))
        sparsify(model, 0.8, seed=1)
        self.accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=passes)
        if scales:  # accelerate has it for accelerators alone
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=4)
            self.accelerator.native_amp = True
            self.accelerator.state._mixed_precision = "fp16"
        x = torch.randn(96, 16, generator=torch.Generator().manual_seed(0))
        loader = DataLoader(TensorDataset(x, x.argmax(1)), batch_size=8, shuffle=True)
        optimizer = AdamW(parameter_groups(model, weight_decay=0.1), lr=1e-2)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(model, optimizer, loader)
        settings = {} if teacher is None else {"teacher": teacher}
        config = SparsifierConfig(steps=EPOCHS * 12 // passes, topology=topology, accumulation=passes, **settings)
        held_out = x[:8]

        def score(step: int) -> Tensor:
            return nn.functional.cross_entropy(self.model(held_out), held_out.argmax(1))

        self.updates: list[Any] = []
        scored = score if isinstance(topology, EvolutionConfig) else None
        self.sparsifier = Sparsifier(self.model, self.optimizer, config, score=scored)
        self.sparsifier.attach(self.updates.append, scaler=self.accelerator.scaler)
        self.accelerator.register_for_checkpointing(self.sparsifier)

    def run(self, epochs: range) -> None:
        for epoch in epochs:
            self.loader.set_epoch(epoch)
            for x, label in self.loader:
                with self.accelerator.accumulate(self.model):
                    taught = None
                    if self.sparsifier.teacher is not None:
                        with torch.no_grad():
                            taught = self.sparsifier.teacher.model(x)
                    parts = distillation_loss(self.model(x), taught, label, alpha=0.5)
                    self.accelerator.backward(parts.total)
                    if self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                    self.optimizer.step()
                    self.optimizer.zero_grad()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_resumed_ends_as_what_was_not_interrupted(kind: str, tmp_path: Path) -> None:
    whole = Loop(**KINDS[kind])
    whole.run(range(2))
    whole.accelerator.save_state(str(tmp_path))
    whole.run(range(2, EPOCHS))
    assert any(update.accepted for update in whole.updates)
    passes = KINDS[kind].get("passes", 1)
    made = EPOCHS * 12 // passes
    assert whole.sparsifier.step == made if kind != "float16" else 0 < whole.sparsifier.step < made
    AcceleratorState._reset_state(reset_partial_state=True)
    resumed = Loop(**KINDS[kind])
    resumed.accelerator.load_state(str(tmp_path))
    assert resumed.sparsifier.step < whole.sparsifier.step
    resumed.run(range(2, EPOCHS))
    assert same(whole.model.state_dict(), resumed.model.state_dict())
    assert same(whole.optimizer.state_dict(), resumed.optimizer.state_dict())
    assert same(whole.sparsifier.state_dict(), resumed.sparsifier.state_dict())


def test_a_state_holds_no_code(tmp_path: Path) -> None:
    """Accelerate reads it as a pickle that may hold anything; it holds tensors and plain values."""
    loop = Loop(**KINDS["taught"])
    loop.run(range(1))
    loop.accelerator.save_state(str(tmp_path))
    state = torch.load(tmp_path / "custom_checkpoint_0.pkl", weights_only=True)
    assert state["step"] == 12


def test_a_sparsifier_of_another_model_is_refused(tmp_path: Path) -> None:
    loop = Loop(**KINDS["plain"])
    loop.run(range(1))
    loop.accelerator.save_state(str(tmp_path))
    AcceleratorState._reset_state(reset_partial_state=True)
    other = Loop(**KINDS["plain"])
    sparsify(deeper := nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)), 0.5)
    other.accelerator._custom_objects[0] = Sparsifier(
        deeper, AdamW(deeper.parameters()), SparsifierConfig(steps=48, topology=SetConfig(every=4))
    )
    with pytest.raises(InputError, match="the state is of other sparse layers: 1 is in only one of state and model"):
        other.accelerator.load_state(str(tmp_path))
