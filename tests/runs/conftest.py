"""Runs that finished, for tests of what can happen to their directories."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sparsae.config import Config
from sparsae.train.run import start
from tests.support.runs import config_of, write_text

Make = Callable[..., Config]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def make(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    cache = tmp_path_factory.mktemp("cache")
    return lambda *overrides, method="sparsae-guided": config_of(text, cache, *overrides, method=method)


@pytest.fixture(scope="module")
def unbroken(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that nothing happened to."""
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("runs") / "run"
    start(make(), path, quiet=True)
    return path


@pytest.fixture(scope="module")
def other(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run of another seed."""
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("runs") / "other"
    start(make("seed=1"), path, quiet=True)
    return path


@pytest.fixture
def finished(unbroken: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(unbroken, tmp_path / "run"))
