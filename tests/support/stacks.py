"""Runs that train together beside the same ones that train alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsae.core.randomness import generator
from sparsae.nn.linear import sparse_layers
from sparsae.observers import Observer, Standing
from sparsae.registry import RULES
from sparsae.runs.rows import TIMES, Row
from sparsae.stack.drive import together
from sparsae.train.assemble import optimizer_of, trainer_of
from sparsae.train.data import TrainData
from sparsae.train.loop import Trainer
from sparsae.train.stopping import StopRequest
from tests.support.loops import LLAMA, SUPAR, built, config_of, frequent

SMALL = (
    "model.layers=1", "model.width=32", "training.batch_size=2", "training.log_every=1",
    "training.checkpoint_minutes=null", "training.learning_rate=0.01",
)  # fmt: skip
TAUGHT = ("teacher.enabled=true", "teacher.warmup_fraction=0.2")
VARYING = TIMES | {"seconds_by_part"}


@dataclass(eq=False)
class Run(Observer):
    """A trainer and what it told."""

    name: str
    trainer: Trainer
    rows: list[dict[str, Any]] = field(default_factory=list)

    def begin(self, standing: Standing) -> None:
        """Nothing to do."""

    def observe(self, row: Row) -> None:
        self.rows.append({key: value for key, value in row.to_dict().items() if key not in VARYING})

    def end(self) -> None:
        """Nothing to do."""


def run_of(name: str, method: str, *overrides: str, dtype: torch.dtype = torch.float64) -> Run:
    config = config_of(*SMALL, *overrides, method=method)
    tokens = torch.randint(300, (900,), generator=generator(3, "tokens")).numpy()
    validation = torch.randint(300, (3, config.model.context + 1), generator=generator(4, "tokens"))
    model, device = built(config).to(dtype), torch.device("cpu")
    data = TrainData.of(config, tokens, validation, tokens, device)
    found: list[Observer] = []
    trainer = trainer_of(config, model, optimizer_of(model, config), data, device, found)
    run = Run(name, trainer)
    trainer.observers = [run]
    return run


def cases(steps: int, every: int) -> dict[str, tuple[str, ...]]:
    """Method and settings by name: every rule of the registry, and whatever else a forward pass may differ by."""
    plain = {
        rule: (rule, *(f"topology.{key}={value}" for key, value in frequent(rule, every).items()))
        for rule in RULES.own_names()
    }
    often = f"topology.every={every}"
    other = {
        "dense": ("dense", "sparsity.sparsity=0"),
        "taught": ("sparsae", often, *TAUGHT),
        "taught-in-part": ("sparsae-guided", often, *TAUGHT, "teacher.share=0.5", "teacher.every=2"),
        "averaged": ("sparsae", often, "topology.random_share=0.5", "topology.window=2"),
        "bump": ("sparsae", often, "sparsity.schedule.kind=bump"),
        "averaged-dense": ("rigl", often, "topology.window=3"),
        "passes": ("rigl", often, "training.accumulation=2", "topology.accumulate=sum"),
        "last-pass": ("rigl", often, "training.accumulation=2"),
        "blocks": ("gse", often, "sparsity.unit=[4,4]", "sparsity.sparsity=0.8"),
        "grabo": ("gse", often, "topology.sampling=grabo"),
        "graest": ("gse", often, "topology.sampling=graest", "seed=1"),
        "sparser": ("rigl", often, "sparsity.sparsity=0.95", "seed=2"),
        "head": ("rigl", often, "sparsity.sparsify_head=true", "model.tie_embeddings=false"),
        "supar": ("rigl", often, *SUPAR),
        "llama": ("set", often, *LLAMA, "model.kv_heads=2"),
    }
    # Each has an end of its own.
    return {
        name: (method, *settings, f"training.steps={steps + number % 3}")
        for number, (name, (method, *settings)) in enumerate((plain | other).items())
    }


def noted_graphs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of runs of each graph that the compiler makes, which is carried out as it is: no code is generated."""
    seen: list[int] = []
    compile_, carried_out = torch.compile, torch._dynamo.lookup_backend("aot_eager")

    def noted(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        seen.append(inputs[0].shape[0])
        made: Callable[..., Any] = carried_out(graph, inputs)
        return made

    def traced(function: Callable[..., Any], *, mode: str, **options: Any) -> Any:
        assert mode == "default"
        return compile_(function, backend=noted, **options)

    monkeypatch.setattr("sparsae.stack.program.torch.compile", traced)
    return seen


def assert_equal(one: Run, other: Run, tolerance: float) -> None:
    """What two runs told, their weights, connections and operations."""
    assert len(one.rows) == len(other.rows), one.name
    for mine, theirs in zip(one.rows, other.rows, strict=True):
        _same(mine, theirs, tolerance, f"{one.name} {mine['kind']} {mine['step']}")
    assert one.trainer.account.flops.to_dict() == other.trainer.account.flops.to_dict(), one.name
    layers = sparse_layers(other.trainer.model)
    for name, layer in sparse_layers(one.trainer.model).items():
        assert torch.equal(layer.indices, layers[name].indices), (one.name, name)
    parameters = dict(other.trainer.model.named_parameters())
    for name, parameter in one.trainer.model.named_parameters():
        assert (parameter - parameters[name]).abs().max() <= tolerance, (one.name, name)


def compared(
    specifications: dict[str, tuple[str, ...]], most: int, dtype: torch.dtype, tolerance: float
) -> Sequence[Run]:
    """Train each run alone and all together, and compare; the runs that trained together."""
    pairs = [tuple(run_of(name, *settings, dtype=dtype) for _ in range(2)) for name, settings in specifications.items()]
    stop = StopRequest()
    ended = dict(together((stacked.trainer.running(stop, _no_save) for _, stacked in pairs), most))
    assert ended == dict.fromkeys(range(len(pairs)), True)
    for alone, stacked in pairs:
        assert alone.trainer.run(stop, _no_save)
        assert_equal(alone, stacked, tolerance)
    return [stacked for _, stacked in pairs]


def _no_save() -> None:
    """A checkpoint that nobody wants."""


def _same(mine: Any, theirs: Any, tolerance: float, where: str) -> None:
    if isinstance(mine, dict):
        assert mine.keys() == theirs.keys(), where
        for key in mine.keys() - VARYING:
            _same(mine[key], theirs[key], tolerance, f"{where}.{key}")
    elif isinstance(mine, list):
        assert len(mine) == len(theirs), where
        for index, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            _same(a, b, tolerance, f"{where}[{index}]")
    elif isinstance(mine, float):
        assert abs(mine - theirs) <= tolerance * max(1.0, abs(mine)), f"{where}: {mine} and {theirs}"
    else:
        assert mine == theirs, f"{where}: {mine} and {theirs}"
