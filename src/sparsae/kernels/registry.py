"""The backends there are, and which of them serves a layer."""

from __future__ import annotations

import logging

import torch

from sparsae.errors import InputError
from sparsae.kernels.backend import Backend
from sparsae.kernels.reference import Reference

log = logging.getLogger(__name__)

# In the order in which `auto` prefers them.
BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (Reference(),)}

_logged: set[tuple[object, ...]] = set()


def choose_backend(name: str, shape: tuple[int, int], unit: tuple[int, int], device: torch.device) -> Backend:
    """The backend of that name, or for `auto` the first one that accepts the layer, logged once a layer shape.

    Raises InputError for an unknown name, and with the backend's reason where one that was named refuses.
    """
    if name == "auto":
        chosen = next(b for b in BACKENDS.values() if b.refusal(unit, device) is None)
        key = (chosen.name, shape, unit, device.type)
        if key not in _logged:
            _logged.add(key)
            log.info("backend %s for %dx%d weights in units of %dx%d on %s", chosen.name, *shape, *unit, device.type)
        return chosen
    if name not in BACKENDS:
        raise InputError(f"unknown backend '{name}' (sparsity.backend): use auto, {', '.join(BACKENDS)}")
    reason = BACKENDS[name].refusal(unit, device)
    if reason is not None:
        raise InputError(f"backend '{name}' (sparsity.backend) cannot serve a {shape[0]}x{shape[1]} layer: {reason}")
    return BACKENDS[name]
