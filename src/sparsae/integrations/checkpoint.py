"""A Companion's state in the folder of a checkpoint that a trainer writes: JSON and safetensors, sealed.

The trainer's own files have the model; which of them belongs to this state is told by the values of its sparse layers.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import nn

from sparsae.errors import InputError
from sparsae.files import read_sealed
from sparsae.integrations.companion import Companion
from sparsae.nn.linear import sparse_layers
from sparsae.runs.checkpoint import joined, load_groups, remove_checkpoint, split, write_whole
from sparsae.runs.directory import CHECKPOINT_FORMAT

FOLDER = "sparsae"


def save(companion: Companion, model: nn.Module, checkpoint: Path) -> None:
    """Write the state into a folder of the checkpoint, whole or not at all. Raises InputError where it cannot be."""
    folder = checkpoint / FOLDER
    plain, tensors = split(companion.state_dict())
    # Safetensors takes no two names of one memory, which a teacher's indices have with the student's.
    copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}

    def make_way() -> None:
        if folder.exists():
            remove_checkpoint(folder)

    write_whole(folder, {"state": copies}, {"companion": plain, "values": _digests(model)}, make_way)


def load(companion: Companion, model: nn.Module, checkpoint: Path) -> None:
    """Give a Companion, and the model that was loaded before, the state that it had.

    Raises InputError where there is none, where it is damaged, and where it belongs to another model.
    """
    folder = checkpoint / FOLDER
    if not folder.is_dir():
        raise InputError(
            f"{checkpoint} has no folder {FOLDER}: it was written without SparsaeCallback, or by another training; "
            "go on from a checkpoint that has one, or begin a new training with its model"
        )
    state = read_sealed(folder / "state.json")
    if state.get("format") != CHECKPOINT_FORMAT:
        raise InputError(f"{folder} has format {state.get('format')}: this version reads format {CHECKPOINT_FORMAT}")
    tensors = load_groups(folder, state["files"])["state"]
    own = _digests(model)
    if other := sorted(
        name for name in own.keys() | state["values"].keys() if own.get(name) != state["values"].get(name)
    ):
        raise InputError(
            f"{folder} is of another model: the values of {other[0]} are not those that it was written with; "
            "go on from the checkpoint that the model was loaded from"
        )
    device = next(iter(sparse_layers(model).values())).values.device
    try:
        companion.load_state_dict(joined(state["companion"], {n: t.to(device) for n, t in tensors.items()}))
    except InputError as error:  # which knows of no file
        raise InputError(f"{folder} does not fit this training: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{folder} does not fit this training: {error!r}") from None


def _digests(model: nn.Module) -> dict[str, str]:
    """By sparse layer, what no other values have."""
    found = {}
    for name, layer in sparse_layers(model).items():
        content = layer.values.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        found[name] = hashlib.blake2b(content, digest_size=8).hexdigest()
    return found
