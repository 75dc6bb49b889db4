"""Models of the families from `transformers` configurations, with new weights and no downloads.

Models are built on the meta device, where weights have shapes and no storage. Layers that become sparse draw their
active values directly, so their dense weights never exist; `materialize` then allocates and initializes what stays
dense.
"""

from __future__ import annotations

import copy
import inspect
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from sparsae.config.complaints import nearest, shown, unknown_name
from sparsae.config.parameterization import ParameterizationConfig
from sparsae.config.schema import ModelConfig
from sparsae.core.heads import HeadLayout
from sparsae.errors import InputError
from sparsae.families import FAMILIES, Family
from sparsae.nn.kinds.kind import KINDS
from sparsae.nn.linear import SparseLinear
from sparsae.parameterization import Parameterization, initial_value

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")

# transformers' initializer_range.
INITIAL_STD = 0.02

# Entries of a configuration (globs) that this program decides itself, or that training never reads.
_NOT_TO_SET = (
    "vocab_size",
    "tie_word_embeddings",
    "initializer_range",
    "*_token_id",
    "*dtype",
    "*attn_implementation",
    "reorder_and_upcast_attn",  # of an attention other than the one used here
    "add_cross_attention",
    "pretraining_tp",
    "use_cache",
    "output_*",
    "return_dict*",
    "summary_*",  # heads of classifiers
    "classifier_*",
)
# Of rotary positions: the entry, and what older versions of transformers had beside it.
_ROPE = "rope_parameters"
_OF_ROPE = ("rope_theta", "rope_scaling", "partial_rotary_factor")


def build_model(
    config: ModelConfig, vocab_size: int, eos_id: int, *, device: torch.device | str = "meta"
) -> PreTrainedModel:
    """A causal language model for a tokenizer of `vocab_size` entries; on the meta device its weights do not exist yet.

    Raises InputError where model.vocab_size is smaller than the tokenizer's, and for a wrong model.transformers.
    """
    size = config.vocab_size or vocab_size
    if size < vocab_size:
        raise InputError(
            f"model.vocab_size is {size}, but the tokenizer has {vocab_size} entries: leave it null or raise it"
        )
    from transformers import AutoModelForCausalLM

    with quiet_import(), torch.device(device):
        from sparsae.nn.attention import attend

        def make(of: ModelConfig) -> Any:
            return AutoModelForCausalLM.from_config(transformers_config(of, size, eos_id))

        model = _blaming(config, make)
        attend(model)
    model.tie_weights()  # which transformers 5.0 leaves out on the meta device
    return model


@contextmanager
def quiet_import() -> Iterator[None]:
    """transformers imports whatever it finds installed (torchao, ...), and that logs what it misses and deprecates."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def transformers_config(config: ModelConfig, vocab_size: int, eos_id: int) -> Any:
    """The configuration in transformers. Raises InputError for entries that nobody may set, and for wrong values."""
    # No padding token: its embedding would be frozen at zero, and packed sequences have no padding.
    special: dict[str, Any] = {"bos_token_id": eos_id, "eos_token_id": eos_id, "pad_token_id": None}
    from transformers import AutoConfig

    family = FAMILIES[config.family]
    own = special | {"vocab_size": vocab_size, "tie_word_embeddings": config.tie_embeddings}
    own |= {"initializer_range": INITIAL_STD, **family.configuration(config)}
    if twice := sorted(own.keys() - family.constants.keys() & config.transformers.keys()):
        raise InputError(f"model.transformers: {twice[0]} is set by settings of its own: leave it out")
    free = further_entries(family)
    for name, value in config.transformers.items():
        if name not in free:
            what = f"family {config.family} has no such entry to set"
            hint = f"it belongs into {_ROPE}" if name in _OF_ROPE and _ROPE in free else nearest(name, sorted(free))
            raise InputError(f"model.transformers.{name}: {what}; {hint}")
        _require_usable(name, value)

    def make(of: ModelConfig) -> Any:
        # Of copies: transformers completes what it is given, and settings are not to change by being used.
        made = AutoConfig.for_model(family.model_type, **{**own, **copy.deepcopy(of.transformers)})
        _require_trainable(made)
        return made

    return _blaming(config, make)


def dropouts(config: ModelConfig) -> dict[str, float]:
    """The probabilities above 0 with which a model drops what goes through it in training, by the settings' names."""
    made, settings = transformers_config(config, config.vocab_size or 1, 0).to_dict(), FAMILIES[config.family].settings
    found = {}
    for name, value in made.items():
        if "drop" not in name or any(fnmatchcase(name, glob) for glob in _NOT_TO_SET):
            continue
        if isinstance(value, int | float) and value > 0:
            found[f"model.{settings.get(name, f'transformers.{name}')}"] = float(value)
    return found


def further_entries(family: Family) -> frozenset[str]:
    """The entries of a family's configuration in transformers that shape its model and no other setting makes."""
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    theirs = CONFIG_MAPPING[family.model_type]
    # A class of the user's may have an __init__ of its own beside what it inherits.
    names = {field.name for field in fields(theirs)} | set(inspect.signature(theirs).parameters)
    names -= {field.name for field in fields(PreTrainedConfig)} | {"kwargs"} | family.settings.keys()
    return frozenset(name for name in names if not any(fnmatchcase(name, glob) for glob in _NOT_TO_SET))


def _require_usable(name: str, value: Any) -> None:
    """Refuse what transformers takes and no training can use, or what it refuses without a word on what would do."""
    if isinstance(value, str) and name.endswith(("_act", "activation_function")):
        from transformers.activations import ACT2FN

        if value not in ACT2FN:
            what = unknown_name("activation function", value, ACT2FN)
            raise InputError(f"model.transformers.{name}: {what}")
    if isinstance(value, str | bool):
        return
    is_number = isinstance(value, int | float)
    if name.endswith(("eps", "epsilon")) and is_number and not value > 0:
        raise InputError(f"model.transformers.{name}: must be above 0, not {shown(value)}")
    if name.endswith("dropout") and not (is_number and 0 <= value < 1):
        raise InputError(f"model.transformers.{name}: must be at least 0 and below 1, not {shown(value)}")


def _require_trainable(made: Any) -> None:
    """ValueError for a configuration that transformers makes, and that fails or is NaN in the first forward pass."""
    window = getattr(made, "sliding_window", None)
    if "sliding_attention" in (getattr(made, "layer_types", None) or ()) and not (window and window > 0):
        raise ValueError("layers of sliding_attention want a sliding_window of at least 1, and use_sliding_window")
    for name, value in (getattr(made, _ROPE, None) or {}).items():
        if name in ("rope_theta", "factor") and isinstance(value, int | float) and not value > 0:
            raise ValueError(f"{name} must be above 0")


def _blaming(config: ModelConfig, make: Callable[[ModelConfig], T]) -> T:
    """What transformers makes of a model's settings. Raises InputError for the entry that it cannot make it with."""
    entries = config.transformers
    try:
        return make(config)
    except InputError:
        raise
    except Exception as error:  # of any kind: transformers uses most values as they are
        if not entries:
            raise
        make(config.model_copy(update={"transformers": {}}))  # What is wrong without them is no fault of theirs.
        if len(entries) > 1:
            for name, value in entries.items():
                _blaming(config.model_copy(update={"transformers": {name: value}}), make)
        key, value = next(iter(entries.items()))
        where, given = ("model.transformers", entries) if len(entries) > 1 else (f"model.transformers.{key}", value)
        raise InputError(f"{where}: transformers cannot use {shown(given)}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """What transformers says is wrong; of several lines the last one says it."""
    if isinstance(error, KeyError) and " " not in str(error):
        return f"it knows no {error}"
    lines = str(error.args[0] if isinstance(error, KeyError) else error).strip().splitlines()
    return re.sub(r"^\w+Error: ", "", lines[-1].strip()) if lines else type(error).__name__


def decoder_and_head(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The module whose output has `last_hidden_state`, and the one from hidden states to logits."""
    return model.base_model, model.get_output_embeddings()  # type: ignore[return-value, operator]


def hidden_states(decoder: Any, tokens_BT: Tensor) -> Tensor:
    """(B * T, width) hidden states of a decoder (compiled or not) for (B, T) tokens, each row one whole sequence."""
    module, cache = getattr(decoder, "_orig_mod", decoder), {}
    if _keeps_only_keys_and_values(module) and (name := cache_name(module)) is not None:
        from sparsae.nn.attention import UNCACHED

        cache = {name: UNCACHED}
    return decoder(input_ids=tokens_BT, use_cache=False, **cache).last_hidden_state.flatten(0, 1)


def _keeps_only_keys_and_values(decoder: Any) -> bool:
    """Whether it is known to ask its cache for nothing else: others keep states of convolutions, indices, ... there."""
    family = FAMILIES.of(decoder)
    return family is not None and any(kind.__name__ == family.decoder_class for kind in type(decoder).__mro__)


def cache_name(decoder: Any) -> str | None:
    """What a decoder calls its cache, None where it takes none.

    transformers calls it `past_key_values`; later versions call it `cache`, and warn of the former name.
    """
    parameters = inspect.signature(getattr(decoder, "forward", decoder)).parameters
    return next((name for name in ("cache", "past_key_values") if name in parameters), None)


def attention_heads(config: ModelConfig) -> dict[str, HeadLayout]:
    """Head layouts of the attention projections, by a glob over module names."""
    family = FAMILIES[config.family]
    size = family.head_size(config)
    return {pattern: HeadLayout(side, size) for pattern, side in family.heads.items()}


def parameterized(model: ModelConfig, config: ParameterizationConfig) -> Parameterization:
    """The parameterization of a model of one of the families."""
    roles = FAMILIES[model.family].parameter_roles(standard=config.name == "sp")
    std = INITIAL_STD * config.initial_scale
    return Parameterization(config, model.width, model.layers, roles, model.tie_embeddings, std)


def attention_modules(model: nn.Module) -> list[Any]:
    """The modules that multiply queries and keys, in the order of a model of one of the families."""
    family = _family_of(model)
    return [module for name, module in model.named_modules() if name.rpartition(".")[2] == family.attention]


def _family_of(model: nn.Module) -> Family:
    family = FAMILIES.of(model)
    if family is None:
        raise InputError(f"{type(model).__name__} is of no family that is known: {', '.join(FAMILIES.names())}")
    return family


def scale_attention(model: nn.Module, parameterization: Parameterization) -> None:
    """Let queries and keys be multiplied as the parameterization has it, in place.

    Raises InputError for a version of transformers whose attention has no scale to set.
    """
    for attention in attention_modules(model):
        scale = parameterization.attention_scale(attention.head_dim)
        if not hasattr(attention, "scaling"):
            raise InputError(
                "parameterization.name: this version of transformers has no attention scale to set: "
                "install a newer one, or use sp"
            )
        attention.scaling = scale


@torch.no_grad()
def fold_attention_scale(model: nn.Module) -> None:
    """Move the scale of attention into the queries, in place: the same function at the scale of its configuration.

    What a configuration of transformers cannot say, its weights can: anything that loads them computes the same.
    """
    family = _family_of(model)
    with torch.device("meta"):
        fresh = type(model)(copy.deepcopy(model.config))
    for attention, made in zip(attention_modules(model), attention_modules(fresh), strict=True):
        standard = getattr(made, "scaling", made.head_dim**-0.5)
        factor = getattr(attention, "scaling", standard) / standard
        if factor == 1.0:
            continue
        _multiply_queries(attention, family, model.config.num_attention_heads, factor)  # type: ignore[union-attr,arg-type]
        attention.scaling = standard


def _multiply_queries(attention: Any, family: Family, heads: int, factor: float) -> None:
    """By a factor, whatever queries are proportional to, all together."""
    if family.head_norms is not None:  # after which nothing is left of a factor on the projection
        for parameter in getattr(attention, family.head_norms[0]).parameters():
            parameter *= factor
        return
    projection = getattr(attention, family.projections[0])
    # Where one layer gives queries, keys and values, the queries come first.
    queries = heads * attention.head_dim
    if isinstance(projection, SparseLinear):
        topology, (b_out, b_in) = projection.topology, projection.unit
        rows_NO = topology.rows[:, None] * b_out + torch.arange(b_out, device=topology.rows.device)
        values = projection.values.view(-1, b_out, b_in)
        values *= torch.where(rows_NO < queries, factor, 1.0)[:, :, None].to(values.dtype)
    else:
        KINDS.of(projection).split("weight", projection.weight)[""][:queries] *= factor
    if projection.bias is not None:
        projection.bias[:queries] *= factor


def materialize(model: nn.Module, parameterization: Parameterization, seed: int, device: torch.device) -> None:
    """Allocate and initialize, on `device`, every parameter and buffer that is still on the meta device.

    Norms start at 1, biases at 0, embeddings and linear weights normal, each from its own generator by (seed, name),
    so no value depends on what else exists; the parameterization scales them. Tied weights stay tied.
    """
    made = {
        id(parameter): nn.Parameter(
            initial_value(name, parameter.shape, role, density, parameterization, seed).to(device),
            parameter.requires_grad,
        )
        for name, parameter, role, density in parameterization.parameters(model)
        if parameter.is_meta
    }
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                setattr(module, name, made[id(parameter)])
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            _recompute_buffers(module, device)


def _recompute_buffers(module: nn.Module, device: torch.device) -> None:
    # Rotary frequencies are functions of the configuration alone: a second instance computes them.
    with torch.device("cpu"):
        fresh = type(module)(module.config)
    for name, buffer in fresh.named_buffers(recurse=False):
        module.register_buffer(name, buffer.to(device), persistent=False)
