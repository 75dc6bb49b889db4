"""A run's model as a Hugging Face directory, dense or sparse, or in another form (`formats`).

What a target gains. Dense: everything that loads transformers models loads this one and computes the same logits; zeros
are stored and multiplied like any weight, so nothing becomes smaller or faster by it, and the topology lies beside the
weights for tools that can use it. Sparse: who imports this package gets the sparse model back, small on disk and in
memory (see `sparsae.nn.stored`); nobody else can load it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from sparsae.errors import InputError
from sparsae.evaluate.card import model_card
from sparsae.evaluate.formats import compact, semi_structured
from sparsae.evaluate.formats.compact import is_compact, write_compact
from sparsae.evaluate.formats.onnx import require_onnx, write_onnx
from sparsae.evaluate.formats.semi_structured import write_semi_structured
from sparsae.evaluate.loading import LoadedRun, load_run
from sparsae.files import open_as_directory, temporary_name
from sparsae.models import fold_attention_scale
from sparsae.nn.linear import sparse_layers
from sparsae.nn.sparsify import densify

FORMS = ("dense", "sparse", "compact", "semi-structured", "onnx")
# Of the forms that have any: the first is taken where none is given.
_PRECISIONS = {"compact": tuple(compact.PRECISIONS), "semi-structured": tuple(semi_structured.PRECISIONS)}


def export_run(
    path: Path,
    to: Path,
    teacher: bool = False,
    form: str = "dense",
    precision: str | None = None,
    best: bool = False,
) -> None:
    """Write the run in `path` to the new directory `to`: model, tokenizer and model card.

    form: "dense", or "sparse" as `save_pretrained` has it; the others have modules of their own in `formats`.
    precision: of a compact or a semi-structured one, bfloat16 unless it is given. Beside dense weights lies
    topology.safetensors, which holds, for every sparse layer, `NAME.indices` (flat unit numbers down the columns of
    the grid of units) and its shape and unit in the metadata. Raises InputError for a run that cannot be read or does
    not fit the form, for another form, or where `to` cannot be written; then nothing is left behind.
    """
    if form not in FORMS:
        raise InputError(f"--format: must be {' or '.join(FORMS)}, not {form}")
    precisions = _PRECISIONS.get(form, ())
    if precision is not None and not precisions:
        raise InputError(f"--precision: is for --format {' and '.join(_PRECISIONS)}")
    if precision not in (None, *precisions):
        raise InputError(f"--precision: must be {' or '.join(precisions)}, not {precision}")
    if form == "onnx":
        require_onnx()
    if to.resolve() == Path.cwd().resolve() or not to.name:
        raise InputError(f"--to: {to} is no new directory; name one")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise InputError(f"{to}: is there already; name a new directory")
    if is_compact(path):
        raise InputError(f"{path}: is an export already, which knows its run no more: give the run that it was made of")
    loaded = load_run(path, teacher, best)
    with _new(to) as partial:
        if form == "compact":
            write_compact(loaded, partial, precision or precisions[0], teacher)
        elif form == "semi-structured":
            write_semi_structured(loaded, partial, precision or precisions[0])
        elif form == "onnx":
            write_onnx(loaded, partial)
        else:
            _write_pretrained(loaded, partial, teacher, form)


def _write_pretrained(loaded: LoadedRun, directory: Path, teacher: bool, form: str) -> None:
    card = model_card(loaded, teacher, form)
    model: Any = loaded.model
    topology, layout = _topologies(model)
    if form == "dense":
        densify(model)
    fold_attention_scale(model)
    # Packed text has no padding, so that the run's model had no use for a token of it; a batch of prompts has.
    model.config.pad_token_id = model.generation_config.pad_token_id = loaded.tokenizer.pad_id
    model.save_pretrained(directory)
    loaded.tokenizer.save(directory, loaded.config.model.context)
    (directory / "README.md").write_text(card, encoding="utf-8")
    if topology and form == "dense":
        save_file(topology, directory / "topology.safetensors", metadata=layout)


@contextmanager
def _new(to: Path) -> Iterator[Path]:
    """A directory to write into, which then becomes `to`; InputError, and nothing left, where it cannot be written."""
    partial = temporary_name(to, "partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        for file in partial.glob("*.safetensors"):
            open_as_directory(file)
        if to.exists():
            to.rmdir()
        os.replace(partial, to)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{to}: cannot be written: {reason}; name another directory") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _topologies(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of topology.safetensors."""
    layers = sparse_layers(model)
    topology = {f"{name}.indices": layer.indices.cpu() for name, layer in layers.items()}
    layout = {
        name: f"{layer.out_features}x{layer.in_features} in units of {layer.unit_name}"
        for name, layer in layers.items()
    }
    return topology, layout
