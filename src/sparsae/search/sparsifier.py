"""Dynamic sparsity in anybody's training loop.

model = sparsify(model, sparsity=0.9)
sparsifier = Sparsifier(model, optimizer, SparsifierConfig(steps=10_000))
...
    loss.backward()
    sparsifier.before_step()
    optimizer.step()
    sparsifier.after_step()
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Self
from weakref import WeakSet

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from sparsae.config.complaints import within
from sparsae.config.rules import RuleConfig
from sparsae.config.sparsifier import SparsifierConfig
from sparsae.core.heads import HeadLayout
from sparsae.core.schedule import Schedule
from sparsae.core.topology import Topology
from sparsae.errors import InputError
from sparsae.nn.linear import sparse_layers
from sparsae.nn.sparsify import validated_heads
from sparsae.optim import follow_density
from sparsae.optimizer_state import parts_of, refuse_unsupported
from sparsae.parameterization import Parameterization
from sparsae.rules import build_rule
from sparsae.rules.parts.rule import Rule
from sparsae.search.attach import StepHooks
from sparsae.search.bounds import layer_bounds, layer_ends, layer_groups, tell_if_rigid, whole_heads
from sparsae.search.burn_in import BurnIn
from sparsae.search.calls import (
    LoopCalls,
    refuse_lost,
    refuse_tied,
    require_loop,
    tell_if_beyond,
    tell_if_still,
    trained_layers,
)
from sparsae.search.guests import as_rule, refuse_unfit
from sparsae.search.parallel import DataParallel
from sparsae.search.ramp import Ramp, refuse_ramp
from sparsae.search.scoring import ScoreFunction, StudyFunction
from sparsae.search.sharding import in_parts, refuse_unfit_shards, refuse_unfit_wrapper
from sparsae.search.state import digests, refuse_other_state, settings_digest, tell_other_settings
from sparsae.search.teacher import Teacher
from sparsae.search.updates import TopologySearch, Update

log = logging.getLogger(__name__)


class Sparsifier:
    """Searches the topology of a sparsified model while somebody trains it, and keeps its teacher.

    model: a model with `SparseLinear` layers. optimizer: any torch optimizer over its parameters. rule: anybody's rule,
    in the place of that which `config.topology` names. score: the mean cross entropy (a scalar that autograd can
    differentiate) of the model on held-out data, given the step; the same data for equal steps. Without it an update
    proposes one candidate and takes it. heads: attention head layouts by layer name.
    parameterization: what the optimizer's groups were made for, if anything; grown weights that start "normal" need it.
    teacher: one of this model that exists already, in the place of one by `config.teacher`.

    A layer whose values do not require a gradient is frozen: its connections stay, and nothing of a swap is its.

    Raises InputError where the model has no sparse layer, its parameters are not the optimizer's, the rule cannot do
    without scores or a parameterization, or a rule prunes without a sparsity to end at, or to one below the model's;
    where all layers are frozen, or two share their values, and the rule would move connections; where the optimizer's
    state or values that are sharded over ranks cannot follow a rule that moves them; and for heads of what is no sparse
    layer. `before_step` and `after_step` raise it for calls that are missing; what may be meant (a step that was
    skipped) is logged.

    Several ranks (`DistributedDataParallel`, `fully_shard`) search one topology together. RanksError, on all of them:
    their settings or connections are not the same.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: SparsifierConfig,
        *,
        rule: Rule[Any] | RuleConfig | None = None,
        score: ScoreFunction | None = None,
        study: StudyFunction | None = None,
        heads: Mapping[str, HeadLayout] | None = None,
        parameterization: Parameterization | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        require_loop(model, optimizer, config, score=score, study=study)
        self.config, self.step = config, 0
        self._hooks: StepHooks | None = None
        self._is_closed = False
        self._model, self._optimizer = model, optimizer
        self._has_score, self._parameterization = score is not None, parameterization
        in_parts(model)
        self._layers = sparse_layers(model)
        if not self._layers:
            raise InputError("the model has no sparse layer: call sparsify(model, ...) before Sparsifier")
        self._parallel = DataParallel(model, self._layers)
        self._parallel.require_same(**{"the settings of Sparsifier": settings_digest(config)})
        if rule is not None and config.rules:
            raise InputError("rule is for all layers, and so `rules` of the config cannot be beside it: leave one out")
        made = build_rule(config.topology, config.rules) if rule is None else as_rule(rule)
        rule, schedule, ends = self._admitted(made, config)
        heads = validated_heads(heads, config.head_min_density, self._layers)
        if teacher is None and config.teacher.enabled:
            teacher = Teacher(model, config.teacher, config.steps)
        if teacher is not None:
            teacher.refuse_sharded(model)
        self.teacher = self._parallel.teacher = teacher
        self._initial_densities = {name: layer.topology.density for name, layer in self._layers.items()}
        self._follow_density()
        self._layouts = heads
        groups = layer_groups(self._layers, config, heads, self._initial_densities, ends)
        self.search = TopologySearch(
            model,
            self._layers,
            rule,
            schedule=schedule,
            optimizer=optimizer,
            followers=self.teacher.layers if self.teacher else None,
            bounds=layer_bounds(self._layers, config, ends),
            ends=ends,
            heads=whole_heads(self._layers, heads),
            groups=groups,
            score=score,
            study=study,
            initial_std=self._initial_std if parameterization else None,
            horizon=config.horizon,
            passes=config.accumulation,
            seed=config.seed,
            parallel=self._parallel,
        )
        self._begin(rule)

    @property
    def burning_in(self) -> bool:
        """Whether the next optimizer step is one of burn-in."""
        return self._burn_in.active

    @property
    def update_due(self) -> bool:
        """Whether a topology update follows the next optimizer step."""
        return self.search.due(self.step + 1)

    @property
    def nnz(self) -> int:
        """Active weights of the sparse layers."""
        return sum(self.layer_nnz.values())

    @property
    def layer_nnz(self) -> dict[str, int]:
        """Active weights of each sparse layer."""
        return {name: layer.topology.nnz for name, layer in self._layers.items()}

    def before_step(self, loss_scale: float | None = None) -> None:
        """After `loss.backward()`, before gradients are clipped and `optimizer.step()`.

        loss_scale: `scaler.get_scale()` after `scaler.unscale_(optimizer)`, for gradients at inactive connections.
        """
        self._refuse_attached("before_step")
        self._before_step(None, loss_scale)

    def after_step(self, stepped: bool = True) -> Update | None:
        """After `optimizer.step()`: the average, then the topology update if one is due.

        stepped: False where the loop has skipped `optimizer.step()`. Such a step has its place in all schedules, and
        nothing else happens in it: no average, no step of burn-in, no age; an update that is due waits for the next.
        """
        self._refuse_attached("after_step")
        return self._after_step(stepped)

    def set_rule(self, rule: Rule[Any] | RuleConfig, *, sparsity: float | None = None) -> None:
        """Search by another rule from the next step on; call it between two steps, before the backward pass.

        The rule begins with its first state, and with bounds around the densities that layers have now. Steps,
        telemetry, teacher and density schedule continue; a burn-in, and an update that waits for finite gradients, are
        given up. sparsity: where a rule that prunes ends; None: the rule keeps the model's.

        Raises InputError as the constructor does; then nothing has changed.
        """
        self._refuse_closed("set_rule")
        changes: dict[str, Any] = {"rules": {}}
        if not self.config.schedule.moves:
            changes |= {"sparsity": sparsity, "density": {} if sparsity is None else self.config.density}
        elif sparsity is not None:
            raise InputError(f"the schedule {self.config.schedule.kind} continues: leave out sparsity {sparsity:g}")
        made = as_rule(rule)
        if isinstance(rule, RuleConfig):
            changes["topology"] = rule
        try:
            config = SparsifierConfig.model_validate({**dict(self.config), **changes})
        except ValidationError as errors:
            raise InputError(str(within(errors))) from None
        admitted, schedule, ends = self._admitted(made, config)
        ends, level = (self.search.ends, self.search.level) if schedule.moves else (ends, 1.0)
        groups = layer_groups(self._layers, config, self._layouts, self._initial_densities, ends)
        self.config = config
        self.search.use(admitted, layer_bounds(self._layers, config, ends), ends, groups, schedule, level)
        self._begin(admitted, self._ramp)

    def attach(
        self, on_update: Callable[[Update], object] | None = None, scaler: torch.amp.GradScaler | None = None
    ) -> Self:
        """Let the optimizer's step call `before_step` and `after_step` from now on; returns the Sparsifier.

        on_update: called with every update; it may end the search, or change its rule. scaler: the loop's gradient
        scaler, for gradients at inactive connections. `before_step` then comes after
        clipping, and a step that a gradient scaler skips does not count.

        Raises InputError where this Sparsifier, or to the same optimizer another over the same layers, is attached
        already, and for an optimizer without step hooks.
        """
        self._refuse_closed("attach")
        if self._hooks is not None:
            raise InputError("this Sparsifier is attached already")
        mine = {id(part) for part in (*parts_of(self._optimizer), *self._layers.values())}
        for other in _ATTACHED:
            parts, layers = parts_of(other._optimizer), other._layers.values()
            if mine & set(map(id, parts)) and mine & set(map(id, layers)):
                raise InputError(
                    "another Sparsifier is attached to this optimizer, over the same layers: end it with its close()"
                )

        def after_step() -> None:
            update = self._after_step()
            if update is not None and on_update is not None:
                on_update(update)

        self._hooks = StepHooks(self._optimizer, self._before_step, after_step, scaler)
        _ATTACHED.add(self)
        return self

    def detach(self) -> None:
        """Undo `attach`."""
        if self._hooks is not None:
            self._hooks.remove()
            self._hooks = None
            _ATTACHED.discard(self)

    def close(self) -> None:
        """End the search: hooks and probes are removed, the topology stays as it is. The teacher may still be used."""
        self.detach()
        self.search.close()
        self._ramp.close()
        self._is_closed = True

    def _refuse_closed(self, call: str) -> None:
        if self._is_closed:
            raise InputError(f"{call}() of a Sparsifier that was closed: make another one")

    def _refuse_attached(self, call: str) -> None:
        self._refuse_closed(call)
        if self._hooks is not None:
            raise InputError(
                f"{call}() of a Sparsifier that is attached: optimizer.step() makes its calls, so leave yours out"
            )

    def _admitted(
        self, rule: Rule[Any], config: SparsifierConfig
    ) -> tuple[Rule[Any], Schedule, dict[str, tuple[int, int]]]:
        """The rule as it can serve here, its schedule, and where its layers end. Raises InputError for what cannot."""
        schedule = Schedule.of(config.schedule, rule.moves)
        moves = rule.moves or schedule.moves
        if moves:
            refuse_unfit_wrapper(self._model)
        trained = trained_layers(self._layers, self._optimizer)
        rule.refuse_layers(self._layers)
        if not trained and moves:
            raise InputError(
                "every sparse layer is frozen (its values do not require a gradient), so no connection can move: "
                "unfreeze one, or take StaticConfig() as topology"
            )
        rule = rule if self._has_score else rule.without_scores()
        refuse_unfit(rule, self._has_score)
        refuse_lost(self._model, self._layers)
        if moves:
            refuse_unfit_shards(self._model, self._layers)
            refuse_tied(self._layers)
            refuse_unsupported(self._optimizer, {name: layer.values for name, layer in trained.items()})
        refuse_ramp(rule, config.horizon, self._layers, self._optimizer)
        ends = layer_ends(rule, schedule, self._layers, trained, config)
        if rule.initialization == "normal" and self._parameterization is None:
            raise InputError("initialization 'normal' draws as the parameterization does: give Sparsifier one")
        return rule, schedule, ends

    def _begin(self, rule: Rule[Any], before: Ramp | None = None) -> None:
        """With a rule that was admitted, before the backward pass of the next step."""
        moves = rule.moves or self.search.schedule.moves
        self._calls = LoopCalls(rule, self._layers, self._optimizer, moves)
        self._burn_in = BurnIn(rule.burn_in, self._layers)
        self._ramp = Ramp(rule, self._ramp_steps, self._layers, self._optimizer, made=self.step, before=before)
        tell_if_still(rule, self.config.horizon)
        trained = trained_layers(self._layers, self._optimizer)
        tell_if_rigid(rule, {name: self.search.gradients.groups[name] for name in trained})
        self.search.arm(self.step + 1)

    def _before_step(self, scale: Tensor | None, loss_scale: float | None) -> None:
        self._parallel.in_parts()
        refuse_lost(self._model, self._layers)
        self._parallel.settle()
        self._calls.before_step(self.update_due, is_hooked=self._hooks is not None)
        self.search.capture(self.step + 1, scale, loss_scale)
        self._burn_in.before_step(self._optimizer)
        self._ramp.before_step()
        self._calls.watch(self.update_due)

    def _after_step(self, stepped: bool = True) -> Update | None:
        self._parallel.in_parts()
        self._calls.after_step(stepped)
        self._burn_in.after_step(stepped)
        self._ramp.after_step(stepped)
        self.step += 1
        tell_if_beyond(self.step, self.search.rule, self.config.horizon)
        if self.teacher is not None:
            self.teacher.update(self._model, self.step - 1, stepped)
        update = self.search.update(self.step, stepped)
        if update is not None and update.accepted:
            grown = {name: change.grown for name, change in update.changes.items() if change.grow.numel()}
            self._burn_in.begin(grown)
            self._ramp.follow(update.changes)
            self._follow_density()
        if update is not None:
            self._ramp.last(self._ramp_steps)
        self.search.arm(self.step + 1)
        return update

    def state_dict(self) -> dict[str, Any]:
        """All that a checkpoint needs beside model and optimizer: one nested mapping of plain values and tensors.

        The teacher's model is in it. As in torch, tensors are not copies. Of a model that is sharded over ranks all of
        them call this: it is the same on each, whole and on the CPU.
        """
        self._parallel.in_parts()
        return {
            "step": self.step,
            "rule": self.search.rule.name,
            "settings": self.config.model_dump(mode="json"),
            "search": self.search.state_dict(),
            "burn_in": self._burn_in.state_dict(),
            "ramp": self._ramp.state_dict(),
            "initial_densities": dict(self._initial_densities),
            "topologies": digests(self._layers),
            "teacher": None if self.teacher is None else self.teacher.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """From `state_dict`, after the states of model and optimizer were loaded.

        Raises InputError for anything else: of other sparse layers or connections, another rule, or with a teacher
        where this Sparsifier has none. Other settings count from now on, with a warning in the log.
        """
        self._parallel.in_parts()
        refuse_other_state(state, self.search.rule.name, self._layers, self.teacher is not None)
        tell_other_settings(state, self.config)
        if self.teacher is not None:
            self.teacher.load_state_dict(state["teacher"])
            self.teacher.reconnect(self._model)
        self.search.load_state_dict(state["search"])
        self._burn_in.load_state_dict(state["burn_in"])
        self._ramp.load_state_dict(state.get("ramp", {}))
        if self._hooks is not None:
            self._hooks.forget()
        self.step = int(state["step"])
        if self.step:
            self._calls.loaded()
        self._initial_densities = dict(state["initial_densities"])
        self.search.gradients.groups = layer_groups(
            self._layers, self.config, self._layouts, self._initial_densities, self.search.ends
        )
        self._follow_density()
        self._ramp.last(self._ramp_steps)
        self._parallel.follow(set(self._layers))  # the model's state may have come after its wrapper
        self.search.arm(self.step + 1)

    @property
    def _ramp_steps(self) -> int:
        moved = self.search.rule.ramp_in_force(self.search.state, self.config.horizon)
        return self.search.rule.ramp_steps(self.config.horizon) if moved is None else moved

    def _follow_density(self) -> None:
        if self._parameterization is not None and self._parameterization.dynamic:
            follow_density(self._optimizer, trained_layers(self._layers, self._optimizer), self._parameterization)

    def _initial_std(self, name: str, topology: Topology) -> float:
        """Of weights that are drawn for a layer: for its first density, or where rates follow it for the present."""
        assert self._parameterization is not None
        density = topology.density if self._parameterization.dynamic else self._initial_densities[name]
        return self._parameterization.initial_std(self._parameterization.role(name), density)


_ATTACHED: WeakSet[Sparsifier] = WeakSet()
