"""The page on rules of one's own: its blocks are carried out in their order, as they stand, each in a process."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.golden import columns_of

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "own-rule.md").read_text("utf-8")
# (language, title, text) of each fenced block.
BLOCKS = re.findall(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where everything of the page has been carried out, and what the shell said in `said`."""
    path, site = tmp_path_factory.mktemp("own-rule"), tmp_path_factory.mktemp("site")
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "SPARSAE_CACHE": str(path / "cache"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(site),
        # pip as the page calls it, but into a directory of its own, and without the network.
        "PIP_TARGET": str(site),
        "PIP_NO_DEPS": "1",
        "PIP_NO_BUILD_ISOLATION": "0",
        "PIP_NO_INDEX": "1",
    }

    def run(*command: str, cwd: Path = path, **more: str) -> str:
        done = subprocess.run(command, cwd=cwd, env={**environment, **more}, capture_output=True, text=True)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout

    said = []
    for language, title, text in BLOCKS:
        if language == "sh":
            said.append(run("bash", "-euo", "pipefail", "-c", text, cwd=ROOT if title == "checkout" else path))
        elif title:
            (path / title).write_text(text, "utf-8")
    script = "\n".join(text for language, title, text in BLOCKS if language == "python" and not title)
    run(sys.executable, "-c", script, PYTHONPATH=str(path))
    (path / "said").write_text("\n".join(said), "utf-8")
    return path


@pytest.mark.slow
def test_the_page_runs_as_it_stands(folder: Path) -> None:
    assert [title for _, title, _ in BLOCKS if title] == [
        "relative.py",
        "pyproject.toml",
        "small.yaml",
        "plan.yaml",
        "checkout",
    ]
    said = (folder / "said").read_text("utf-8")
    assert re.search(r"relative\s+Weights that are small .* \[from relative-rule\]", " ".join(said.split()))
    assert re.search(r"\d\d+ passed", said)
    assert len((folder / "relative.py").read_text("utf-8").splitlines()) <= 30


@pytest.mark.slow
def test_the_rule_of_the_page_is_trained_compared_and_reported_by_name(folder: Path) -> None:
    columns = columns_of(folder / "runs" / "relative")
    assert sum(columns["topology.accepted"]) > 5
    assert len(set(columns["train.nnz"])) == 1
    assert "relative" in (folder / "runs" / "relative" / "report.html").read_text("utf-8")
    results = json.loads((folder / "runs" / "comparison" / "results.json").read_text("utf-8"))
    assert {row["method"] for row in results["rows"]} == {"static", "relative"}
    assert "relative" in (folder / "runs" / "comparison" / "report.html").read_text("utf-8")
