"""The tokenizer: trained here as byte-level BPE, or read from a file or a directory.

The preparation of text works with `tokenizers` alone, which is quick to import; `save` writes what
`transformers.AutoTokenizer` reads, and `to_transformers` wraps the same tokenizer for those who want it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsae.errors import InputError

if TYPE_CHECKING:
    import tokenizers
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
TRAINING_BYTES = 20_000_000
"""A tokenizer is trained on so many bytes of the first training documents; more text hardly moves the merges."""

_PIECE = 500_000
_BEFORE_A_WORD = re.compile(r"(?<=\S)(?= \S)")
_KNOWN_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")


@dataclass(frozen=True)
class Tokenizer:
    """A `tokenizers.Tokenizer` with its marks of begin and end of a document.

    Special tokens are never read out of text: a document that spells "<|endoftext|>" does not end there.
    """

    raw: tokenizers.Tokenizer
    eos_token: str = END_OF_TEXT
    bos_token: str = END_OF_TEXT

    @property
    def eos_id(self) -> int:
        return self._id(self.eos_token)

    @property
    def bos_id(self) -> int:
        return self._id(self.bos_token)

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
        return self.raw.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, on all cores."""
        return [encoding.ids for encoding in self.raw.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, special tokens left out."""
        return self.raw.decode([int(i) for i in ids], skip_special_tokens=True)

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which `AutoTokenizer.from_pretrained(directory)` reads."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "tokenizer.json").write_text(self.raw.to_str(pretty=True), encoding="utf-8")
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "clean_up_tokenization_spaces": False,
        }
        (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def to_transformers(self) -> PreTrainedTokenizerFast:
        """The same tokenizer as `transformers` has it (the import takes seconds)."""
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast(
            tokenizer_object=self.raw,
            bos_token=self.bos_token,
            eos_token=self.eos_token,
            clean_up_tokenization_spaces=False,
        )

    def _id(self, token: str) -> int:
        found = self.raw.token_to_id(token)
        if found is None:
            raise ValueError(f"the tokenizer has no token {token!r}")
        return found


def load_or_train(name: str, texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """The tokenizer that `DataConfig.tokenizer` names: `train` is trained on `texts`, anything else read from there."""
    return train_tokenizer(texts, vocab_size) if name == "train" else load_tokenizer(name)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with at most `vocab_size` entries, trained on the first `TRAINING_BYTES` of `texts`.

    A pure function of its arguments. Little text gives fewer entries than asked for. The entries are <|endoftext|>,
    the 256 bytes, so that every text can be encoded, and the merges.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    raw = tokenizers.Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    raw.train_from_iterator(_first_bytes(texts, TRAINING_BYTES), trainer)
    return _ready(raw, END_OF_TEXT, END_OF_TEXT)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer.json, a directory that holds one, or a directory with GPT-2's vocab.json and merges.txt.

    The marks of begin and end are those of the tokenizer_config.json beside it; without one, the first of
    <|endoftext|>, <|end_of_text|>, </s>, <eos>, <|im_end|> that the vocabulary has. Raises InputError where the path
    holds no tokenizer, the files are damaged, or nothing marks the end of a document.
    """
    path = Path(path).expanduser()
    if os.path.isfile(path):
        folder, raw = path.parent, _read_json_form(path)
    elif not os.path.isdir(path):
        raise InputError(f"{path}: no such tokenizer; give train, a tokenizer.json or a directory with one")
    elif (path / "tokenizer.json").is_file():
        folder, raw = path, _read_json_form(path / "tokenizer.json")
    elif (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        folder, raw = path, _read_gpt2_form(path)
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
    bos = _token(settings.get("bos_token"))
    return _ready(raw, eos, bos if bos in vocabulary else eos)


def pieces(text: str, size: int = _PIECE) -> Iterator[str]:
    """Cut a long text where words begin, so that encoding it takes bounded memory and all cores.

    A cut lies between a character that is not a space and a single space before a word. Byte-level BPE ends a word
    there in any case, so that the pieces encode to the same ids as the whole.
    """
    start = 0
    while len(text) - start > size and (cut := _BEFORE_A_WORD.search(text, start + size)):
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def _first_bytes(texts: Iterable[str], limit: int) -> Iterator[str]:
    left = limit
    for text in texts:
        for piece in pieces(text):
            encoded = piece.encode()
            if len(encoded) >= left:
                yield encoded[:left].decode(errors="ignore")
                return
            left -= len(encoded)
            yield piece


def _ready(raw: tokenizers.Tokenizer, eos: str, bos: str) -> Tokenizer:
    from tokenizers import AddedToken

    raw.no_truncation()
    raw.no_padding()
    raw.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in dict.fromkeys((bos, eos))])
    raw.encode_special_tokens = True
    return Tokenizer(raw, eos_token=eos, bos_token=bos)


def _read_json_form(path: Path) -> tokenizers.Tokenizer:
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except Exception as error:  # The library raises bare Exception for every fault in the file.
        raise InputError(f"{path}: not a tokenizer.json of the tokenizers library: {error}") from None


def _read_gpt2_form(folder: Path) -> tokenizers.Tokenizer:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    try:
        model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:  # As above: the library has no exception of its own.
        raise InputError(f"{folder}: vocab.json and merges.txt are not GPT-2's: {error}") from None
    raw = tokenizers.Tokenizer(model)
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return raw


def _settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable JSON: {error}") from None
    if not isinstance(settings, dict):
        raise InputError(f"{path}: a {type(settings).__name__}, not a JSON object")
    return settings


def _token(entry: Any) -> str | None:
    """A token as tokenizer_config.json spells it: a string, or an object with `content`."""
    return entry.get("content") if isinstance(entry, dict) else entry
