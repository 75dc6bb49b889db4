"""A run continues with other settings only where each is allowed by its name, and says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsae.cli import main
from sparsae.errors import InputError
from sparsae.files import read_json
from sparsae.report.page import write_report
from sparsae.runs.directory import describe
from sparsae.train.run import resume, start
from tests.runs.conftest import Make
from tests.support.runs import contents, rows, stopped_at, write_text

RATE = "training.learning_rate"


@pytest.fixture
def stopped(make: Make, tmp_path: Path) -> Path:
    with stopped_at(6):
        start(make("training.log_every=1", "tracking.tensorboard=true"), tmp_path / "run", quiet=True)
    return tmp_path / "run"


def change(run: Path, old: str, new: str) -> None:
    file = run / "config.yaml"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new, 1))


def test_a_change_is_refused_by_name_and_made_where_it_is_allowed(
    stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(stopped, "learning_rate: 0.002", "learning_rate: 0.001")
    change(stopped, "clip: 1.0", "clip: 0.5")
    before = contents(stopped)
    for allowed in ([], ["--allow-change", RATE], ["--allow-change", RATE, "--allow-change", "seed"]):
        assert main(["train", "--resume", str(stopped), *allowed]) == 2
        told = capsys.readouterr().err.splitlines()[-1]
        assert ("seed" if "seed" in allowed else "training.clip is 0.5, not 1.0") in told
        assert contents(stopped) == before | {".lock": contents(stopped)[".lock"]}
    assert main(["train", "--resume", str(stopped), "--allow-change", "trainin.learning_rate"]) == 2
    assert f"trainin.learning_rate: no such setting; did you mean {RATE}" in capsys.readouterr().err
    assert main(["train", "--resume", str(stopped), "--allow-change", RATE, "--allow-change", "training.clip"]) == 0
    changes = [
        {"step": 6, "key": RATE, "before": "0.002", "after": "0.001"},
        {"step": 6, "key": "training.clip", "before": "1.0", "after": "0.5"},
    ]
    assert read_json(stopped / "manifest.json")["changes"] == changes == describe(stopped)["changes"]
    rates = {row["step"]: row["learning_rate"] for row in rows(stopped) if row["kind"] == "train"}
    assert 0 < rates[7] < 0.6 * rates[6]
    page = write_report(stopped).read_text()
    assert f"At step 6 {RATE} was changed from 0.002 to 0.001." in page
    assert resume(stopped, quiet=True, steps=14)["changes"] == changes


@pytest.mark.parametrize(
    ("old", "new", "key", "told"),
    [
        ("width: 32", "width: 64", "model.width", "model.width: is part of what"),
        ("steps: 12", "steps: 24", "training.steps", r"--resume RUN --steps N"),
        ("sparsity: 0.9", "sparsity: 0.8", "sparsity.sparsity", "undo it in"),
        ("", "", "data.source", r"text of data\.source has changed"),
    ],
)
def test_what_a_checkpoint_cannot_serve_stays_refused(
    stopped: Path, text: Path, old: str, new: str, key: str, told: str
) -> None:
    settings, texts = stopped / "config.yaml", stopped.parent / "text"
    whole = settings.read_text()
    if key == "data.source":
        old = f"source: {text}"
        write_text(texts)
        (texts / "0.txt").write_text("another text")
        new = f"source: {texts}"
    assert old in whole
    settings.write_text(whole.replace(old, new, 1))
    with pytest.raises(InputError, match=told):
        resume(stopped, quiet=True, allowed=[key])
    settings.write_text(whole)
    assert resume(stopped, quiet=True)["changes"] == []


def test_only_a_run_that_is_resumed_has_changes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--out", str(tmp_path / "new"), "--allow-change", RATE]) == 2
    assert "--allow-change: only a run that is resumed" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
