"""Loss, perplexity and bits per byte of a run's model on a text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sparsae.data import Progress, prepare, tokenize_text
from sparsae.errors import InputError
from sparsae.evaluate.loading import LoadedRun, load_run
from sparsae.runs.rows import perplexity
from sparsae.train.held_out import split_held_out
from sparsae.train.objective import Objective


def evaluate_run(
    path: Path,
    data: str | None = None,
    teacher: bool = False,
    max_tokens: int | None = None,
    progress: Progress | None = None,
    best: bool = False,
) -> dict[str, Any]:
    """Evaluate the run in `path` on `data` (None: the held-out text of its validation), every token predicted once.

    Windows of the model's context follow each other without overlap. Bits per byte are the total loss over the bytes of
    UTF-8 that the predicted tokens stand for, which makes models with different tokenizers comparable. Raises
    InputError for a run or a text that cannot be read.
    """
    loaded = load_run(path, teacher, best)
    tokens, text_bytes, documents = held_out_text(loaded, data, progress)
    if max_tokens is not None and len(tokens) > max_tokens:
        tokens = tokens[:max_tokens]
        text_bytes, documents = _size(tokens, loaded)
    if len(tokens) < 2:
        raise InputError(f"{data or 'the held-out text'} has {len(tokens)} tokens: nothing to predict")
    nats, count = 0.0, 0
    objective = Objective(loaded.model, loaded.config.training, loaded.device)
    for batch in windows(tokens, loaded.config.model.context, loaded.config.training.batch_size):
        predicted = batch.shape[0] * (batch.shape[1] - 1)
        nats += float(objective.cross_entropy(batch)) * predicted
        count += predicted
        if progress:
            progress("evaluate", count, len(tokens) - 1)
    loss = nats / count
    return {
        "step": loaded.step,
        "loss": loss,
        "perplexity": perplexity(loss),
        "bits_per_byte": nats / math.log(2.0) / (text_bytes * count / len(tokens)),
        "tokens": count,
        "bytes": text_bytes,
        "documents": documents,
        "teacher": teacher,
        "data": data or "held-out text of the run",
    }


def held_out_text(
    loaded: LoadedRun, data: str | None, progress: Progress | None = None
) -> tuple[npt.NDArray[np.int64], int, int]:
    """(tokens, bytes, documents) of `data`, or of what the run's own validation and test read.

    Raises InputError for a text that cannot be read, or is no longer what the run was trained beside.
    """
    if data is not None:
        return tokenize_text(
            data,
            loaded.tokenizer,
            text_field=loaded.config.data.text_field,
            vocab_size=loaded.config.model.vocab_size,
            progress=progress,
        )
    corpus = prepare(loaded.config.data, progress, loaded.run.tokenizer)
    if corpus.digest != loaded.corpus:
        raise InputError("the run's text has changed since it was trained: name a text with --data")
    # The rest has scored candidates: the topology was chosen on it.
    reported = split_held_out(corpus.validation, loaded.config.model.context)[0][:]
    return reported, *_size(reported, loaded)


def _size(tokens: npt.NDArray[np.int64], loaded: LoadedRun) -> tuple[int, int]:
    """Bytes of UTF-8 and documents; one that is cut off counts too."""
    size = len(loaded.tokenizer.decode(tokens.tolist()).encode())
    ends = np.flatnonzero(tokens == loaded.tokenizer.eos_id)
    begun = len(ends) == 0 or ends[-1] != len(tokens) - 1
    return size, len(ends) + int(begun)


def windows(tokens: npt.NDArray[np.int64], context: int, batch: int) -> Iterator[Tensor]:
    """Whole windows (B, context + 1) in batches, then one of what is left; each begins with the last's last token."""
    whole = (len(tokens) - 1) // context
    for first in range(0, whole, batch):
        last = min(first + batch, whole)
        span = torch.from_numpy(tokens[first * context : last * context + 1].astype(np.int64))
        yield span.unfold(0, context + 1, context).contiguous()
    if whole * context < len(tokens) - 1:
        yield torch.from_numpy(tokens[whole * context :].astype(np.int64))[None]
