"""The teacher: an exponential moving average of the student, over active weights only.

    W_T <- beta W_T + (1 - beta) (W_S * M)          over all positions,

so that a dropped connection fades instead of vanishing. With "union" storage this is exact without a dense matrix: the
teacher's topology is the student's and what was dropped and has not yet faded below a tolerance. "masked" forgets
what the student drops; "dense" keeps every position.
"""

from __future__ import annotations

import copy
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
    """A model that follows the student. `model` is it, without gradients; `layers` what it keeps of sparse layers."""

    def __init__(self, student: nn.Module, config: TeacherConfig) -> None:
        """Starts as a copy of the student. Sparse layers share the student's index tensors until they diverge."""
        self.config = config
        student = _unsynchronized(student)
        self.model = _copy_sharing_indices(student)
        self.model.requires_grad_(False).eval()
        if config.storage == "dense":
            densify(self.model)
            self.model.requires_grad_(False)
        modules = modules_by_name(self.model)
        self.layers = {
            name: TeacherLayer(modules[name], config.storage, config.tolerance, student=layer.topology)
            for name, layer in sparse_layers(student).items()
        }

    def decay(self, step: int) -> float:
        """beta at a step counted from 0; with a ramp min(beta, (1 + t) / (10 + t))."""
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
        """One step of the average, after the optimizer's.

        Raises InputError where a layer of the student was made sparse or dense, or got another topology, and the
        teacher was not told.
        """
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
        for name, layer in sparse_layers(student).items():
            _connect(name, self.layers[name], layer)

    def state_dict(self) -> dict[str, Any]:
        """Plain names of `model`'s tensors, which are those of the average, with the topologies that it has."""
        return {"model": {name: tensor.detach() for name, tensor in model_tensors(self.model).items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """From `state_dict`. The student that is given next, to `update` or `reconnect`, is looked at anew.

        Raises InputError where the tensors are not of such a model.
        """
        require_state("Teacher", state, ["model"])
        load_model(self.model, state["model"], "the teacher's state")
        for kept in self.layers.values():
            kept.active = kept.student = None

    @staticmethod
    def _update_layer(name: str, kept: TeacherLayer, layer: SparseLinear, beta: float) -> None:
        module = kept.module
        if not isinstance(module, SparseLinear):
            weight = module.weight
            assert isinstance(weight, Tensor)
            weight.mul_(beta)
            layer.add_to_dense(weight.T if layer.conv1d else weight, 1.0 - beta)
            return
        if kept.student is None:
            _connect(name, kept, layer)
        # Only surgery tells the teacher: a state that was loaded into the student does not.
        if layer.topology is not kept.student:
            mine = module.topology.indices
            if not same_indices(mine if kept.active is None else mine[kept.active], layer.topology.indices):
                raise InputError(f"{_OTHER_TOPOLOGY.format(name)}: load its state too, then teacher.reconnect(model)")
            kept.student = layer.topology
        if kept.active is None:
            module.values.data.lerp_(layer.values.data, 1.0 - beta)
        else:
            faded = module.values.data.mul_(beta)
            faded[kept.active] = faded[kept.active].add_(layer.values.data, alpha=1.0 - beta)


class WarmUp:
    """When the KL term begins: after a share of the steps, or when validation improves past a threshold."""

    def __init__(self, config: TeacherConfig, steps: int) -> None:
        self._config = config
        self._steps = steps
        self._first_loss: float | None = None
        self.over_by_validation = False

    def alpha(self, step: int) -> float:
        """Weight of the KL term at a step counted from 0; 0 during the warm-up."""
        if self._config.warmup == "fraction":
            over = step >= self._config.warmup_fraction * self._steps
        else:
            over = self.over_by_validation
        return self._config.alpha if over else 0.0

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
