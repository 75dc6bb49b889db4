"""The training of a byte-level BPE, in a process of its own.

The trainer of `tokenizers` does not look at signals while it runs. As a child it can be ended at once, and whoever
waits for it can say so. Run as a script this module imports nothing but that library: it reads the number of entries,
the end token and the texts from standard input and writes a tokenizer.json to standard output.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from subprocess import PIPE
from tempfile import TemporaryFile
from typing import IO

LONGEST_WORD = 256
"""Bytes after which a word is cut. Merges are found word by word, in time that grows with a word's length squared."""

_TICK = 0.5  # seconds between two signs of life


def train_bpe(texts: Iterable[str], vocab_size: int, end: str, waiting: Callable[[], None]) -> str:
    """A tokenizer.json with `end`, the 256 bytes and at most `vocab_size` entries altogether; a pure function.

    `waiting` is called about twice a second while the training goes on; what it raises ends the training.
    """
    order = json.dumps({"vocab_size": vocab_size, "end": end}).encode()
    # -P: the modules beside this one must not be taken for libraries of the same name.
    command = [sys.executable, "-P", __file__]
    with (
        _written([order, *(json.dumps(text).encode() for text in texts)]) as given,
        subprocess.Popen(command, stdin=given, stdout=PIPE, stderr=PIPE) as process,
    ):
        try:
            while True:
                try:
                    made, complaint = process.communicate(timeout=_TICK)
                    break
                except subprocess.TimeoutExpired:
                    waiting()
        finally:
            process.kill()
            process.wait()  # which leaving the block does not after Ctrl-C
    if process.returncode:
        reason = complaint.decode(errors="replace").strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
        raise RuntimeError(f"training the tokenizer failed: {reason[0]}")
    return made.decode()


@contextmanager
def _written(lines: Iterable[bytes]) -> Iterator[IO[bytes]]:
    """A file to read them from; no pipe: what of it is left at a time-out, `communicate` would never write."""
    from sparsae.errors import InputError

    with ExitStack() as opened:
        try:
            given = opened.enter_context(TemporaryFile())
            given.write(b"\n".join(lines))
            given.seek(0)
        except OSError as error:
            place = tempfile.tempdir or "the directory of temporary files"
            what = f"{place}: the text for the tokenizer cannot be written there: {error.strerror}"
            raise InputError(f"{what}; set TMPDIR to a directory with room") from None
        yield given


def _train(texts: Iterable[str], vocab_size: int, end: str) -> str:
    import tokenizers
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

    raw = tokenizers.Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            pre_tokenizers.Split(Regex(f".{{1,{LONGEST_WORD}}}"), "isolated"),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[end],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    return raw.to_str()


def _main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    order, *texts = sys.stdin.buffer.read().split(b"\n")
    sys.stdout.buffer.write(_train(map(json.loads, texts), **json.loads(order)).encode())


if __name__ == "__main__":
    _main()
