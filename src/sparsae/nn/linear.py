"""A linear layer that owns an index set and a vector of values, and nothing of the size of a dense weight."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.jit._trace import is_tracing
from torch.nn import functional

from sparsae.config.unit import Quota, unit_name
from sparsae.core.shards import is_sharded
from sparsae.core.topology import Topology
from sparsae.errors import InputError
from sparsae.kernels.backend import Layout
from sparsae.kernels.function import sparse_linear
from sparsae.kernels.probe import new_key, note_forward, open_probe
from sparsae.kernels.registry import BACKENDS, choose_backend
from sparsae.kernels.structures import CHANGED, key_and_layout, multiplied, poisoned, same_indices
from sparsae.nn.indices import quota_problem, validated
from sparsae.nn.kinds.kind import Kind
from sparsae.nn.kinds.linear import Linear
from sparsae.nn.names import modules_by_name
from sparsae.nn.resharding import overwrite
from sparsae.nn.tracing import by_operators, in_autocast, is_exporting, is_traced, transformed, unwrapped, watched
from sparsae.nn.weight import DenseView


class Prepared(NamedTuple):
    """What a layer multiplies with, made from the index tensor `source`; see kernels/structures.py."""

    source: Tensor
    topology: Topology
    backend: str
    structures: list[Tensor]

    @property
    def layout(self) -> Layout:
        """The active units as the backend gets them."""
        _, indices, *derived = self.structures
        return Layout(self.topology.shape, self.topology.unit, indices, derived)


class SparseLinear(nn.Module):
    """y = x W^T + b with W zero outside a topology: takes and returns what `nn.Linear` does.

    values: parameter of shape (nnz,), or (count, b_out, b_in) for blocks, in the order of `topology.indices`. bias:
    (out,) or None. indices: buffer, a copy of `topology.indices`, for state dicts; whoever puts another tensor in its
    place changes the topology, whoever writes another topology into it is refused by the next forward pass. Under
    autocast the product is computed in the autocast dtype. kind: what the layer stands for, where that is no
    `nn.Linear`: how inputs become rows of features, and how the dense weight lies (see nn/kinds). quota: what every
    topology of the layer keeps, of single weights.
    """

    indices: Tensor

    def __init__(
        self,
        topology: Topology,
        values: Tensor,
        bias: Tensor | None = None,
        *,
        backend: str = "auto",
        kind: Kind = Linear(),
        quota: Quota | None = None,
    ) -> None:
        """Raises ValueError where values or bias do not have the topology's shape, or that does not keep the quota.

        Raises InputError for a backend that does not exist or refuses this layer.
        """
        super().__init__()
        if bias is not None and tuple(bias.shape) != topology.shape[:1]:
            raise ValueError(f"bias has shape {tuple(bias.shape)}, not ({topology.shape[0]},)")
        self.out_features, self.in_features = topology.shape
        self.unit = topology.unit
        self.backend = backend
        self.kind = kind
        self.quota = quota
        if problem := quota_problem(topology, quota):
            raise ValueError(problem)
        self.values = nn.Parameter(values)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.register_buffer("indices", topology.indices)
        self._prepared: Prepared | None = None
        # Held while a topology is changed, and while a pass takes what it multiplies with.
        self.lock = threading.RLock()
        self.set_topology(topology, values)

    @property
    def topology(self) -> Topology:
        """The active units, on the device of the indices."""
        return self.prepare().topology

    @property
    def unit_name(self) -> str:
        """What people call its unit: 1x1, 4x4, 2:4."""
        return unit_name(self.unit, self.quota)

    @property
    def kernel(self) -> str:
        """The name of the backend that serves this layer."""
        return self.prepare().backend

    @property
    def layout(self) -> Layout:
        """The active units as the backend gets them."""
        return self.prepare().layout

    @property
    def key(self) -> Tensor:
        """What probes know this layer with its present topology by."""
        return self.prepare().structures[0]

    @property
    def index_tensors(self) -> list[Tensor]:
        """All tensors that describe the topology: the buffer, and what the kernels read."""
        return [self.indices, *self.prepare().structures[1:]]

    @property
    def weight(self) -> Tensor:
        """The dense weight as the dense layer has it, to read: see nn/weight.py. Writing raises."""

        def build() -> Tensor:
            return self.kind.join("weight", {"": self.matrix()}).contiguous()

        if is_traced() or transformed():
            return build()
        shape = self.kind.weight_shape((self.out_features, self.in_features))
        return DenseView(build, shape, self.values, requires_grad=self.values.requires_grad)

    @weight.setter
    def weight(self, value: object) -> None:
        raise AttributeError(
            "the weight of a sparse layer cannot be set: write its values, or make it dense first (sparsae.densify)"
        )

    def set_topology(self, topology: Topology, values: Tensor) -> None:
        """Take over a topology and its values, keeping the parameter object and dropping its gradient.

        Values of a layer that is sharded over ranks lie as the layer's do, or are whole on each rank.

        For `surgery` and for loading only: optimizer state and teacher do not follow by themselves.
        """
        if tuple(values.shape) != topology.values_shape:
            raise ValueError(f"values have shape {tuple(values.shape)}, the topology wants {topology.values_shape}")
        if values.is_inference():
            with torch.inference_mode(False):
                values = values.clone()
        indices = topology.view("copy", lambda t: [t.indices.clone()])[0]
        prepared = self._structured(indices, topology)
        with self.lock:
            if self._prepared is not None:
                # Autograd keeps the key with a graph, and refuses gradients of the old topology's values from now on.
                self._prepared.structures[0].fill_(-1)
            self._install(prepared, values)

    @contextmanager
    def trying(self, topology: Topology, values: Tensor) -> Iterator[None]:
        """With another topology and other values inside; afterwards everything is as before, but for the gradient."""
        # What is sharded stays in its memory, where FSDP looks for it.
        held = self.values.data.clone() if is_sharded(self.values) else self.values.data
        before = self.prepare(), held
        indices = topology.view("copy", lambda t: [t.indices.clone()])[0]
        tried = self._structured(indices, topology)
        self._install(tried, values)
        try:
            yield
        finally:
            tried.structures[0].fill_(-1)
            self._install(*before)

    def _install(self, prepared: Prepared, values: Tensor) -> None:
        with self.lock:
            self.values.grad = None
            if is_sharded(self.values):
                overwrite(self.values, values)
            elif values.shape != self.values.shape:
                # A graph that is still referenced keeps the parameter's gradient accumulator, which remembers the old
                # shape; a passing change of dtype makes autograd forget it.
                other = torch.float64 if values.dtype != torch.float64 else torch.float32
                self.values.data = values.new_empty(0, dtype=other)
            if not is_sharded(self.values):
                self.values.data = values
            self.indices, self._prepared = prepared.source, prepared

    def prepare(self) -> Prepared:
        """What a forward pass multiplies with: chosen and made when the topology is set, and here for other indices.

        Raises InputError for indices that are no topology of this layer.
        """
        prepared = self._prepared
        # What traces sees an index tensor of its own; the operator compares when it runs.
        if prepared is None or not (torch.compiler.is_compiling() or prepared.source is self.indices):
            if prepared is not None and transformed():
                # Tensors that are made inside of a transform are of no use afterwards.
                if not same_indices(unwrapped(self.indices), prepared.topology.indices):
                    raise InputError("inside a function transform (torch.func) a sparse layer keeps its topology")
                return prepared
            with self.lock:
                prepared = self._prepared = self._structured(self.indices, self._known(self.indices))
        return prepared

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in, kernel dimensions...); the topology's is (out, in times kernel positions)."""
        return self.kind.shape((self.out_features, self.in_features))

    def forward(self, x: Tensor) -> Tensor:
        """What the dense layer computes. Raises as `product` does."""
        return self.kind.forward(self, x)

    def product(self, x: Tensor) -> Tensor:
        """x: (..., in) to (..., out), `in` and `out` being those of the topology.

        Raises InputError where another topology was written into the indices, ValueError for values of another number
        of units and for an x of another width.
        """
        if by_operators():
            return functional.linear(x, self.matrix(), self.bias)
        if x.shape[-1:] != (self.in_features,):
            raise ValueError(f"x has shape {tuple(x.shape)}: its last dimension must be {self.in_features}")
        if torch.compiler.is_compiling():
            return self._multiply(x)
        if torch.is_grad_enabled() or watched(x):
            with self.lock:
                return self._multiply(x)
        # What nobody differentiates or watches needs no operator, which would cost a third of decoding a token.
        with self.lock:
            values, prepared = self.values.data, self.prepare()
        x, values = in_autocast(x), _as_read(values, prepared.backend)
        bias = None if self.bias is None else in_autocast(self.bias)
        key, layout = key_and_layout(values, prepared.structures, self.out_features, self.in_features)
        note_forward(key, self.training)
        values, layout = multiplied(BACKENDS[prepared.backend], values, prepared.source, layout)
        y_TO = BACKENDS[prepared.backend].spmm(values, layout, x.reshape(-1, self.in_features), bias)
        return y_TO.contiguous().view(*x.shape[:-1], self.out_features)

    def dense_weight(self) -> Tensor:
        """The (out, in) weight with its zeros, a new tensor: for export, people and tests."""
        with torch.no_grad():
            return self.matrix().contiguous()

    @torch.no_grad()
    def add_to_dense(self, weight_OI: Tensor, scale: float) -> None:
        """Add the values, times `scale`, to their places in a dense (out, in) matrix of any strides, in O(nnz)."""
        topology, (b_out, b_in) = self.topology, self.unit
        rows, columns = topology.grid
        blocks = weight_OI.view(rows, b_out, columns, b_in).transpose(1, 2)
        values = (self.values.detach() * scale).view(-1, b_out, b_in)
        blocks.index_put_((topology.rows.long(), topology.columns.long()), values, accumulate=True)

    def extra_repr(self) -> str:
        topology = self.topology
        unit = "" if self.unit == (1, 1) and self.quota is None else f", unit={self.unit_name}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, nnz={topology.nnz}, "
            f"density={topology.density:.4g}{unit}, bias={self.bias is not None}"
            f"{'' if self.kind == Linear() else f', kind={self.kind}'}"
        )

    def _multiply(self, x: Tensor) -> Tensor:
        """By the operator, for whoever differentiates, compiles or watches."""
        prepared = self.prepare()
        x, values = in_autocast(x), _as_read(self.values, prepared.backend)
        bias = None if self.bias is None else in_autocast(self.bias)
        trains = self.training or torch.is_grad_enabled()
        shape = self.out_features, self.in_features
        return sparse_linear(x, values, bias, self.indices, prepared.structures, *shape, prepared.backend, trains)

    def matrix(self) -> Tensor:
        """The (out, in) weight with its zeros, differentiable with respect to the values. Raises as `product` does."""
        prepared, (b_out, b_in) = self.prepare(), self.unit
        own = prepared.topology.indices
        values: Tensor = self.values
        if not is_traced() and is_sharded(values):
            raise InputError(
                "a sparse layer that is sharded over ranks (fully_shard) has a dense weight during a pass only: load "
                "the whole state of the model, as get_model_state_dict gives it, into one that is not sharded"
            )
        if torch.compiler.is_compiling() and not is_exporting():
            # Compared when the graph runs.
            values = poisoned(values, self.indices, own)
        elif not is_traced() and not same_indices(prepared.source, own):
            raise InputError(CHANGED)
        if not is_tracing():  # which warns of every look at a shape
            key_and_layout(values, prepared.structures, self.out_features, self.in_features)
        rows, columns = prepared.topology.grid
        units = values.new_zeros(rows * columns, *values.shape[1:])
        units = units.index_put((own.long(),), values)
        blocks = units.view(columns, rows, b_out, b_in).permute(1, 2, 0, 3)
        weight_OI = blocks.reshape(self.out_features, self.in_features)
        if weight_OI.requires_grad and not is_traced() and not transformed():
            version = prepared.structures[0]._version
            weight_OI.register_hook(lambda gradient_OI: _answer(prepared, version, gradient_OI))
        return weight_OI

    def _known(self, indices: Tensor) -> Topology:
        """The topology of an index tensor that took the place of the layer's own."""
        shape, before = (self.out_features, self.in_features), self._prepared
        if indices.is_meta:
            return Topology(shape, indices, self.unit)
        with torch.inference_mode(False), torch.no_grad():
            if before is not None and same_indices(indices, before.topology.indices):
                return before.topology.to(indices.device)
            return validated(shape, indices, self.unit, self.quota, "the indices of a sparse layer")

    def _has(self, topology: Topology) -> bool:
        """Whether this is the layer's topology: values that are loaded for it change nothing else, as in any module."""
        prepared = self._prepared
        if prepared is None or prepared.source is not self.indices or self.indices.is_meta:
            return False
        return same_indices(topology.indices, prepared.topology.indices)

    def _structured(self, source: Tensor, topology: Topology, key: Tensor | None = None) -> Prepared:
        # Made outside of inference mode, whose tensors are of no use for training.
        with torch.inference_mode(False), torch.no_grad():
            if topology.indices.is_inference():
                topology = Topology(topology.shape, topology.indices.clone(), topology.unit)
            key = new_key() if key is None else key
            if not source.is_inference():
                # A teacher that takes over the topology shares the buffer, too.
                topology.view("copy", lambda _: [source])
            if source.is_meta:
                return Prepared(source, topology, "reference", [key, topology.indices])
            layout = Layout(topology.shape, topology.unit, topology.indices)
            backend = choose_backend(self.backend, layout, self.values.dtype)
            derived = topology.view(backend.name, backend.derive)
            return Prepared(source, topology, backend.name, [key, topology.indices, *derived])

    def _apply(self, fn: Any, recurse: bool = True) -> SparseLinear:
        before = self._prepared
        super()._apply(fn, recurse)
        with self.lock:
            self._prepared = None
            if before is None or before.source.is_meta:
                return self
            topology = before.topology.to(self.indices.device)
            if self.indices.is_floating_point():
                # `type(dtype)` converts every buffer.
                self.indices = topology.indices.clone()
            # Not so after `to_empty`: what is loaded then is looked at by the first forward pass.
            if self.indices.is_meta or same_indices(self.indices, topology.indices):
                # The same topology: probes still know the layer, wherever it is moved between two steps.
                self._prepared = self._structured(self.indices, topology, before.structures[0])
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Without what this process and this machine made of the topology."""
        return {name: value for name, value in self.__dict__.items() if name != "lock"} | {"_prepared": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.lock = threading.RLock()
        self.prepare()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        indices, values = state_dict.get(prefix + "indices"), state_dict.get(prefix + "values")
        if indices is not None and values is not None:
            shape = self.out_features, self.in_features
            topology = validated(shape, indices, self.unit, self.quota, prefix + "indices")
            if tuple(values.shape) != topology.values_shape:
                raise InputError(
                    f"{prefix}values: has shape {tuple(values.shape)}, and {prefix}indices wants "
                    f"{topology.values_shape}: give both of one state"
                )
            if not self._has(topology):
                device, dtype = self.values.device, self.values.dtype
                # What is sharded may be given in the memory of the parameter itself, which then has the values already.
                given = values if is_sharded(self.values) else torch.empty_like(values, device=device, dtype=dtype)
                self.set_topology(topology.to(device), given)
        super()._load_from_state_dict(state_dict, prefix, *args)


def sparse_layers(model: nn.Module) -> dict[str, SparseLinear]:
    """The sparse layers of a model by plain name (see `names`), in the model's order."""
    return {name: module for name, module in modules_by_name(model).items() if isinstance(module, SparseLinear)}


def _as_read(values: Tensor, backend: str) -> Tensor:
    """The values as a backend takes them under autocast: see `Backend.casts`."""
    return values if BACKENDS[backend].casts else in_autocast(values)


def _answer(prepared: Prepared, version: int, gradient_OI: Tensor) -> None:
    """Give an open probe the gradient of a dense weight that somebody computed with, as dY^T X with X = 1.

    Raises RuntimeError, as autograd does for the operator, where the topology was replaced since.
    """
    if prepared.structures[0]._version != version:
        raise RuntimeError("the topology of a sparse layer was modified by an inplace operation since its forward pass")
    if (probe := open_probe(prepared.structures[0])) is not None:
        identity_II = torch.eye(gradient_OI.shape[1], dtype=gradient_OI.dtype, device=gradient_OI.device)
        probe.add(BACKENDS["reference"], prepared.layout, gradient_OI.T.contiguous(), identity_II)
