"""Text from a run's model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from sparsae.core.randomness import generator
from sparsae.data import prepare
from sparsae.errors import InputError
from sparsae.evaluate.loading import LoadedRun, load_run
from sparsae.models import decoder_and_head


def generate_text(
    path: Path,
    prompt: str,
    tokens: int = 120,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
    teacher: bool = False,
) -> str:
    """The prompt and up to `tokens` more tokens, ended by the end of a document.

    temperature 0 takes the likeliest token; top_k 0 draws among all. Raises InputError for a run that cannot be read.
    """
    return continue_text(load_run(path, teacher), prompt, tokens, temperature, top_k, seed)


def continue_text(
    loaded: LoadedRun, prompt: str, tokens: int, temperature: float = 0.8, top_k: int = 50, seed: int = 0
) -> str:
    """As `generate_text`, with a run that is already loaded."""
    tokenizer = loaded.tokenizer
    ids = tokenizer.encode(prompt) or [tokenizer.eos_id]
    return prompt + tokenizer.decode(_continue(loaded, ids, tokens, temperature, top_k, generator(seed, "generate")))


def write_sample(path: Path) -> None:
    """Write the run's sample.json: a continuation by the student and, where there is one, by the teacher.

    The prompt is tracking.sample_prompt, or the start of the run's held-out text.
    """
    loaded = load_run(path)
    tracking = loaded.config.tracking
    prompt = tracking.sample_prompt
    if prompt is None:
        held_out = prepare(loaded.config.data).validation
        prompt = loaded.tokenizer.decode(held_out[: min(32, loaded.config.model.context // 2)].tolist())
    text = continue_text(loaded, prompt, tracking.sample_tokens)
    taught = None
    if loaded.config.teacher.enabled:
        taught = continue_text(load_run(path, teacher=True), prompt, tracking.sample_tokens)[len(prompt) :]
    loaded.run.write_json("sample.json", {"prompt": prompt, "text": text[len(prompt) :], "teacher_text": taught})


@torch.no_grad()
def _continue(
    loaded: LoadedRun, ids: list[int], tokens: int, temperature: float, top_k: int, rng: torch.Generator
) -> list[int]:
    if tokens < 1:
        raise InputError(f"{tokens} tokens to generate: ask for at least 1")
    decoder, head = decoder_and_head(loaded.model)
    context, vocabulary = loaded.config.model.context, loaded.tokenizer.vocab_size
    made: list[int] = []
    cache = None
    fresh = ids[-context:]
    length = len(fresh)
    while len(made) < tokens:
        if cache is not None and length > context:
            # Past the context the positions run out: go on from its later half, which leaves room to move.
            fresh, cache = (ids + made)[-(context // 2) :], None
            length = len(fresh)
        output = decoder(input_ids=torch.tensor([fresh], device=loaded.device), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        # A vocabulary padded beyond the tokenizer's has entries that stand for nothing.
        logits = head(output.last_hidden_state[0, -1]).float()[:vocabulary].cpu()
        token = _draw(logits, temperature, top_k, rng)
        if token == loaded.tokenizer.eos_id:
            break
        made.append(token)
        fresh = [token]
        length += 1
    return made


def _draw(logits: Tensor, temperature: float, top_k: int, rng: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    if top_k and top_k < logits.numel():
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    return int(torch.multinomial((logits / temperature).softmax(0), 1, generator=rng))
