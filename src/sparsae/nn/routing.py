"""How many of a model's experts see a token: what mixtures of experts compute, of all the weights that they have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fractions import Fraction

from torch import nn

from sparsae.nn.choice import expert_counts
from sparsae.nn.kinds.experts import Experts, SparseExperts
from sparsae.nn.names import modules_by_name

# What transformers' models call the number of experts that a router chooses for a token.
_CHOSEN = ("top_k", "num_experts_per_tok", "num_experts_per_token", "moe_k")


class Routing:
    """The experts of a model, by the names of the modules that hold them, and the share of the tokens that each sees.

    That is k / n where a router chooses k of n experts for every token: the mean over them, and exact for their sum.
    routers: weights of the routers that are no linear layers, and see every token.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = modules_by_name(model)
        self.shares: dict[str, Fraction] = {}
        routers = set[int]()
        for name, module in modules.items():
            around = modules.get(name.rpartition(".")[0]) if name else None
            count, chosen = _count(module), None if around is None else _chosen(around)
            if around is None or chosen is None or count is None or count not in expert_counts(around):
                continue
            self.shares[name] = Fraction(min(chosen, count), count)
            routers |= {id(child) for child in around.children() if child is not module and _chosen_by(child)}
        self.routers = sum(
            sum(p.numel() for p in module.parameters(recurse=False) if p.dim() == 2)
            for module in modules.values()
            if id(module) in routers
        )

    def share(self, layer: str) -> Fraction:
        """Of the tokens, for a layer by its name."""
        names = (layer[:i] for i, sign in enumerate(f"{layer}.") if sign == ".")
        return next((self.shares[name] for name in names if name in self.shares), Fraction(1))

    def met(self, weights: Mapping[str, int]) -> int:
        """How many of the weights of layers a token meets, on average, rounded."""
        if not self.shares:
            return sum(weights.values())
        return round(sum(self.share(name) * count for name, count in weights.items()))


def _count(module: nn.Module) -> int | None:
    """How many experts a module holds, if it may hold any."""
    if isinstance(module, SparseExperts):
        return module.kind.count
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        return len(module)
    return Experts.of(module).count if Experts.claims(module) else None


def _chosen(around: nn.Module) -> int | None:
    """How many experts are chosen for a token, as the module around them or its router says."""
    # A child that has experts itself chooses among those.
    routers = (child for child in around.children() if all(_count(inner) is None for inner in child.children()))
    return next((found for holder in (around, *routers) for found in _chosen_by(holder)), None)


def _chosen_by(module: nn.Module) -> list[int]:
    return [value for key, value in _numbers(module) if key in _CHOSEN]


def _numbers(module: nn.Module) -> Iterator[tuple[str, int]]:
    return ((key, value) for key, value in vars(module).items() if type(value) is int)
