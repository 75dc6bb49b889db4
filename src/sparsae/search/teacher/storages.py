"""What a teacher keeps of one sparse layer of its student: active weights, also those that fade, or every position."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import Tensor, nn

from sparsae.config.teacher import TeacherConfig
from sparsae.core.ranking import positions
from sparsae.core.shards import is_sharded, local, local_of, lying_as, whole
from sparsae.core.topology import Topology, remap
from sparsae.errors import InputError
from sparsae.kernels.structures import same_indices
from sparsae.nn.conversion import DensePlace, dense_places, sparse_modules
from sparsae.nn.linear import SparseLinear, sparse_layers
from sparsae.nn.names import modules_by_name
from sparsae.nn.resharding import overwrite
from sparsae.nn.sparsify import densify
from sparsae.surgery import Change


@dataclass(eq=False)
class Ages:
    """Steps of the average that each unit of the student has had; a grown one begins at the student's value.

    steps: (units,) int32. Each unit decays by beta, with a ramp by min(beta, (1 + t) / (10 + t)) of its own steps t.
    """

    steps: Tensor
    beta: float
    ramp: bool

    @classmethod
    def of(cls, student: SparseLinear, config: TeacherConfig) -> Self | None:
        """None where grown units begin at what the teacher remembers of them."""
        if config.grown != "student":
            return None
        steps = torch.zeros(student.topology.count, dtype=torch.int32, device=student.values.device)
        return cls(steps, config.beta, config.ramp)

    def rates(self, values: Tensor) -> Tensor:
        """1 - decay of each unit, in the shape of its values; the step that they are for is counted."""
        decay = torch.full_like(self.steps, self.beta, dtype=values.dtype)
        if self.ramp:
            age = self.steps.to(values.dtype)
            decay = torch.minimum(decay, (1.0 + age) / (10.0 + age))
        self.steps += 1
        return (1.0 - decay).view(-1, *[1] * (values.dim() - 1))

    def follow(self, change: Change, module: SparseLinear) -> None:
        """After the module, the teacher's layer, has followed."""
        self.steps = remap(self.steps, change.source)
        grown = module.topology.positions(change.grow)
        average = whole(module.values.data)
        average[grown] = whole(change.values)[change.grown]
        overwrite(module.values, average)


class Storage(ABC):
    """The average of one sparse layer. `module` is the teacher's layer, `ages` None where all units are one age."""

    module: nn.Module
    ages: Ages | None = None

    @staticmethod
    def prepare(model: nn.Module) -> Mapping[str, Any]:
        """Give a copy of the student the layers that this storage keeps, in place; returns what `of` takes of each."""
        return sparse_layers(model)

    @staticmethod
    def size(nnz: int, weights: int) -> int:
        """Weights that it begins with, of so many active ones and so many positions."""
        return nnz

    @classmethod
    @abstractmethod
    def of(cls, name: str, copied: Any, student: SparseLinear, config: TeacherConfig) -> Self:
        """For the student's layer `name`, of which `copied` is the prepared copy."""

    @property
    @abstractmethod
    def weights(self) -> Tensor:
        """What the teacher multiplies by."""

    @abstractmethod
    def average(self, student: SparseLinear, decay: float) -> tuple[Tensor, Tensor] | None:
        """One step, or (average, values) where all of the average moves alike, for whoever moves many layers at once.

        Raises InputError where the student has another topology than the one that was followed.
        """

    @abstractmethod
    def follow(self, change: Change) -> None:
        """Take over the student's new topology."""

    @abstractmethod
    def forget(self) -> None:
        """The average was loaded: which of its units are the student's has to be looked at."""

    @abstractmethod
    def connect(self, student: SparseLinear) -> None:
        """Look at it. InputError where the student has connections that are not here."""

    def tensors(self) -> Iterator[Tensor]:
        """All that it keeps."""
        if isinstance(self.module, SparseLinear):
            yield from self.module.index_tensors
        yield self.weights
        if self.ages is not None:
            yield self.ages.steps


@dataclass(eq=False)
class Masked(Storage):
    """Over the student's topology. `student`: that topology; None where it has to be looked at."""

    name: str
    module: SparseLinear
    student: Topology | None = None
    ages: Ages | None = None

    @classmethod
    def of(cls, name: str, copied: SparseLinear, student: SparseLinear, config: TeacherConfig) -> Self:
        return cls(name, copied, student.topology, Ages.of(student, config))

    @property
    def weights(self) -> Tensor:
        return self.module.values

    def average(self, student: SparseLinear, decay: float) -> tuple[Tensor, Tensor] | None:
        if self.student is None:
            self.connect(student)
        if student.topology is not self.student:
            _require_same(self.name, self.module.topology.indices, student.topology)
            self.student = student.topology
        average, values = self.module.values.data, student.values.data
        if self.ages is None:
            return average, values
        local(average).lerp_(lying_as(average, values), local_of(self.ages.rates(values), average))
        return None

    def follow(self, change: Change) -> None:
        self.student = change.after
        self.module.set_topology(change.after, remap(whole(self.module.values.data), change.source))
        if self.ages is not None:
            self.ages.follow(change, self.module)

    def forget(self) -> None:
        self.student = None

    def connect(self, student: SparseLinear) -> None:
        if not same_indices(self.module.topology.indices, student.topology.indices):
            raise _other_steps(self.name)
        self.module.set_topology(student.topology, self.module.values.data)
        self.student = student.topology


@dataclass(eq=False)
class Union(Storage):
    """Over the student's topology and the units dropped before that have not yet faded below the tolerance.

    active: (units,) bool, which of them are the student's; None: all are. `student` as `Masked` has it.
    """

    name: str
    module: SparseLinear
    tolerance: float
    student: Topology | None = None
    ages: Ages | None = None
    active: Tensor | None = None

    @staticmethod
    def prepare(model: nn.Module) -> Mapping[str, Any]:
        layers = sparse_layers(model)
        for layer in layers.values():
            layer.quota = None  # what fades is more than it allows
        return layers

    @classmethod
    def of(cls, name: str, copied: SparseLinear, student: SparseLinear, config: TeacherConfig) -> Self:
        return cls(name, copied, config.tolerance, student.topology, Ages.of(student, config))

    @property
    def weights(self) -> Tensor:
        return self.module.values

    def average(self, student: SparseLinear, decay: float) -> tuple[Tensor, Tensor] | None:
        if self.student is None:
            self.connect(student)
        if student.topology is not self.student:
            mine = self.module.topology.indices
            _require_same(self.name, mine if self.active is None else mine[self.active], student.topology)
            self.student = student.topology
        average, values = self.module.values.data, student.values.data
        rates = None if self.ages is None else self.ages.rates(values)
        if self.active is None:
            if rates is None:
                return average, values
            local(average).lerp_(lying_as(average, values), local_of(rates, average))
            return None
        active, here = self._here(average)
        average, values = local(average), whole(values)[here]
        # Every step: a mask as an index would let a GPU be waited for.
        at = positions(active, values.shape[0])
        if rates is None:
            faded = average.mul_(decay)
            faded[at] = faded[at].add_(values, alpha=1.0 - decay)
        else:
            mine = average[at].lerp(values, rates[here])
            average.mul_(decay)[at] = mine
        return None

    def _here(self, average: Tensor) -> tuple[Tensor, slice]:
        """Which units of this rank's part of the average are the student's, and of the student's these are."""
        assert self.active is not None
        if not is_sharded(average):
            return self.active, slice(None)
        active, through = local_of(self.active, average), local_of(self.active.cumsum(0), average)
        # Both are in the order of the units.
        end = int(through[-1]) if through.numel() else 0
        return active, slice(end - int(active.count_nonzero()), end)

    def follow(self, change: Change) -> None:
        self.student = student = change.after
        union, average = self.module.topology, whole(self.module.values.data)
        magnitude = average.abs().reshape(union.count, -1).amax(1) if union.count else average
        forgotten = ~student.contains(union.indices) & (magnitude < self.tolerance)
        new = student.indices[~union.contains(student.indices)]
        after, source = union.replace(union.indices[forgotten], new)
        if after.count == student.count:
            after, self.active = student, None
        else:
            self.active = student.contains(after.indices)
        self.module.set_topology(after, remap(average, source))
        if self.ages is not None:
            self.ages.follow(change, self.module)

    def forget(self) -> None:
        self.active = self.student = None

    def connect(self, student: SparseLinear) -> None:
        mine, theirs = self.module.topology, student.topology
        active = theirs.contains(mine.indices)
        if int(active.sum()) != theirs.count:
            raise _other_steps(self.name)
        if mine.count == theirs.count:
            self.module.set_topology(theirs, self.module.values.data)
        self.active = None if mine.count == theirs.count else active
        self.student = theirs

    def tensors(self) -> Iterator[Tensor]:
        yield from super().tensors()
        if self.active is not None:
            yield self.active


@dataclass(eq=False)
class Dense(Storage):
    """Every position, as a dense layer: nothing has to follow."""

    place: DensePlace

    @staticmethod
    def prepare(model: nn.Module) -> Mapping[str, Any]:
        names = list(sparse_modules(model))
        modules = modules_by_name(densify(model))
        return dense_places({name: modules[name] for name in names})

    @staticmethod
    def size(nnz: int, weights: int) -> int:
        return weights

    @classmethod
    def of(cls, name: str, copied: DensePlace, student: SparseLinear, config: TeacherConfig) -> Self:
        return cls(copied)

    @property
    def module(self) -> nn.Module:  # type: ignore[override]
        return self.place.module

    @property
    def weights(self) -> Tensor:
        return self.place.matrix

    def average(self, student: SparseLinear, decay: float) -> tuple[Tensor, Tensor] | None:
        student.add_to_dense(self.weights.mul_(decay), 1.0 - decay)
        return None

    def follow(self, change: Change) -> None:
        """It has every position already."""

    def forget(self) -> None:
        """It asks for no topology."""

    def connect(self, student: SparseLinear) -> None:
        """As `forget`."""


STORAGES: Mapping[str, type[Storage]] = MappingProxyType({"masked": Masked, "union": Union, "dense": Dense})


def _require_same(name: str, indices: Tensor, topology: Topology) -> None:
    """Only surgery tells the teacher of a new topology: a state that was loaded into the student does not."""
    if not same_indices(indices, topology.indices):
        raise InputError(f"{_OTHER_TOPOLOGY.format(name)}: load its state too, then teacher.reconnect(model)")


def _other_steps(name: str) -> InputError:
    return InputError(f"{_OTHER_TOPOLOGY.format(name)}: load the states of both, of the same step")


_OTHER_TOPOLOGY = "the teacher's layer {} does not have the student's topology"
