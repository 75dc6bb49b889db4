"""The teacher as a model that follows its student."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from sparsae.config.teacher import TeacherConfig
from sparsae.core.shards import local, lying_as, to_save
from sparsae.errors import InputError, require_state
from sparsae.nn.linear import sparse_layers
from sparsae.nn.tensors import load_model, model_tensors
from sparsae.search.sharding import in_parts, sharded_modules
from sparsae.search.teacher.storages import STORAGES, Storage


class Teacher:
    """A model that follows the student, from a share of the training's steps on (`config.start`).

    Until it has `begun` nothing of it exists. `layers` is what it keeps of sparse layers; `since` the step, counted
    from 0, at which it began.
    """

    def __init__(self, student: nn.Module, config: TeacherConfig, steps: int | None = None) -> None:
        """Begins as a copy of the student; sparse layers share the student's index tensors until they diverge.

        steps: of the whole training. Raises InputError where `config.start` is a share of steps that are not known, for
        parameters of 16 bits, and for a student that `fully_shard` has sharded already: call it on `model` as on the
        student, after this.
        """
        if config.start and steps is None:
            raise InputError(f"teacher.start {config.start:g} is a share of the steps: give Teacher(..., steps=N)")
        _require_width(student, config.beta)
        self.config = config
        self.layers: dict[str, Storage] = {}
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
        self.refuse_sharded(student)
        model = _copy_sharing_indices(student).eval()
        storage = STORAGES[config.storage]
        copied = storage.prepare(model)
        model.requires_grad_(False)
        self.since, self._model = step, model
        for name, layer in sparse_layers(student).items():
            self.layers[name] = storage.of(name, copied[name], layer, config)

    def refuse_sharded(self, student: nn.Module) -> None:
        """Raise InputError for what cannot follow a student that is sharded over ranks."""
        if not any(True for _ in sharded_modules(student)):
            return
        if not self.begun:
            raise InputError(
                "a model that fully_shard has sharded cannot be copied as a teacher: make Teacher(model, config) "
                "before, with start 0, call fully_shard on its `model` too, and give it as Sparsifier(teacher=...)"
            )
        if self.config.storage == "dense":
            raise InputError("a teacher with storage 'dense' cannot follow a sharded model: use 'masked' or 'union'")

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
        return sum(kept.weights.numel() for kept in self.layers.values())

    @torch.no_grad()
    def update(self, student: nn.Module, step: int, stepped: bool = True) -> None:
        """One step of the average, after the optimizer's (`step` is counted from 0); or its beginning, as a copy.

        stepped: False where the optimizer's step was skipped, which is none of the average's either.
        Raises InputError where a layer of the student was made sparse or dense, or got another topology, and the
        teacher was not told.
        """
        if not self.begun:
            if step + 1 >= self._first:
                self._begin(step + 1)
            return
        if not stepped:
            return
        in_parts(self.model)
        beta, student = self.decay(step), _unsynchronized(student)
        sparse = sparse_layers(student)
        if other := sorted(sparse.keys() ^ self.layers.keys()):
            raise InputError(f"layer {other[0]} was made sparse or dense since the teacher was made: make a new one")
        owned = {id(layer.values) for layer in sparse.values()}
        shared = [(name, p) for name, p in student.named_parameters() if id(p) not in owned]
        teacher_parameters = dict(self.model.named_parameters())
        alike = [(teacher_parameters[name].data, p.data) for name, p in shared if _is_number(p)]
        for name, layer in sparse.items():
            if (pair := self.layers[name].average(layer, beta)) is not None:
                alike.append(pair)
        if alike:
            averages, values = [local(mine) for mine, _ in alike], [lying_as(mine, theirs) for mine, theirs in alike]
            torch._foreach_lerp_(averages, values, 1.0 - beta)
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
            self.layers[name].connect(layer)

    def state_dict(self) -> dict[str, Any]:
        """Plain names of `model`'s tensors, which are those of the average, with the topologies that it has.

        None before it has begun; `since`, and the `ages` of connections where they are counted, beside it. What is
        sharded over ranks is gathered to each one's CPU.
        """
        model = {name: to_save(tensor) for name, tensor in model_tensors(self.model).items()} if self.begun else None
        ages = {name: kept.ages.steps for name, kept in self.layers.items() if kept.ages is not None}
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
            kept.forget()
            if kept.ages is not None:
                if name not in ages:
                    raise InputError(f"the state has no ages of {name}: make the teacher with the same teacher.grown")
                kept.ages.steps = ages[name].to(kept.ages.steps.device, copy=True)


def _unsynchronized(student: nn.Module) -> nn.Module:
    """A model without the wrapper that averages gradients over ranks: a teacher has none."""
    return student.module if isinstance(student, nn.parallel.DistributedDataParallel) else student


def _is_number(parameter: Tensor) -> bool:
    return parameter.is_floating_point() or parameter.is_complex()


def _require_width(student: nn.Module, beta: float) -> None:
    """Raise InputError where an average in the parameters' dtype would lose steps of 1 - beta to rounding."""
    for name, parameter in student.named_parameters():
        is_narrow = parameter.dtype in (torch.bfloat16, torch.float16)
        if parameter.requires_grad and is_narrow and 1 - beta < 16 * torch.finfo(parameter.dtype).eps:
            dtype = str(parameter.dtype).removeprefix("torch.")
            raise InputError(
                f"a teacher cannot average {name}: its small steps do not survive the rounding of {dtype}; keep "
                "parameters in float32 and train in 16 bits by autocast, or lower teacher.beta"
            )


def _copy_sharing_indices(student: nn.Module) -> nn.Module:
    # Index tensors are immutable, so a copy may share them: a teacher over the same units costs its values only.
    memo = {id(layer.indices): layer.indices for layer in sparse_layers(student).values()}
    teacher = copy.deepcopy(student, memo)
    twins = sparse_layers(teacher)
    for name, layer in sparse_layers(student).items():
        twins[name].set_topology(layer.topology, twins[name].values.data)
    for name, module in teacher.named_modules():
        _own_forward(name, module)
    return teacher


def _own_forward(name: str, module: nn.Module) -> None:
    """See that the copy of a module computes with itself: a function on it that replaces its forward is no copy."""
    forward = vars(module).get("forward")
    if not isinstance(forward, FunctionType) or "_orig_mod" in module._modules:
        return  # the wrapper of torch.compile makes its forward anew when it is copied
    is_compiled = hasattr(forward, "_torchdynamo_orig_callable")
    if not is_compiled or getattr(inspect.unwrap(forward), "__func__", None) is not type(module).forward:
        raise InputError(
            f"the teacher is a copy of the model, whose {name or 'own'} forward was replaced by the function "
            f"{forward.__qualname__}, which computes with the model itself: replace it after Sparsifier is made"
        )
    del module.forward  # which was compiled for the student: the class has another
