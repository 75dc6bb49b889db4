"""What a kind of layer is.

A dense module has one weight or several; each of them holds one matrix (out, in) or several, of which every one becomes
a `SparseLinear`. A kind knows which modules it means, where in their weights the matrices lie, and what takes the place
of such a module and gives it back. Nothing else knows one kind from another.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar, Self

from torch import Tensor, nn

if TYPE_CHECKING:
    from sparsae.nn.linear import SparseLinear


class Kind(ABC):
    """One kind of dense modules; an instance describes one of them, is a frozen dataclass, and outlives it.

    Layers are named below their module: "" is the module's own place, which is where its only matrix becomes a layer.
    """

    # Whether it maps vectors of features, as output heads and routers do.
    is_linear: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def claims(cls, module: nn.Module) -> bool:
        """Whether a dense module is of this kind, whether or not it can be sparse."""

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """Why a module that is claimed stays dense, in a few words; None where it can be sparse."""
        return None

    @classmethod
    def outputs(cls, module: nn.Module) -> int:
        """How many features a claimed module gives, where `is_linear`."""
        return int(module.out_features)  # type: ignore[arg-type]

    @classmethod
    @abstractmethod
    def of(cls, module: nn.Module) -> Self:
        """What describes a module that is claimed and not refused."""

    @property
    def weights(self) -> tuple[str, ...]:
        """The parameters that become sparse."""
        return ("weight",)

    @property
    def biases(self) -> tuple[str, ...]:
        """The parameters, or places for some, that go over as they are."""
        return ("bias",)

    @property
    def kernel(self) -> tuple[int, ...]:
        """The kernel dimensions, whose product divides a matrix's inputs; () where there are none."""
        return ()

    def shape(self, matrix: tuple[int, int]) -> tuple[int, ...]:
        """(out, in, kernel dimensions...) of a layer, from the shape (out, in) of its matrix."""
        return matrix[0], matrix[1] // math.prod(self.kernel), *self.kernel

    def parts(self, weight: str) -> tuple[str, ...]:
        """The names, below the module, of the layers that a weight becomes."""
        return ("",)

    @abstractmethod
    def split(self, weight: str, tensor: Tensor) -> dict[str, Tensor]:
        """The (out, in) matrices in a contiguous tensor of the shape of a weight, as views of it, by its `parts`."""

    @abstractmethod
    def join(self, weight: str, matrices: Mapping[str, Tensor]) -> Tensor:
        """The inverse of `split`, in any memory order."""

    def weight_shape(self, matrix: tuple[int, int]) -> tuple[int, ...]:
        """The shape of a dense module's only weight, from that of its matrix."""
        return self.shape(matrix)

    def forward(self, layer: SparseLinear, x: Tensor) -> Tensor:
        """What the layer in the module's own place computes: by `layer.product`, from (..., in) to (..., out)."""
        return layer.product(x)

    def layers(self, twin: nn.Module) -> dict[str, nn.Module]:
        """The layers, by name, in what `hold` made."""
        return {"": twin}

    def hold(self, module: nn.Module, layers: Mapping[str, SparseLinear]) -> nn.Module:
        """What takes the module's place: its only layer, or a new module, whose attribute `kind` this has to be.

        It gets the biases of `module`; anything that others set on that goes over by itself.
        """
        (layer,) = layers.values()
        layer.bias = module.bias  # type: ignore[assignment]
        return layer

    @abstractmethod
    def release(self, twin: nn.Module) -> nn.Module:
        """A new dense module in the place of what `hold` made, with its biases; the weights are set afterwards."""

    def own_names(self, twin: nn.Module) -> frozenset[str] | None:
        """The attributes, parameters and children that `hold` gave a module of its own; None: it is its only layer."""
        return None


class Kinds:
    """All known kinds, those of this package and of others."""

    def __init__(self) -> None:
        self._known: list[type[Kind]] = []

    def register(self, kind: type[Kind]) -> type[Kind]:
        """A class decorator. Who is registered last is asked first: it may claim what another kind refuses."""
        place = kind.__module__, kind.__qualname__
        # A module may be loaded anew.
        self._known = [known for known in self._known if (known.__module__, known.__qualname__) != place]
        self._known.append(kind)
        return kind

    def __iter__(self) -> Iterator[type[Kind]]:
        return iter(self._known)

    def claiming(self, module: nn.Module) -> type[Kind] | None:
        """The kind of a dense module; None where there is none."""
        return next((kind for kind in reversed(self._known) if kind.claims(module)), None)

    def of(self, module: nn.Module) -> Kind:
        """What describes a dense module that can be sparse. Raises ValueError for one of no kind."""
        kind = self.claiming(module)
        if kind is None:
            raise ValueError(f"{type(module).__name__} is of no kind that can be sparse")
        return kind.of(module)


KINDS = Kinds()


def kind_in(module: nn.Module) -> Kind | None:
    """The kind of the dense module whose place this one took; None for any other module."""
    kind = vars(module).get("kind")
    return kind if isinstance(kind, Kind) else None


def parameter_of(module: nn.Module, weight: str) -> nn.Parameter:
    """A weight of a module that can be sparse, or was made from one."""
    parameter = module._parameters[weight]
    assert parameter is not None
    return parameter


def subclass_refusal(module: nn.Module, base: type[nn.Module]) -> str | None:
    """Why a module of a subclass of `base` stays dense; None for a `base`."""
    if type(module) is base:
        return None
    own = "with a forward of its own" if type(module).forward is not base.forward else "of another kind"
    return f"a subclass of nn.{base.__name__} {own} ({type(module).__name__})"
