"""Rules that prune: when x what is dropped, from the first model's connections to the budget, and what regenerates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from sparsae.core.budgets import shrunk
from sparsae.core.cadence import Cadence
from sparsae.core.observation import LayerView, Observation
from sparsae.rules.parts.drop import Drop, scored
from sparsae.rules.parts.exchange import CosineFraction, candidate, require_parts
from sparsae.rules.parts.grow import Grow
from sparsae.rules.parts.rule import Candidate, NoState, Rule

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sparsae.core.topology import Topology
    from sparsae.kernels.probe import Draw


class Pruning(Rule[NoState]):
    """The smallest scores are dropped until so many units are left as `when` says; what is left may regenerate.

    scope "local": each layer is on the way from its first to its last number of units, which the budget gives.
    "global": the model is, whichever its smallest scores are, and every layer keeps its k_min. Where there are
    `fraction` and `grow`, floor(f_t nnz_l) of what is left in layer l are dropped besides, and as many grown.
    """

    prunes = True

    def __init__(
        self,
        name: str,
        *,
        when: Cadence,
        drop: Drop,
        scope: Literal["local", "global"],
        fraction: CosineFraction | None = None,
        grow: Grow | None = None,
    ) -> None:
        parts = {"fraction": fraction, "grow": grow}
        require_parts(when=when, drop=drop, **{name: part for name, part in parts.items() if part is not None})
        self._name, self.when, self._drop, self._scope = name, when, drop, scope
        self._fraction, self._grow = fraction, grow
        self.needs = drop.needs
        if grow is not None:
            self.needs, self.window, self.accumulate = drop.needs | grow.needs, grow.window, grow.accumulate

    @property
    def grows(self) -> bool:
        return self._grow is not None

    @property
    def name(self) -> str:
        return self._name

    def sample(
        self, topologies: Mapping[str, Topology], state: NoState, rng: torch.Generator
    ) -> Mapping[str, Tensor | Draw]:
        return {} if self._grow is None else self._grow.sample(topologies, rng)

    def growth(self, topologies: Mapping[str, Topology], state: NoState, progress: float) -> dict[str, int]:
        # Of what is there before pruning: how much each layer loses is not known until the optimizer has stepped.
        return {name: int(self._regeneration(progress) * topology.count) for name, topology in topologies.items()}

    def probed_units(self, active: int, inactive: int) -> int:
        return 0 if self._grow is None else self._grow.probed_units(active, inactive)

    def ask(self, observation: Observation, state: NoState, rng: torch.Generator) -> list[Candidate]:
        from sparsae.rules.parts.choose import pruned, regenerated

        left = self.when.left(observation.step, observation.horizon)
        scores = {name: scored(self._drop, view, rng) for name, view in observation.layers.items()}
        losses = pruned_counts(observation, scores, left, self._scope)
        drop, grow = {}, {}
        for name, view in observation.layers.items():
            pruned_at = pruned(view, scores[name], losses[name])
            n = int(self._regeneration(observation.progress) * (view.topology.count - losses[name]))
            if n and self._grow is not None:
                growth = self._grow.candidates(view, pruned_at, n, rng)
                drop[name], grow[name] = regenerated(view, scores[name], pruned_at, n, growth)
            else:
                drop[name] = view.topology.indices[pruned_at]
        return [candidate(self.name, drop, grow)]

    def telemetry(self, state: NoState, progress: float) -> dict[str, float]:
        return {} if self._fraction is None else {"drop_fraction": self._regeneration(progress)}

    def _regeneration(self, progress: float) -> float:
        return 0.0 if self._fraction is None else self._fraction.at(progress)


def pruned_counts(observation: Observation, scores: Mapping[str, Tensor], left: float, scope: str) -> dict[str, int]:
    """How many units with its smallest scores each layer loses, on the way from its first to its last number of units.

    left: share of that way that remains. "local": each layer has k_end + left (k_start - k_end) units afterwards.
    "global": the model has, whichever its smallest scores are, and every layer keeps its k_min and its heads' floors.
    """
    views = observation.layers
    goals = {name: shrunk(*_ends(view), left) for name, view in views.items()}
    if scope == "local":
        return {name: max(0, view.topology.count - goals[name]) for name, view in views.items()}
    starts, ends = (sum(_ends(view)[i] for view in views.values()) for i in (0, 1))
    surplus = max(0, observation.count - shrunk(starts, ends, left))
    floors = {
        name: max([view.bounds[0], *(part.least * part.count for part in view.groups if part.fan is None)])
        for name, view in views.items()
    }
    room = {name: max(0, view.topology.count - floors[name]) for name, view in views.items()}
    return smallest_overall(scores, surplus, dict.fromkeys(views, 0), room)


def smallest_overall(
    scores: Mapping[str, Tensor], n: int, least: Mapping[str, int], most: Mapping[str, int]
) -> dict[str, int]:
    """How many of the n smallest scores of all layers together, at least `least` and at most `most` in each, are whose.

    Raises ValueError where that does not leave n.
    """
    import torch

    from sparsae.core.ranking import select

    if not sum(least.values()) <= n <= sum(most.values()):
        raise ValueError(f"{n} scores are not between {sum(least.values())} and {sum(most.values())}")
    sizes = [layer.numel() for layer in scores.values()]
    limits = [[each[name] for name in scores] for each in (least, most)]
    chosen = select(torch.cat(list(scores.values())), n, sizes, *limits)
    borders = torch.tensor(sizes, dtype=torch.int64, device=chosen.device).cumsum(0)
    ends = torch.searchsorted(chosen, borders).tolist()
    return {name: end - start for name, start, end in zip(scores, [0, *ends], ends, strict=False)}


def _ends(view: LayerView) -> tuple[int, int]:
    assert view.ends is not None
    return view.ends
