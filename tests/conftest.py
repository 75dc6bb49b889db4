"""Settings common to all tests."""

from __future__ import annotations

import gc
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.support.triton_interpreter import mend_interpreter

settings.register_profile("sparsae", deadline=None, max_examples=30, derandomize=True, database=None)
settings.load_profile("sparsae")

if os.environ.get("TRITON_INTERPRET") == "1":
    mend_interpreter()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: at the end no process works on one while the others have nothing left."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """What is imported by now stays: transformers and accelerate collect garbage often, each time through all of it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _disk_is_not_waited_for() -> Iterator[None]:
    """Processes are killed here, but no machine is switched off, and waiting for the disk is a fifth of short runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """One process is enough for what shards its state."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    """What other tests compiled counts towards torch's limit of compilations, beyond which code is left as it is."""
    if (compiler := sys.modules.get("torch._dynamo")) is not None:
        with warnings.catch_warnings():
            # Where there is a GPU it imports more of torch, which warns of itself.
            warnings.simplefilter("ignore", DeprecationWarning)
            compiler.reset()


@pytest.fixture(autouse=True)
def _arithmetic_as_torch_comes() -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(False)
