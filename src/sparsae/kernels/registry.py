"""The backends there are, and which of them serves a layer.

A folder here is a backend: it owns all that belongs to a device, and its backend.py holds the backend as `BACKEND`. A
guest's registers itself (`register_backend`) in a program, or in a module that its package names as an entry point.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

from sparsae.errors import InputError, argument
from sparsae.kernels.backend import Backend, Layout
from sparsae.kernels.reference import Reference
from sparsae.registry import Names

log = logging.getLogger(__name__)


def _of_folders() -> Iterator[Backend]:
    for file in sorted(Path(__file__).parent.glob("*/backend.py")):
        yield import_module(f"{__package__}.{file.parent.name}.backend").BACKEND


class _Backends(Names[Backend]):
    """By name: those of this package, of programs, and of the entry points of installed packages."""

    def __init__(self, own: Sequence[Backend]) -> None:
        super().__init__("backend", "sparsae.kernels", frozenset({"auto"}), "which chooses among this package's own")
        self._entries |= {backend.name: backend for backend in own}
        self._own = tuple(self._entries)

    @property
    def known(self) -> dict[str, Backend]:
        """Those that are loaded, this package's first; a layer that has a backend finds it here."""
        return self._entries


# In the order in which `auto` prefers them. The last one takes everything.
_OWN = (*_of_folders(), Reference())
_NAMES = _Backends(_OWN)
BACKENDS = _NAMES.known

_logged: set[tuple[object, ...]] = set()


def register_backend(backend: Backend) -> Backend:
    """Make a guest's backend known, for layers that name it: `backend="its name"`, or `sparsity.backend` in settings.

    `auto` never takes one, so that a run computes with what its settings say, whatever else is imported. Returns it.
    Raises InputError for what is no Backend, and for a name that is taken.
    """
    name = getattr(backend, "name", None)
    if not isinstance(backend, Backend) or not isinstance(name, str) or not name:
        raise InputError(f"a backend is an instance of a class that inherits Backend and has a name, not {backend!r}")
    known = BACKENDS.get(name)
    if name == "auto" or known in _OWN or (known is not None and _place(known) != _place(backend)):
        raise InputError(f"backend '{name}' is there already: give {_place(backend)} another name")
    BACKENDS[name] = backend
    return backend


def backend_names() -> tuple[str, ...]:
    """Every backend that can be named, this package's first, then those of installed packages, loaded or not."""
    return tuple(dict.fromkeys([*BACKENDS, *_NAMES.names()]))


def backend_named(name: str) -> Backend:
    """The backend of that name. Raises InputError where there is none, or where its package cannot be loaded."""
    if name in BACKENDS:
        return BACKENDS[name]
    if name not in _NAMES:
        raise InputError(f"unknown {argument('backend')} '{name}': use auto, {', '.join(backend_names())}")
    return _NAMES[name]


def choose_backend(name: str, layout: Layout, dtype: torch.dtype) -> Backend:
    """The backend of that name, or for `auto` the first of this package that accepts the layer and pays at its density.

    dtype: that of the values. The choice of `auto` is logged once a layer shape. Raises InputError as `backend_named`,
    and with the backend's reason where one that was named refuses.
    """
    shape, unit, device = layout.shape, layout.unit, layout.indices.device
    if name == "auto":
        chosen = next(b for b in _OWN if b.refusal(unit, device, dtype) is None and b.pays(layout, dtype))
        key = (chosen.name, shape, unit, device.type, dtype)
        if key not in _logged:
            _logged.add(key)
            log.info("backend %s for %dx%d weights in units of %dx%d on %s", chosen.name, *shape, *unit, device.type)
        _say_what_is_missing(device)
        return chosen
    backend = backend_named(name)
    reason = backend.refusal(unit, device, dtype)
    if reason is not None:
        raise InputError(f"{argument('backend')} '{name}' cannot serve a {shape[0]}x{shape[1]} layer: {reason}")
    return backend


def attention_backend(q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor) -> Backend | None:
    """The first of this package that computes such causal attention; None where torch's own is to be taken."""
    return next((b for b in _OWN if b.attention_refusal(q_BHTD, k_BGTD, v_BGTD) is None), None)


def losses_backend(logits_TV: Tensor, teacher_TV: Tensor | None) -> Backend | None:
    """The first of this package that computes the losses of such logits; None where torch's operators are to be."""
    return next((b for b in _OWN if b.losses_refusal(logits_TV, teacher_TV) is None), None)


def _place(backend: Backend) -> str:
    return f"{type(backend).__module__}.{type(backend).__qualname__}"


def _say_what_is_missing(device: torch.device) -> None:
    """Warn once where a device has to do without its own backend."""
    for backend in _OWN:
        missing = backend.missing(device)
        if missing is not None and ("missing", backend.name) not in _logged:
            _logged.add(("missing", backend.name))
            log.warning("sparse layers cost what dense ones do: %s", missing)
