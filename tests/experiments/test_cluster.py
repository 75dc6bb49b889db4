"""Runs over a local Ray cluster with two workers; in a process of its own, since Ray warns of what pytest forbids."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sparsae.cli import main
from sparsae.experiments.compare.results import TIMING

pytestmark = pytest.mark.slow

SCRIPT = """
import json, sys
from pathlib import Path
from sparsae.experiments.cluster import Cluster
from sparsae.experiments.compare.experiment import Comparison
from sparsae.experiments.compare.plan import ComparisonPlan
from sparsae.experiments.plan import parse_plan

plan, out = parse_plan(json.loads(sys.argv[1]), "the test", ComparisonPlan), Path(sys.argv[2])
assert Comparison(plan, out, quiet=True).run(lambda lock: Cluster("local", local_cores=2)) is not None
"""


def without_timing(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_timing(inner) for key, inner in value.items() if key not in TIMING}
    return [without_timing(inner) for inner in value] if isinstance(value, list) else value


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
def test_two_workers_of_a_cluster_find_what_one_process_finds(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"item {j} has {j % 7} parts and {j % 3} colours" for j in range(3000)))
    settings = {
        "model": {"layers": 1, "width": 16, "heads": 2, "context": 16},
        "data": {"source": str(text), "cache": str(tmp_path / "cache"), "tokenizer_vocab": 300},
        "training": {"steps": 12, "batch_size": 2, "validation_sequences": 2, "device": "cpu", "threads": 1},
    }
    plan = {"methods": ["static", "sparsae"], "seeds": 2, "match": "steps", "settings": settings}
    (tmp_path / "plan.yaml").write_text(json.dumps(plan))
    assert main(["compare", str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "here")]) == 0
    command = [sys.executable, "-c", SCRIPT, json.dumps(plan), str(tmp_path / "there")]
    subprocess.run(command, check=True, timeout=150, env={**os.environ, "RAY_DISABLE_IMPORT_WARNING": "1"})
    here, there = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("here", "there"))
    assert len(there["rows"]) == 4
    assert without_timing(here) == without_timing(there)
