"""Every architecture that trains comes back from `save_pretrained` bit for bit, however it is made, cut and loaded."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from sparsae import sparsify
from tests.nn.test_stored import TRAINING, UNDIVIDED, assert_same
from tests.support.architectures import ARCHITECTURES

pytestmark = pytest.mark.soak

UNITS, DTYPES, TIED = ((1, 1), (4, 4)), (torch.float32, torch.bfloat16), (None, True, False)


@pytest.mark.parametrize("name", TRAINING)
def test_every_architecture_in_every_form(name: str, tmp_path: Path) -> None:
    """Single weights and blocks, both dtypes, embeddings tied or not, one file or shards of 1 MB, both ways to load."""
    architecture = ARCHITECTURES[name]
    # Embeddings that fill a shard of 1 MB by themselves, where there are any.
    large = {"vocab_size": 40_000} if "vocab_size" in architecture.settings else {}
    for unit, dtype, tied in itertools.product(UNITS, DTYPES, TIED):
        given = architecture.settings | large | ({} if tied is None else {"tie_word_embeddings": tied})
        torch.manual_seed(0)
        model: Any = getattr(hf, architecture.model)(architecture.config(**given)).eval()
        sparsify(model, 0.7, unit=unit, exclude=UNDIVIDED.get(name, ()) if unit != (1, 1) else ())
        model.to(dtype)
        for size, low in (("1GB", False), ("1MB", True), ("1MB", False)):
            with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
                model.save_pretrained(folder, max_shard_size=size)
                files = list(Path(folder).glob("*.safetensors"))
                assert (len(files) > 1) == (bool(large) and size == "1MB"), (size, len(files))
                again, told = type(model).from_pretrained(folder, low_cpu_mem_usage=low, output_loading_info=True)
                assert not any(told.values()), told
                assert_same(model, again)
