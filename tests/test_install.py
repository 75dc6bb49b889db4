"""Installing: the lock serves what it locks, and no C++ compiler is needed."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
INSTALLED_FROM = ["pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE", "src"]
BUILDERS = ["cmake", "ninja"]

CHOOSE = """
import torch
from sparsae.core.randomness import generator
from sparsae.core.topology import Topology
from sparsae.kernels.backend import Layout
from sparsae.kernels.registry import choose_backend
for size in (64, 96):
    topology = Topology.random((size, size), size, generator(0, "install"))
    print(choose_backend("auto", Layout(topology.shape, topology.unit, topology.indices), torch.float32).name)
"""


def test_the_lock_pins_every_requirement_but_torch() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    locked = {canonicalize_name(pin.name): pin.specifier for pin in pins}
    assert len(locked) == len(pins)  # one version for every Python
    assert all([pin.operator for pin in specifier] == ["=="] for specifier in locked.values())
    assert [name for name in locked if name in ("torch", "triton") or name.startswith(("nvidia-", "cuda-"))] == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for line in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        wanted = Requirement(line)
        if wanted.name != "torch":
            (pin,) = locked[canonicalize_name(wanted.name)]
            assert wanted.specifier.contains(pin.version), f"{line}, but {pin.version} is locked: make lock"


@pytest.mark.slow
def test_without_a_compiler(tmp_path: Path) -> None:
    missing = [tool for tool in BUILDERS if shutil.which(tool) is None]
    # By their metadata: looking for pip as a module makes setuptools give distutils back to Python, for good.
    installed = {distribution.name for distribution in importlib.metadata.distributions()}
    missing += {"pip", "scikit_build_core"} - {name.replace("-", "_") for name in installed}
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    checkout, tools, site = tmp_path / "checkout", tmp_path / "tools", tmp_path / "site"
    checkout.mkdir()
    tools.mkdir()
    for name in INSTALLED_FROM:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("_native.*", "__pycache__"))
        else:
            shutil.copy(ROOT / name, checkout / name)
    for tool in BUILDERS:
        (tools / tool).symlink_to(str(shutil.which(tool)))
    # Nothing but the build tools on the path.
    environment = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX", "PYTHONPATH")}
    environment["PATH"] = str(tools)
    offline = ["--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check"]
    install = [sys.executable, "-m", "pip", "install", "--verbose", *offline, "--target", site, checkout]
    done = subprocess.run(install, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (done.stdout + done.stderr).count("no C++ compiler") == 1
    kernels = site / "sparsae" / "kernels" / "cpu"
    assert (kernels / "native.py").exists()
    assert not (kernels / "_native.so").exists()
    assert not (kernels / "csrc").exists()

    # Without `site` no .pth file puts the checkout that is tested before the installation.
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    environment["PYTHONPATH"] = os.pathsep.join([str(site), *libraries])
    used = subprocess.run([sys.executable, "-S", "-c", CHOOSE], env=environment, capture_output=True, text=True)
    assert used.returncode == 0, used.stderr
    assert used.stdout.split() == ["reference", "reference"]
    warnings = [line for line in used.stderr.splitlines() if "native kernels were not compiled" in line]
    assert len(warnings) == 1
    assert used.stderr.splitlines() == warnings
