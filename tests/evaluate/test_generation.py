"""Continuations: prompt and continuation are one text, and a sample starts where something follows."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from sparsae.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from sparsae.evaluate import generation
from sparsae.evaluate.generation import _start, continue_text

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
