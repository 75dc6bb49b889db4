"""Saves of a run in which one call after the other fails, for a process with failing.c in front of libc."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import shutil
import sys
from pathlib import Path

import torch

from sparsae.config.load import resolve
from sparsae.errors import InputError
from sparsae.runs import checkpoint
from sparsae.runs.checkpoint import load_checkpoint
from sparsae.runs.directory import RunDirectory
from sparsae.train.run import resume, start
from tests.support.runs import rows, weights

SECOND = "step-00000008"


def failing_save(folder: Path, run: Path, call: int, number: int) -> tuple[int, int]:
    """Train in a child, in which calls of the second save fail from the so manyth on: its exit code and its calls."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        library, save = ctypes.CDLL(None), checkpoint.save_checkpoint

        def saving(directory: Path, tensors: object, state: object) -> None:
            if directory.name != SECOND:
                save(directory, tensors, state)  # type: ignore[arg-type]
                return
            library.failing_arm(call, number)
            try:
                save(directory, tensors, state)  # type: ignore[arg-type]
            finally:
                os.write(write, library.failing_disarm().to_bytes(4, "little"))

        from sparsae.train import saving as module

        module.save_checkpoint = saving
        code = 70
        try:
            start(resolve(folder / "config.yaml"), run, quiet=True)
            code = 0
        except InputError as error:
            code = 2 if os.strerror(number) in str(error) and "\n" not in str(error) else 3
        except OSError as error:
            code = 4 if error.filename else 5
        finally:
            os._exit(code)
    os.close(write)
    calls = int.from_bytes(os.read(read, 4), "little")
    os.close(read)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), calls


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    run, whole = folder / "run", folder / "whole"
    code, calls = failing_save(folder, run, 2**30, errno.EIO)
    assert code == 0, code
    assert calls > 20, calls
    reference = digest(RunDirectory(whole).checkpoint(4))
    shutil.rmtree(run)
    for number in (errno.ENOSPC, errno.EIO):
        for call in range(1, calls + 1):
            told = f"{errno.errorcode[number]} from call {call} of {calls} on"
            code, _ = failing_save(folder, run, call, number)
            assert code in (0, 2), f"{told}: exit code {code}"
            directory = RunDirectory(run)
            if code == 2:
                # Of the last calls some come after the checkpoint is whole: bringing its name to disk.
                assert directory.saved_steps()[0] == 4, told
                load_checkpoint(directory.checkpoint(4))
                assert digest(directory.checkpoint(4)) == reference, told
            load_checkpoint(directory.latest_checkpoint())
            assert not list(directory.checkpoints.glob(".*partial")), told
            if code == 2 and call % 8 == 0:
                resume(run, quiet=True)
                assert rows(run) == rows(whole), told
                assert weights(run) == weights(whole), told
            shutil.rmtree(run)
    print(f"{2 * calls} saves failed, at each of {calls} calls with ENOSPC and with EIO")


def digest(directory: Path) -> str:
    """Of the tensors of a checkpoint."""
    found = hashlib.sha256()
    for path in sorted(directory.glob("*.safetensors")):
        found.update(path.read_bytes())
    return found.hexdigest()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
