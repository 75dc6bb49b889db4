"""Whether this machine has what the settings of a run ask of it."""

from __future__ import annotations

import os

from sparsae.config.schema import Config
from sparsae.errors import InputError
from sparsae.observers import OBSERVERS, Observer
from sparsae.train.model import choose_device

_THREADS = 256  # or four for each core: more than that is a slip, and systems refuse to make them


def require_machine(config: Config) -> None:
    """Raise InputError where there are not the cores, the device or the libraries that a run would be trained with."""
    threads, cores = config.training.threads, os.cpu_count() or 1
    if threads is not None and threads > max(_THREADS, 4 * cores):
        raise InputError(f"training.threads {threads}: this machine has {cores} cores; give at most so many, or null")
    choose_device(config.training.device)
    for name in config.tracking.named:
        make = OBSERVERS[name]
        if isinstance(make, type) and issubclass(make, Observer):
            make.require()
