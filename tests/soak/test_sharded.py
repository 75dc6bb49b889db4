"""Every rule, optimizer and teacher over two ranks by FSDP2: the same swaps and values as by DDP."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from sparsae.config.teacher import TeacherConfig
from tests.support.loops import OPTIMIZERS
from tests.support.ranks import assert_same, joined, on_ranks, train
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
