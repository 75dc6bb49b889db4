"""The backends there are, and which of them serves a layer."""

from __future__ import annotations

import logging

import torch

from sparsae.errors import InputError
from sparsae.kernels.backend import Backend, Layout
from sparsae.kernels.cpu import native
from sparsae.kernels.cpu.backend import Cpu
from sparsae.kernels.reference import Reference

log = logging.getLogger(__name__)

_reference = Reference()

# In the order in which `auto` prefers them. The last one takes everything.
BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (Cpu(_reference), _reference)}

_logged: set[tuple[object, ...]] = set()


def choose_backend(name: str, layout: Layout, dtype: torch.dtype) -> Backend:
    """The backend of that name, or for `auto` the first one that accepts the layer and pays at its density.

    dtype: that of the values. The choice of `auto` is logged once a layer shape. Raises InputError for an unknown name,
    and with the backend's reason where one that was named refuses.
    """
    shape, unit, device = layout.shape, layout.unit, layout.indices.device
    if name == "auto":
        chosen = next(b for b in BACKENDS.values() if b.refusal(unit, device, dtype) is None and b.pays(layout, dtype))
        key = (chosen.name, shape, unit, device.type, dtype)
        if key not in _logged:
            _logged.add(key)
            log.info("backend %s for %dx%d weights in units of %dx%d on %s", chosen.name, *shape, *unit, device.type)
        _say_what_is_missing(device)
        return chosen
    if name not in BACKENDS:
        raise InputError(f"unknown backend '{name}' (sparsity.backend): use auto, {', '.join(BACKENDS)}")
    reason = BACKENDS[name].refusal(unit, device, dtype)
    if reason is not None:
        raise InputError(f"backend '{name}' (sparsity.backend) cannot serve a {shape[0]}x{shape[1]} layer: {reason}")
    return BACKENDS[name]


def _say_what_is_missing(device: torch.device) -> None:
    """Warn once where a CPU has to do without native kernels."""
    absence = native.absence()
    if device.type == "cpu" and absence is not None and ("absence",) not in _logged:
        _logged.add(("absence",))
        log.warning("sparse layers cost what dense ones do: %s", absence)
