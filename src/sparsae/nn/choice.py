"""Which layers of a model can be sparse, and why the others stay dense."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from sparsae.errors import InputError, argument
from sparsae.nn.kinds.kind import KINDS, kind_in, parameter_of
from sparsae.nn.linear import SparseLinear
from sparsae.nn.names import below, full_names, modules_by_name

# What people call a model's last layer: anywhere, and where it is the last linear layer of the model.
_HEADS = ("lm_head", "to_logits", "embed_out")
_LAST_HEADS = {*_HEADS, "head", "heads", "fc", "classifier", "score", "logits", "qa_outputs"}
_ROUTERS = ("router", "gate", "gating")
_EXPERT_COUNTS = ("num_experts", "n_experts", "n_expert", "num_local_experts", "n_routed_experts")

EXCLUDED = "left out by the patterns"


@dataclass(frozen=True)
class Choice:
    """What `sparsify` was asked to replace: its arguments of the same names, and the factor of each layer's density."""

    sparsity: float = 0.0
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    sparsify_head: bool = False
    factors: Mapping[str, float] = field(default_factory=dict)

    def layers(self, model: nn.Module) -> dict[str, nn.Module]:
        """The layers to replace, by name in the model's order.

        Raises InputError for a pattern that names no layer, and with the reasons where there is nothing to replace.
        """
        self._require_patterns(model)
        found = self.candidates(model)
        if not found:
            modules = modules_by_name(model)
            why, others = Counter[str](), Counter[str]()
            for name, reason in self.reasons(model).items():
                (why if KINDS.claiming(modules[name]) else others)[str(reason)] += 1
            if sparse := sum(isinstance(module, SparseLinear) for module in modules.values()):
                why["sparse already (densify(model) first)"] = sparse
            counted = [f"{count} {reason}" for reason, count in (*why.most_common(), *others.most_common())]
            raise InputError(f"no layer to sparsify: {'; '.join(counted) or 'the model has no parameters'}")
        return found

    def candidates(self, model: nn.Module) -> dict[str, nn.Module]:
        """The layers to replace; none where there is none."""
        modules = modules_by_name(model)
        return {name: modules[name] for name, reason in self.reasons(model).items() if reason is None}

    def reasons(self, model: nn.Module) -> dict[str, str | None]:
        """Why each module that has parameters of its own stays dense, by name; None for a layer that can be sparse."""
        names = full_names(model)
        modules = {
            name: module
            for name, module in modules_by_name(model).items()
            if module._parameters and kind_in(module) is None
        }
        context = _Context(model)
        return {name: self._reason(name, names[name], module, context) for name, module in modules.items()}

    def _reason(self, name: str, full_name: str, module: nn.Module, context: _Context) -> str | None:
        if KINDS.claiming(module) is None:
            return _reason_of_type(name, module)
        if (refusal := context.refusal(module, full_name)) is not None:
            return refusal
        names = {name, full_name}
        if (self.include and not _match(names, self.include)) or _match(names, self.exclude):
            return EXCLUDED
        if id(module) in context.heads and not self.sparsify_head:
            return "output head"
        return "router of experts" if id(module) in context.routers else None

    def _require_patterns(self, model: nn.Module) -> None:
        """Raises InputError for the first pattern that names no layer."""
        modules, names = modules_by_name(model), full_names(model)
        layers = {name: {name, names[name]} for name, module in modules.items() if module._parameters}
        known = {name: both for name, both in layers.items() if is_known(modules[name])}
        for setting, patterns, named in (("include", self.include, known), ("exclude", self.exclude, layers)):
            what = "layer to sparsify" if setting == "include" else "layer"
            for pattern in patterns:
                if any(_match(both, [pattern]) for both in named.values()):
                    continue
                inside = any(_match(both, [f"{pattern}.*"]) for both in named.values())
                example = f"names are such as {next(iter(known))}" if known else "there are none"
                advice = f"'{pattern}.*' names what is inside" if inside else example
                whole = next((name for name in known if _match(_parts(name, modules[name]), [pattern])), None)
                if whole is not None:
                    advice = f"the layers of {whole} become sparse together, by that name"
                raise InputError(f"no {what} matches '{pattern}' of {argument(setting)}: {advice}")


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that could be sparse and are not, by name in the model's order."""
    return Choice().candidates(model)


def linear_routers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers that choose among experts, by name: they stay dense."""
    routers = {id(module) for module in _routers(modules_by_name(model))}
    return {name: module for name, module in modules_by_name(model).items() if id(module) in routers}


def layer_shapes(modules: Mapping[str, nn.Module]) -> dict[str, tuple[int, ...]]:
    """(out, in, kernel dimensions...) of the layers that dense modules become, by the layers' names."""
    found: dict[str, tuple[int, ...]] = {}
    for name, module in modules.items():
        kind = KINDS.of(module)
        for weight in kind.weights:
            for part, matrix in kind.split(weight, parameter_of(module, weight).detach().contiguous()).items():
                found[below(name, part)] = kind.shape((matrix.shape[0], matrix.shape[1]))
    return found


def _parts(name: str, module: nn.Module) -> set[str]:
    """What the layers of a dense module that becomes several will be called."""
    kind = KINDS.claiming(module)
    if kind is None or kind.refusal(module) is not None:
        return set()
    described = kind.of(module)
    return {below(name, part) for weight in described.weights for part in described.parts(weight) if part}


def is_known(module: nn.Module) -> bool:
    """Whether this is sparse, or of a kind that can be, though it may be refused."""
    return isinstance(module, SparseLinear) or KINDS.claiming(module) is not None


def is_linear(module: nn.Module) -> bool:
    """Whether this maps vectors of features by a matrix, sparse or dense."""
    kind = module.kind if isinstance(module, SparseLinear) else KINDS.claiming(module)
    return kind is not None and kind.is_linear


def is_patched(module: nn.Module) -> bool:
    """Whether calling this very object is something else than its class says."""
    return "forward" in vars(module) or vars(module).get("_compiled_call_impl") is not None


class _Context:
    """What tells linear layers of one model apart that look alike."""

    def __init__(self, model: nn.Module) -> None:
        modules = modules_by_name(model)
        self._owners: dict[int, list[str]] = {}
        for name, module in modules.items():
            for parameter in module.parameters(recurse=False):
                self._owners.setdefault(id(parameter), []).append(name)
        self._names = {id(module): name for name, module in modules.items()}
        # These read, or write, the weights of their layers without calling them.
        self._readers: dict[int, str] = {}
        for module in modules.values():
            for kind in (nn.TransformerEncoderLayer, nn.MultiheadAttention):
                if isinstance(module, kind):
                    self._readers |= {id(child): f"read directly by nn.{kind.__name__}" for child in module.children()}
            if type(module).__name__ == "RwkvModel" and module.config.rescale_every > 0:  # type: ignore[union-attr,operator]
                self._readers |= {
                    id(child): "rescaled in evaluation by RwkvModel (set its config's rescale_every to 0)"
                    for name, child in module.named_modules()
                    if name.endswith((".attention.output", ".feed_forward.value"))
                }
        self.heads = {id(module) for module in _heads(modules)}
        self.routers = {id(module) for module in _routers(modules)}

    def refusal(self, module: nn.Module, full_name: str) -> str | None:
        """Why a layer of a known kind cannot be sparse."""
        kind = KINDS.claiming(module)
        assert kind is not None
        if id(module) in self._readers:
            return self._readers[id(module)]
        if hasattr(module, "parametrizations"):
            return "a parametrized weight (weight_norm, spectral_norm or the like)"
        if (refusal := kind.refusal(module)) is not None:
            return refusal
        if full_name.endswith("_orig_mod") or is_patched(module):
            return "its forward was replaced, or compiled by itself"
        described = kind.of(module)
        weights = [module._parameters.get(name) for name in described.weights]
        others = [name for name in described.biases if getattr(module, name, None) is not None]
        if None in weights or not module._parameters.keys() >= set(others):
            return "its weight or bias is computed from other parameters (weight_norm, pruning or the like)"
        return next((why for weight in weights if (why := self._refusal_of(weight, module)) is not None), None)

    def _refusal_of(self, weight: Any, module: nn.Module) -> str | None:
        owners = [name for name in self._owners[id(weight)] if name != self._names[id(module)]]
        if owners:
            return f"tied to the weight of {owners[0]}"
        if not weight.numel():
            return "it has no weights"
        if type(weight.data) is not Tensor or not weight.is_floating_point() or weight.element_size() < 2:
            return f"its weight is no plain tensor of numbers ({type(weight.data).__name__}, {weight.dtype})"
        return None


def _match(names: set[str], patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _reason_of_type(name: str, module: nn.Module) -> str:
    """Why a module that is no linear layer stays dense."""
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "embedding"
    if isinstance(module, _ConvNd):
        return "convolution"
    if ".parametrizations." in f".{name}.":
        return "a parametrized weight (weight_norm, spectral_norm or the like)"
    dimensions = max((p.dim() for p in module._parameters.values() if p is not None and not is_lazy(p)), default=0)
    if dimensions < 2:
        return "norms and other vectors"
    what = "stacked weights" if dimensions > 2 else "a weight"
    return f"{what} of {type(module).__name__}, which is no nn.Linear"


def _heads(modules: Mapping[str, nn.Module]) -> Iterator[nn.Module]:
    """Output heads: what the model itself calls so, by method or by name, and a last layer to the vocabulary."""
    for module in modules.values():
        for method in ("get_output_embeddings", "get_classifier"):
            if callable(getattr(type(module), method, None)):
                yield from _modules_in(getattr(module, method)())
    linear = {name: module for name, module in modules.items() if is_linear(module)}
    yield from (module for name, module in linear.items() if name.rpartition(".")[2] in _HEADS)
    if linear:
        last = next(reversed(linear.values()))
        vocabulary = max((m.num_embeddings for m in modules.values() if isinstance(m, nn.Embedding)), default=None)
        if not _LAST_HEADS.isdisjoint(_top(list(linear))) or _out(last) == vocabulary:
            yield last


def _top(names: Sequence[str]) -> list[str]:
    """Of the last name, the first level, and as many more as all names share: somebody's module may hold the model."""
    levels = names[-1].split(".")
    shared = 0
    while shared < len(levels) - 1 and all(name.split(".")[: shared + 1] == levels[: shared + 1] for name in names):
        shared += 1
    return levels[: shared + 1]


def _modules_in(found: object) -> Iterator[nn.Module]:
    if isinstance(found, nn.Module):
        yield found
    elif isinstance(found, tuple | list):
        yield from (module for module in found if isinstance(module, nn.Module))


def _routers(modules: Mapping[str, nn.Module]) -> Iterator[nn.Module]:
    """Layers that are called routers or gates and have an output an expert."""
    for name, module in modules.items():
        *above, last = name.split(".")
        if (last not in _ROUTERS and not (above and above[-1] in _ROUTERS)) or not is_linear(module):
            continue
        levels = [modules[".".join(above[:n])] for n in range(len(above), max(-1, len(above) - 3), -1)]
        if any(_out(module) in expert_counts(level) for level in levels):
            yield module


def expert_counts(module: nn.Module) -> Iterator[int]:
    """What could be the number of experts of a module."""
    for holder in (module, *module.children()):
        yield from (vars(holder)[key] for key in _EXPERT_COUNTS if isinstance(vars(holder).get(key), int))
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield len(child)
        yield from (p.shape[0] for p in child.parameters(recurse=False) if p.dim() == 3)


def _out(module: nn.Module) -> int:
    kind = None if isinstance(module, SparseLinear) else KINDS.claiming(module)
    return module.out_features if kind is None else kind.outputs(module)  # type: ignore[return-value]
