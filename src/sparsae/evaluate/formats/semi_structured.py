"""A run's model for GPUs that multiply 2:4-sparse matrices: two of every four weights and their places, torch's form.

    config.json                      of transformers, beside the tokenizer's files
    semi-structured.json             the packed layers, the precision, and the SHA-256 of every other file; sealed
    semi-structured.safetensors      NAME.packed (out, in / 2) and NAME.meta (out, in / 16), int16, of each packed layer
                                     NAME; every other tensor by its own name

They are the two tensors of `torch.sparse.SparseSemiStructuredTensorCUTLASS`. A layer fits whose weights are at most two
of every four consecutive inputs: 2:4, 1:4, 2:8 and the like. The packing needs no GPU, the products do; on a CPU the
weights are unpacked, exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparsae.config.unit import Quota
from sparsae.core.groups import Groups
from sparsae.errors import InputError
from sparsae.evaluate.formats.header import read_header
from sparsae.files import sha256_of, write_sealed
from sparsae.models import fold_attention_scale
from sparsae.nn.linear import SparseLinear, sparse_layers
from sparsae.nn.names import modules_by_name
from sparsae.nn.sparsify import densify
from sparsae.nn.tensors import model_tensors

if TYPE_CHECKING:
    from sparsae.evaluate.loading import LoadedRun

NAME = "semi-structured.json"
FORMAT = 1
PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_TENSORS = "semi-structured.safetensors"  # a name that transformers does not look for: it would draw random weights
_TWO_OF_FOUR = Quota(2, 4)
_MULTIPLES = (32, 64)  # what torch's kernels want outputs and inputs of a layer to be multiples of


def write_semi_structured(loaded: LoadedRun, directory: Path, precision: str) -> None:
    """Into an empty directory.

    Raises InputError for a model with a layer that does not fit, OSError or SafetensorError where it cannot be written.
    """
    model: Any = loaded.model.cpu()
    layers = sparse_layers(model)
    if not layers:
        raise InputError("--format semi-structured: is for sparse models, and this one is dense")
    for name, layer in layers.items():
        if problem := _misfit(layer):
            raise InputError(f"--format semi-structured: layer {name} {problem}")
    fold_attention_scale(model)
    dtype, stored, table = PRECISIONS[precision], dict[str, Tensor](), dict[str, dict[str, Any]]()
    for name, layer in layers.items():
        weight_OI = layer.dense_weight().to(dtype)
        stored[f"{name}.packed"], stored[f"{name}.meta"] = packed(weight_OI)
        table[name] = {"shape": list(weight_OI.shape), "transposed": _is_transposed(layer)}
    densify(model)
    if unknown := sorted(layers.keys() - modules_by_name(model).keys()):
        raise InputError(f"--format semi-structured: layer {unknown[0]} is a part of a larger weight, not a layer")
    for name, tensor in model_tensors(model).items():
        if name.removesuffix(".weight") not in layers:
            # Matrices are rounded, vectors (biases, norms) are not.
            stored[name] = tensor.to(dtype) if tensor.is_floating_point() and tensor.dim() > 1 else tensor
    if overflown := [name for name, tensor in stored.items() if tensor.is_floating_point() and not _finite(tensor)]:
        raise InputError(f"--precision {precision}: {overflown[0]} has values that it does not hold: take bfloat16")
    save_file({name: tensor.detach().contiguous() for name, tensor in stored.items()}, directory / _TENSORS)
    model.config.save_pretrained(directory)
    loaded.tokenizer.save(directory, loaded.config.model.context)
    files = {file.name: sha256_of(file) for file in sorted(directory.iterdir()) if file.is_file()}
    write_sealed(directory / NAME, {"format": FORMAT, "precision": precision, "layers": table, "files": files})


def load_semi_structured(path: Path | str, device: torch.device | str = "cpu") -> Any:
    """The transformers model of such an export, in its precision, in evaluation mode.

    On a CUDA device the packed layers are `nn.Linear` with a `SparseSemiStructuredTensor` as weight: as it is stored
    for CUTLASS, whose kernels in torch serve compute capability 8.x, and on other devices as cuSPARSELt packs it anew.
    On any other device they are what they are in the model, dense.

    Raises InputError where a file is missing, damaged, or of another version.
    """
    path, device = Path(path), torch.device(device)
    content = read_header(path / NAME, FORMAT)
    layers, dtype = content["layers"], PRECISIONS[content["precision"]]
    try:
        stored = load_file(path / _TENSORS)
        pairs = {name: (stored.pop(f"{name}.packed"), stored.pop(f"{name}.meta")) for name in layers}
    except (SafetensorError, OSError, KeyError) as error:
        raise InputError(f"{path / _TENSORS}: cannot be read: {error}") from None
    for name, layer in layers.items():
        weight_OI = unpacked(*pairs[name])
        stored[f"{name}.weight"] = weight_OI.T.contiguous() if layer["transposed"] else weight_OI
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    config = AutoConfig.from_pretrained(path)
    architecture: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model = architecture.from_pretrained(None, config=config, state_dict=stored, dtype=dtype)
    model.requires_grad_(False).eval()
    return model.to(device) if device.type != "cuda" else _on_cuda(model, pairs, layers, device)


def packed(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """The values and the metadata of a matrix with at most two of every four, as CUTLASS wants them."""
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

    values, meta = sparse_semi_structured_from_dense_cutlass(weight_OI)
    return values, meta


def unpacked(values: Tensor, meta: Tensor) -> Tensor:
    """The inverse of `packed`: (out, in)."""
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass

    dense: Tensor = sparse_semi_structured_to_dense_cutlass(values, meta)
    return dense


def _is_transposed(layer: SparseLinear) -> bool:
    """Whether the dense weight of a linear layer lies (in, out)."""
    return layer.kind.weight_shape((1, 2)) == (2, 1)


def _misfit(layer: SparseLinear) -> str | None:
    """Why a layer cannot be packed, all of it, since each may want another training; None: it can."""
    if not layer.kind.is_linear:
        return "is no linear layer"
    return ", and ".join(filter(None, (_too_full(layer), _odd_sides(layer)))) or None


def _too_full(layer: SparseLinear) -> str | None:
    if layer.unit != (1, 1):
        return f"has units of {layer.unit_name}: train with sparsity.unit=2:4"
    if layer.in_features % _TWO_OF_FOUR.of:
        return None  # there are no groups of 4 to count
    groups = Groups.of_quota(layer.topology.grid, _TWO_OF_FOUR)
    fuller = int((groups.counts(layer.topology.indices) > groups.most).count_nonzero())
    if not fuller:
        return None
    return (
        f"has more than 2 weights in {fuller:,} of {groups.count:,} groups of 4: train with sparsity.unit=2:4 (or 1:4, "
        "2:8, ...)"
    )


def _odd_sides(layer: SparseLinear) -> str | None:
    sides = layer.out_features, layer.in_features
    if not any(side % multiple for side, multiple in zip(sides, _MULTIPLES, strict=True)):
        return None
    wanted = " and ".join(map(str, _MULTIPLES))
    return f"has {sides[0]} outputs and {sides[1]} inputs, which have to be multiples of {wanted}"


def _on_cuda(
    model: Any,
    pairs: Mapping[str, tuple[Tensor, Tensor]],
    layers: Mapping[str, Mapping[str, Any]],
    device: torch.device,
) -> Any:
    """The model there, its packed layers multiplied sparse."""
    modules = modules_by_name(model)
    for name in layers:  # whose dense weights shall not go there
        modules[name].weight = nn.Parameter(torch.empty(0, dtype=model.dtype, device="cpu"), requires_grad=False)
    model.to(device)
    for name, layer in layers.items():
        (rows, columns), bias = layer["shape"], modules[name].bias
        values, meta = (tensor.to(device) for tensor in pairs[name])
        linear = nn.Linear(columns, rows, bias=False, device="meta", dtype=values.dtype)
        linear.weight = nn.Parameter(semi_structured(values, meta), requires_grad=False)
        linear.bias = bias  # type: ignore[assignment]
        model.set_submodule(name, linear.eval())
    return model


def semi_structured(values: Tensor, meta: Tensor) -> Any:
    """The (out, in) matrix as a tensor that torch multiplies sparse, on the device of what it is packed into."""
    from torch.sparse import SparseSemiStructuredTensorCUTLASS, to_sparse_semi_structured

    if values.is_cuda and torch.cuda.get_device_capability(values.device)[0] != 8:
        return to_sparse_semi_structured(unpacked(values, meta))
    shape = torch.Size((values.shape[0], 2 * values.shape[1]))
    return SparseSemiStructuredTensorCUTLASS(
        shape, packed=values, meta=meta, packed_t=None, meta_t=None, compressed_swizzled_bitmask=None
    )


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())
