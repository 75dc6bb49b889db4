"""Settings common to all tests."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

settings.register_profile("sparsae", deadline=None, max_examples=30, derandomize=True, database=None)
settings.load_profile("sparsae")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
