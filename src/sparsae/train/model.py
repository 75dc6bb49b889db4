"""The model of a run, from its settings; and whether those fit together."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from sparsae.config.complaints import telling_places
from sparsae.config.density import by_pattern
from sparsae.config.schema import Config
from sparsae.core.budgets import density_factors, matrix_shape
from sparsae.core.heads import HeadLayout
from sparsae.core.schedule import Schedule
from sparsae.core.topology import Topology
from sparsae.errors import InputError
from sparsae.models import attention_heads, attention_modules, build_model, materialize, parameterized, scale_attention
from sparsae.nn.choice import Choice, layer_shapes
from sparsae.nn.conversion import Initializer
from sparsae.nn.limits import Limits, require_quota
from sparsae.nn.linear import sparse_layers
from sparsae.nn.mlp import mlp_keeps
from sparsae.nn.sparsify import layer_counts, sparsify, validated_heads
from sparsae.parameterization import Parameterization
from sparsae.rules import build_rule
from sparsae.search.bounds import refuse_shifting


@telling_places
def require_fit(config: Config) -> None:
    """Refuse settings of model and sparsity that do not fit together, before any text is read.

    Raises InputError.
    """
    sparsity = config.sparsity
    if sparsity.sparsity == 0 and build_rule(config.topology, config.rules).moves:
        which = "what rules give" if config.rules else f"topology.rule '{config.topology.rule}'"
        raise InputError(f"sparsity is 0, so {which} has nothing to swap: leave it out, or use --method dense alone")
    model = build_model(config.model, config.model.vocab_size or 512, 0, device="meta")
    if config.parameterization.name != "sp":
        _refuse_scales_of_attention(config, model)
        scale_attention(model, parameterized(config.model, config.parameterization))
    if sparsity.sparsity == 0:
        return
    shapes = layer_shapes(choice_of(config).layers(model))
    rule = build_rule(config.topology, config.rules)
    rule.refuse_layers(shapes)
    factors = density_factors(density_of(config), list(shapes), "sparsity.density")
    if sparsity.quota is not None:
        require_quota(shapes, sparsity.quota)
        refuse_shifting(rule, sparsity.quota)
    counts = layer_counts(shapes, sparsity.sparsity, sparsity.budget, sparsity.block, sparsity.density_bounds, factors)
    heads = head_layouts(shapes, config)
    validated_heads(heads, sparsity.head_min_density, shapes)
    limits = Limits(sparsity.head_min_density, sparsity.fan_in, sparsity.fan_out, sparsity.quota)
    sparsest = {name: min(ends) for name, ends in Schedule.of(sparsity.schedule, True).ends(counts, counts).items()}
    for name, shape in shapes.items():
        limits.require_room(matrix_shape(shape), sparsity.block, sparsest.get(name, counts[name]), heads.get(name))


def _refuse_scales_of_attention(config: Config, model: nn.Module) -> None:
    """Raises InputError where entries of the configuration scale attention, which the parameterization does."""
    if not config.model.transformers:
        return
    plain = build_model(config.model.model_copy(update={"transformers": {}}), 512, 0, device="meta")
    scales = [[getattr(each, "scaling", None) for each in attention_modules(made)] for made in (model, plain)]
    if scales[0] != scales[1]:
        raise InputError(
            f"model.transformers: parameterization '{config.parameterization.name}' scales attention itself: leave out "
            "what scales it there, or use sp"
        )


@telling_places
def model_of(
    config: Config, vocab_size: int, eos_id: int, device: torch.device, trained: nn.Module | None = None
) -> nn.Module:
    """The model of a run with new weights (none on the meta device); dense ones of sparse layers never exist.

    trained: the dense model that the run continues; the largest weights of each layer are its first.
    """
    model = build_model(config.model, vocab_size, eos_id, device="meta") if trained is None else trained
    parameterization = parameterized(config.model, config.parameterization)
    if parameterization.config.name != "sp":
        scale_attention(model, parameterization)
    if config.sparsity.sparsity > 0:
        low, high = initial_bounds(config)
        sparsify(
            model,
            config.initial_sparsity,
            budget=config.sparsity.budget,
            unit=config.sparsity.unit,
            min_density=low,
            max_density=high,
            density=density_of(config),
            fan_in=config.sparsity.fan_in,
            fan_out=config.sparsity.fan_out,
            include=config.sparsity.include,
            exclude=config.sparsity.exclude,
            sparsify_head=config.sparsity.sparsify_head,
            heads=head_layouts(layer_shapes(choice_of(config).layers(model)), config),
            head_min_density=config.sparsity.head_min_density,
            start="random" if trained is None else "magnitude",
            initializer=_initializer(parameterization) if trained is None else None,
            backend=config.sparsity.backend,
            seed=config.seed,
        )
        for layer in sparse_layers(model).values():
            layer.values = nn.Parameter(layer.values.detach().to(device))
            if device.type != "meta":
                layer.indices = layer.indices.to(device)
                layer.prepare()
    if device.type != "meta":
        materialize(model, parameterization, config.seed, device)
        model.to(device)
    return mlp_keeps(model, config.training.mlp_keeps)


def initial_bounds(config: Config) -> tuple[float, float]:
    """(k_min, k_max) of the untrained model's layers, as densities."""
    low, high = config.sparsity.density_bounds
    # Where a rule prunes, the upper bound is on the model that is left.
    return low, high if config.initial_sparsity == config.sparsity.sparsity else 1.0


def choice_of(config: Config) -> Choice:
    """Which layers the settings make sparse."""
    sparsity = config.sparsity
    return Choice(sparsity.sparsity, tuple(sparsity.include), tuple(sparsity.exclude), sparsity.sparsify_head)


def density_of(config: Config) -> dict[str, float | list[float]]:
    """The factors of the layers' densities, by patterns and depth."""
    return by_pattern(config.sparsity.density, config.model.family)


def head_layouts(layers: Iterable[str], config: Config) -> dict[str, HeadLayout]:
    """The attention heads of the layers of these names that have any."""
    patterns = attention_heads(config.model)
    return {name: layout for name in layers for pattern, layout in patterns.items() if fnmatchcase(name, pattern)}


def choose_device(name: str, setting: str = "training.device") -> torch.device:
    """`auto` is CUDA where there is one. Raises InputError, which names the setting, for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"{setting} '{name}' is no device: use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"{setting} '{name}' is not there: {torch.cuda.device_count()} CUDA devices found")
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"{setting} '{name}' is not supported: use auto, cpu, cuda or cuda:N")
    return device


def _initializer(parameterization: Parameterization) -> Initializer:
    """Normal, for the density of the layer: unless settings say otherwise, outputs start as the dense layer's do.

    With density d an output sums d times as many terms, so the weights of those that exist are 1 / sqrt(d) larger.
    """

    def draw(name: str, topology: Topology, rng: torch.Generator) -> Tensor:
        std = parameterization.initial_std(parameterization.role(name), topology.density)
        return torch.randn(topology.values_shape, generator=rng, dtype=torch.float32, device="cpu") * std

    return draw
