"""What `from_pretrained` does for a model that was stored sparse."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsae.config.unit import Quota
from sparsae.core.topology import Topology, index_dtype
from sparsae.errors import InputError
from sparsae.files import is_whole, sha256_of
from sparsae.nn.conversion import dense_places, sparse_twin
from sparsae.nn.kinds.kind import KINDS, Kind
from sparsae.nn.linear import SparseLinear, sparse_layers
from sparsae.nn.names import modules_by_name
from sparsae.nn.sparsify import put_in_place
from sparsae.nn.stored import FORMAT


class Facts(NamedTuple):
    """What is told of a layer."""

    nnz: int
    unit: tuple[int, int]
    quota: Quota | None


class Stored:
    """What `config.json` tells of a model that was stored sparse.

    layers: facts by the names of the sparse layers. files: SHA-256 of the files of weights, by their names.
    """

    def __init__(self, table: Mapping[str, Any]) -> None:
        """Raises InputError for a table of another format, and for one that is not as it was saved."""
        if table.get("format") != FORMAT:
            raise InputError(
                f"config.json: quantization_config has format {table.get('format')}, and this version of sparsae reads "
                f"{FORMAT}: install the version that wrote it"
            )
        if not is_whole(table):
            raise InputError("config.json: quantization_config was changed since it was saved; the file is damaged")
        self.layers: dict[str, Facts] = {
            name: Facts(entry["nnz"], tuple(entry["unit"]), Quota.parse(entry["quota"]) if "quota" in entry else None)
            for name, entry in table["layers"].items()
        }
        self.files: dict[str, str] = table["files"]

    def require_files(self, files: Sequence[str]) -> None:
        """Raises InputError where files of weights are not those that were saved."""
        paths = {Path(file).name: Path(file) for file in files}
        for name in sorted(paths.keys() ^ self.files.keys()):
            where = paths.get(name, name)
            raise InputError(f"{where}: is only one of what was found and what config.json names; a file is damaged")
        for name, path in paths.items():
            if not path.is_file() or sha256_of(path) != self.files[name]:
                raise InputError(f"{path}: is missing or was changed since it was saved; the file is damaged")

    def make_room(self, model: Any) -> None:
        """Put layers for what will be loaded, on the meta device, in the places of a model's dense ones.

        The model may be the base of what was saved, or have another head. Raises InputError where a layer that was
        sparse cannot be, and where none is found.
        """
        wanted, targets = self._in(model)

        def make(name: str, matrix_OI: Tensor, kind: Kind) -> SparseLinear:
            nnz, unit, quota = wanted[name]
            rows, columns = matrix_OI.shape
            units, count = rows * columns // math.prod(unit), nnz // math.prod(unit)
            if rows % unit[0] or columns % unit[1] or count > units:
                raise InputError(
                    f"layer {name} is {rows}x{columns}, which does not hold {nnz} weights in units of "
                    f"{unit[0]}x{unit[1]}: the model and config.json do not belong together"
                )
            indices = torch.empty(count, dtype=index_dtype(units), device="meta")
            topology = Topology((rows, columns), indices, unit)
            values = torch.empty(topology.values_shape, dtype=matrix_OI.dtype, device="meta")
            return SparseLinear(topology, values, kind=kind, quota=quota)

        put_in_place(model, targets, {name: sparse_twin(name, module, make) for name, module in targets.items()})

    def _in(self, model: Any) -> tuple[dict[str, Facts], dict[str, nn.Module]]:
        """Facts by the names that the layers have in this model, and the dense modules that become sparse."""
        modules, prefix = modules_by_name(model), f"{model.base_model_prefix}."
        able = {n: m for n, m in modules.items() if (k := KINDS.claiming(m)) is not None and k.refusal(m) is None}
        places, wanted = dense_places(able), {}
        for name, facts in self.layers.items():
            names = (name, prefix + name, name.removeprefix(prefix))
            own = next((known for known in names if known in places), None)
            if own is not None:
                wanted[own] = facts
            elif (other := next((modules[known] for known in names if known in modules), None)) is not None:
                kind = KINDS.claiming(other)
                why = (kind and kind.refusal(other)) or f"{type(other).__name__} is of no known kind"
                raise InputError(f"layer {name} was saved sparse, and cannot be sparse here: {why}")
        chosen = {id(places[name].module) for name in wanted}
        targets = {name: module for name, module in able.items() if id(module) in chosen}
        if lacking := sorted(dense_places(targets).keys() - wanted.keys()):
            raise InputError(f"layer {lacking[0]} was not saved: the model and config.json do not belong together")
        if self.layers and not wanted:
            raise InputError(
                f"{type(model).__name__} has none of the sparse layers that were saved, such as "
                f"{next(iter(self.layers))}: load the model as the class that it was saved from"
            )
        return wanted, targets


def take_over_topologies(model: nn.Module) -> None:
    """After the tensors were loaded: the layers' topologies. Raises InputError for indices that are none."""
    for name, layer in sparse_layers(model).items():
        try:
            layer.prepare()
        except InputError as error:
            raise InputError(f"layer {name}: {error}; the file of weights is damaged") from None
