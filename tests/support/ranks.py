"""Processes that train one model together, and the same training by one."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard

from sparsae.config.sparsifier import SparsifierConfig
from sparsae.config.teacher import TeacherConfig
from sparsae.core import shards
from sparsae.core.randomness import generator
from sparsae.core.ranks import ranks
from sparsae.core.shards import whole
from sparsae.nn.linear import sparse_layers
from sparsae.optim import AdamW, parameter_groups
from sparsae.rules import build_rule
from sparsae.search.sparsifier import Sparsifier
from sparsae.search.teacher import Teacher
from sparsae.search.updates import Update
from tests.support.loops import mlp
from tests.support.sections import SECTIONS

WIDTH, ROWS = 24, 16


def on_ranks(work: Callable[..., None], folder: Path, *given: Any, count: int = 2) -> None:
    """Call `work(rank, count, store, *given)` in so many processes; what fails in one of them fails here."""
    store = folder / f"store-{work.__name__}"
    store.unlink(missing_ok=True)
    torch.multiprocessing.spawn(work, (count, str(store), *given), nprocs=count)


def by_launcher(work: Callable[..., None], *given: Any, count: int = 2) -> None:
    """Call `work(*given)` in so many processes that find what torchrun tells; what fails in one of them fails here.

    They are forks, which have what is imported here; where there is a GPU they cannot be.
    """
    start = "spawn" if torch.cuda.is_available() else "fork"
    given = (work, count, free_port(), given)
    torch.multiprocessing.start_processes(_launched, given, nprocs=count, start_method=start)


def _launched(rank: int, work: Callable[..., None], count: int, port: int, given: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    launched(rank, count, port)
    work(*given)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def launched(rank: int, count: int, port: int) -> None:
    """Let this process find what a launcher tells a rank."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}


def free_port() -> int:
    """Of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def joined(rank: int, count: int, store: str) -> Iterator[None]:
    """Inside, this process is one of so many."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()


@dataclass
class Trained:
    """What came out of a training: model, search, the updates, a loss of each step, and bytes that went to others."""

    model: nn.Module
    sparsifier: Sparsifier
    updates: list[Update]
    losses: list[float]

    def topologies(self) -> dict[str, Tensor]:
        return {name: layer.topology.indices for name, layer in sparse_layers(self.model).items()}


def train(
    section: str,
    steps: int,
    *,
    teacher: bool | TeacherConfig = False,
    ties: bool = False,
    dtype: torch.dtype = torch.float64,
    look: Callable[[int, Sparsifier], None] | None = None,
    scores_nan: bool = False,
    sharded: bool = False,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
    **of_wrapper: Any,
) -> Trained:
    """A training such as anybody writes, with this rank's share of batches that do not depend on how many there are.

    ties: weights, inputs and gradients of few different sizes. look: called before every step.
    scores_nan: what this rank scores is NaN. sharded: by FSDP2, the first layer by itself and then the rest, in the
    place of DDP. optimizer: that of a model, in the place of SGD.
    """
    here = ranks()
    model = mlp(WIDTH).to(dtype)
    if ties:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_((parameter * 20).round() / 20)
    parallel: Any = model
    config = config_of(section, steps, teacher)
    average = Teacher(model, config.teacher, steps) if sharded and teacher else None
    if sharded:
        shard(model, **of_wrapper)
    elif dist.is_initialized():
        parallel = nn.parallel.DistributedDataParallel(model, **of_wrapper)
    if average is not None:
        shard(average.model, **of_wrapper)
    made = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9) if optimizer is None else optimizer(model)

    def batch(*purpose: int | str) -> Tensor:
        x = torch.randn(ROWS, WIDTH, generator=generator(7, *purpose), dtype=torch.float64).to(dtype)
        return x.round() if ties else x

    def score(step: int) -> Tensor:
        x = batch("held out", step)
        loss = (parallel(x) - x.roll(1, 1)).square().mean()
        return loss * torch.nan if scores_nan else loss

    scores = bool(build_rule(config.topology).needs & {"loss", "candidate_gradient"})
    sparsifier = Sparsifier(parallel, made, config, score=score if scores else None, teacher=average)
    updates, losses = [], []
    own = slice(here.rank * ROWS // here.count, (here.rank + 1) * ROWS // here.count)
    for step in range(steps):
        x = batch("x", step)[own]
        y = parallel(x)
        loss = (y - x.roll(1, 1)).square().mean()
        if sparsifier.teacher is not None and sparsifier.teacher.begun:
            with torch.no_grad():
                taught = sparsifier.teacher.model(x)
            loss = loss + 0.1 * (y - taught).square().mean()
        made.zero_grad()
        loss.backward()
        if look is not None:
            look(step, sparsifier)
        sparsifier.before_step()
        made.step()
        if (update := sparsifier.after_step()) is not None:
            updates.append(update)
        losses.append(here.means([float(loss.detach())])[0])
    return Trained(model, sparsifier, updates, losses)


def shard(model: Any, **of_wrapper: Any) -> None:
    """By FSDP2, the first layer by itself, which gives up after a pass what it has gathered, and then the rest."""
    fully_shard(model[0], **of_wrapper)
    fully_shard(model, **of_wrapper)


def resumable() -> tuple[Any, torch.optim.Optimizer, Sparsifier]:
    """A model and a teacher in parts, whose numbers of connections change in 16 steps."""
    model: Any = mlp().double()
    config = config_of("gse", 16, TeacherConfig(storage="union"))
    teacher = Teacher(model, config.teacher, 16)
    shard(model)
    shard(teacher.model)
    optimizer = AdamW(parameter_groups(model, 0.1), lr=3e-3)
    return model, optimizer, Sparsifier(model, optimizer, config, teacher=teacher)


def config_of(section: str, steps: int, teacher: bool | TeacherConfig = False) -> SparsifierConfig:
    """The settings of one of SECTIONS."""
    rule = {"rule": section.partition(",")[0], **SECTIONS[section]}
    config = SparsifierConfig.model_validate({"steps": steps, "topology": rule})
    prunes = build_rule(config.topology).prunes
    taught = TeacherConfig(start=0.1) if teacher is True else teacher or TeacherConfig(enabled=False)
    return SparsifierConfig.model_validate(
        {
            "steps": steps,
            "topology": rule,
            "sparsity": 0.9 if prunes else None,
            "teacher": taught.model_dump(),
        }
    )


def assert_same(one: Trained, other: Trained, tolerance: float = 1e-9) -> None:
    """The same swaps, and values to within a tolerance."""
    assert len(one.updates) == len(other.updates) > 0
    # All of its ranks together score each candidate.
    is_sharded = any(map(shards.is_sharded, one.model.parameters()))
    for mine, theirs in zip(one.updates, other.updates, strict=True):
        assert mine.changes.keys() == theirs.changes.keys(), f"step {mine.row['step']}"
        for name, change in mine.changes.items():
            assert torch.equal(change.after.indices, theirs.changes[name].after.indices), f"step {mine.row['step']}"
        assert mine.row["chosen"] == theirs.row["chosen"]
        assert mine.cost.probed == theirs.cost.probed
        assert is_sharded or mine.cost == theirs.cost
    for (name, tensor), (_, its) in zip(one.model.state_dict().items(), other.model.state_dict().items(), strict=True):
        assert tensor.shape == its.shape, name
        tensor, its = whole(tensor), whole(its)
        assert bool(((tensor.double() - its.double()).abs() <= tolerance).all()), name
    averages = [each.sparsifier.state_dict()["teacher"] or {"model": {}} for each in (one, other)]
    torch.testing.assert_close(*(each["model"] for each in averages), rtol=0, atol=tolerance)
    torch.testing.assert_close(torch.tensor(one.losses), torch.tensor(other.losses), rtol=0, atol=tolerance)
