"""Checkpoints: safetensors for tensors, JSON for the rest, whole or not at all.

A checkpoint is written into a temporary directory and renamed when every byte is on disk, so a run that dies at any
moment leaves the last whole one. `state.json` holds the SHA-256 of every other file; a file that does not match is
named.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparsae.errors import InputError
from sparsae.nn.linear import sparse_layers
from sparsae.nn.names import full_names

FORMAT = 1


def save_checkpoint(directory: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    """Write `tensors` (one safetensors file a group) and `state` (JSON values) as the new checkpoint `directory`.

    Raises InputError where it cannot be written; then nothing of it is left.
    """
    temporary = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        _write(temporary, tensors, state)
        os.replace(temporary, directory)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise InputError(
            f"checkpoint {directory} cannot be written: {error}; earlier ones are whole: make room and resume"
        ) from None
    _sync(directory.parent)


def _write(temporary: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    temporary.mkdir(parents=True)
    files = {}
    for group, named in tensors.items():
        path = temporary / f"{group}.safetensors"
        save_file({name: t.detach().contiguous().cpu() for name, t in named.items()}, path)
        files[path.name] = _sha256(path)
    text = json.dumps({"format": FORMAT, "files": files, **state}, allow_nan=False)
    (temporary / "state.json").write_text(text, encoding="utf-8")
    for path in [*temporary.iterdir(), temporary]:
        _sync(path)


def load_checkpoint(directory: Path, *groups: str) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The named groups of tensors (all, if none is named) and the state; InputError for a missing or damaged file."""
    try:
        state = json.loads((directory / "state.json").read_text(encoding="utf-8"))
        files: dict[str, str] = state["files"]
        state["trainer"]["step"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"checkpoint {directory} is damaged: state.json cannot be read ({error})") from None
    if state.get("format") != FORMAT:
        raise InputError(f"checkpoint {directory} has format {state.get('format')}: this version reads format {FORMAT}")
    tensors = {}
    for group in groups or [name.removesuffix(".safetensors") for name in files]:
        path = directory / f"{group}.safetensors"
        if path.name not in files:
            raise InputError(f"checkpoint {directory} has no {path.name}")
        if not path.is_file() or _sha256(path) != files[path.name]:
            raise InputError(f"checkpoint {directory} is damaged: {path.name} is missing or was changed")
        tensors[group] = load_file(path)
    return tensors, state


def keep_newest(directory: Path, count: int) -> None:
    """Remove all but the `count` newest whole checkpoints below `directory`."""
    steps = sorted(path for path in directory.glob("step-*") if (path / "state.json").is_file())
    for path in steps[:-count]:
        shutil.rmtree(path)


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, each once however it is tied, and the buffers that belong to the state."""
    persistent = model.state_dict(keep_vars=True)
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    tensors |= {name: b for name, b in model.named_buffers() if name in persistent}
    return tensors


def load_model(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Into a model of the same architecture, any topologies. InputError where names or shapes do not fit."""
    wanted, given = set(model_tensors(model)), set(tensors)
    if wanted != given:
        name = sorted(wanted ^ given)[0]
        raise InputError(f"the checkpoint does not fit the model: {name} is in only one of them")
    full = full_names(model)
    sparse = tuple(f"{full[name]}." for name in sparse_layers(model))
    for name, parameter in model_tensors(model).items():
        if not name.startswith(sparse) and parameter.shape != tensors[name].shape:
            raise InputError(
                f"the checkpoint does not fit the model: {name} is {tuple(tensors[name].shape)}, "
                f"not {tuple(parameter.shape)}"
            )
    model.load_state_dict(dict(tensors), strict=False)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as "parameter:key" -> tensor."""
    return {
        f"{name}:{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`; counters of zero dimensions stay on the CPU, as torch keeps them."""
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        owner, _, key = name.rpartition(":")
        parameter = parameters[owner]
        optimizer.state[parameter][key] = tensor.to(parameter.device) if tensor.dim() else tensor.clone()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
