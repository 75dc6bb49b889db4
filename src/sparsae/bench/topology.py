"""What a topology update costs by itself, against the number of weights that are active.

One square layer with AdamW's state. An update is made of named parts, each timed: draw the candidates for growth, take
the gradients there, choose what is dropped and grown, prepare the swap, commit it to values, optimizer and index
structures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch

from sparsae.bench.clock import Phases, interleaved, using_threads
from sparsae.bench.rows import Column, Row, groups
from sparsae.core.observation import LayerView, Observation
from sparsae.core.randomness import generator
from sparsae.core.swap import Swap
from sparsae.core.topology import Topology, grid_size
from sparsae.errors import InputError
from sparsae.kernels.backend import Layout
from sparsae.kernels.probe import LargestGradients, Probe, SampledGradients
from sparsae.kernels.registry import choose_backend
from sparsae.nn.linear import SparseLinear
from sparsae.optim import AdamW
from sparsae.rules import EvolutionConfig, GseConfig, RiglConfig, build_rule
from sparsae.rules.parts.proposers import PROPOSERS, Guidance
from sparsae.rules.parts.rule import Rule
from sparsae.rules.parts.sampling import sample_inactive
from sparsae.surgery import PreparedSwap, prepare_swap

_NAME = "layer"


class Subject:
    """A layer in training, and what one part of an update leaves for the next."""

    def __init__(
        self, width: int, sparsity: float, unit: tuple[int, int], tokens: int, share: float, backend: str
    ) -> None:
        shape = (width, width)
        self.rng = generator(0, "bench topology", width)
        count = max(1, round((1 - sparsity) * grid_size(shape, unit)))
        topology = Topology.random(shape, count, self.rng, unit)
        self.layer = SparseLinear(
            topology,
            torch.randn(topology.values_shape, generator=self.rng, dtype=torch.float32, device="cpu"),
            backend=backend,
        )
        self.kernels = choose_backend(backend, Layout(shape, unit, topology.indices), torch.float32)
        self.optimizer = AdamW([self.layer.values], lr=1e-3)
        self.layer.values.grad = torch.ones_like(self.layer.values)
        self.optimizer.step()
        self.layer.values.grad = None
        self.x_TI, self.dy_TO = (
            torch.randn(tokens, width, generator=self.rng, dtype=torch.float32, device="cpu") for _ in range(2)
        )
        self.moved = max(1, round(share * count))
        self.config = EvolutionConfig()
        self.guidance = Guidance(self.config.drop_temperature, self.config.grow_temperature)
        self._rules: dict[str, Rule] = {
            "gse": build_rule(GseConfig(drop_fraction=share)),
            "rigl": build_rule(RiglConfig(drop_fraction=share)),
        }
        self._sample: torch.Tensor | None = None
        self._gradient: torch.Tensor | None = None
        self._active_gradient: torch.Tensor | None = None
        self._swap: Swap | None = None
        self._prepared: PreparedSwap | None = None

    def sample(self) -> None:
        """As many inactive units as are active."""
        self._sample = sample_inactive({_NAME: self.layer.topology}, self.config.sample_ratio, self.rng)[_NAME]

    def sddmm(self) -> None:
        """The gradients there."""
        assert self._sample is not None
        topology = self.layer.topology
        self._gradient = self.kernels.sddmm(self.dy_TO, self.x_TI, Layout(topology.shape, topology.unit, self._sample))

    def probe(self, rule: str) -> None:
        """The gradients that a rule asks a backward pass for, with the drawing of where it wants them."""
        topology = self.layer.topology
        asked = self._rules[rule]
        state, key = asked.initial_state(), self.layer.key
        probe: Probe
        if "dense_gradient" in asked.needs:
            probe = LargestGradients(key, asked.growth({_NAME: topology}, state, 0.0)[_NAME], "last")
        else:
            probe = SampledGradients(key, asked.sample({_NAME: topology}, state, self.rng)[_NAME])
        probe.add(self.kernels, Layout(topology.shape, topology.unit, topology.indices), self.dy_TO, self.x_TI)
        probe.close()
        self._sample, self._gradient = probe.units, probe.gradient
        self._active_gradient = getattr(probe, "active", None)

    def ask(self, rule: str) -> None:
        """What is dropped and grown, by a rule."""
        observation = Observation({_NAME: self._view()}, 0, 1)
        self._swap = self._rules[rule].ask(observation, self._rules[rule].initial_state(), self.rng)[0].swap

    def propose(self, proposer: str) -> None:
        """What is dropped and grown, by a proposer of the evolution strategy."""
        observation = Observation({_NAME: self._view()}, 1, 2)
        self._swap = PROPOSERS[proposer](observation, self.moved, self.guidance, self.rng)

    def _view(self) -> LayerView:
        topology = self.layer.topology
        return LayerView(
            topology,
            self.layer.values.data,
            (0, topology.units),
            sample=self._sample,
            sample_gradient=self._gradient,
            active_gradient=self._active_gradient,
        )

    def prepare(self) -> None:
        """The new indices and values."""
        assert self._swap is not None
        self._prepared = prepare_swap({_NAME: self.layer}, self._swap, "zero", self.rng)

    def commit(self) -> None:
        """Values, moments and steps of AdamW, and all index structures."""
        assert self._prepared is not None
        self._prepared.commit(self.optimizer)
        self._sample = self._gradient = self._active_gradient = self._swap = self._prepared = None
        # Other gradients for the next update: by the same ones what has just grown would grow again.
        self.dy_TO = self.dy_TO.roll(1, dims=1)

    def index(self) -> None:
        """The index structures alone, once more: a part of `commit`, not of the sum."""
        topology = self.layer.topology
        self.kernels.derive(topology)


def _by_rule(subject: Subject, rule: str) -> Phases:
    return {
        "sddmm": lambda: subject.probe(rule),
        "propose": lambda: subject.ask(rule),
        "prepare": subject.prepare,
        "commit": subject.commit,
    }


# The kinds of update by name: the parts of one, in order.
UPDATES: dict[str, Callable[[Subject], Phases]] = {
    "random": lambda subject: {
        "propose": lambda: subject.propose("layerwise"),
        "prepare": subject.prepare,
        "commit": subject.commit,
    },
    "guided": lambda subject: {
        "sample": subject.sample,
        "sddmm": subject.sddmm,
        "propose": lambda: subject.propose("guided"),
        "prepare": subject.prepare,
        "commit": subject.commit,
    },
    "gse": lambda subject: _by_rule(subject, "gse"),
    "rigl": lambda subject: _by_rule(subject, "rigl"),
}
PARTS = ("sample", "sddmm", "propose", "prepare", "commit", "index")


def _part(name: str) -> Column:
    return Column(name, lambda row: None if row["parts"].get(name) is None else 1e3 * row["parts"][name], ",.1f", 9)


COLUMNS = (
    Column("update", "update"),
    Column("backend", "backend", width=10),
    Column("unit", "unit", width=5),
    Column("width", "width", width=6),
    Column("sparsity", "sparsity", "g"),
    Column("nnz", "nnz", ",", 11),
    Column("ms", lambda row: 1e3 * row["seconds"], ",.1f", 9),
    Column("ns/nnz", lambda row: 1e9 * row["seconds"] / row["nnz"], ".1f"),
    *map(_part, PARTS),
)
SLOPES = (
    Column("update", "update"),
    Column("backend", "backend", width=10),
    Column("unit", "unit", width=5),
    Column("sparsity", "sparsity", "g"),
    Column("sizes", "sizes"),
    Column("slope", "slope", ".2f"),
    Column("CPU slope", "cpu_slope", ".2f", 9),
)


@dataclass(frozen=True)
class Updates:
    """What is measured. tokens: those of the gradients at sampled units. share: of the active units, how many move."""

    widths: Sequence[int]
    sparsities: Sequence[float]
    unit: tuple[int, int]
    kinds: Sequence[str]
    backend: str
    tokens: int
    share: float
    rounds: int
    threads: int

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in UPDATES:
                raise InputError(f"--updates: no '{kind}'; use {', '.join(UPDATES)}")
        for width in self.widths:
            try:
                grid_size((width, width), self.unit)
            except ValueError as error:
                raise InputError(f"--unit, --widths: {error}") from None
        choose_backend(
            self.backend, Layout(self.unit, self.unit, torch.zeros(1, dtype=torch.int32, device="cpu")), torch.float32
        )

    def __len__(self) -> int:
        return len(self.widths) * len(self.sparsities)

    def measure(self) -> Iterator[list[Row]]:
        """The rows of one layer after the other, small ones first."""
        with using_threads(self.threads):
            for sparsity, width in product(self.sparsities, sorted(self.widths)):
                yield [self._row(width, sparsity, kind) for kind in self.kinds]

    def _row(self, width: int, sparsity: float, kind: str) -> Row:
        subject = Subject(width, sparsity, self.unit, self.tokens, self.share, self.backend)
        (timing,) = interleaved([UPDATES[kind](subject)], self.rounds, self.threads)
        (index,) = interleaved([{"index": subject.index}], self.rounds, self.threads)
        return {
            "update": kind,
            "backend": self.backend,
            "unit": f"{self.unit[0]}x{self.unit[1]}",
            "width": width,
            "sparsity": sparsity,
            "nnz": subject.layer.topology.nnz,
            "moved": subject.moved,
            "tokens": self.tokens,
            "threads": self.threads,
            "seconds": timing.seconds,
            "cpu_seconds": timing.cpu_seconds,
            "parts": {**timing.phases, "index": index.seconds},
        }


def slopes(rows: Sequence[Row]) -> list[Row]:
    """For each kind and sparsity, d log seconds / d log nnz over the widths (least squares): 1 is linear.

    That of wall time, and that of CPU time.
    """
    keys = ("update", "backend", "unit", "sparsity")
    found = []
    for values, group in groups(rows, keys).items():
        if len({row["nnz"] for row in group}) > 1:
            times = {"slope": "seconds", "cpu_slope": "cpu_seconds"}
            row: Row = {**dict(zip(keys, values, strict=True)), "sizes": len(group)}
            found.append(row | {name: _slope(group, time) for name, time in times.items()})
    return found


def _slope(rows: Sequence[Row], time: str) -> float:
    x, y = ([math.log(row[key]) for row in rows] for key in ("nnz", time))
    return float(np.polyfit(x, y, 1)[0])
