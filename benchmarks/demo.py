"""The README's picture and numbers, of one run: `make demo`, then `python benchmarks/demo.py runs/demo-... MACHINE`.

Keeps the run's summary in docs/results/demo.json, takes the picture of its report with Chromium, and writes the
paragraph between the markers of the README. Times are those of the machine that it runs on: leave it alone meanwhile.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
README, PICTURE, RECORD = ROOT / "README.md", ROOT / "docs" / "images" / "demo.png", ROOT / "docs/results/demo.json"
MARKED = re.compile(r"(?<=<!-- demo -->\n).*?(?=\n<!-- end -->)", re.DOTALL)
SIZE = (1000, 1500)


def paragraph(summary: Mapping[str, Any], machine: str) -> str:
    """What the README says of the run."""
    nnz, target = summary["nnz"], summary["nnz_target"]
    flops = summary["train_flops"] / summary["train_flops_dense_equivalent"]
    state = summary["state_bytes_sparse_layers"] / summary["state_bytes_sparse_layers_dense_equivalent"]
    held = 20 if summary["state_bytes_by_part"]["teacher"] else 16
    return (
        f"`make demo`, on {machine}: {summary['steps']} steps in {summary['seconds']:.0f} s,\n"
        f"{summary['tokens_per_second']:,.0f} tokens a second. Validation perplexity "
        f"{summary['validation_perplexity']:.1f}, where a unigram model has {summary['unigram_perplexity']:.1f} "
        f"and the untrained one\n{summary['untrained_perplexity']:,.0f}; nnz {nnz:,}, "
        f"{'exactly the target' if nnz == target else f'target {target:,}'}; {flops:.2f} of dense training's counted "
        "FLOPs, all\nincluded (the dense output head is most of what is left); the sparsified layers' model state is "
        f"{state:.3f} of\ndense training's {held} bytes a weight (value, gradient, Adam's moments"
        f"{', average' if held > 16 else ''})."
    )


def photograph(page: Path, picture: Path) -> None:
    """Draw the top of a page."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("no Chromium to take the picture with")
    with tempfile.TemporaryDirectory() as profile:
        flags = ("headless", "no-sandbox", "disable-gpu", "hide-scrollbars", f"user-data-dir={profile}")
        size = f"window-size={SIZE[0]},{SIZE[1]}"
        command = [
            chromium,
            *(f"--{flag}" for flag in (*flags, size, f"screenshot={picture}")),
            page.resolve().as_uri(),
        ]
        subprocess.run(command, check=True, capture_output=True, timeout=120)


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit("usage: python benchmarks/demo.py RUN 'two cores of a virtual machine (Zen 4)'")
    run, machine = Path(sys.argv[1]), sys.argv[2]
    summary = json.loads((run / "summary.json").read_text("utf-8"))
    photograph(run / "report.html", PICTURE)
    RECORD.write_text(json.dumps({"machine": machine, "summary": summary}, indent=2) + "\n", encoding="utf-8")
    README.write_text(MARKED.sub(lambda _: paragraph(summary, machine), README.read_text("utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
