"""A model that FSDP2 shards is searched as any other, by parts of its values and one layer's at a time."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sparsae.config.sparsifier import SparsifierConfig
from sparsae.config.teacher import TeacherConfig
from sparsae.core.randomness import generator
from sparsae.core.ranks import ranks
from sparsae.core.shards import is_sharded, whole
from sparsae.core.topology import Topology
from sparsae.errors import InputError
from sparsae.nn.linear import sparse_layers
from sparsae.nn.sparsify import densify, sparsify
from sparsae.nn.tensors import load_model
from sparsae.optim import AdamW, parameter_groups
from sparsae.search.sparsifier import Sparsifier
from sparsae.search.teacher import Teacher
from tests.support.loops import OPTIMIZERS, mlp
from tests.support.ranks import assert_same, joined, on_ranks, resumable, shard, train

# Rules with dense gradients, with sampled ones over layers whose number of connections changes, and with scores by a
# backward pass of each candidate; each with another optimizer and teacher.
TRAININGS: dict[str, tuple[str, TeacherConfig | bool]] = {
    "rigl": ("sgd", TeacherConfig()),
    "generations": ("adamw", False),
    "gse": ("ours", TeacherConfig(storage="union", tolerance=1e-3, grown="student")),
    "evolution, elitist": ("ours", False),
}


def _one(section: str, **given: Any) -> Any:
    optimizer, teacher = TRAININGS[section]
    steps = {"gse": 12, "evolution, elitist": 5}.get(section, 20)
    return train(section, steps, teacher=teacher, optimizer=OPTIMIZERS[optimizer], **given)


def _checks(rank: int, count: int, store: str) -> None:
    torch.set_num_threads(1)
    alone = {section: _one(section) for section in TRAININGS}
    accumulated = _accumulated(sharded=False)
    with joined(rank, count, store):
        for section, expected in alone.items():
            _told(section, lambda s=section, e=expected: assert_same(_one(s, sharded=True), e))
        _told("accumulation", lambda: _assert_close(_accumulated(sharded=True), accumulated))
        for check in CHECKS:
            _told(check.__name__, check)


def _told(what: str, check: Callable[[], None]) -> None:
    try:
        check()
    except Exception as error:
        raise AssertionError(f"{what}, rank {ranks().rank}: {error!r}") from error


def _assert_close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=1e-9)


def _accumulated(sharded: bool) -> dict[str, Tensor]:
    """Two backward passes a step, of which FSDP reduces the gradients of the last alone."""
    model: Any = mlp().double()
    if sharded:
        shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    config = SparsifierConfig.model_validate({"steps": 8, "accumulation": 2, "topology": {"rule": "gse", "every": 2}})
    sparsifier, here = Sparsifier(model, optimizer, config), ranks()
    for step in range(8):
        optimizer.zero_grad()
        for each in range(2):
            x = torch.randn(8, 24, generator=generator(step, each), dtype=torch.float64)
            x = x[here.rank * 8 // here.count : (here.rank + 1) * 8 // here.count]
            if sharded:
                model.set_requires_gradient_sync(each == 1)
            (model(x) - x.roll(1, 1)).square().mean().backward()
        sparsifier.before_step()
        optimizer.step()
        sparsifier.after_step()
    return {name: whole(tensor).detach() for name, tensor in model.state_dict().items()}


def _continues_bit_for_bit() -> None:
    """By what torch has for states of sharded models, whole on each rank, and a number of connections that changes."""
    model, optimizer, sparsifier = first = resumable()
    _steps(first, range(9))
    options = StateDictOptions(full_state_dict=True)
    parts: list[Any] = [get_model_state_dict(model, options=options)]
    parts += [get_optimizer_state_dict(model, optimizer, options=options), sparsifier.state_dict()]
    parts = copy.deepcopy(parts)
    assert not any(is_sharded(tensor) for tensor in parts[2]["teacher"]["model"].values())
    losses = _steps(first, range(9, 16))
    again = resumable()
    load_model(again[0], parts[0])
    set_optimizer_state_dict(again[0], again[1], parts[1], options=options)
    again[2].load_state_dict(parts[2])
    assert _steps(again, range(9, 16)) == losses
    for mine, theirs in zip(again[0].parameters(), model.parameters(), strict=True):
        assert torch.equal(whole(mine), whole(theirs))


def _steps(training: tuple[Any, torch.optim.Optimizer, Sparsifier], steps: range) -> list[float]:
    model, optimizer, sparsifier = training
    assert sparsifier.teacher is not None
    losses = []
    for step in steps:
        x = torch.randn(4, 24, generator=generator(step, ranks().rank), dtype=torch.float64)
        y = model(x)
        with torch.no_grad():
            taught = sparsifier.teacher.model(x)
        loss = (y - x.roll(1, 1)).square().mean() + 0.1 * (y - taught).square().mean()
        optimizer.zero_grad()
        loss.backward()
        sparsifier.before_step()
        optimizer.step()
        sparsifier.after_step()
        losses.append(float(loss.detach()))
    return losses


class _Sizes(TorchDispatchMode):
    """The largest float32 tensor that is made, and how many with at least `size` numbers there are at once."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size, self._alive = size, weakref.WeakSet[Any]()
        self.largest = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and tensor.dtype == torch.float32 and not is_sharded(tensor):
                self.largest = max(self.largest, tensor.numel())
                if tensor.numel() >= self._size:
                    self._alive.add(tensor.untyped_storage())
                    self.most = max(self.most, len(self._alive))
        return out


def _one_layer_at_a_time() -> None:
    """Of 16 layers no more than a few tensors of one layer's size are there at once, and none of a dense layer's."""
    model = sparsify(nn.Sequential(*(nn.Linear(32, 32) for _ in range(16))), 0.9)
    teacher = Teacher(model, TeacherConfig())
    for each in (model, teacher.model):
        fully_shard(each)
    optimizer = AdamW(parameter_groups(model, 0.1), lr=3e-3)
    config = SparsifierConfig.model_validate({"steps": 12, "topology": {"rule": "generations", "every": 2}})
    sparsifier = Sparsifier(model, optimizer, config, teacher=teacher)
    sizes = _Sizes(min(layer.topology.nnz for layer in sparse_layers(model).values()))
    for step in range(6):
        x = torch.randn(4, 32, generator=generator(step))
        optimizer.zero_grad()
        (model(x) - x).square().mean().backward()
        with sizes:
            sparsifier.before_step()
            optimizer.step()
            update = sparsifier.after_step()
        assert (update is not None) == (step % 2 == 1)
    assert 0 < sizes.largest < 2 * max(layer.topology.nnz for layer in sparse_layers(model).values()) < 32 * 32
    assert 0 < sizes.most < 8
    assert all(is_sharded(state[key]) for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq"))


def _what_does_not_fit_is_refused() -> None:
    by_hand, averaged = mlp(), fully_shard(mlp())
    layer = next(iter(sparse_layers(by_hand).values()))
    layer.values = nn.Parameter(distribute_tensor(layer.values.detach(), init_device_mesh("cpu", (2,)), [Shard(0)]))
    _refused(by_hand, "the values of 0 are sharded over ranks by something else than fully_shard")
    blocks = fully_shard(mlp(32, unit=(4, 4)), shard_placement_fn=lambda p: Shard(1) if p.dim() == 3 else None)
    _refused(blocks, "by another dimension than the first")
    rows = init_device_mesh("cpu", (2, 1), mesh_dim_names=("apart", "together"))
    _refused(fully_shard(mlp(), mesh=rows["together"]), "that are not all of them")
    _refused(_without_connections(), "layer 0 has no connection")
    _refused(averaged, "cannot be copied as a teacher: make Teacher", TeacherConfig())
    model = mlp()
    with pytest.raises(InputError, match="has a dense weight during a pass only"):
        densify(averaged)
    dense = Teacher(model, TeacherConfig(storage="dense"))
    _refused(fully_shard(model), "storage 'dense' cannot follow a sharded model", TeacherConfig(), dense)


def _without_connections() -> nn.Module:
    model = mlp()
    layer = next(iter(sparse_layers(model).values()))
    empty = Topology(layer.topology.shape, layer.topology.indices[:0])
    layer.set_topology(empty, layer.values.detach()[:0])
    return fully_shard(model)


def _sizes_of(model: nn.Module) -> list[int]:
    return [layer.topology.count for layer in sparse_layers(model).values()]


def _the_parameter_stays_what_others_made_of_it() -> None:
    """Attributes, weak references and a graph that is still there, where the number of connections changes."""
    model = fully_shard(mlp())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    config = SparsifierConfig.model_validate({"steps": 4, "topology": {"rule": "gse", "every": 2}})
    sparsifier, before = Sparsifier(model, optimizer, config), _sizes_of(model)
    parameter: Any
    for name, parameter in model.named_parameters():
        parameter.called = name
    seen = [weakref.ref(parameter) for parameter in model.parameters()]
    penalties = []
    for step in range(4):
        penalties.append(torch.stack([p.square().sum().full_tensor() for p in model.parameters()]).sum())
        x = torch.randn(4, 24, generator=generator(step))
        optimizer.zero_grad()
        ((model(x) - x).square().mean() + 1e-3 * penalties[-1]).backward()
        sparsifier.before_step()
        optimizer.step()
        sparsifier.after_step()
    assert _sizes_of(model) != before
    for (name, parameter), reference in zip(model.named_parameters(), seen, strict=True):
        assert parameter is reference()
        assert parameter.called == name


def _refused(
    model: nn.Module, why: str, config: TeacherConfig = TeacherConfig(enabled=False), teacher: Teacher | None = None
) -> None:
    settings = SparsifierConfig.model_validate(
        {"steps": 4, "topology": {"rule": "set"}, "teacher": config.model_dump()}
    )
    with pytest.raises(InputError, match=why):
        Sparsifier(model, torch.optim.SGD(model.parameters(), lr=0.1), settings, teacher=teacher)


CHECKS = (
    _continues_bit_for_bit,
    _one_layer_at_a_time,
    _the_parameter_stays_what_others_made_of_it,
    _what_does_not_fit_is_refused,
)


@pytest.mark.slow
def test_two_ranks_with_a_part_each_are_one_run(tmp_path: Path) -> None:
    on_ranks(_checks, tmp_path)
