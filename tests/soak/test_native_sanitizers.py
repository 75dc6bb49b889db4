"""The native kernels under AddressSanitizer and UndefinedBehaviorSanitizer, as a program without Python."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.soak

SOURCE = Path(__file__).parents[2] / "src/sparsae/kernels/cpu/csrc"
X86_FLAGS = {
    "isa_avx2.cpp": ["-mavx2", "-mfma"],
    "isa_avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"],
}
# What each machine compiles beside portable code, and the macro that says so.
MACHINES: dict[str, tuple[list[str], dict[str, list[str]]]] = {
    "x86_64": (["-DSPARSAE_X86"], X86_FLAGS),
    "aarch64": (["-DSPARSAE_ARM64"], {"isa_neon.cpp": []}),
}
FLAGS = ["-std=c++17", "-O0", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-fopenmp", "-DSPARSAE_SMALL_CODE"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def compiler() -> str:
    """A C++ compiler with working sanitizers, else skip."""
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if found is None:
        pytest.skip("no C++ compiler")
    return found


def test_clean_under_sanitizers(tmp_path: Path) -> None:
    cxx = compiler()
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    if subprocess.run([cxx, "-fopenmp", *SANITIZERS, probe, "-o", tmp_path / "probe"], capture_output=True).returncode:
        pytest.skip(f"{cxx} has no sanitizers or no OpenMP")
    macros, isa_flags = MACHINES.get(platform.machine(), ([], {}))
    flags = [*FLAGS, *macros, *SANITIZERS]
    sources = {"selftest.cpp": [], "api.cpp": [], "isa_portable.cpp": [], **isa_flags}
    for name, own in sources.items():
        command = [cxx, *flags, *own, "-c", SOURCE / name, "-o", tmp_path / f"{name}.o"]
        compiled = subprocess.run(command, capture_output=True, text=True)
        assert compiled.returncode == 0, compiled.stderr
    program = tmp_path / "selftest"
    subprocess.run(
        [cxx, "-fopenmp", *SANITIZERS, *(tmp_path / f"{name}.o" for name in sources), "-o", program], check=True
    )
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "portable: 0 failures" in result.stdout
