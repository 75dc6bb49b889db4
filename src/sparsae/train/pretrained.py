"""A directory of transformers' as the start of a run: a dense model, or one that was stored sparse."""

from __future__ import annotations

import os
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from sparsae.config.complaints import shown
from sparsae.config.schema import Config, ModelConfig
from sparsae.data import Tokenizer
from sparsae.errors import InputError
from sparsae.families import FAMILIES
from sparsae.files import read_json
from sparsae.models import build_model, further_entries, materialize, parameterized, quiet_import, transformers_config
from sparsae.nn.linear import sparse_layers
from sparsae.nn.tensors import load_model, model_tensors
from sparsae.runs.directory import RunDirectory
from sparsae.runs.recognized import is_pretrained
from sparsae.train.model import model_of

# A run may begin with another dropout, and read less at a time where positions are not learned.
_FREE = frozenset({"dropout", "context"})
_FREE_ENTRIES = frozenset({"attention_dropout"})
_STATE = "trainer_state.json"
_PROBE = 16  # tokens on which a model made from settings has to compute what the directory's does


def pretrained_settings(path: Path) -> dict[str, Any]:
    """The settings of a run that continues the model in `path`: its architecture and its tokenizer.

    Raises InputError where its configuration cannot be read, or is of no known family.
    """
    from transformers import AutoConfig

    try:
        theirs: Any = AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path}: no configuration of a model: {str(error).splitlines()[0]}") from None
    name = next((name for name in FAMILIES.names() if FAMILIES[name].model_type == theirs.model_type), None)
    if name is None:
        raise InputError(
            f"{path}: its model_type is {theirs.model_type}, and families are {', '.join(FAMILIES.names())}: register "
            "a family of your own"
        )
    family = FAMILIES[name]
    model: dict[str, Any] = {"family": name, "vocab_size": theirs.vocab_size}
    model["tie_embeddings"] = bool(theirs.tie_word_embeddings)
    for key, ours in family.settings.items():
        if ours not in _FREE or (ours == "context" and family.positions is not None):
            model[ours] = getattr(theirs, key)
    longest = getattr(theirs, next(key for key, ours in family.settings.items() if ours == "context"))
    same = transformers_config(ModelConfig(**{**model, "context": longest}), theirs.vocab_size, 0).to_dict()
    own = further_entries(family) - _FREE_ENTRIES
    further = {key: value for key, value in theirs.to_dict().items() if key in own and value != same.get(key)}
    return {"model": {**model, "transformers": further}, "data": {"tokenizer": os.path.abspath(path)}}


@dataclass(frozen=True, eq=False)
class Pretrained:
    """A model of transformers' on the disk; `record` is what the new run's manifest says of it."""

    path: Path
    record: dict[str, Any]

    def model(self, config: Config, tokenizer: Tokenizer, device: torch.device) -> nn.Module:
        """The run's first model: of a dense one the largest weights of each layer exist, of a sparse one what existed.

        Raises InputError where the files cannot be read, or hold another model than the settings say.
        """
        there = read_model(self.path, "--from ")
        if sparse_layers(there):
            model = model_of(config, tokenizer.vocab_size, tokenizer.eos_id, device)
            wanted = _nnz(model)
            load_model(model, model_tensors(there), f"--from {self.path}")
            if _nnz(model) != wanted:
                raise InputError(
                    f"--from {self.path}: it has {_nnz(model):,} active weights, these settings begin with {wanted:,}"
                )
            return model
        dense = build_model(config.model, tokenizer.vocab_size, tokenizer.eos_id, device="meta")
        if missing := sorted(dense.state_dict().keys() ^ there.state_dict().keys()):
            raise InputError(f"--from {self.path}: {missing[0]} is in only one of its model and that of the settings")
        dense.load_state_dict(there.state_dict(), assign=True)
        dense.tie_weights()
        materialize(dense, parameterized(config.model, config.parameterization), config.seed, torch.device("cpu"))
        self._require_same(dense.eval(), there.eval())
        return model_of(config, tokenizer.vocab_size, tokenizer.eos_id, device, dense.train())

    @torch.no_grad()
    def _require_same(self, model: Any, there: Any) -> None:
        tokens = torch.arange(_PROBE, device="cpu")[None] % model.config.vocab_size
        tokens = tokens[:, : model.config.max_position_embeddings]
        one, two = model(tokens).logits, there(tokens).logits
        if not torch.allclose(one, two, rtol=1e-3, atol=1e-3 * float(two.abs().max())):
            raise InputError(
                f"--from {self.path}: the family {type(model).__name__} computes otherwise than this model does: "
                "its configuration has something that the settings cannot say"
            )


def read_model(path: Path, option: str = "") -> Any:
    """The causal language model of a directory of transformers', in float32. Raises InputError where there is none.

    option: that named the directory, for the error.
    """
    with quiet_import():
        from transformers import AutoModelForCausalLM

        from sparsae.nn.attention import attend

    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise InputError(f"{option}{path}: cannot be read: {str(error).splitlines()[0]}") from None
    attend(model)
    return model


def at_best(path: Path) -> tuple[Path, bool]:
    """Where the best checkpoint of a path lies, and whether it is still to be chosen there, as in a run.

    Raises InputError where there is none.
    """
    kept = best_of_trainer(path)
    if kept is not None:
        return kept, False
    RunDirectory.open(path).best_checkpoint()
    return path, True


def best_of_trainer(path: Path) -> Path | None:
    """The best checkpoint of a directory that transformers' Trainer wrote, or of one of its checkpoints.

    None where no Trainer wrote there. Raises InputError for any other directory of transformers', and where the Trainer
    names none, or that is gone.
    """
    states = [file for file in (path / _STATE, *path.glob(f"checkpoint-*/{_STATE}")) if file.is_file()]
    if not states:
        if is_pretrained(path):
            raise InputError(f"{path}: no Trainer says which checkpoint is the best: leave out --best")
        return None
    newest, best = -1, None
    for file in states:
        state = read_json(file)
        step, named = state.get("global_step", 0), state.get("best_model_checkpoint")
        if type(step) is not int or not (named is None or isinstance(named, str)):
            raise InputError(f"{file}: no state of a Trainer: global_step or best_model_checkpoint is damaged")
        newest, best = max((newest, best), (step, named), key=itemgetter(0))
    if best is None:
        raise InputError(f"{path}: its Trainer knows no best checkpoint: name one, or leave out --best")
    # Named from where the Trainer ran; it may have been moved since.
    name = PurePath(best.replace("\\", "/")).name
    folders = [path, path.absolute().parent] if name.startswith("checkpoint-") else []
    found = next((folder / name for folder in folders if (folder / name).is_dir()), None)
    if found is None:
        raise InputError(f"{path}: its best checkpoint {shown(name)} is gone: name another one")
    return found


def read_pretrained(path: Path, config: Config) -> Pretrained:
    """The directory `path` as the start of a run with these settings.

    Raises InputError where these are of another model than its own, or want another parameterization than it had.
    """
    if config.parameterization.name != "sp":
        raise InputError(f"--from {path}: a model of transformers' has parameterization.name sp: set it to that")
    theirs = ModelConfig(**pretrained_settings(path)["model"])
    learned = FAMILIES[theirs.family].positions is not None
    for key, value in theirs.model_dump().items():
        ours = getattr(config.model, key)
        if ours != value and (key not in _FREE or (key == "context" and learned)):
            raise InputError(
                f"--from {path}: its model.{key} is {shown(value)}, not {shown(ours)}: it must be the same"
            )
    return Pretrained(path, {"path": str(path.absolute()), "run": None, "step": 0})


def _nnz(model: nn.Module) -> int:
    return sum(layer.topology.nnz for layer in sparse_layers(model).values())
