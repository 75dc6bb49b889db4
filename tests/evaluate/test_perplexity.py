"""Loss and bits per byte of a run on a text, or on the first tokens of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsae.evaluate.perplexity import evaluate_run
from sparsae.train.run import start
from tests.support.runs import config_of, write_text
from tests.support.tasks import write_lines


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("perplexity")
    start(config_of(write_text(folder / "text"), folder / "cache", method="static"), folder / "run", quiet=True)
    return folder / "run"


def test_bytes_and_documents_are_those_of_the_tokens_that_are_read(run: Path, tmp_path: Path) -> None:
    """A text whose later part has more bytes a token says nothing of the earlier one."""
    first = "The first document has plain words. " * 20
    texts = [first, "漢字" * 400, first, "漢字" * 400]
    write_lines(tmp_path / "one.jsonl", [{"text": first}])
    write_lines(tmp_path / "both.jsonl", [{"text": text} for text in texts])
    alone = evaluate_run(run, str(tmp_path / "one.jsonl"))
    part = evaluate_run(run, str(tmp_path / "both.jsonl"), max_tokens=alone["tokens"] + 1)
    assert (part["tokens"], part["documents"]) == (alone["tokens"], alone["documents"]) == (part["tokens"], 1)
    assert part["loss"] == pytest.approx(alone["loss"])
    assert part["bits_per_byte"] == pytest.approx(alone["bits_per_byte"], rel=0.03)
    whole = evaluate_run(run, str(tmp_path / "both.jsonl"))
    assert whole["documents"] == 4
    assert evaluate_run(run, str(tmp_path / "both.jsonl"), max_tokens=10**6) == whole
