"""What soak tests of runs share."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sparsae.config import Config
from tests.support.runs import config_of, write_text

Make = Callable[..., Config]
# Of a run that saves often.
SAVED = ("training.checkpoint_every=5", "training.keep_checkpoints=2")


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    text, cache = write_text(tmp_path_factory.mktemp("text")), tmp_path_factory.mktemp("cache")
    return lambda *overrides, method="sparsae-guided": config_of(text, cache, *overrides, method=method)
