"""Tokens of books for a machine that has neither them nor time: `python benchmarks/books.py FOLDER OUT`.

FOLDER holds train-0.jsonl.xz, train-1.jsonl.xz and valid.jsonl.xz, one book a line. Whole books of the two are taken by
turns until there are as many tokens as fit; with the tokenizer that is trained on them, and the validation books, they
lie in OUT as prepared text, uint16 and less than 60 MiB: a run reads them by data.source=OUT.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from itertools import chain, zip_longest
from pathlib import Path

from sparsae.config import DataConfig
from sparsae.data import prepare
from sparsae.data.sources import documents

VOCABULARY = 4096
TEXT = 102_000_000  # bytes of training text: about 28.9 million tokens
LARGEST = 60 * 2**20  # bytes in OUT


def books(folder: Path) -> Iterator[str]:
    """Books of the two files by turns, up to `TEXT` bytes."""
    files = [documents(str(folder / f"train-{part}.jsonl.xz")) for part in (0, 1)]
    size = 0
    for text in chain.from_iterable(zip_longest(*files)):
        if text is None:
            continue
        if (size := size + len(text.encode())) > TEXT:
            return
        yield text


def main() -> None:
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    with tempfile.TemporaryDirectory() as temporary:
        chosen = Path(temporary) / "books.jsonl"
        with chosen.open("w", encoding="utf-8") as file:
            for text in books(folder):
                file.write(json.dumps({"text": text}) + "\n")
        held_out = str(folder / "valid.jsonl.xz")
        config = DataConfig(
            source=str(chosen), validation_source=held_out, tokenizer_vocab=VOCABULARY, cache=f"{temporary}/cache"
        )
        corpus = prepare(config)
        size = sum(path.stat().st_size for path in corpus.directory.rglob("*") if path.is_file())
        print(
            f"{len(corpus.train):,} tokens to train on, {corpus.validation_tokens:,} held out, {size / 2**20:.1f} MiB"
        )
        if size > LARGEST:
            sys.exit(f"more than {LARGEST / 2**20:.0f} MiB: lower TEXT")
        shutil.copytree(corpus.directory, out)


if __name__ == "__main__":
    main()
