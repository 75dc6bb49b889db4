"""The dense weight of a sparse layer, for code that expects an `nn.Linear`.

Such code mostly asks for its dtype, device or shape, which are known; sometimes it computes with it, and then the dense
weight is built, differentiable with respect to the values, and is gone with the expression. Nobody can write to what
does not exist, so whoever tries is told.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

READ_ONLY = (
    "the weight of a sparse layer is there to be read, since it holds active connections only: write to its `values` "
    "(to freeze it, values.requires_grad_(False)), take a copy with weight.clone(), or use sparsae.densify"
)


class DenseView(Tensor):
    """What `SparseLinear.weight` gives: it has the dense weight's shape, dtype and device, and no data until asked."""

    _build: Callable[[], Tensor]
    _made_of: Tensor
    # By this mark transformers knows what it need not initialize.
    _is_hf_initialized = True

    @staticmethod
    def __new__(
        cls, make: Callable[[], Tensor], shape: tuple[int, ...], values: Tensor, *, requires_grad: bool
    ) -> DenseView:
        """make: gives the weight, of this shape, which is made from `values`."""
        view: DenseView = Tensor._make_wrapper_subclass(
            cls,
            shape,
            dtype=values.dtype,
            device=values.device,
            requires_grad=requires_grad,
        )
        view._build = make
        view._made_of = values
        return view

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _ANSWERED:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if _writes(func, args, kwargs):
            raise RuntimeError(READ_ONLY)
        if func in _DETACHING and isinstance(args[0], DenseView):
            return args[0]._detached()
        built: list[Tensor] = []

        def build(thing: Any) -> Any:
            if not isinstance(thing, DenseView):
                return thing
            built.append(thing._build())
            return built[-1]

        result = func(*tree_map(build, args), **tree_map(build, kwargs))
        # What a slice, or another view of what was built, is written with is lost like what the whole is.
        memory = {_memory(tensor) for tensor in built} - {0}
        return tree_map(lambda thing: _read_only(thing) if _memory(thing) in memory else thing, result)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func._schema.is_mutable and args and isinstance(args[0], DenseView):
            raise RuntimeError(READ_ONLY)
        return func(*tree_map(_built, args), **tree_map(_built, kwargs or {}))

    def _detached(self) -> DenseView:
        make = self._build
        return DenseView(lambda: make().detach(), self.shape, self._made_of, requires_grad=False)


# Known without the weight: functions of tensors, and what reading an attribute calls.
_ANSWERED = {
    Tensor.dim,
    Tensor.element_size,
    Tensor.get_device,
    Tensor.is_complex,
    Tensor.is_contiguous,
    Tensor.is_floating_point,
    Tensor.is_inference,
    Tensor.is_signed,
    Tensor.ndimension,
    Tensor.nelement,
    Tensor.numel,
    Tensor.size,
    Tensor.__hash__,
    Tensor.__len__,
    torch.is_complex,
    torch.is_floating_point,
    torch.is_inference,
    torch.is_signed,
    torch.numel,
    *(
        getattr(Tensor, name).__get__
        for name in (
            *(
                "device",
                "dtype",
                "grad_fn",
                "is_cpu",
                "is_cuda",
                "is_leaf",
                "is_meta",
                "is_mkldnn",
                "is_mps",
                "is_nested",
            ),
            *("is_quantized", "is_sparse", "is_sparse_csr", "is_xla", "itemsize", "layout", "nbytes", "ndim"),
            *("requires_grad", "retains_grad", "shape"),
        )
        if hasattr(Tensor, name)
    ),
}
_DETACHING = {Tensor.detach, torch.detach, Tensor.data.__get__}  # type: ignore[attr-defined]


def _memory(thing: Any) -> int:
    """Where the data of a plain tensor lie; 0 for anything else."""
    plain = type(thing) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(thing)
    return thing.untyped_storage().data_ptr() if plain else 0


def _read_only(tensor: Tensor) -> DenseView:
    return DenseView(lambda: tensor, tensor.shape, tensor, requires_grad=tensor.requires_grad)


def _built(thing: Any) -> Any:
    return thing._build() if isinstance(thing, DenseView) else thing


def _writes(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a function would write to a view: by torch's names, `__set__` of an attribute, `add_`, `__iadd__`."""
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    operator = name in ("__set__", "__setitem__", "__delete__") or (name.startswith("__i") and name in _IN_PLACE)
    targets = [kwargs.get("out")]
    if in_place or operator:
        targets += [args[:1], kwargs.get("tensor"), kwargs.get("input"), kwargs.get("self")]
    return any(isinstance(leaf, DenseView) for leaf in tree_leaves(targets))


_OPERATORS = "add sub mul div truediv floordiv mod pow and or xor lshift rshift"
_IN_PLACE = {f"__i{name}__" for name in _OPERATORS.split()}
