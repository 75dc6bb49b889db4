"""lm-eval's own command line, which looks through thousands of task files before it begins."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from sparsae.train.run import start
from tests.support.lm_eval import write_tasks
from tests.support.runs import config_of, write_text

pytest.importorskip("lm_eval")
pytestmark = [pytest.mark.soak, pytest.mark.filterwarnings("ignore")]


def test_lm_evals_own_command_line_knows_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sparsae.tasks.lm_eval import main as lm_eval

    config = config_of(write_text(tmp_path / "text"), tmp_path / "cache", "model.context=48")
    start(config, tmp_path / "run", quiet=True)
    write_tasks(tmp_path / "tasks")
    given = ["run", "--model", "sparsae", "--model_args", f"path={tmp_path / 'run'}", "--tasks", "toy_pairs"]
    given += ["--include_path", str(tmp_path / "tasks"), "--output_path", str(tmp_path / "out"), "--limit", "4"]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *given])
    lm_eval()
    (written,) = (tmp_path / "out").rglob("*.json")
    results = json.loads(written.read_text())["results"]
    assert results["toy_pairs"]["acc,none"] in (0.0, 0.25, 0.5, 0.75, 1.0)
    assert "toy_pairs" in capsys.readouterr().out
