"""The topology loop: observe, ask, score, tell, surgery. It knows no rule by name."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparsae.config.span import Horizon
from sparsae.core.groups import Groups
from sparsae.core.heads import HeadLayout
from sparsae.core.observation import LayerView, Observation
from sparsae.core.quantized import floats_of
from sparsae.core.randomness import generator
from sparsae.core.ranks import ranks
from sparsae.core.schedule import CONSTANT, Schedule, counts_at
from sparsae.core.swap import Swap
from sparsae.errors import InputError, require_state
from sparsae.nn.linear import SparseLinear
from sparsae.optimizer_state import parts_of
from sparsae.rules.parts.rule import Candidate, Decision, Rule
from sparsae.rules.parts.scheduled import on_schedule
from sparsae.score import Score
from sparsae.search.capture import GradientCapture
from sparsae.search.guests import chosen, in_force, named, refuse_lossy, saved, validated
from sparsae.search.parallel import DataParallel
from sparsae.search.past import PastCapture
from sparsae.search.rows import TopologyRow
from sparsae.search.scoring import ScoreFunction, Scoring, StudyFunction, candidate_row, candidate_rows
from sparsae.search.telemetry import TopologyTelemetry
from sparsae.surgery import Change, Follower, InitialStd, PreparedSwap, prepare_swap

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SearchCost:
    """What an update computed: scored topologies, those with a backward pass, and gradients at inactive units."""

    forwards: int = 0
    backwards: int = 0
    probed: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # layer -> (weights, tokens)
    studied: int = 0  # topologies scored on all validation text, which decides nothing


@dataclass(frozen=True, eq=False)
class Update:
    """The outcome of one update: what the metrics have of it, what changed, and what it cost."""

    record: TopologyRow
    changes: Mapping[str, Change]
    cost: SearchCost

    def __repr__(self) -> str:
        """In short: its parts are as long as the model's connections."""
        return f"Update(step={self.record.step}, accepted={self.accepted}, swaps={self.record.swaps})"

    @property
    def row(self) -> dict[str, Any]:
        """The row of the metrics, as it is written."""
        return self.record.to_dict()

    @property
    def accepted(self) -> bool:
        """Whether a new topology was taken."""
        return self.record.accepted


class TopologySearch:
    """Runs a rule over the sparse layers of a model.

    An update whose gradients are not all finite (a gradient scaler then skips the optimizer's step), or whose step was
    skipped for another reason, changes nothing, whatever the rule looks at: it says so, the first time in the log and
    each time in its row, and is made up for after the next step (`waiting`), so that a rule that prunes ends where it
    shall.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, SparseLinear],
        rule: Rule[Any],
        *,
        optimizer: torch.optim.Optimizer,
        followers: Mapping[str, Follower] | None,
        bounds: Mapping[str, tuple[int, int]],
        ends: Mapping[str, tuple[int, int]],
        heads: Mapping[str, HeadLayout],
        groups: Mapping[str, tuple[Groups, ...]],
        score: ScoreFunction | None,
        study: StudyFunction | None = None,
        initial_std: InitialStd | None = None,
        horizon: Horizon,
        passes: int,
        seed: int,
        parallel: DataParallel,
        schedule: Schedule = CONSTANT,
    ) -> None:
        """bounds: (k_min, k_max) of each layer; ends: its first and last units, of a rule that prunes, or those between
        which the schedule moves it (else empty).

        groups: of its heads and neurons that have limits. passes: backward passes an optimizer step. initial_std: as
        `surgery.prepare_swap` has it.
        """
        self.telemetry = TopologyTelemetry(layers, heads)
        self._layers, self._optimizer, self._followers = layers, optimizer, followers
        self._scoring, self._initial_std = Scoring(model, score, study, parallel), initial_std
        self._horizon, self._seed, self._parallel = horizon, seed, parallel
        self.gradients = GradientCapture(model, layers, optimizer, heads, horizon=horizon, passes=passes, seed=seed)
        self._past = PastCapture(layers, horizon)
        self._told = False
        self.use(rule, bounds, ends, groups, schedule)

    def use(
        self,
        rule: Rule[Any],
        bounds: Mapping[str, tuple[int, int]],
        ends: Mapping[str, tuple[int, int]],
        groups: Mapping[str, tuple[Groups, ...]],
        schedule: Schedule = CONSTANT,
        level: float = 1.0,
    ) -> None:
        """Begin with a rule, at this level of the schedule: an update that another one waited for is given up."""
        self.rule, self.state = rule, rule.initial_state()
        self.schedule, self.level = schedule, level
        self.bounds, self.ends, self.gradients.groups = dict(bounds), dict(ends), groups
        self._since = 0
        self.gradients.clear()
        self.gradients.windows.begin(rule, schedule)

    def close(self) -> None:
        """Watch no backward pass any more, and keep nothing of what was seen."""
        self.gradients.clear()
        self.gradients.windows.clear()
        self._past.clear()
        self._scoring.forget()

    @property
    def waiting(self) -> bool:
        """Whether an update that was due waits for the next step."""
        return self._since > 0

    def due(self, step: int) -> bool:
        """Whether an update follows optimizer step `step`, counted from 1."""
        updates = self.rule.due(step, self._horizon)
        return self.waiting or updates or self.schedule.due(step, self._horizon, updates)

    def arm(self, step: int) -> None:
        """Before the backward pass of `step` (counted from 1): probe it if an update wants its gradients.

        Raises InputError as `GradientCapture.arm` does.
        """
        self.gradients.clear()
        self._past.follow(self.rule, step - 1, waiting=self.waiting)
        if self.due(step):
            steps = range(self._since or step, step + 1)
            self.gradients.arm(self.rule, self.state, steps, self.ends, asks=self._asks(steps))
        else:
            self.gradients.gather(self.rule, self.state, step)

    def capture(self, step: int, scale: Tensor | None = None, loss_scale: float | None = None) -> None:
        """Between the backward pass and the optimizer's step: keep what the rule needs of the gradients.

        scale, loss_scale: as `GradientCapture.take` has them.
        """
        if self.due(step):
            self._parallel.require_same()
        if self.due(step) or self.gradients.probes:
            self.gradients.take(self.rule, self.bounds, self.ends if self.rule.prunes else {}, scale, loss_scale)

    def update(self, step: int, stepped: bool = True) -> Update | None:
        """After the optimizer's step, or one that was skipped: one update of the topology, if it is due."""
        seen = self.gradients.views
        if seen is None:
            return None
        started = time.perf_counter()
        self._scoring.forget()
        if self.gradients.not_finite is not None or not stepped:
            self._since = self._since or step
            return self._postponed(step, started)
        moments = self._moments()
        views = {
            name: view.having(
                values=self._layers[name].values.detach(),
                moment=moments.get(name),
                past=self._past.of(name),
                groups=self._groups_now(view),
            )
            for name, view in seen.items()
        }
        observation = Observation(views, step, self._horizon.steps, self._horizon.epoch, self._since)
        self._since = 0
        strategy = in_force(self.rule, self.state, observation.progress)
        candidates: list[Candidate] = []
        current: Score | None = None
        scores: list[Score | None] = []
        study: Mapping[int | None, float] = {}
        decision = Decision(None)
        if self._asks(observation.made_up):
            with named(self.rule, step):
                asked = self.rule.ask(observation, self.state, generator(self._seed, "ask", step))
            candidates = validated(self.rule, asked, views)
            current, scores = self._scored(candidates, observation)
            study = (
                {} if current is None else self._scoring.study(self._prepare_all(candidates, step, _race(candidates)))
            )
            with named(self.rule, step):
                decision, state = self.rule.tell(candidates, scores, current, self.state, observation.progress)
            refuse_lossy(self.rule, state)
            decision, self.state = chosen(self.rule, decision, candidates), state
        swap = None if decision.chosen is None else candidates[decision.chosen].swap
        swap = self._on_schedule(swap, observation)
        changes: Mapping[str, Change] = {}
        if swap is not None:
            prepared = self._prepare(swap, step, decision.chosen or 0)
            prepared.commit(self._optimizer, self._followers)
            changes = prepared.changes
            self._parallel.require_same()
        # What was only tried, on any rank, has been of another size too.
        swaps = [] if current is None else [c.swap for c in candidates if c.rejected is None]
        swaps += [] if swap is None else [swap]
        self._parallel.follow({name for each in swaps for name, d in each.count_changes().items() if d})
        cost = self._cost()
        record = dataclasses.replace(
            self.telemetry.row(step, changes, self.gradients.norms),
            accepted=swap is not None,
            chosen=decision.chosen,
            candidates=candidate_rows(self.rule, candidates, scores, decision, study),
            current=None
            if current is None
            else candidate_row(self.rule, "current", 0, current, decision.current, None, study.get(None)),
            numbers={**strategy, **decision.notes},
            seconds=time.perf_counter() - started,
        )
        self.gradients.clear()
        return Update(record, changes, cost)

    def initial_row(self) -> TopologyRow:
        """The topology before any update, as a row of the metrics."""
        return self._unchanged(0)

    def state_dict(self) -> dict[str, Any]:
        """Plain values, and tensors by layer."""
        return {
            "rule": saved(self.state),
            "waiting": self._since,
            "level": self.level,
            "bounds": {name: list(bounds) for name, bounds in self.bounds.items()},
            "ends": {name: list(ends) for name, ends in self.ends.items()},
            "telemetry": self.telemetry.state_dict(),
            "past": self._past.state_dict(),
            "windows": self.gradients.windows.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """From `state_dict`, of the same rule and the layers as they are. Raises InputError for anything else."""
        # Not all keep a mapping that is empty (torch's distributed checkpoints do not).
        own = self.state_dict() | {"past": {}, "windows": {}}
        require_state("TopologySearch", state, [key for key, value in own.items() if key != "level" and value != {}])
        try:
            self.telemetry.load_state_dict(state["telemetry"])
            self._past.load_state_dict(state.get("past", {}))
            self.gradients.windows.load_state_dict(state.get("windows", {}))
            self.state = self.rule.state_from_dict(state.get("rule", {}))
            self._since, self.level = int(state["waiting"]), float(state.get("level", 1.0))
            self.bounds = {name: (low, high) for name, (low, high) in state["bounds"].items()}
            self.ends = {name: (first, last) for name, (first, last) in state.get("ends", {}).items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"the state of a search does not fit rule '{self.rule.name}': {error!r}") from None

    def _unchanged(self, step: int) -> TopologyRow:
        numbers = in_force(self.rule, self.state, step / self._horizon.steps)
        return dataclasses.replace(self.telemetry.row(step, {}, {}), numbers=numbers)

    def _postponed(self, step: int, started: float) -> Update:
        layer = self.gradients.not_finite
        if not self._told:
            log.warning(
                "step %d: the topology update waits for the next step, since %s "
                "(said once; rows of the metrics have it as skipped)",
                step,
                "the optimizer's step was skipped" if layer is None else f"a gradient of {layer} is not finite",
            )
            self._told = True
        cost = self._cost()
        why: Literal["gradient", "step"] = "step" if layer is None else "gradient"
        seconds = time.perf_counter() - started
        record = dataclasses.replace(self._unchanged(step), skipped=why, seconds=seconds)
        self.gradients.clear()
        return Update(record, {}, cost)

    def _asks(self, steps: range) -> bool:
        """Whether the rule is asked at the update of these steps; else it is the schedule's alone."""
        return not self.schedule.moves or any(self.rule.due(step, self._horizon) for step in steps)

    def _groups_now(self, view: LayerView) -> tuple[Groups, ...]:
        """A layer's groups with the limits that they have for its present number of units, which a schedule moves."""
        return tuple(part.at(view.topology.count) for part in view.groups) if self.schedule.moves else view.groups

    def _on_schedule(self, swap: Swap | None, observation: Observation) -> Swap | None:
        """What the rule has chosen (None: nothing), and what the schedule wants besides."""
        updates = (step for step in observation.made_up if self.schedule.moves)
        if not any(self.schedule.due(s, self._horizon, self.rule.due(s, self._horizon)) for s in updates):
            return swap
        before, step = self.level, observation.step
        self.level = self.schedule.level(step, self._horizon, before)
        if counts_at(self.ends, self.level) == counts_at(self.ends, before):
            return swap
        rng = generator(self._seed, "schedule", step)
        return on_schedule(observation.layers, swap or Swap({}, {}), self.ends, (before, self.level), rng)

    def _prepare(self, swap: Swap, step: int, index: int) -> PreparedSwap:
        rng = generator(self._seed, "grown values", step, index)
        try:
            return prepare_swap(self._layers, swap, self.rule.initialization, rng, self._initial_std)
        except ValueError as error:
            raise InputError(f"rule '{self.rule.name}' proposed a swap that cannot be made: {error}") from error

    def _prepare_all(
        self, candidates: Sequence[Candidate], step: int, race: Sequence[int | None]
    ) -> Iterator[tuple[int | None, PreparedSwap | None]]:
        """Those of `race`, one at a time: candidates, and the current topology by the index None."""
        for index in race:
            yield index, None if index is None else self._prepare(candidates[index].swap, step, index)

    def _scored(
        self, candidates: Sequence[Candidate], observation: Observation
    ) -> tuple[Score | None, list[Score | None]]:
        """Scores of the current topology and of the candidates; None where there is none."""
        found: dict[int | None, Score] = {}
        views, step, here = observation.layers, observation.step, ranks()
        if self.rule.compares(observation.made_up, observation.horizon):
            race = [index for index in _race(candidates) if index is None or candidates[index].is_scored]
            # Each rank scores its share. The chosen swap is prepared again, from the same generator.
            with self._parallel.silent():
                for index, candidate in self._prepare_all(candidates, step, self._parallel.share(race)):
                    found[index] = self._scoring.score(self.rule, candidate, views, self.gradients.trained, step)
            found = {index: score for part in here.gather(list(found.items())) for index, score in part}
        return found.get(None), [found.get(i) for i in range(len(candidates))]

    def _moments(self) -> dict[str, Tensor]:
        """The optimizer's average gradient of each layer, where the rule needs it: zeros where a layer has none yet.

        Raises InputError where none has one.
        """
        if "moments" not in self.rule.needs:
            return {}
        found = {name: _average_gradient(self._optimizer, layer.values) for name, layer in self._layers.items()}
        if all(moment is None for moment in found.values()):
            terms = " and ".join(term.name for term in self.rule.terms if "moments" in term.needs)
            wanted = f"{terms} (topology.proxy.terms)" if terms else f"rule '{self.rule.name}'"
            raise InputError(
                f"{type(self._optimizer).__name__} has no average gradient, which {wanted} is taken from: use an "
                "optimizer with momentum, or another source of the term"
            )
        zeros = {name: torch.zeros_like(self._layers[name].values) for name, moment in found.items() if moment is None}
        return zeros | {name: moment for name, moment in found.items() if moment is not None}

    def _cost(self) -> SearchCost:
        done = self._scoring
        forwards, backwards = ranks().sums([done.forwards, done.backwards])
        return SearchCost(forwards, backwards, self.gradients.probed(), done.studied)


def _race(candidates: Sequence[Candidate]) -> list[int | None]:
    """The current topology (None) and the candidates that were not rejected."""
    return [None, *(i for i, candidate in enumerate(candidates) if candidate.rejected is None)]


def _average_gradient(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Tensor | None:
    """The average gradient that an optimizer keeps of a parameter; None if it keeps none."""
    for part in parts_of(optimizer):
        state = part.state.get(parameter, {})
        for key in ("exp_avg", "momentum_buffer"):
            if isinstance(state.get(key), Tensor):
                return floats_of(state[key])
    return None
