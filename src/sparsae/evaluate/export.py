"""A run's model as a Hugging Face directory.

What a target gains: everything that loads transformers models loads this one and computes the same logits. Zeros are
stored and multiplied like any weight, so nothing becomes smaller or faster by it; the topology lies beside the weights
for tools that can use it.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from sparsae.errors import InputError
from sparsae.evaluate.card import model_card
from sparsae.evaluate.loading import load_run
from sparsae.files import open_as_directory, temporary_name
from sparsae.models import fold_attention_scale
from sparsae.nn.linear import sparse_layers
from sparsae.nn.sparsify import densify


def export_run(path: Path, to: Path, teacher: bool = False) -> None:
    """Write the run in `path` to the new directory `to`: model, tokenizer, model card and `topology.safetensors`.

    topology.safetensors holds, for every sparse layer, `NAME.indices` (flat unit numbers down the columns of the grid
    of units) and its shape and unit in the metadata. Raises InputError for a run that cannot be read, or where `to`
    cannot be written; then nothing is left behind.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise InputError(f"{to}: is there already; name a new directory")
    loaded = load_run(path, teacher)
    layers = sparse_layers(loaded.model)
    topology = {f"{name}.indices": layer.indices.cpu() for name, layer in layers.items()}
    layout = {
        name: f"{layer.out_features}x{layer.in_features} in units of {layer.unit[0]}x{layer.unit[1]}"
        for name, layer in layers.items()
    }
    model: Any = densify(loaded.model)
    fold_attention_scale(model)
    # Packed text has no padding, so that the run's model had no use for a token of it; a batch of prompts has.
    model.config.pad_token_id = model.generation_config.pad_token_id = loaded.tokenizer.pad_id
    card = model_card(loaded, layers, sum(parameter.numel() for parameter in model.parameters()), teacher)
    partial = temporary_name(to, "partial")
    try:
        partial.mkdir(parents=True)
        model.save_pretrained(partial)
        loaded.tokenizer.save(partial, loaded.config.model.context)
        (partial / "README.md").write_text(card, encoding="utf-8")
        if topology:
            save_file(topology, partial / "topology.safetensors", metadata=layout)
        for file in partial.glob("*.safetensors"):
            open_as_directory(file)
        if to.exists():
            to.rmdir()
        os.replace(partial, to)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{to}: cannot be written: {reason}; name another directory") from None
