"""Rules that exchange connections: when x how many x what is dropped x what is grown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sparsae.config.complaints import shown
from sparsae.config.span import require_share
from sparsae.core.cadence import Cadence, decayed
from sparsae.core.observation import LayerView, Observation
from sparsae.core.swap import Swap
from sparsae.errors import InputError
from sparsae.rules.parts.drop import Drop, scored
from sparsae.rules.parts.grow import Grow, with_random
from sparsae.rules.parts.rule import Candidate, NoState, Rule

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sparsae.core.topology import Topology
    from sparsae.kernels.probe import Draw


@dataclass(frozen=True)
class CosineFraction:
    """f_t = alpha / 2 (1 + cos(pi t / T_end)) (Evci et al., 2020), T_end being the share `stop` of the run; then 0.

    first: alpha. Raises InputError where one of the two is no share, or `stop` 0.
    """

    first: float
    stop: float = 1.0

    def __post_init__(self) -> None:
        require_share(first=self.first, stop=self.stop)
        if not self.stop:
            raise InputError("stop: must be above 0")

    def at(self, progress: float) -> float:
        """f when the share `progress` of the run has passed."""
        return self.first * decayed("cosine", min(1.0, progress / self.stop))


class Exchange(Rule[NoState]):
    """At each update a fraction of the connections is dropped and as many are grown.

    scope "local": floor(f_t nnz_l) in each layer l, whose number of connections stays. "global": floor(f_t nnz) over
    the model, by scores of all layers together, each layer inside its bounds; `grow` then looks at gradients. Heads and
    neurons stay inside their limits; less moves where these leave no room (choose.py). random_share: the share of what
    is grown that is uniformly random, of the model spread over layers by their connections; the rest is what `grow`
    has best.
    """

    def __init__(
        self,
        name: str,
        *,
        when: Cadence,
        fraction: CosineFraction,
        drop: Drop,
        grow: Grow,
        scope: Literal["local", "global"] = "local",
        random_share: float = 0.0,
    ) -> None:
        require_parts(when=when, fraction=fraction, drop=drop, grow=grow)
        if scope == "global" and not grow.needs:
            raise InputError("scope 'global' ranks what all layers could grow by gradients: `grow` looks at none")
        self._name, self.when, self._fraction, self._drop, self._grow = name, when, fraction, drop, grow
        self._scope, self._random_share = scope, random_share
        self.needs, self.window, self.accumulate = drop.needs | grow.needs, grow.window, grow.accumulate

    @property
    def name(self) -> str:
        return self._name

    def sample(
        self, topologies: Mapping[str, Topology], state: NoState, rng: torch.Generator
    ) -> Mapping[str, Tensor | Draw]:
        return self._grow.sample(topologies, rng)

    def growth(self, topologies: Mapping[str, Topology], state: NoState, progress: float) -> dict[str, int]:
        return {name: int(self._fraction.at(progress) * topology.count) for name, topology in topologies.items()}

    def probed_units(self, active: int, inactive: int) -> int:
        return self._grow.probed_units(active, inactive)

    def ask(self, observation: Observation, state: NoState, rng: torch.Generator) -> list[Candidate]:
        fraction = self._fraction.at(observation.progress)
        move = self._over_the_model if self._scope == "global" else self._layer_by_layer
        return [candidate(self.name, *move(observation.layers, fraction, rng))]

    def telemetry(self, state: NoState, progress: float) -> dict[str, float]:
        return {"drop_fraction": self._fraction.at(progress)}

    def _layer_by_layer(
        self, views: Mapping[str, LayerView], fraction: float, rng: torch.Generator
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        from sparsae.core.ranking import smallest
        from sparsae.rules.parts.choose import in_layer

        drop, grow = {}, {}
        for name, view in views.items():
            if n := min(int(fraction * view.topology.count), self._grow.room(view)):
                scores = scored(self._drop, view, rng)
                growth = self._grow.candidates(view, smallest(scores, n), n, rng)
                empty = view.topology.units - view.topology.count  # growth may have more: what is dropped
                growth = with_random(view, growth, min(round(self._random_share * n), empty), rng)
                drop[name], grow[name] = in_layer(view, scores, n, growth)
        return drop, grow

    def _over_the_model(
        self, views: Mapping[str, LayerView], fraction: float, rng: torch.Generator
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        from sparsae.rules.parts.choose import over_layers
        from sparsae.rules.parts.proposers import shares

        n = int(fraction * sum(view.topology.count for view in views.values()))
        random = shares({name: view.topology for name, view in views.items()}, round(self._random_share * n))
        growths = {}
        for name, view in views.items():
            growth = self._grow.candidates(view, view.topology.indices[:0].long(), self._grow.room(view), rng)
            growths[name] = with_random(view, growth, random.get(name, 0), rng)
        scores = {name: scored(self._drop, view, rng) for name, view in views.items()}
        units = over_layers(views, scores, growths, n)
        return {name: drop for name, (drop, _) in units.items()}, {name: grow for name, (_, grow) in units.items()}


def require_parts(**given: object) -> None:
    """Raises InputError for the first of a rule's parts that is not what its place wants.

    A fraction may be anything that has one `at` a share of the run.
    """
    kinds = {"when": Cadence, "fraction": CosineFraction, "drop": Drop, "grow": Grow}
    for name, part in given.items():
        fits = isinstance(part, kinds[name]) or (name == "fraction" and callable(getattr(part, "at", None)))
        if not fits:
            raise InputError(f"{name}: must be a {kinds[name].__name__}, not {shown(part)}")


def candidate(name: str, drop: Mapping[str, Tensor], grow: Mapping[str, Tensor]) -> Candidate:
    """A rule's one candidate; the model shrinks by what is not grown again."""
    drop, grow = ({layer: u for layer, u in units.items() if u.numel()} for units in (drop, grow))
    shrinks = sum(u.numel() for u in drop.values()) - sum(u.numel() for u in grow.values())
    return Candidate(Swap(drop, grow, shrinks), name)
