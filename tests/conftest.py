"""Settings common to all tests."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
from hypothesis import settings

# torch.compile imports setuptools when it first compiles C++, and that replaces distutils: with warnings as errors, and
# after others have imported distutils, it fails. Imported here it is there already.
with contextlib.suppress(ImportError), warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import setuptools  # noqa: F401

settings.register_profile("sparsae", deadline=None, max_examples=30, derandomize=True, database=None)
settings.load_profile("sparsae")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
