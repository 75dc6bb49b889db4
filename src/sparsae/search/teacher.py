"""The teacher: an exponential moving average of the student, over active weights only.

    W_T <- beta W_T + (1 - beta) (W_S * M)          over all positions,

so that a dropped connection fades instead of vanishing. With "union" storage this is exact without a dense matrix: the
teacher's topology is the student's and what was dropped and has not yet faded below a tolerance. "masked" forgets
what the student drops; "dense" keeps every position.

A teacher costs a forward pass of what it teaches: a share of the sequences, at every n-th step.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsae.config.schema import TeacherConfig
from sparsae.errors import InputError, require_state
from sparsae.kernels.structures import same_indices
from sparsae.nn.linear import SparseLinear, sparse_layers
from sparsae.nn.names import modules_by_name
from sparsae.nn.sparsify import densify
from sparsae.nn.tensors import load_model, model_tensors
from sparsae.surgery import TeacherLayer

_OTHER_TOPOLOGY = "the teacher's layer {} does not have the student's topology"


class Teacher:
    """A model that follows the student, from a share of the training's steps on (`config.start`).

    Until it has `begun` nothing of it exists. `layers` is what it keeps of sparse layers; `since` the step, counted
    from 0, at which it began.
    """

    def __init__(self, student: nn.Module, config: TeacherConfig, steps: int | None = None) -> None:
        """Begins as a copy of the student; sparse layers share the student's index tensors until they diverge.

        steps: of the whole training. Raises InputError where `config.start` is a share of steps that are not known.
        """
        if config.start and steps is None:
            raise InputError(f"teacher.start {config.start:g} is a share of the steps: give Teacher(..., steps=N)")
        self.config = config
        self.layers: dict[str, TeacherLayer] = {}
        self.since = 0
        self._first = math.ceil(config.start * (steps or 0))
        self._student = student
        self._model: nn.Module | None = None
        if not self._first:
            self._begin(0)

    @property
    def begun(self) -> bool:
        """Whether there is a model yet."""
        return self._model is not None

    @property
    def model(self) -> nn.Module:
        """The average, without gradients. Raises InputError where it has not begun."""
        if self._model is None:
            raise InputError(f"the teacher begins after {self._first} steps (teacher.start): there is none yet")
        return self._model

    def _begin(self, step: int) -> None:
        config, student = self.config, _unsynchronized(self._student)
        model = _copy_sharing_indices(student).eval()
        if config.storage == "dense":
            densify(model)
        model.requires_grad_(False)
        self.since, self._model, modules = step, model, modules_by_name(model)
        for name, layer in sparse_layers(student).items():
            kept = TeacherLayer(modules[name], config.storage, config.tolerance, student=layer.topology)
            if config.grown == "student":
                kept.ages = torch.zeros(layer.topology.count, dtype=torch.int32, device=layer.values.device)
            self.layers[name] = kept

    def _end(self) -> None:
        # Whoever watches `layers` has the mapping.
        self.since, self._model = 0, None
        self.layers.clear()

    def decay(self, step: int) -> float:
        """beta at a step counted from 0; with a ramp min(beta, (1 + t) / (10 + t)), t counted from the beginning."""
        step -= self.since
        return min(self.config.beta, (1 + step) / (10 + step)) if self.config.ramp else self.config.beta

    @property
    def nnz(self) -> int:
        """Weights that the teacher multiplies by in the layers that are sparse in the student."""
        count = 0
        for kept in self.layers.values():
            module = kept.module
            weights = module.values if isinstance(module, SparseLinear) else module.weight
            assert isinstance(weights, Tensor)
            count += weights.numel()
        return count

    @torch.no_grad()
    def update(self, student: nn.Module, step: int) -> None:
        """One step of the average, after the optimizer's (`step` is counted from 0); or its beginning, as a copy.

        Raises InputError where a layer of the student was made sparse or dense, or got another topology, and the
        teacher was not told.
        """
        if not self.begun:
            if step + 1 >= self._first:
                self._begin(step + 1)
            return
        beta, student = self.decay(step), _unsynchronized(student)
        sparse = sparse_layers(student)
        if other := sorted(sparse.keys() ^ self.layers.keys()):
            raise InputError(f"layer {other[0]} was made sparse or dense since the teacher was made: make a new one")
        owned = {id(layer.values) for layer in sparse.values()}
        shared = [(name, p) for name, p in student.named_parameters() if id(p) not in owned]
        teacher_parameters = dict(self.model.named_parameters())
        if shared:
            mine = [teacher_parameters[name].data for name, _ in shared]
            torch._foreach_lerp_(mine, [p.data for _, p in shared], 1.0 - beta)
        for name, layer in sparse.items():
            self._update_layer(name, self.layers[name], layer, beta)
        theirs = dict(student.named_buffers())
        for name, buffer in self.model.named_buffers():
            # Index tensors belong to the topology, which surgery changes.
            if buffer.is_floating_point():
                buffer.copy_(theirs[name])

    def reconnect(self, student: nn.Module) -> None:
        """After both models were loaded: mark what the student has active, and share its index tensors where equal.

        Raises InputError where a layer of the student has connections that the teacher's has not.
        """
        for name, layer in sparse_layers(student).items() if self.begun else ():
            _connect(name, self.layers[name], layer)

    def state_dict(self) -> dict[str, Any]:
        """Plain names of `model`'s tensors, which are those of the average, with the topologies that it has.

        None before it has begun; `since`, and the `ages` of connections where they are counted, beside it.
        """
        model = {name: tensor.detach() for name, tensor in model_tensors(self.model).items()} if self.begun else None
        ages = {name: kept.ages for name, kept in self.layers.items() if kept.ages is not None}
        return {"model": model, "since": self.since, "ages": ages}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """From `state_dict`. The student that is given next, to `update` or `reconnect`, is looked at anew.

        Raises InputError where the tensors are not of such a model.
        """
        require_state("Teacher", state, ["model"])
        if state["model"] is None:
            if not self._first or state.get("since", 0):
                raise InputError(
                    "the state has no model of the teacher, which had begun: make it with the same settings"
                )
            self._end()
            return
        if not self.begun:
            self._begin(0)
        load_model(self.model, state["model"], "the teacher's state")
        self.since = int(state.get("since", 0))
        ages = state.get("ages", {})
        for name, kept in self.layers.items():
            kept.active = kept.student = None
            if kept.ages is not None:
                if name not in ages:
                    raise InputError(f"the state has no ages of {name}: make the teacher with the same teacher.grown")
                kept.ages = ages[name].to(kept.ages.device, copy=True)

    def _update_layer(self, name: str, kept: TeacherLayer, layer: SparseLinear, beta: float) -> None:
        module = kept.module
        if not isinstance(module, SparseLinear):
            weight = module.weight
            assert isinstance(weight, Tensor)
            weight.mul_(beta)
            layer.add_to_dense(layer.kind.split("weight", weight)[""], 1.0 - beta)
            return
        if kept.student is None:
            _connect(name, kept, layer)
        # Only surgery tells the teacher: a state that was loaded into the student does not.
        if layer.topology is not kept.student:
            mine = module.topology.indices
            if not same_indices(mine if kept.active is None else mine[kept.active], layer.topology.indices):
                raise InputError(f"{_OTHER_TOPOLOGY.format(name)}: load its state too, then teacher.reconnect(model)")
            kept.student = layer.topology
        average, values = module.values.data, layer.values.data
        if kept.ages is not None:
            self._update_by_age(kept, average, values, beta)
        elif kept.active is None:
            average.lerp_(values, 1.0 - beta)
        else:
            faded = average.mul_(beta)
            faded[kept.active] = faded[kept.active].add_(values, alpha=1.0 - beta)

    def _update_by_age(self, kept: TeacherLayer, average: Tensor, values: Tensor, beta: float) -> None:
        """Each unit of the student by its own decay; what it has dropped fades."""
        assert kept.ages is not None
        own = torch.full_like(kept.ages, self.config.beta, dtype=values.dtype)
        if self.config.ramp:
            age = kept.ages.to(values.dtype)
            own = torch.minimum(own, (1.0 + age) / (10.0 + age))
        kept.ages += 1
        rate = (1.0 - own).view(-1, *[1] * (values.dim() - 1))
        if kept.active is None:
            average.lerp_(values, rate)
            return
        mine = average[kept.active].lerp(values, rate)
        average.mul_(beta)[kept.active] = mine


class WarmUp:
    """Which steps and sequences are taught.

    None before a share of the steps, or before validation improves past a threshold, nor before there is a teacher;
    then every n-th step, and in it a share of the sequences.
    """

    def __init__(self, config: TeacherConfig, steps: int) -> None:
        self._config = config
        self._steps = steps
        self._first_loss: float | None = None
        self.over_by_validation = False

    def alpha(self, step: int) -> float:
        """Weight of the KL term at a step counted from 0; 0 during the warm-up and at steps that are not taught."""
        if step % self._config.every or step < self._config.start * self._steps:
            return 0.0
        if self._config.warmup == "fraction":
            over = step >= self._config.warmup_fraction * self._steps
        else:
            over = self.over_by_validation
        return self._config.alpha if over else 0.0

    def taught(self, step: int, index: int, passes: int, rows: int) -> int:
        """How many of the `rows` sequences of a step's forward pass `index` are taught, the first ones.

        A function of these numbers alone: over the taught steps of a training it is `share` of all, to within one.
        """
        before = (step // self._config.every * passes + index) * rows
        share = self._config.share
        return math.floor(share * (before + rows)) - math.floor(share * before)

    def observe(self, validation_loss: float) -> None:
        """Take note of a validation loss (nats); the first one is the untrained model's."""
        if self._first_loss is None:
            self._first_loss = validation_loss
        if validation_loss <= self._first_loss - self._config.warmup_improvement:
            self.over_by_validation = True

    def state_dict(self) -> dict[str, float | bool | None]:
        """Plain values."""
        return {"first_loss": self._first_loss, "over_by_validation": self.over_by_validation}

    def load_state_dict(self, state: Mapping[str, float | bool | None]) -> None:
        """From `state_dict`. Raises InputError for anything else."""
        require_state("WarmUp", state, self.state_dict())
        first = state["first_loss"]
        self._first_loss = None if first is None else float(first)
        self.over_by_validation = bool(state["over_by_validation"])


def _connect(name: str, kept: TeacherLayer, layer: SparseLinear) -> None:
    """Find the student's connections among the teacher's. InputError where it has one that the teacher has not."""
    if not isinstance(kept.module, SparseLinear):
        return
    mine, theirs = kept.module.topology, layer.topology
    active = theirs.contains(mine.indices)
    if int(active.sum()) != theirs.count or (kept.storage == "masked" and mine.count != theirs.count):
        raise InputError(f"{_OTHER_TOPOLOGY.format(name)}: load the states of both, of the same step")
    if mine.count == theirs.count:
        kept.module.set_topology(theirs, kept.module.values.data)
    kept.active = None if mine.count == theirs.count else active
    kept.student = theirs


def _unsynchronized(student: nn.Module) -> nn.Module:
    """A model without the wrapper that averages gradients over ranks: a teacher has none."""
    return student.module if isinstance(student, nn.parallel.DistributedDataParallel) else student


def _copy_sharing_indices(student: nn.Module) -> nn.Module:
    # Index tensors are immutable, so a copy may share them: a teacher over the same units costs its values only.
    memo = {id(layer.indices): layer.indices for layer in sparse_layers(student).values()}
    teacher = copy.deepcopy(student, memo)
    twins = sparse_layers(teacher)
    for name, layer in sparse_layers(student).items():
        twins[name].set_topology(layer.topology, twins[name].values.data)
    return teacher
