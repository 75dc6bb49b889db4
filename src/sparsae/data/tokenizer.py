"""The tokenizer: trained here as byte-level BPE, or read from a file or a directory.

The preparation of text works with `tokenizers` alone, which is quick to import; `save` writes what
`transformers.AutoTokenizer` reads, and `to_transformers` wraps the same tokenizer for those who want it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsae.data.bpe import train_bpe
from sparsae.errors import InputError
from sparsae.files import expanded, write_atomically

if TYPE_CHECKING:
    import tokenizers
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
TRAINING_BYTES = 20_000_000
"""A tokenizer is trained on so many bytes of the first training documents; more text hardly moves the merges."""

LARGEST_VOCABULARY = 2**22
"""Four times the largest vocabulary that is known to us."""

_LARGEST_FILE = 2**28  # bytes
_PIECE = 100_000
_BEFORE_A_WORD = re.compile(r"(?<=\S)(?= \S)")
_KNOWN_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")


@dataclass(frozen=True)
class Tokenizer:
    """A `tokenizers.Tokenizer` with its marks of begin and end of a document, and of padding.

    Special tokens are never read out of text: a document that spells "<|endoftext|>" does not end there.
    """

    raw: tokenizers.Tokenizer
    eos_token: str = END_OF_TEXT
    bos_token: str = END_OF_TEXT
    pad_token: str = END_OF_TEXT

    @property
    def eos_id(self) -> int:
        return self._id(self.eos_token)

    @property
    def pad_id(self) -> int:
        return self._id(self.pad_token)

    @cached_property
    def vocab_size(self) -> int:
        """Rows that an embedding needs: the largest id + 1 (ids may have gaps)."""
        return max(self.raw.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def hash(self) -> str:
        """The same for every tokenizer that encodes and ends documents in the same way, on every machine."""
        return sha256("\0".join((self.raw.to_str(), self.bos_token, self.eos_token)).encode()).hexdigest()[:32]

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without marks of begin or end."""
        return list(chain.from_iterable(self.encode_batch(list(pieces(text)))))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, on all cores; long ones are better given as `pieces`.

        Raises InputError where a tokenizer from elsewhere fails on the text, as one without an unknown token does.
        """
        try:
            encodings = self.raw.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:  # The library raises bare Exception.
            raise InputError(f"the tokenizer cannot encode the text: {error}; use another tokenizer") from None
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, special tokens left out."""
        return self.raw.decode([int(i) for i in ids], skip_special_tokens=True)

    def save(self, directory: str | Path, context: int | None = None) -> None:
        """Write tokenizer.json and tokenizer_config.json, which `AutoTokenizer.from_pretrained(directory)` reads.

        context: the longest sequence of the model that it goes with, in tokens.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(directory / "tokenizer.json", self.raw.to_str(pretty=True))
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "pad_token": self.pad_token,
            "clean_up_tokenization_spaces": False,
        }
        if context is not None:
            config["model_max_length"] = context
        write_atomically(directory / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")

    def to_transformers(self) -> PreTrainedTokenizerFast:
        """The same tokenizer as `transformers` has it (the import takes seconds)."""
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast(
            tokenizer_object=self.raw,
            bos_token=self.bos_token,
            eos_token=self.eos_token,
            pad_token=self.pad_token,
            clean_up_tokenization_spaces=False,
        )

    def _id(self, token: str) -> int:
        found = self.raw.token_to_id(token)
        if found is None:
            raise ValueError(f"the tokenizer has no token {token!r}")
        return found


def train_tokenizer(texts: Iterable[str], vocab_size: int, waiting: Callable[[], None] = lambda: None) -> Tokenizer:
    """Byte-level BPE with at most `vocab_size` entries, trained on the first `TRAINING_BYTES` of `texts`.

    A pure function of texts and size. Little text gives fewer entries than asked for. The entries are <|endoftext|>,
    the 256 bytes, so that every text can be encoded, and the merges. `waiting` is called now and then while the
    training goes on.
    """
    import tokenizers

    made = train_bpe(first_bytes(texts, TRAINING_BYTES), vocab_size, END_OF_TEXT, waiting)
    return _ready(tokenizers.Tokenizer.from_str(made), END_OF_TEXT, END_OF_TEXT, END_OF_TEXT)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer.json, a directory that holds one, or a directory with a vocab.json and merges.txt.

    The marks of begin and end are those of the tokenizer_config.json beside it; without one, the first of
    <|endoftext|>, <|end_of_text|>, </s>, <eos>, <|im_end|> that the vocabulary has. Raises InputError where the path
    holds no tokenizer, the files are damaged, or nothing marks the end of a document.
    """
    path = Path(expanded(os.fspath(path)))
    if os.path.isfile(path):
        folder, raw = path.parent, _read_json_form(path)
    elif not os.path.isdir(path):
        raise InputError(f"{path}: no such tokenizer; give train, a tokenizer.json or a directory with one")
    elif (path / "tokenizer.json").is_file():
        folder, raw = path, _read_json_form(path / "tokenizer.json")
    elif (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        folder, raw = path, _read_two_files(path)
    else:
        raise InputError(f"{path}: no tokenizer here: neither tokenizer.json nor vocab.json with merges.txt")
    settings = _settings(folder / "tokenizer_config.json")
    vocabulary = raw.get_vocab(with_added_tokens=True)
    named = [_token(settings.get("eos_token")), *_KNOWN_ENDS]
    eos = next((token for token in named if token in vocabulary), None)
    if eos is None:
        raise InputError(
            f"{path}: no token marks the end of a document; name one as eos_token in tokenizer_config.json "
            f"(known by themselves: {', '.join(_KNOWN_ENDS)})"
        )
    _require_ids(path, vocabulary)
    bos = _token(settings.get("bos_token"))
    pad = _token(settings.get("pad_token"))
    return _ready(raw, eos, bos if bos in vocabulary else eos, pad if pad in vocabulary else eos)


def pieces(text: str, size: int = _PIECE) -> Iterator[str]:
    """Cut a long text where words begin, so that encoding it takes bounded memory and all cores.

    A cut lies between a character that is not a space and a single space before a word. Byte-level BPE ends a word
    there in any case, so that the pieces encode to the same ids as the whole. Where `size` characters go by without
    such a place, the cut is made anyway.
    """
    start = 0
    while len(text) - start > size:
        found = _BEFORE_A_WORD.search(text, start + size, start + 2 * size)
        end = found.start() if found else min(start + 2 * size, len(text))
        yield text[start:end]
        start = end
    if start < len(text) or not text:
        yield text[start:]


def first_bytes(texts: Iterable[str], limit: int) -> Iterator[str]:
    """The texts in pieces, of which the first `limit` bytes of UTF-8 are taken."""
    left = limit
    for text in texts:
        for piece in pieces(text):
            encoded = piece.encode()
            if len(encoded) >= left:
                yield encoded[:left].decode(errors="ignore")
                return
            left -= len(encoded)
            yield piece


def _require_ids(path: Path, vocabulary: Mapping[str, int]) -> None:
    """Counts, embeddings and logits have a place for every id up to the largest, so that one entry can ask for all."""
    token, largest = max(vocabulary.items(), key=itemgetter(1))
    if largest >= LARGEST_VOCABULARY:
        raise InputError(
            f"{path}: the token {token[:40]!r} has the id {largest:,}; ids must be below {LARGEST_VOCABULARY:,}"
        )


def _ready(raw: tokenizers.Tokenizer, eos: str, bos: str, pad: str) -> Tokenizer:
    from tokenizers import AddedToken

    raw.no_truncation()
    raw.no_padding()
    raw.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in dict.fromkeys((bos, eos))])
    raw.encode_special_tokens = True
    return Tokenizer(raw, eos, bos, pad)


def _read_json_form(path: Path) -> tokenizers.Tokenizer:
    import tokenizers

    text = _read(path)
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # The library raises bare Exception for every fault in the file.
        raise InputError(f"{path}: not a tokenizer.json of the tokenizers library: {error}") from None


def _read_two_files(folder: Path) -> tokenizers.Tokenizer:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    try:
        model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:  # As above: the library has no exception of its own.
        raise InputError(f"{folder}: vocab.json and merges.txt are no byte-level BPE: {error}") from None
    raw = tokenizers.Tokenizer(model)
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return raw


def _settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        settings = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable JSON: {error}") from None
    if not isinstance(settings, dict):
        raise InputError(f"{path}: a {type(settings).__name__}, not a JSON object")
    return settings


def _token(entry: Any) -> str | None:
    """A token as tokenizer_config.json spells it: a string, or an object with `content`; None for anything else."""
    token = entry.get("content") if isinstance(entry, dict) else entry
    return token if isinstance(token, str) else None


def _read(path: Path) -> str:
    """The text of a file of a tokenizer. Raises InputError where it cannot be read, is no UTF-8 or far too long."""
    try:
        with path.open("rb") as stream:
            content = stream.read(_LARGEST_FILE + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    if len(content) > _LARGEST_FILE:
        raise InputError(f"{path}: too long for a tokenizer; it may have {_LARGEST_FILE:,} bytes")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 (byte {error.start}); it is no file of a tokenizer") from None
