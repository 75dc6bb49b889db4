"""The tensors of a model by plain name (see `names`), and back into a model whose topologies may be others."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparsae.core.shards import spread
from sparsae.errors import InputError
from sparsae.nn.linear import SparseLinear, sparse_layers
from sparsae.nn.names import full_names, innermost


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, each once however it is tied, and the buffers that belong to the state; none of a wrapper's own."""
    return {plain: tensor for plain, _, tensor in _named(innermost(model))}


def load_model(model: nn.Module, tensors: Mapping[str, Tensor], origin: str = "the checkpoint") -> None:
    """Into a model of the same architecture, any topologies; each rank gives all of what the model has in parts.

    Raises InputError, which names `origin` and a tensor, where names, shapes or dtypes do not fit, or indices are none.
    """
    model = innermost(model)
    named = _named(model)
    wanted, given = {plain for plain, _, _ in named}, set(tensors)
    if wanted != given:
        name = sorted(wanted ^ given)[0]
        raise InputError(f"{origin} does not fit the model: {name} is in only one of them")
    layers = sparse_layers(model)
    sparse = tuple(f"{name}." for name in layers)
    for name, _, own in named:
        if not name.endswith(".indices"):
            if tensors[name].dtype != own.dtype:
                raise InputError(f"{origin} does not fit the model: {name} is {tensors[name].dtype}, not {own.dtype}")
            if not (name.startswith(sparse) and name.endswith(".values")) and tensors[name].shape != own.shape:
                raise InputError(
                    f"{origin} does not fit the model: {name} is {tuple(tensors[name].shape)}, not {tuple(own.shape)}"
                )
    for name, layer in layers.items():
        _require_sparse(name, layer, tensors, origin)
    model.load_state_dict({full: spread(tensors[plain], own) for plain, full, own in named}, strict=False)


def _named(model: nn.Module) -> list[tuple[str, str, Tensor]]:
    """(plain name, name in the state dict, tensor) of each."""
    plain_names = {full: plain for plain, full in full_names(model).items()}
    found, seen = [], set()
    for key, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor) or id(tensor) in seen:  # extra state is none; tied parameters have two names
            continue
        if isinstance(tensor, nn.Parameter):
            seen.add(id(tensor))
        owner, _, last = key.rpartition(".")
        owner = plain_names.get(owner, owner)  # some wrappers take their name out of the key themselves
        found.append((f"{owner}.{last}" if owner else last, key, tensor))
    return found


def _require_sparse(name: str, layer: SparseLinear, tensors: Mapping[str, Tensor], origin: str) -> None:
    indices, values = tensors[f"{name}.indices"], tensors[f"{name}.values"]
    units = layer.topology.units
    if indices.dtype not in (torch.int32, torch.int64) or indices.dim() != 1:
        raise InputError(f"{origin}: {name}.indices is {indices.dtype} {tuple(indices.shape)}, no list of units")
    inside = not indices.numel() or bool(indices[0] >= 0 and indices[-1] < units)
    if not inside or not bool((indices[1:] > indices[:-1]).all()):
        raise InputError(f"{origin}: {name}.indices are not numbers of {units:,} units in ascending order")
    block = () if layer.unit == (1, 1) else layer.unit
    if tuple(values.shape) != (indices.numel(), *block):
        raise InputError(f"{origin}: {name}.values is {tuple(values.shape)}, not {(indices.numel(), *block)}")
