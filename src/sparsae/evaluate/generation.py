"""Text from a run's model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice, takewhile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from sparsae.config.schema import MOST_GENERATED
from sparsae.core.randomness import generator
from sparsae.data import prepare
from sparsae.errors import InputError
from sparsae.evaluate.decoding import open_decoder
from sparsae.evaluate.loading import LoadedRun, load_run
from sparsae.runs.summary import Sample

_LOOKED_AT = 2**20  # tokens among which the start of a document is sought


def generate_text(
    path: Path,
    prompt: str,
    tokens: int = 120,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
    teacher: bool = False,
    best: bool = False,
) -> str:
    """What follows the prompt: up to `tokens` tokens, ended by the end of a document; empty where that comes at once.

    temperature 0 takes the likeliest token; top_k 0 draws among all. Raises InputError for a run that cannot be read.
    """
    return continue_text(load_run(path, teacher, best), prompt, tokens, temperature, top_k, seed)


def continue_text(
    loaded: LoadedRun, prompt: str, tokens: int, temperature: float = 0.8, top_k: int = 50, seed: int = 0
) -> str:
    """As `generate_text`, with a run that is already loaded."""
    tokenizer = loaded.tokenizer
    ids = tokenizer.encode(prompt) or [tokenizer.eos_id]
    made = _continue(loaded, ids, tokens, temperature, top_k, generator(seed, "generate"))
    # Together, because a decoder may treat the start of a text in its own way: some drop a space there.
    before, whole = tokenizer.decode(ids), tokenizer.decode([*ids, *made])
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, whole, strict=False)))
    return whole[shared:]


def write_sample(path: Path) -> None:
    """Write the run's sample.json: a continuation by the student and, where there is one, by the teacher.

    The prompt is tracking.sample_prompt, or the start of a held-out document that goes on after it.
    """
    loaded = load_run(path)
    tracking = loaded.config.tracking
    prompt = tracking.sample_prompt
    if prompt is None:
        held_out = prepare(loaded.config.data, own=loaded.run.tokenizer).validation[:_LOOKED_AT]
        prompt = loaded.tokenizer.decode(_start(held_out, loaded.tokenizer.eos_id, loaded.config.model.context // 2))
    text = continue_text(loaded, prompt, tracking.sample_tokens)
    taught = None
    if loaded.config.teacher.enabled:
        taught = continue_text(load_run(path, teacher=True), prompt, tracking.sample_tokens)
    loaded.run.write_sample(Sample(prompt=prompt, text=text, teacher_text=taught))


def _start(tokens: npt.NDArray[np.int64], eos: int, most: int) -> list[int]:
    """Up to 32 tokens, `most` at most, of the first document that is more than twice as long, else of the longest.

    A model that is shown a whole document is right to end it.
    """
    size = max(1, min(32, most))
    ends = [*np.flatnonzero(tokens == eos).tolist(), len(tokens)]
    found = [tokens[first:end] for first, end in zip([0, *(end + 1 for end in ends)], ends, strict=False)]
    document = next((ids for ids in found if len(ids) > 2 * size), max(found, key=len))
    return document[: min(size, max(1, len(document) // 2))].tolist()


def next_tokens(
    model: nn.Module,
    ids: Sequence[int],
    *,
    context: int,
    vocabulary: int,
    temperature: float,
    top_k: int,
    rng: torch.Generator,
) -> Iterator[int]:
    """One token of `vocabulary` after the other, without end, after the tokens `ids` (at least one)."""
    decoder = open_decoder(model, context)
    known = list(ids)
    fresh = known[-context:]
    length = len(fresh)
    with torch.no_grad():
        logits = decoder.read(fresh)
    while True:
        # A vocabulary padded beyond the tokenizer's has entries that stand for nothing.
        token = _draw(logits[:vocabulary].cpu(), temperature, top_k, rng)
        yield token
        known.append(token)
        length += 1
        with torch.no_grad():
            if length > context:
                # Past the context the positions run out: go on from its later half, which leaves room to move.
                fresh = known[-(context // 2) :]
                length = len(fresh)
                logits = decoder.read(fresh)
            else:
                logits = decoder.step(token)


def _continue(
    loaded: LoadedRun, ids: list[int], tokens: int, temperature: float, top_k: int, rng: torch.Generator
) -> list[int]:
    if not 1 <= tokens <= MOST_GENERATED:
        raise InputError(f"{tokens} tokens to generate: ask for 1 to {MOST_GENERATED}")
    made = next_tokens(
        loaded.model,
        ids,
        context=loaded.config.model.context,
        vocabulary=loaded.tokenizer.vocab_size,
        temperature=temperature,
        top_k=top_k,
        rng=rng,
    )
    return list(takewhile(lambda token: token != loaded.tokenizer.eos_id, islice(made, tokens)))


def _draw(logits: Tensor, temperature: float, top_k: int, rng: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    if top_k and top_k < logits.numel():
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    if not 1e-6 < temperature < 1e6:  # float32 may not hold the quotients, or the temperature itself
        logits = (logits - logits.max()).double()  # of which none is above 0, so that none overflows to infinity
    return int(torch.multinomial((logits / temperature).softmax(0), 1, generator=rng))
