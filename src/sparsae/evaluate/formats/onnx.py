"""A run's model as an ONNX graph from token ids to logits, its weights dense.

What a runtime gains: ONNX Runtime, OpenVINO and others run it without Python or torch. They multiply densely: ONNX has
sparse initializers, which ONNX Runtime stores and then expands, so zeros cost what weights cost.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsae.errors import InputError
from sparsae.models import fold_attention_scale
from sparsae.nn.sparsify import densify

if TYPE_CHECKING:
    from sparsae.evaluate.loading import LoadedRun


class _Logits(nn.Module):
    """(batch, tokens) ids to (batch, tokens, vocabulary) logits, without a cache."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits


def require_onnx() -> None:
    """Raises InputError where what writes ONNX is not installed."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        raise InputError("--format onnx: needs onnx and onnxscript: pip install 'sparsae[onnx]'") from None


def write_onnx(loaded: LoadedRun, directory: Path) -> None:
    """model.onnx and the tokenizer, into an empty directory. Raises OSError where it cannot be written."""
    require_onnx()
    model: Any = densify(loaded.model).cpu()
    fold_attention_scale(model)
    example = torch.zeros((2, min(8, loaded.config.model.context)), dtype=torch.int64, device="cpu")
    shapes = {"input_ids": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
    # The exporter tells its progress and its plans; what fails it raises.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            _Logits(model).eval(), (example,), input_names=["input_ids"], output_names=["logits"],
            dynamic_shapes=shapes, dynamo=True, verbose=False,
        )  # fmt: skip
        assert program is not None
        program.save(directory / "model.onnx", external_data=False)
    loaded.tokenizer.save(directory, loaded.config.model.context)
