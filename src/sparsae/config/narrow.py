"""The narrower dense model that has as many parameters as a sparse one has active: the method `dense-small`.

Parameters are counted from the shapes alone, without torch, so that a run's settings say its width before it begins.
"""

from __future__ import annotations

import json
import math
from fnmatch import fnmatchcase
from pathlib import Path

from sparsae.config.schema import Config, ModelConfig, SparsityConfig
from sparsae.errors import InputError
from sparsae.families import FAMILIES
from sparsae.files import expanded

USED = ("unit", "include", "exclude", "sparsify_head")  # of the section sparsity, beside the sparsity itself
METHOD = "dense-small"  # named here alone, beside its file
MOST_PARAMETERS = 2**40
MOST_TOKENS = 2**31 - 1


def refuse_huge(config: Config) -> None:
    """InputError for sizes of which each is possible, but no machine can hold a model or a batch of all of them."""
    model, training = config.model, config.training
    shapes = FAMILIES[model.family].linear_shapes(model.model_copy(update={"layers": 1}))
    block = sum(rows * columns for rows, columns in shapes.values())
    vocabulary = model.vocab_size or config.data.tokenizer_vocab
    parameters = model.layers * block + (vocabulary + model.context) * model.width
    if parameters > MOST_PARAMETERS:
        raise InputError(
            f"a model of {parameters:.3g} parameters is too large: lower model.width (now {model.width}), model.layers "
            f"(now {model.layers}), model.mlp_width, model.head_size, model.vocab_size or model.context"
        )
    if (tokens := training.batch_size * model.context) > MOST_TOKENS:
        raise InputError(
            f"a batch of {tokens:.3g} tokens is too large: lower training.batch_size (now {training.batch_size}) or "
            f"model.context (now {model.context})"
        )


def narrowed(config: Config) -> Config:
    """The settings, in which METHOD has the dense model whose parameters are nearest to the active ones.

    It is no wider than the given one, whose active parameters at its sparsity are meant.
    Layers, heads and context stay; the width is a multiple of twice the heads (of the heads where it was no such
    multiple before), unless heads have a size of their own, which shrinks with it, and need not divide it. The MLP's
    width shrinks too, and then takes up what that rounding left, in eights where it is 64 or more. Settings whose
    sparsity is 0 are narrow already.

    Raises InputError where even one pair of features a head has more parameters than are wanted.
    """
    if config.method != METHOD or config.sparsity.sparsity == 0:
        return config
    model, vocabulary = config.model, _vocabulary(config)
    target = count_parameters(model, vocabulary, config.sparsity)
    divides = model.head_size is None or FAMILIES[model.family].divides_width
    heads = model.heads if divides else 1
    step = heads * (2 if model.width % (2 * heads) == 0 else 1)
    candidates = [_of_width(model, width) for width in range(step, model.width + 1, step)]
    best = min(candidates, key=lambda narrow: abs(count_parameters(narrow, vocabulary) - target))
    if best is candidates[0] and count_parameters(best, vocabulary) > 1.5 * target:
        raise InputError(
            f"method {METHOD}: no width has as few as the {target:,} parameters that are active at "
            f"sparsity.sparsity {config.sparsity.sparsity:g}: lower it, or take fewer model.heads"
        )
    best = _with_mlp_for(best, vocabulary, target)
    return config.model_copy(update={"model": best, "sparsity": SparsityConfig(sparsity=0.0)})


def count_parameters(model: ModelConfig, vocabulary: int, sparsity: SparsityConfig | None = None) -> int:
    """Parameters of a model, or those that exist of one that is sparse so."""
    family = FAMILIES[model.family]
    linear = family.linear_shapes(model)
    head = 0 if model.tie_embeddings else vocabulary * model.width
    if sparsity is not None:
        selected = {
            name: rows * columns
            for name, (rows, columns) in linear.items()
            if (not sparsity.include or any(fnmatchcase(name, glob) for glob in sparsity.include))
            and not any(fnmatchcase(name, glob) for glob in sparsity.exclude)
        }
        inactive = sum(selected.values()) + (head if sparsity.sparsify_head else 0)
        unit = math.prod(sparsity.block)
        active = unit * round((1.0 - sparsity.sparsity) * (inactive // unit))
    else:
        inactive = active = 0
    weights = sum(rows * columns for rows, columns in linear.values())
    return weights - inactive + active + head + family.other_parameters(model, vocabulary)


def _with_mlp_for(model: ModelConfig, vocabulary: int, target: int) -> ModelConfig:
    """The model with the MLP width that brings its parameters nearest to the target."""
    hidden = FAMILIES[model.family].mlp_width(model)
    unit = 8 if hidden >= 64 else 1
    wider = model.model_copy(update={"mlp_width": hidden + unit})
    missing, gained = (target - count_parameters(model, vocabulary)), count_parameters(wider, vocabulary)
    units = round(missing / (gained - count_parameters(model, vocabulary)))
    return model.model_copy(update={"mlp_width": max(unit, hidden + unit * units)})


def _of_width(model: ModelConfig, width: int) -> ModelConfig:
    """What is given of the MLP and of the heads shrinks with the width; a head's features stay even, for rotations."""
    hidden = model.mlp_width and max(1, round(model.mlp_width * width / model.width))
    head = model.head_size and 2 * max(1, round(model.head_size * width / model.width / 2))
    return model.model_copy(update={"width": width, "mlp_width": hidden, "head_size": head})


def _vocabulary(config: Config) -> int:
    """Entries of the embedding; of a tokenizer that is yet to be trained, as many as it may have."""
    if config.model.vocab_size is not None:
        return config.model.vocab_size
    if config.data.tokenizer == "train":
        return config.data.tokenizer_vocab
    path = Path(expanded(config.data.tokenizer))
    files = [path] if path.is_file() else [path / "tokenizer.json", path / "vocab.json"]
    for file in filter(Path.is_file, files):
        try:
            content = json.loads(file.read_text("utf-8"))
            added = content.get("added_tokens", []) if "model" in content else []
            entries = content["model"]["vocab"] if "model" in content else content
            return len({*entries, *(token["content"] for token in added)})
        except (OSError, ValueError, KeyError, TypeError):
            break
    raise InputError(
        f"{path}: cannot tell how many entries this tokenizer has, which method {METHOD} needs: set model.vocab_size"
    )
