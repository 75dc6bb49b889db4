"""Continuations: prompt and continuation are one text, and a sample starts where something follows."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from sparsae.core.randomness import generator
from sparsae.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from sparsae.evaluate import generation
from sparsae.evaluate.generation import _draw, _start, continue_text

PIECES = ["▁", "▁Once", "▁upon", "▁a", "▁time", "time", "s", "O", "n"]


def saved(raw: tokenizers.Tokenizer, path: Path) -> Tokenizer:
    raw.save(str(path / "tokenizer.json"))
    return load_tokenizer(path)


def llama(path: Path) -> Tokenizer:
    """As Llama 2's: spaces are part of words, the first one is put before the text, bytes stand for what is missing."""
    vocabulary = {"<unk>": 0, "</s>": 1} | {f"<0x{byte:02X}>": byte + 2 for byte in range(256)}
    vocabulary |= {piece: 258 + i for i, piece in enumerate(PIECES)}
    raw = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, ignore_merges=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return saved(raw, path)


def word_pieces(path: Path) -> Tokenizer:
    """As BERT's: the decoder sets spaces and takes those before punctuation away again."""
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "</s>", "once", "upon", "##s", "a", "time", "##r", "."])}
    raw = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    raw.normalizer = normalizers.Lowercase()
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.decoder = decoders.WordPiece(cleanup=True)
    return saved(raw, path)


def continued(tokenizer: Tokenizer, prompt: str, made: list[int], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(generation, "_continue", lambda *_: made)
    loaded: Any = SimpleNamespace(tokenizer=tokenizer)
    return prompt + continue_text(loaded, prompt, len(made))


def test_a_space_at_the_seam_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = llama(tmp_path)
    ids = {piece: tokenizer.raw.token_to_id(piece) for piece in PIECES}
    assert tokenizer.decode([ids["▁a"], ids["▁time"]]) == "a time"  # alone, the space is lost
    assert continued(tokenizer, "Once upon", [ids["▁a"], ids["▁time"]], monkeypatch) == "Once upon a time"
    assert continued(tokenizer, "Once upon a time", [ids["s"]], monkeypatch) == "Once upon a times"
    assert continued(tokenizer, "", [ids["▁Once"], ids["▁upon"]], monkeypatch) == "Once upon"
    bytes_of = [tokenizer.raw.token_to_id(f"<0x{byte:02X}>") for byte in "ß三".encode()]
    assert continued(tokenizer, "Once", bytes_of, monkeypatch) == "Onceß三"


def test_words_of_a_decoder_that_sets_spaces_stay_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = word_pieces(tmp_path)
    ids = [tokenizer.raw.token_to_id(token) for token in ("a", "time", "##r", ".")]
    assert continued(tokenizer, "Once upon", ids, monkeypatch) == "Once upon a timer."


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=12), st.text(max_size=12))
def test_bytes_of_a_character_may_lie_on_both_sides(prompt: str, text: str) -> None:
    tokenizer = train_tokenizer(["grün und blau"], 270)
    with pytest.MonkeyPatch.context() as patch:
        assert continued(tokenizer, prompt, tokenizer.encode(text), patch) == prompt + text


def test_a_sample_starts_with_a_document_that_goes_on() -> None:
    eos, short, long = 0, [1] * 10, list(range(100, 200))
    tokens = np.array([*short, eos, *short, eos, *long, eos, *long])
    assert _start(tokens, eos, 128) == long[:32]
    assert _start(tokens, eos, 8) == long[:8]
    assert _start(np.array([*short, eos, 5, eos]), eos, 128) == [1] * 5
    assert _start(np.array([7]), eos, 128) == [7]
    assert _start(np.array(long), eos, 128) == long[:32]


LOGITS = st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=8)
POSITIVE = st.floats(min_value=0, exclude_min=True, allow_infinity=False)


@settings(deadline=None)
@given(LOGITS, POSITIVE, st.integers(0, 4), st.integers(0, 9))
def test_every_temperature_draws_one_of_the_likeliest(
    values: list[float], temperature: float, top_k: int, seed: int
) -> None:
    logits = torch.tensor(values)
    token = _draw(logits, temperature, top_k, generator(seed, "draw"))
    assert logits[token] >= logits.topk(min(top_k or len(values), len(values))).values[-1]
    if 1e-3 <= temperature <= 1e3:  # bit for bit what runs have drawn since the first
        if 0 < top_k < len(values):
            logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
        chances = (logits / temperature).softmax(0)
        assert token == int(torch.multinomial(chances, 1, generator=generator(seed, "draw")))


@pytest.mark.parametrize("temperature", [5e-324, 1e-44, 1e-30])
def test_a_temperature_near_zero_takes_the_likeliest(temperature: float) -> None:
    logits = torch.tensor([1.0, 3.0, 2.0])
    assert {_draw(logits, temperature, 0, generator(seed, "draw")) for seed in range(20)} == {1}


@pytest.mark.parametrize("temperature", [1e30, 1e39, 1e300])
def test_a_temperature_without_measure_draws_evenly(temperature: float) -> None:
    logits, rng = torch.tensor([1.0, 30.0, 2.0, 0.0]), generator(0, "draw")
    counts = torch.tensor([_draw(logits, temperature, 3, rng) for _ in range(600)]).bincount(minlength=4)
    assert counts[3] == 0
    assert counts[:3].min() > 150
