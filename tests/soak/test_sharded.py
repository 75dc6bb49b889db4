"""Every rule, optimizer and teacher over two ranks by FSDP2: the same swaps and values as by DDP."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh

from sparsae import Sparsifier, load_model
from sparsae.config.teacher import TeacherConfig
from sparsae.core.randomness import generator
from sparsae.core.ranks import ranks
from tests.support.loops import OPTIMIZERS
from tests.support.ranks import assert_same, joined, on_ranks, resumable, train
from tests.support.sections import SECTIONS

pytestmark = pytest.mark.soak

# As sparsae-written has it, but for updates every few steps: numbers of connections change, candidates are global
# resets now and then, and what has grown burns in.
WRITTEN = "evolution, written"
SECTIONS[WRITTEN] = {
    "every": 3,
    "selection": "elitist",
    "proposer": "uniform",
    "mutation_rate": 0.02,
    "bounds": "redraw",
    "initialization": "kaiming_uniform",
    "proxy": {"terms": {"cross_entropy": {}, "diversity": {"weight": 0.01}, "activity": {"source": "candidate"}}},
    "reset": {"probability": 0.2},
    "adaptation": {"enabled": True},
    "burn_in": {"steps": 2, "scope": "new"},
}
WHOLE = StateDictOptions(full_state_dict=True)
TEACHERS: list[TeacherConfig | bool] = [
    False,
    TeacherConfig(),
    TeacherConfig(storage="union", tolerance=1e-3),
    TeacherConfig(storage="union", tolerance=1e-3, grown="student"),
]


def _as_ddp(rank: int, count: int, store: str, section: str) -> None:
    torch.set_num_threads(1)
    alone = {}
    for i, teacher in enumerate(TEACHERS):
        optimizer = OPTIMIZERS[list(OPTIMIZERS)[i % len(OPTIMIZERS)]]
        alone[i] = train(section, 24, teacher=teacher, optimizer=optimizer)
    with joined(rank, count, store):
        for i, teacher in enumerate(TEACHERS):
            optimizer = OPTIMIZERS[list(OPTIMIZERS)[i % len(OPTIMIZERS)]]
            sharded = train(section, 24, teacher=teacher, optimizer=optimizer, sharded=True)
            assert_same(sharded, train(section, 24, teacher=teacher, optimizer=optimizer))
            assert_same(sharded, alone[i])


@pytest.mark.parametrize("section", list(SECTIONS))
def test_parts_are_trained_as_copies(section: str, tmp_path: Path) -> None:
    on_ranks(_as_ddp, tmp_path, section)


def _alone(rank: int, count: int, store: str) -> None:
    torch.set_num_threads(1)
    expected = train("gse", 24, teacher=TEACHERS[1])
    with joined(rank, count, store):
        assert_same(train("gse", 24, teacher=TEACHERS[1], sharded=True), expected)
        if count == 4:
            copies = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "parts"))
            assert_same(train("gse", 24, teacher=TEACHERS[1], sharded=True, mesh=copies), expected)


@pytest.mark.parametrize("count", [1, 4])
def test_any_number_of_ranks(count: int, tmp_path: Path) -> None:
    on_ranks(_alone, tmp_path, count=count)


def _on_other_ranks(rank: int, count: int, store: str) -> None:
    """What two ranks saved is continued by all, as those two continue it."""
    torch.set_num_threads(1)
    said: list[Any] = [None, None]
    if rank < 2:
        with joined(rank, 2, f"{store}-two"):
            model, optimizer, sparsifier = training = resumable()
            _steps(training, range(9))
            states = [
                get_model_state_dict(model, options=WHOLE),
                get_optimizer_state_dict(model, optimizer, options=WHOLE),
            ]
            said[0] = copy.deepcopy([*states, sparsifier.state_dict()])
            said[1] = _steps(training, range(9, 16))
    with joined(rank, count, store):
        torch.distributed.broadcast_object_list(said)
        model, optimizer, sparsifier = training = resumable()
        load_model(model, said[0][0])
        set_optimizer_state_dict(model, optimizer, said[0][1], options=WHOLE)
        sparsifier.load_state_dict(said[0][2])
        assert _steps(training, range(9, 16)) == pytest.approx(said[1], rel=1e-9)


def _steps(training: tuple[Any, torch.optim.Optimizer, Sparsifier], steps: range) -> list[float]:
    """The losses of steps over batches that do not depend on how many ranks share them."""
    model, optimizer, sparsifier = training
    here = ranks()
    losses = []
    for step in steps:
        x = torch.randn(8, 24, generator=generator(step), dtype=torch.float64).chunk(here.count)[here.rank]
        loss = (model(x) - x.roll(1, 1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        sparsifier.before_step()
        optimizer.step()
        sparsifier.after_step()
        losses += here.means([float(loss.detach())])
    return losses


@pytest.mark.parametrize("count", [2, 4])
def test_another_number_of_ranks_continues(count: int, tmp_path: Path) -> None:
    on_ranks(_on_other_ranks, tmp_path, count=count)
