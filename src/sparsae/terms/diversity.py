"""D, `L1_Mask_Diversity`: standard deviation of active / total over layers; a layer with heads counts once a head."""

from __future__ import annotations

from pydantic import Field

from sparsae.config.rules import TermConfig
from sparsae.config.section import NonNegative
from sparsae.core.observation import head_densities
from sparsae.registry import TERMS
from sparsae.score import Term, Trial


class DiversityConfig(TermConfig):
    """How unequal the densities of layers and heads are."""

    weight: NonNegative = Field(default=0.01, description="w2, weight of the deviation of densities")


@TERMS.register("diversity", DiversityConfig)
class Diversity(Term[DiversityConfig]):
    """The population's deviation, in double precision."""

    label, unit = "Mask diversity", "deviation of densities"

    def value(self, trial: Trial) -> float:
        import torch

        from sparsae.core.host import on_host

        parts = [
            torch.tensor([topology.density], dtype=torch.float64, device="cpu")
            if heads is None
            else head_densities(topology, heads)
            for topology, heads in ((trial.topologies[name], view.heads) for name, view in trial.views.items())
        ]
        return float(torch.cat(on_host(parts)).std(correction=0))
