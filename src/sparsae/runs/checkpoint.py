"""Checkpoints: safetensors for tensors, JSON for the rest, whole or not at all.

A checkpoint is written into a temporary directory and renamed when every byte is on disk, so a run that dies at any
moment leaves the last whole one. `state.json` is sealed and holds the SHA-256 of every other file; a file that does not
match is named, and so is a tensor that does not fit although its file does.
"""

from __future__ import annotations

import copy
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from secrets import token_hex
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparsae.errors import InputError
from sparsae.files import named, open_as_directory, read_sealed, sealed, sha256_of, sync, temporary_name
from sparsae.optim import STATE
from sparsae.runs.directory import CHECKPOINT_FORMAT, read_state


class CheckpointTimes:
    """When a run is saved: every so many steps, and when so many minutes have passed since it was."""

    def __init__(self, every: int | None, minutes: float | None, step: int) -> None:
        """step: where the run is, and is saved."""
        self._every, self._minutes = every, minutes
        self.saved(step)

    def saved(self, step: int) -> None:
        """A checkpoint of this step exists."""
        self.last, self._at = step, time.monotonic()

    def due(self, step: int) -> bool:
        """Whether the step that was just done, counted from 1, is to be saved."""
        by_step = self._every is not None and step % self._every == 0
        return by_step or (self._minutes is not None and time.monotonic() - self._at >= 60.0 * self._minutes)


def save_checkpoint(directory: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    """Write `tensors` (one safetensors file a group) and `state` (JSON values) as the new checkpoint `directory`.

    Raises InputError where it cannot be written; then nothing of it is left.
    """
    write_whole(directory, tensors, state, lambda: _make_way(directory, state["run"]))


def write_whole(
    directory: Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    make_way: Callable[[], object],
) -> None:
    """As `save_checkpoint`, whatever the state is of. make_way: moves what has the directory's name, once it may go."""
    temporary = temporary_name(directory, "partial")
    try:
        _write(temporary, tensors, state)
        make_way()
        os.replace(temporary, directory)
        sync(directory.parent)
        sync(directory.parent.parent)  # which the first checkpoint gives the name of the directory above it
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise InputError(
            f"checkpoint {directory} cannot be written: {error}; earlier ones are whole: make room and resume"
        ) from None
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write(temporary: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    temporary.parent.mkdir(exist_ok=True)  # and not what is above it: whoever removes a run has ended it
    temporary.mkdir()
    files = {}
    for group, members in tensors.items():
        path = temporary / f"{group}.safetensors"
        with named(path):
            save_file({name: t.detach().contiguous().cpu() for name, t in members.items()}, path)
        open_as_directory(path)
        files[path.name] = sha256_of(path)
    path = temporary / "state.json"
    with named(path):
        path.write_text(sealed({"format": CHECKPOINT_FORMAT, "files": files, **state}), encoding="utf-8")
    for path in [*temporary.iterdir(), temporary]:
        sync(path)


def _make_way(directory: Path, run: str) -> None:
    """What has the name of a new checkpoint: a torn or earlier one of this run goes, anybody else's is put aside."""
    if not directory.exists() and not directory.is_symlink():
        return
    if _is_of(directory, run) or not (directory / "state.json").exists():
        remove_checkpoint(directory)
    else:
        os.replace(directory, directory.with_name(f"{directory.name}-found-{token_hex(4)}"))


def remove_checkpoint(directory: Path) -> None:
    """Remove a checkpoint so that a crash leaves none that looks whole.

    What of it cannot be removed at once (on NFS, while somebody reads it) stays under a temporary name: a run that
    saved well does not end by it.
    """
    if directory.is_symlink() or not directory.is_dir():
        directory.unlink()
        return
    gone = temporary_name(directory, "partial")
    os.replace(directory, gone)
    shutil.rmtree(gone, ignore_errors=True)


def load_checkpoint(directory: Path, *groups: str) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The named groups of tensors (all, if none is named) and the state; InputError for a missing or damaged file."""
    state = read_state(directory)
    return load_groups(directory, state["files"], *groups), state


def load_groups(directory: Path, files: Mapping[str, str], *groups: str) -> dict[str, dict[str, Tensor]]:
    """The named groups of tensors (all, if none is named). files: the SHA-256 of each, as the state has them.

    InputError for a missing or damaged file.
    """
    tensors = {}
    for group in groups or [name.removesuffix(".safetensors") for name in files]:
        path = directory / f"{group}.safetensors"
        if path.name not in files:
            raise InputError(f"checkpoint {directory} has no {path.name}")
        if not path.is_file() or sha256_of(path) != files[path.name]:
            raise InputError(f"checkpoint {directory} is damaged: {path.name} is missing or was changed")
        try:
            tensors[group] = load_file(path)
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise InputError(f"{path}: not tensors in the safetensors format: {error}") from None
    return tensors


def keep_newest(directory: Path, count: int, run: str, also: Path | None = None) -> None:
    """Remove all but the `count` newest whole checkpoints of this run below `directory`, and what is left of torn ones.

    also: one that stays too. Those of another run stay.
    """
    found = sorted(path for path in directory.glob("step-*") if path.is_dir() and path.name[5:].isdecimal())
    torn = [path for path in found if not (path / "state.json").exists()]
    for path in [*torn, *[path for path in found if path not in torn and _is_of(path, run)][:-count]]:
        if path != also:
            remove_checkpoint(path)


def _is_of(directory: Path, run: str) -> bool:
    try:
        return bool(read_sealed(directory / "state.json").get("run") == run)
    except InputError:
        return False


def split(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A state of nested mappings as JSON values and, by JSON pointer without its first "/" (RFC 6901), tensors."""
    plain: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        place = key.replace("~", "~0").replace("/", "~1")
        if isinstance(value, Tensor):
            tensors[place] = value
        elif isinstance(value, Mapping):
            plain[key], inner = split(value)
            tensors |= {f"{place}/{path}": tensor for path, tensor in inner.items()}
        else:
            plain[key] = value
    return plain, tensors


def joined(plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The inverse of `split`. Raises KeyError or TypeError where the two do not belong together."""
    state = copy.deepcopy(dict(plain))
    for path, tensor in tensors.items():
        *above, last = (place.replace("~1", "/").replace("~0", "~") for place in path.split("/"))
        inner = state
        for key in above:
            inner = inner[key]
        inner[last] = tensor
    return state


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as "parameter:key" -> tensor."""
    return {
        f"{name}:{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
    origin: str = "the checkpoint",
) -> None:
    """The inverse of `optimizer_tensors`; counters of zero dimensions stay on the CPU, as torch keeps them.

    Raises InputError, which names `origin` and a tensor, for state of no parameter or of another shape.
    """
    parameters = dict(model.named_parameters())
    for owner in {name.rpartition(":")[0] for name in tensors}:
        missing = next((key for key in STATE if f"{owner}:{key}" not in tensors), None)
        if owner not in parameters or missing is not None:
            raise InputError(f"{origin} does not fit the optimizer: {owner}:{missing or '*'} is in only one of them")
    for name, tensor in tensors.items():
        owner, _, key = name.rpartition(":")
        parameter = parameters[owner]
        if tensor.dim() and tensor.shape != parameter.shape:
            raise InputError(f"{origin}: {name} is {tuple(tensor.shape)}, its parameter {tuple(parameter.shape)}")
        optimizer.state[parameter][key] = tensor.to(parameter.device) if tensor.dim() else tensor.clone()
