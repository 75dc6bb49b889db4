"""A GPU in host memory (`simulated_gpu.cpp`), which torch takes for its CUDA device: `pytest -p tests.gpu.simulated`.

It has to be there before torch is imported. A torch that was built with CUDA keeps what it has: these tests then run on
its GPU, if there is one.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

SOURCE = Path(__file__).with_name("simulated_gpu.cpp")
BUILT = Path(__file__).parents[2] / "build" / "simulated-gpu"
OnWait = ctypes.CFUNCTYPE(None, ctypes.c_char_p)


def absence() -> str | None:
    """Why there is no simulated GPU; None: there is one."""
    if _library is not None:
        return None
    if _torch().has_cuda:
        return "torch was built with CUDA"
    return "this is not Linux" if sys.platform != "linux" else f"there is no C++ compiler ({_compiler()})"


def _torch() -> SimpleNamespace:
    """Where torch is, its version, and whether it was built with CUDA, without importing it."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent
    has_cuda = (folder / "lib" / "libtorch_cuda.so").exists()
    return SimpleNamespace(folder=folder, version=importlib.metadata.version("torch"), has_cuda=has_cuda)


def _compiler() -> str:
    return os.environ.get("CXX", "c++")


def _build(torch: SimpleNamespace) -> Path:
    """The library for this torch, made where it is not there yet."""
    name = hashlib.sha256(SOURCE.read_bytes() + torch.version.encode() + str(torch.folder).encode()).hexdigest()[:16]
    library = BUILT / f"{name}.so"
    if not library.exists():
        BUILT.mkdir(parents=True, exist_ok=True)
        made = library.with_suffix(f".{os.getpid()}")
        headers, libraries = torch.folder / "include", torch.folder / "lib"
        command = [_compiler(), "-O1", "-std=c++20", "-shared", "-fPIC", str(SOURCE), "-o", str(made)]
        command += ["-isystem", str(headers)]
        command += ["-isystem", str(headers / "torch/csrc/api/include"), f"-L{libraries}", f"-Wl,-rpath,{libraries}"]
        subprocess.run([*command, "-lc10", "-ltorch_cpu"], check=True)
        made.replace(library)
    return library


class Stream:
    """The one stream, on which everything is done at once."""

    cuda_stream = 0

    def synchronize(self) -> None:
        _waited(b"synchronize")

    def wait_stream(self, other: object) -> None:
        pass


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self.seconds = 0.0

    def record(self, stream: object = None) -> None:
        self.seconds = time.perf_counter()

    def synchronize(self) -> None:
        _waited(b"synchronize")

    def elapsed_time(self, end: Event) -> float:
        return 1000 * (end.seconds - self.seconds)


def _pretend() -> None:
    """What torch.cuda tells of the device, in Python, where torch was built without it."""
    import torch

    properties = SimpleNamespace(
        name="simulated", total_memory=8 << 30, multi_processor_count=132, major=9, minor=0, warp_size=32
    )
    fixed = {
        "is_available": True, "is_initialized": True, "is_bf16_supported": True, "device_count": 1, "current_device": 0,
        "get_device_name": "simulated", "get_device_capability": (9, 0), "get_device_properties": properties,
        "mem_get_info": (8 << 30, 8 << 30), "memory_allocated": 0, "max_memory_allocated": 0, "memory_reserved": 0,
        "reset_peak_memory_stats": None, "empty_cache": None, "set_device": None, "_lazy_init": None, "_sleep": None,
        "_exchange_device": 0, "_maybe_exchange_device": 0, "is_current_stream_capturing": False,
        "current_stream": Stream(), "default_stream": Stream(),
    }  # fmt: skip
    for name, value in fixed.items():  # each a function of its own: torch's compiler knows them by identity
        setattr(torch.cuda, name, lambda *args, _value=value, **kwargs: _value)
    torch.cuda.synchronize = lambda device=None: _waited(b"synchronize")
    torch.cuda.Stream, torch.cuda.Event = Stream, Event  # type: ignore[assignment, misc]
    torch.cuda.get_rng_state = lambda device="cuda": torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, device="cuda": torch.set_rng_state(state)
    torch.cuda.get_rng_state_all = lambda: [torch.get_rng_state()]
    torch.cuda.set_rng_state_all = lambda states: torch.set_rng_state(states[0])
    clone = torch.UntypedStorage.clone

    def clone_of(storage: torch.UntypedStorage) -> torch.UntypedStorage:
        if storage.device.type == "cpu":
            return clone(storage)
        return torch.empty(0, dtype=torch.uint8, device="cuda").set_(storage).clone().untyped_storage()

    torch.UntypedStorage.clone = clone_of  # type: ignore[method-assign]


_library: ctypes.CDLL | None = None
_counting: Counter[str] | None = None


@OnWait
def _waited(operator: bytes) -> None:
    if _counting is not None:
        frames = [frame for frame in traceback.extract_stack() if "/src/sparsae/" in frame.filename]
        where = f"{frames[-1].filename}:{frames[-1].lineno} {frames[-1].line}" if frames else "not in sparsae"
        _counting[f"{operator.decode()} {where}"] += 1


@contextmanager
def waits() -> Iterator[Counter[str]]:
    """Counts what would wait for a GPU, by operator and by the line of sparsae that asked for it."""
    global _counting
    before, _counting = _counting, Counter()
    try:
        yield _counting
    finally:
        _counting = before


def _begin() -> None:
    global _library
    torch = _torch()
    if torch.has_cuda or sys.platform != "linux" or shutil.which(_compiler()) is None:
        return
    assert "torch" not in sys.modules, "a simulated GPU has to be there before torch is imported"
    _library = ctypes.CDLL(str(_build(torch)), ctypes.RTLD_GLOBAL)
    _library.simulated_gpu_on_wait(_waited)
    _pretend()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Where no GPU can be had nothing was collected, which is no failure."""
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and absence() is not None:
        print(f"no GPU: {absence()}")
        session.exitstatus = pytest.ExitCode.OK


_begin()
