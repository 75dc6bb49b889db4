"""benchmarks/gpu.sh from its first part to its last, at toy size on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.sh"


def test_every_part_runs_and_adds_its_rows(tmp_path: Path) -> None:
    program = [str(SCRIPT), "--device", "cpu", "--out", str(tmp_path)]
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = [line.split()[1].rstrip(":") for line in done.stdout.splitlines() if line.startswith("== ")][:-1]
    assert (parts[0], parts[-1], len(parts)) == ("check", "largest", 14)
    for part in parts:
        rows = [json.loads(line) for line in (tmp_path / f"{part}.jsonl").read_text("utf-8").splitlines()]
        assert rows, part
