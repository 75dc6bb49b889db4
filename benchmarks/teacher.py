"""Where a teacher pays at equal FLOPs, by how often a text is read: `python benchmarks/teacher.py TEXT HELD_OUT`.

    python benchmarks/teacher.py books/train-0.jsonl.xz books/valid.jsonl.xz --passes 1 8 32 --steps 1000 --seeds 1

Each number of passes is a comparison by teacher.yaml over the beginning of TEXT that so many passes of the run's tokens
read; tokenizer and held-out text are the same for all. What was stopped continues by the same command. Other arguments
are those of `sparsae compare` (--seeds 1, --sparsities 0.9, --learning-rates ..., section.key=value). With 1,000
steps a comparison of one seed is 12 runs of 7 TFLOP.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

from sparsae.cli import main as sparsae
from sparsae.config import DataConfig
from sparsae.data import prepare
from sparsae.data.sources import documents
from sparsae.experiments.compare.plan import ComparisonPlan
from sparsae.experiments.plan import read_plan

PLAN = Path(__file__).with_suffix(".yaml")
VOCABULARY = 1024
_LETTERS_A_TOKEN = 5  # more than there are: of so much text a pass is cut


def beginning(source: str, letters: int) -> str:
    """The first letters of a text, or all of it where it has fewer."""
    parts, left = [], letters
    for text in documents(source):
        parts.append(text[:left])
        left -= len(parts[-1])
        if not left:
            break
    return "\n".join(parts)[:letters]


def cut(source: str, tokens: int, passes: list[int], out: Path) -> tuple[Path, dict[int, Path]]:
    """(tokenizer, text by passes): of as many letters as so many tokens over the passes have on average."""
    out.mkdir(parents=True, exist_ok=True)
    whole = out / "whole.txt"
    whole.write_text(beginning(source, _LETTERS_A_TOKEN * tokens), "utf-8")
    corpus = prepare(DataConfig(source=str(whole), tokenizer_vocab=VOCABULARY, cache=str(out / "cache")))
    text = whole.read_text("utf-8")
    letters = len(text) / (len(corpus.train) + len(corpus.validation)) * tokens
    if letters > len(text):
        raise SystemExit(f"{source}: too little text for {tokens:,} tokens: give more, or fewer --steps")
    found = {}
    for count in passes:
        found[count] = out / f"{count}.txt"
        found[count].write_text(text[: round(letters / count)], "utf-8")
    return corpus.directory / "tokenizer", found


def main(arguments: list[str]) -> int:
    """One comparison after the other; the exit code of the first that fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("text", help="training text, as data.source has it")
    parser.add_argument("held_out", help="validation text")
    parser.add_argument("--passes", type=int, nargs="+", default=[1, 8, 32], help="how often the text is read")
    parser.add_argument("--steps", type=int, default=1000, help="steps of the run without a teacher")
    parser.add_argument("--out", type=Path, default=Path("runs/teacher"))
    options, rest = parser.parse_known_args(arguments)
    if min(options.passes) < 1:
        parser.error("--passes: a text is read once or more often")
    config = read_plan(PLAN, {}, [], ComparisonPlan).config("none", 0.9, 0)
    tokens = options.steps * config.training.batch_size * config.training.accumulation * config.model.context
    tokenizer, texts = cut(options.text, tokens, options.passes, options.out / "text")
    settings = {
        "data.tokenizer": tokenizer,
        "data.validation_source": options.held_out,
        "data.cache": options.out / "text" / "cache",
        "training.steps": options.steps,
    }
    given = list(itertools.chain.from_iterable(("--set", f"{key}={value}") for key, value in settings.items()))
    for count, text in texts.items():
        out = options.out / f"passes-{count}"
        command = ["compare", str(PLAN), "--out", str(out), "--set", f"data.source={text}", *given, *rest]
        if code := sparsae(command):
            return code
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
