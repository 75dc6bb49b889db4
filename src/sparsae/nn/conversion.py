"""Between dense modules and what takes their places: sparse layers, and modules that hold some. See nn/kinds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsae.config.unit import Quota
from sparsae.core.randomness import generator
from sparsae.core.topology import Topology
from sparsae.errors import InputError
from sparsae.nn.carry import carry_module, carry_parameter, own_names
from sparsae.nn.dense import gathered, scattered
from sparsae.nn.kinds.kind import KINDS, Kind, kind_in, parameter_of
from sparsae.nn.kinds.linear import Linear
from sparsae.nn.linear import SparseLinear
from sparsae.nn.names import below, modules_by_name
from sparsae.optimizer_state import Successor

# Values for a new layer: (name, topology, generator) -> tensor of topology.values_shape.
Initializer = Callable[[str, Topology, torch.Generator], Tensor]


@dataclass(frozen=True)
class Maker:
    """Makes the sparse layers of a model, by name."""

    topologies: Mapping[str, Topology]
    initializer: Initializer | None
    backend: str
    seed: int
    quota: Quota | None = None

    def __call__(self, name: str, matrix_OI: Tensor, kind: Kind) -> SparseLinear:
        topology = self.topologies[name]
        if self.initializer is not None:
            values = self._initial(name, topology)
            if not matrix_OI.is_meta:
                values = values.to(matrix_OI.device, matrix_OI.dtype)
                topology = topology.to(matrix_OI.device)
        else:
            topology = topology.to(matrix_OI.device)
            values = gathered(_present(name, matrix_OI), topology)
        return SparseLinear(topology, values, backend=self.backend, kind=kind, quota=self.quota)

    def _initial(self, name: str, topology: Topology) -> Tensor:
        assert self.initializer is not None
        values: object = self.initializer(name, topology, generator(self.seed, "values", name))
        shape = topology.values_shape
        if not isinstance(values, Tensor) or values.shape != shape or not values.is_floating_point():
            what = f"{values.dtype} of {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
            raise InputError(f"initializer: must give layer {name} floating-point values of {shape}, not {what}")
        return values


def sparse_twin(name: str, module: nn.Module, make: Callable[[str, Tensor, Kind], SparseLinear]) -> nn.Module:
    """What takes the place of a dense module; make: gives each of its layers, by name, dense matrix and kind."""
    kind, layers = KINDS.of(module), dict[str, SparseLinear]()
    for weight in kind.weights:
        parameter = parameter_of(module, weight)
        for part, matrix_OI in kind.split(weight, parameter.detach().contiguous()).items():
            full = below(name, part)
            layers[part] = make(full, matrix_OI, Linear() if part else kind)
            carry_parameter(full, parameter, layers[part].values)
    twin = kind.hold(module, layers)
    carry_module(name, module, twin, own_names(kind.release(twin)), _names_of(twin, kind))
    return twin


@dataclass(frozen=True)
class DensePlace:
    """Where the matrix of a layer lies in a dense module."""

    module: nn.Module
    weight: str
    part: str

    @property
    def matrix(self) -> Tensor:
        """(out, in), a view of the weight, which becomes contiguous where it is not."""
        parameter = parameter_of(self.module, self.weight)
        if not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()
        return self._split(parameter.data)

    @property
    def shape(self) -> torch.Size:
        """That of the matrix."""
        weight = parameter_of(self.module, self.weight)
        return self._split(torch.empty(weight.shape, dtype=weight.dtype, device="meta")).shape

    def _split(self, weight: Tensor) -> Tensor:
        return KINDS.of(self.module).split(self.weight, weight)[self.part]


def dense_places(modules: Mapping[str, nn.Module]) -> dict[str, DensePlace]:
    """Where the layers lie that modules become, by the layers' names."""
    return {
        below(name, part): DensePlace(module, weight, part)
        for name, module in modules.items()
        for kind in (KINDS.of(module),)
        for weight in kind.weights
        for part in kind.parts(weight)
    }


def dense_matrices(targets: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The (out, in) weights of the layers that modules become. Raises InputError for one on the meta device."""
    found = {}
    for name, module in targets.items():
        kind = KINDS.of(module)
        for weight in kind.weights:
            for part, matrix_OI in kind.split(weight, parameter_of(module, weight).detach().contiguous()).items():
                full = below(name, part)
                found[full] = _present(full, matrix_OI)
    return found


def _present(name: str, matrix_OI: Tensor) -> Tensor:
    if matrix_OI.is_meta:
        raise InputError(f"layer {name} is on the meta device: its values need an initializer, and random positions")
    return matrix_OI


def to_sparse(name: str, dense: nn.Module, twin: nn.Module) -> Iterator[tuple[str, Successor]]:
    """What succeeds each weight of a module."""
    kind: Kind = twin.kind  # type: ignore[assignment]
    layers: Mapping[str, Any] = kind.layers(twin)
    for weight in kind.weights:
        parts = kind.parts(weight)

        def carry(tensors: list[Tensor], weight: str = weight) -> list[Tensor]:
            matrices = kind.split(weight, tensors[0].contiguous()).items()
            return [gathered(m, layers[part].topology.to(m.device)) for part, m in matrices]

        new, names = [layers[part].values for part in parts], [below(part, "values") for part in parts]
        yield _label(name, kind, weight), Successor([parameter_of(dense, weight)], new, carry, ([weight], names))


def to_dense(name: str, twin: nn.Module, dense: nn.Module) -> Iterator[tuple[str, Successor]]:
    """What succeeds the values of a module's layers."""
    kind: Kind = twin.kind  # type: ignore[assignment]
    layers: Mapping[str, Any] = kind.layers(twin)
    for weight in kind.weights:
        parts = kind.parts(weight)

        def carry(tensors: list[Tensor], weight: str = weight, parts: Sequence[str] = parts) -> list[Tensor]:
            matrices = {
                part: scattered(tensor, layers[part].topology.to(tensor.device))
                for part, tensor in zip(parts, tensors, strict=True)
            }
            return [kind.join(weight, matrices).contiguous()]

        old, names = [layers[part].values for part in parts], [below(part, "values") for part in parts]
        yield _label(name, kind, weight), Successor(old, [parameter_of(dense, weight)], carry, (names, [weight]))


def _label(name: str, kind: Kind, weight: str) -> str:
    """What a module's weight is called in messages: as the module, where it is the only one."""
    return name if len(kind.weights) == 1 else below(name, weight)


def dense_twin(name: str, twin: nn.Module) -> nn.Module:
    kind: Kind = twin.kind  # type: ignore[assignment]
    layers: Mapping[str, Any] = kind.layers(twin)
    dense = kind.release(twin)
    reserved = own_names(dense)
    for weight in kind.weights:
        values = {part: layers[part].values for part in kind.parts(weight)}
        matrices = {part: layers[part].dense_weight() for part in values}
        parameter = nn.Parameter(kind.join(weight, matrices).contiguous())
        if len({tensor.requires_grad for tensor in values.values()}) > 1:
            raise InputError(
                f"some layers of {below(name, weight)} are frozen, which are one parameter: freeze all or none"
            )
        for part in values:
            carry_parameter(below(name, part), values[part], parameter)
        setattr(dense, weight, parameter)
    carry_module(name, twin, dense, _names_of(twin, kind), reserved)
    return dense


def sparse_modules(model: nn.Module) -> dict[str, nn.Module]:
    """What took the places of dense modules, by plain name: sparse layers, and modules that hold some."""
    modules = modules_by_name(model)
    kinds = {name: kind for name, module in modules.items() if (kind := kind_in(module)) is not None}
    held = {id(layer) for name, kind in kinds.items() for part, layer in kind.layers(modules[name]).items() if part}
    return {name: modules[name] for name in kinds if id(modules[name]) not in held}


def _names_of(twin: nn.Module, kind: Kind) -> frozenset[str]:
    """The attributes, parameters and children that are of a sparse module's own."""
    if (names := kind.own_names(twin)) is not None:
        return names
    topology = Topology((1, 1), torch.zeros(1, dtype=torch.int32, device="cpu"), (1, 1))
    return own_names(SparseLinear(topology, torch.zeros(1, dtype=torch.float32, device="cpu")))
