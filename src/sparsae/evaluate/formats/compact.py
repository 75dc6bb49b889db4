"""A run's model in few bytes, for rest and transport: about three a weight of a sparse layer.

    compact.json        settings, the layers' shapes and codes, and the SHA-256 of every other file; sealed
    model.safetensors   NAME.values (bfloat16 or float32) and NAME.positions (bytes, see `positions`) of each sparse
                        layer NAME; every other tensor by its own name
    tokenizer/

Everything that reads a run's model reads this one: the layers are sparse again. In float32 it is the same bit for bit;
in bfloat16 matrices are rounded to 8 significant bits, vectors (biases, norms) are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsae.config.schema import Config
from sparsae.core.topology import index_dtype
from sparsae.errors import InputError
from sparsae.evaluate.formats.header import read_header
from sparsae.evaluate.formats.positions import Code, decode, encode
from sparsae.files import sha256_of, write_sealed
from sparsae.nn.linear import sparse_layers
from sparsae.nn.tensors import model_tensors

if TYPE_CHECKING:
    from sparsae.evaluate.loading import LoadedRun

NAME = "compact.json"
FORMAT = 1
PRECISIONS = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_TENSORS = "model.safetensors"


@dataclass(frozen=True, eq=False)
class Compact:
    """What a compact export holds: the tensors of a model of these settings, as `load_model` takes them."""

    config: Config
    tensors: dict[str, Tensor]
    tokenizer: Path
    step: int
    corpus: str
    teacher: bool


def write_compact(loaded: LoadedRun, directory: Path, precision: str, teacher: bool) -> None:
    """Into an empty directory; teacher: whether the model is the run's teacher.

    Raises OSError or SafetensorError where it cannot be written.
    """
    stored, layers = {}, {}
    tensors = {name: tensor.detach().cpu() for name, tensor in model_tensors(loaded.model).items()}
    for name, layer in sparse_layers(loaded.model).items():
        topology = layer.topology
        code, data = encode(tensors.pop(f"{name}.indices").numpy().astype(np.int64), topology.units)
        stored[f"{name}.positions"] = torch.from_numpy(data)
        stored[f"{name}.values"] = tensors.pop(f"{name}.values").to(PRECISIONS[precision])
        layers[name] = {"units": topology.units, "code": code}
    for name, tensor in tensors.items():
        stored[name] = tensor.to(PRECISIONS[precision]) if tensor.is_floating_point() and tensor.dim() > 1 else tensor
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, directory / _TENSORS)
    loaded.tokenizer.save(directory / "tokenizer")
    write_sealed(
        directory / NAME,
        {
            "format": FORMAT,
            "config": loaded.config.model_dump(mode="json"),
            "step": loaded.step,
            "corpus": loaded.corpus,
            "teacher": teacher,
            "layers": layers,
            "files": {
                file.relative_to(directory).as_posix(): sha256_of(file)
                for file in sorted(directory.rglob("*"))
                if file.is_file()
            },
        },
    )


def is_compact(path: Path) -> bool:
    """Whether this is the directory of a compact export."""
    return (path / NAME).is_file()


def read_compact(path: Path) -> Compact:
    """What `write_compact` wrote. Raises InputError where a file is missing, damaged, or of another version."""
    content = read_header(path / NAME, FORMAT)
    try:
        config = Config.model_validate(content["config"])
        stored = load_file(path / _TENSORS)
        tensors = _unpacked(stored, content["layers"])
    except (ValidationError, SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a compact export that this version reads: {_line(error)}") from None
    return Compact(config, tensors, path / "tokenizer", int(content["step"]), content["corpus"], content["teacher"])


def _unpacked(stored: dict[str, Tensor], layers: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    tensors = {}
    for name, layer in layers.items():
        units, code = int(layer["units"]), layer["code"]
        if code not in get_args(Code):
            raise ValueError(f"no code is called {code!r}")
        positions = decode(code, stored.pop(f"{name}.positions").numpy(), units)
        tensors[f"{name}.indices"] = torch.from_numpy(positions).to(index_dtype(units))
    rest = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in stored.items()}
    return tensors | rest


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
