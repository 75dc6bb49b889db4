"""Another run as the start of a new one: its weights and its topology."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsae.config.complaints import shown
from sparsae.config.schema import Config
from sparsae.data import Tokenizer, load_tokenizer
from sparsae.errors import InputError
from sparsae.nn.linear import sparse_layers
from sparsae.nn.tensors import load_model
from sparsae.runs.checkpoint import load_checkpoint
from sparsae.runs.directory import RunDirectory
from sparsae.train.model import model_of

_SAME = ("model", "parameterization", "sparsity")
_FREE = {
    "dropout",
    "backend",
    "min_density",
    "max_density",
    "head_min_density",
    "fan_in",
    "fan_out",
    "budget",
    "density",
    "schedule",
}


@dataclass(frozen=True, eq=False)
class Source:
    """A checkpoint of a run; `record` is what the new run's manifest says of it."""

    tensors: dict[str, Tensor]
    tokenizer: Tokenizer
    record: dict[str, Any]

    def model(self, config: Config, tokenizer: Tokenizer, device: torch.device) -> nn.Module:
        """With its weights and topology. InputError where they do not fit, or text is read with another tokenizer."""
        model = model_of(config, tokenizer.vocab_size, tokenizer.eos_id, device)
        origin = f"--from {self.record['path']}"
        if tokenizer.hash != self.tokenizer.hash:
            raise InputError(
                f"{origin}: its tokenizer is another one: set data.tokenizer to {self.record['path']}/tokenizer"
            )
        wanted = sum(layer.topology.nnz for layer in sparse_layers(model).values())
        load_model(model, self.tensors, origin)
        given = sum(layer.topology.nnz for layer in sparse_layers(model).values())
        if given != wanted:
            raise InputError(f"{origin}: it has {given:,} active weights, these settings begin with {wanted:,}")
        return model


def read_source(path: Path, config: Config, best: bool = False) -> Source:
    """The run in `path` as the start of one with these settings.

    best: its checkpoint of the best validation, not the newest. Raises InputError where there is no run or no such
    checkpoint, where it is damaged, or where its architecture differs.
    """
    run = RunDirectory.open(path)
    theirs = run.config()
    for section in _SAME:
        ours = getattr(config, section).model_dump()
        for key, value in getattr(theirs, section).model_dump().items():
            if key not in _FREE and ours[key] != value:
                raise InputError(
                    f"--from {path}: its {section}.{key} is {shown(value)}, not {shown(ours[key])}: it must be the same"
                )
    tensors, state = run.steady(
        lambda: load_checkpoint(run.best_checkpoint() if best else run.latest_checkpoint(), "model")
    )
    run.require_tokenizer()
    record = {"path": str(path.absolute()), "run": state["run"], "step": state["trainer"]["step"]}
    return Source(tensors["model"], load_tokenizer(run.tokenizer), record)
