"""`save_pretrained` of models that have sparse layers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsae.errors import InputError
from sparsae.files import open_as_directory, parse_json, sha256_of, with_seal, write_atomically
from sparsae.nn.linear import SparseLinear, sparse_layers
from sparsae.nn.stored import FORMAT, GUARD, METHOD

# The arguments of `save_pretrained` that `push_to_hub` has not, or has too.
_OF_SAVING = {"max_shard_size", "variant", "token", "save_peft_format", "save_original_format"}


def keeping_sparse(save: Callable[..., Any]) -> Callable[..., Any]:
    """transformers' `save_pretrained`, which then keeps sparse layers sparse; of any other model it is what it was.

    It raises InputError for a directory that is a file, for distributed checkpoints of sparse layers, and for a state
    without some of these.
    """

    @wraps(save)
    def save_pretrained(
        self: Any,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        push_to_hub: bool = False,
        *arguments: Any,
        **others: Any,
    ) -> Any:
        layers = sparse_layers(self)
        # With adapters these alone are saved.
        if not layers or getattr(self, "_hf_peft_config_loaded", False):
            return save(self, save_directory, is_main_process, state_dict, push_to_hub, *arguments, **others)
        if others.pop("distributed_checkpoint", False):
            raise InputError("save_pretrained: sparse layers are not saved as a distributed checkpoint: leave it out")
        folder, variant = Path(save_directory), others.get("variant")
        if folder.is_file():
            raise InputError(f"{folder}: is a file; name a directory")
        # Tensors have the names that they have in the model, in whatever form that was published.
        others["save_original_format"] = False
        hub = {key: others.pop(key) for key in list(others) if push_to_hub and key not in _OF_SAVING}
        if is_main_process:
            for old in _first_files(folder, variant):
                old.unlink(missing_ok=True)
        save(self, folder, is_main_process, state_dict, False, *arguments, **others)
        if is_main_process:
            _complete(folder, layers, variant)
        if push_to_hub:
            # It would have been uploaded before it was complete.
            kept = {key: others[key] for key in ("max_shard_size", "token") if key in others}
            return self.push_to_hub(hub.pop("repo_id", folder.name), **hub, **kept)
        return None

    return save_pretrained


def _first_files(folder: Path, variant: str | None) -> tuple[Path, Path]:
    """The file of all weights, and the index of several: the two that are looked for."""
    middle = "" if variant is None else f".{variant}"
    return folder / f"model{middle}.safetensors", folder / f"model.safetensors.index{middle}.json"


def _complete(folder: Path, layers: Mapping[str, SparseLinear], variant: str | None) -> None:
    """Write into `config.json` how what was saved is read."""
    weights, index = _first_files(folder, variant)
    names = [weights.name]
    if index.exists():
        names = sorted(set(_with_layers_whole(folder, index, layers).values()))
    saved: set[str] = set()
    for name in names:
        with safe_open(folder / name, "pt") as opened:
            saved |= set(opened.keys())
    for name in layers:
        if not {f"{name}.values", f"{name}.indices"} <= saved:
            raise InputError(
                f"{folder}: the weights of {name} were not saved under this name, and could not be loaded: save the "
                "plain model (one that torch.compile has wrapped has it as _orig_mod), and all of its state"
            )
    path = folder / "config.json"
    config = parse_json(path.read_bytes(), str(path))
    config["transformers_weights"] = GUARD
    table: dict[str, Any] = {
        name: {"nnz": layer.topology.nnz, "unit": list(map(int, layer.unit))} for name, layer in layers.items()
    }
    for name, layer in layers.items():
        if layer.quota is not None:
            table[name]["quota"] = str(layer.quota)
    files = {name: sha256_of(folder / name) for name in names}
    config["quantization_config"] = with_seal(
        {"quant_method": METHOD, "format": FORMAT, "layers": table, "files": files}
    )
    write_atomically(path, json.dumps(config, indent=2, sort_keys=True) + "\n")


def _with_layers_whole(folder: Path, index: Path, layers: Mapping[str, SparseLinear]) -> dict[str, str]:
    """Where each tensor lies, once the indices of every layer lie in the file of its values.

    A Trainer resumes by loading one file after the other into a model that has another topology: a layer takes its
    values and indices over together. Files become a little larger than was asked for by it.
    """
    content = parse_json(index.read_bytes(), str(index))
    where: dict[str, str] = content["weight_map"]
    pairs = [(f"{name}.indices", f"{name}.values") for name in layers]
    moves = {i: where[v] for i, v in pairs if i in where and v in where and where[i] != where[v]}
    changed = {where[name] for name in moves} | set(moves.values())
    moved: dict[str, Tensor] = {}
    for name in moves:
        with safe_open(folder / where[name], "pt") as opened:
            moved[name] = opened.get_tensor(name)
    for file in sorted(changed):
        kept = {name: tensor for name, tensor in load_file(folder / file).items() if name not in moves}
        kept |= {name: moved[name] for name, to in moves.items() if to == file}
        (folder / file).unlink()
        if kept:
            save_file(kept, folder / file, metadata={"format": "pt"})
            open_as_directory(folder / file)
    if moves:
        where |= moves
        write_atomically(index, json.dumps(content, indent=2, sort_keys=True) + "\n")
    return where
