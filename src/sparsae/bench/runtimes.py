"""Dense models in other runtimes, decoding a token at a time with a cache: what a sparse one has to be faster than.

The graph is one step of the family's blocks: a token, its position and the keys and values so far to logits and the
keys and values with those of the token. Weights are float32. None of the runtimes is a dependency.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sparsae.errors import InputError
from sparsae.evaluate.decoding import Blocks
from sparsae.evaluate.formats.onnx import require_onnx
from sparsae.families import FAMILIES
from sparsae.models import attention_modules, decoder_and_head

Floats = NDArray[np.float32]


class Runtime(ABC):
    """What runs the graph in the file `path` on so many threads. Made anew for each model."""

    module: str

    @abstractmethod
    def __init__(self, path: Path, threads: int) -> None: ...

    @abstractmethod
    def step(self, token: int, position: int, past: Floats) -> tuple[Floats, Floats]:
        """(1, vocabulary) logits and the new past (layer, 2, kv head, position + 1, head size)."""


class OnnxRuntime(Runtime):
    """ONNX Runtime on the CPU."""

    module = "onnxruntime"

    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def step(self, token: int, position: int, past: Floats) -> tuple[Floats, Floats]:
        given = {"token": np.array([token]), "position": np.array([position]), "past": past}
        logits, present = self._session.run(None, given)
        return logits, present


class OpenVino(Runtime):
    """OpenVINO on the CPU."""

    module = "openvino"

    def __init__(self, path: Path, threads: int) -> None:
        import openvino

        core = openvino.Core()
        # Else it takes bfloat16 where the processor has it.
        hints = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        self._request = core.compile_model(core.read_model(path), "CPU", hints).create_infer_request()

    def step(self, token: int, position: int, past: Floats) -> tuple[Floats, Floats]:
        given = {"token": np.array([token]), "position": np.array([position]), "past": past}
        found = self._request.infer(given)
        return found[0], np.array(found[1])


RUNTIMES: Mapping[str, type[Runtime]] = {runtime.module: runtime for runtime in (OnnxRuntime, OpenVino)}


def require_runtimes(names: Iterable[str]) -> None:
    """Raises InputError for a name that is none, or not installed."""
    for name in names:
        if name not in RUNTIMES:
            raise InputError(f"--runtimes: {name} is none of {', '.join(RUNTIMES)}")
        if find_spec(name) is None:
            raise InputError(f"--runtimes: {name} is not installed: pip install 'sparsae[bench]'")
        require_onnx()


class Decoding:
    """A dense model of a family in a runtime, which decodes greedily."""

    def __init__(self, model: Any, name: str, context: int, threads: int) -> None:
        step = _Step(model.eval(), context)
        shape = step.blocks.shape(context)
        self._nothing = np.zeros((len(step.blocks), 2, shape.kv_heads, 0, shape.head_size), np.float32)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "step.onnx"
            _export(step, shape.kv_heads, shape.head_size, path)
            self._runtime = RUNTIMES[name](path, threads)

    def logits(self) -> Iterator[Floats]:
        """(vocabulary,) logits after the token 0 and, each time, the likeliest one."""
        token, past, position = 0, self._nothing, 0
        while True:
            logits, past = self._runtime.step(token, position, past)
            yield logits[0]
            token, position = int(logits[0].argmax()), position + 1


class _Step(nn.Module):
    """One token with its past as plain tensors."""

    def __init__(self, model: Any, context: int) -> None:
        super().__init__()
        family = FAMILIES.of(model)
        assert family is not None
        self.model, self.blocks = model, Blocks(model, family, context)
        self._head = decoder_and_head(model)[1]
        size = self.blocks.head_size
        self._scales = [getattr(module, "scaling", None) or size**-0.5 for module in attention_modules(model)]

    def forward(self, token: Tensor, position: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        x, present = self.blocks.embed_tensors(token, position), []

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys = torch.cat([past[layer, 0], k[:, None]], 1)
            values = torch.cat([past[layer, 1], v[:, None]], 1)
            present.append(torch.stack([keys, values]))
            group = q.shape[1] // keys.shape[0]
            q = q[0].view(keys.shape[0], group, -1)
            weights = torch.softmax(q @ keys.transpose(1, 2) * self._scales[layer], -1)
            return (weights @ values).reshape(1, -1)

        for layer in range(len(self.blocks)):
            x = self.blocks.block(layer, x, position, attend)
        return self._head(self.blocks.norm(x)), torch.stack(present)


def _export(step: _Step, kv_heads: int, head_size: int, path: Path) -> None:
    past = torch.zeros(len(step.blocks), 2, kv_heads, 5, head_size, dtype=torch.float32, device="cpu")
    example = (*(torch.tensor([n], dtype=torch.int64, device="cpu") for n in (3, 5)), past)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            step, example, input_names=["token", "position", "past"], output_names=["logits", "present"],
            dynamic_shapes=({}, {}, {3: torch.export.Dim.DYNAMIC}), dynamo=True, verbose=False,
        )  # fmt: skip
        assert program is not None
        program.save(path, external_data=False)
