"""How much of a trained model can be pruned in one shot: its loss on held-out text against sparsity.

Jaiswal et al. (2023, "The Emergence of Essential Sparsity in Large Pre-trained Models") call essential the sparsity up
to which removing the smallest weights costs next to nothing, and beyond which loss rises steeply. Where exactly that
is takes a convention; here it is the largest measured sparsity before any loss is more than `tolerance`, a share, above
the unpruned model's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsae.data import Progress, load_tokenizer, tokenize_text
from sparsae.errors import InputError
from sparsae.evaluate.loading import load_run
from sparsae.evaluate.perplexity import held_out_text, windows
from sparsae.nn.choice import linear_layers
from sparsae.nn.linear import sparse_layers
from sparsae.nn.pruning import Prunable, global_zeros, prunable, uniform_zeros
from sparsae.runs.recognized import is_pretrained
from sparsae.runs.rows import perplexity
from sparsae.train.model import choice_of, choose_device
from sparsae.train.objective import Objective
from sparsae.train.pretrained import at_best, read_model

Allocation = Literal["uniform", "global"]
ALLOCATIONS: Mapping[Allocation, Callable[[Sequence[Prunable], float], list[int]]] = {
    "uniform": uniform_zeros,
    "global": global_zeros,
}
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
MAX_TOKENS = 65_536
TOLERANCE = 0.01
_CONTEXT = 1024  # tokens of a window of a model that is no run's, at most


@dataclass(frozen=True)
class Pruned:
    """Loss, in nats a token, of a model whose layers are pruned; sparsity is the share of zeros that they then have.

    allocation: the same sparsity in every layer, or all weights ranked together.
    """

    allocation: Allocation
    sparsity: float
    loss: float
    perplexity: float


@dataclass(frozen=True)
class Essential:
    """The curve of a model. essential: the sparsity that costs next to nothing, by allocation; see the module.

    left_out: sparsities that were asked for and that the model has without any pruning.
    """

    model: str
    data: str
    tokens: int
    layers: int
    own_sparsity: float
    unpruned_loss: float
    tolerance: float
    essential: dict[str, float]
    rows: tuple[Pruned, ...]
    left_out: tuple[float, ...] = ()


@dataclass(frozen=True, eq=False)
class _Judged:
    """A model, the layers that are pruned, and what measures it on a batch of tokens (B, T + 1)."""

    layers: Sequence[Prunable]
    tokens: npt.NDArray[np.int64]
    context: int
    batch: int
    cross_entropy: Callable[[Tensor], Tensor]

    def loss(self, measured: Callable[[int], None]) -> float:
        """In nats a token, every token predicted once; measured: is told of each batch."""
        nats, count = 0.0, 0
        for tokens_BT in windows(self.tokens, self.context, self.batch):
            predicted = tokens_BT.shape[0] * (tokens_BT.shape[1] - 1)
            nats += float(self.cross_entropy(tokens_BT)) * predicted
            count += predicted
            measured(predicted)
        return nats / count


def essential_sparsity(
    path: Path,
    data: str | None = None,
    sparsities: Sequence[float] | None = None,
    *,
    teacher: bool = False,
    best: bool = False,
    max_tokens: int = MAX_TOKENS,
    tolerance: float = TOLERANCE,
    progress: Progress | None = None,
) -> Essential:
    """Prune the run or the directory of transformers' in `path` at each sparsity, and measure the loss each time.

    data: a text; None: the run's held-out one. sparsities: shares of all positions of the layers; those that the model
    has anyway are left out, and named; None: `SHARES` of what is not zero. best: of the best checkpoint, also of a
    directory of transformers' Trainer that knows one. Of a sparse model the sparse layers are pruned, of a dense run
    those that its settings would make sparse, of another dense model all but its output head. Nothing is written.
    Raises InputError for a model or a text that cannot be read, and where no sparsity is left.
    """
    if best:
        path, best = at_best(path)

    def judge(progress: Progress | None) -> _Judged:
        return _judged(path, data, teacher, best, max_tokens, progress)

    judged = judge(progress)
    positions, before = _positions(judged.layers), _sparsity(judged.layers)
    given = [1 - (1 - before) * (1 - share) for share in SHARES] if sparsities is None else sorted(set(sparsities))
    asked = [share for share in given if round(share * positions) > round(before * positions)]
    left_out = tuple(share for share in given if share not in asked)
    if not asked:
        raise InputError(
            f"{path}: its layers have a sparsity of {before:.6g} before any pruning: give a higher one, not "
            f"{', '.join(f'{share:g}' for share in left_out)}"
        )
    total, done = (1 + len(ALLOCATIONS) * len(asked)) * (len(judged.tokens) - 1), 0

    def measured(tokens: int) -> None:
        nonlocal done
        done += tokens
        if progress:
            progress("prune", done, total)

    unpruned = judged.loss(measured)
    rows: list[Pruned] = []
    for number, allocation in enumerate(ALLOCATIONS):
        if number:
            judged = judge(None)
        rows += _curve(judged, allocation, asked, measured)
    return Essential(
        model=str(path),
        data=data or "held-out text of the run",
        tokens=len(judged.tokens) - 1,
        layers=len(judged.layers),
        own_sparsity=before,
        unpruned_loss=unpruned,
        tolerance=tolerance,
        essential={
            name: bend([row for row in rows if row.allocation == name], before, unpruned, tolerance)
            for name in ALLOCATIONS
        },
        rows=tuple(rows),
        left_out=left_out,
    )


def bend(rows: Sequence[Pruned], before: float, unpruned: float, tolerance: float) -> float:
    """The largest sparsity of a curve before any loss is more than `tolerance` above the unpruned model's.

    before: the sparsity of that, which it is where the first loss is above already.
    """
    found = before
    for row in rows:
        if not row.loss <= unpruned * (1 + tolerance):
            break
        found = row.sparsity
    return found


def _curve(
    judged: _Judged, allocation: Allocation, sparsities: Sequence[float], measured: Callable[[int], None]
) -> Iterator[Pruned]:
    """The lowest sparsity first: what is pruned stays so."""
    for sparsity in sparsities:
        for layer, zeros in zip(judged.layers, ALLOCATIONS[allocation](judged.layers, sparsity), strict=True):
            layer.prune(zeros)
        loss = judged.loss(measured)
        yield Pruned(allocation, _sparsity(judged.layers), loss, perplexity(loss))


def _judged(
    path: Path, data: str | None, teacher: bool, best: bool, max_tokens: int, progress: Progress | None
) -> _Judged:
    if is_pretrained(path):
        return _pretrained(path, data, teacher, max_tokens, progress)
    loaded = load_run(path, teacher, best)
    tokens = _cut(held_out_text(loaded, data, progress)[0], max_tokens)
    objective = Objective(loaded.model, loaded.config.training, loaded.device)
    layers: Mapping[str, nn.Module] = sparse_layers(loaded.model) or choice_of(loaded.config).layers(loaded.model)
    training = loaded.config.training
    return _Judged(prunable(layers), tokens, loaded.config.model.context, training.batch_size, objective.cross_entropy)


def _pretrained(path: Path, data: str | None, teacher: bool, max_tokens: int, progress: Progress | None) -> _Judged:
    if teacher:
        raise InputError(f"{path}: a directory of transformers' holds one model: leave out --teacher")
    if data is None:
        raise InputError(f"{path}: no run, so that there is no held-out text: name one with --data")
    device = choose_device("auto")
    model = read_model(path).eval().requires_grad_(False).to(device)
    tokens = tokenize_text(data, load_tokenizer(path), vocab_size=model.config.vocab_size, progress=progress)[0]

    def cross_entropy(tokens_BT: Tensor) -> Tensor:
        with torch.inference_mode():
            tokens_BT = tokens_BT.to(device)
            logits_BTV = model(input_ids=tokens_BT[:, :-1], use_cache=False).logits
            return functional.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT[:, 1:].flatten())

    context = min(getattr(model.config, "max_position_embeddings", None) or _CONTEXT, _CONTEXT)
    layers: Mapping[str, Any] = sparse_layers(model) or linear_layers(model)
    if not layers:
        raise InputError(f"{path}: the model has no layer that could be sparse")
    return _Judged(prunable(layers), _cut(tokens, max_tokens), context, 1, cross_entropy)


def _cut(tokens: npt.NDArray[np.int64], most: int) -> npt.NDArray[np.int64]:
    if len(tokens) < 2:
        raise InputError(f"the text has {len(tokens)} tokens: nothing to predict")
    return np.asarray(tokens[: most + 1])


def _positions(layers: Sequence[Prunable]) -> int:
    return sum(layer.positions for layer in layers)


def _sparsity(layers: Sequence[Prunable]) -> float:
    return sum(layer.zeros() for layer in layers) / _positions(layers)
