"""The NEON kernels, cross-compiled as an installation on 64-bit Arm would compile them, and run in an emulator."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SELFTEST = ROOT / "src/sparsae/kernels/cpu/csrc/selftest.cpp"
COMPILER = "aarch64-linux-gnu-g++"
EMULATORS = ("qemu-aarch64", "qemu-aarch64-static")
SYSROOT = Path("/usr/aarch64-linux-gnu")


def run(*command: str | Path) -> str:
    """What the command printed; fails with it where the command failed."""
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, f"{command[0]}: {result.stdout}{result.stderr}"
    return result.stdout


@pytest.mark.soak
def test_neon_kernels_in_an_emulator(tmp_path: Path) -> None:
    emulator = next(filter(shutil.which, EMULATORS), None)
    missing = [tool for tool in (COMPILER, "cmake") if shutil.which(tool) is None]
    if emulator is None or missing or not SYSROOT.exists():
        pytest.skip(f"needs {COMPILER}, cmake and {' or '.join(EMULATORS)}")
    target = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={COMPILER}"]
    build = tmp_path / "build"
    run("cmake", "-S", ROOT, "-B", build, *target)
    run("cmake", "--build", build, "--parallel", "2")
    program = tmp_path / "selftest"
    library = build / "_native.so"
    run(
        COMPILER,
        "-std=c++17",
        "-O2",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unknown-pragmas",
        SELFTEST,
        library,
        "-o",
        program,
    )
    path = f"{SYSROOT / 'lib'}:{build}"
    # The portable kernels are the same code on every processor, and tested on this one.
    printed = run(str(emulator), "-L", SYSROOT, "-E", f"LD_LIBRARY_PATH={path}", program, "neon")
    assert printed == "neon: 0 failures\n"
