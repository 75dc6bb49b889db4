"""The pages of the results in docs/results, from their numbers: `make pages`, or `python benchmarks/pages.py OUT`.

The repository keeps plans and numbers. Each page is written by `sparsae report`, as OUT/NAME/report.html.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from sparsae.cli import main as sparsae
from sparsae.config.text import dump_yaml

RESULTS = Path(__file__).parents[1] / "docs" / "results"


def experiments(root: Path) -> list[Path]:
    """The results of experiments below a directory; a page can be written of each."""
    contents = {file: json.loads(file.read_text("utf-8")) for file in sorted(root.glob("*/*.json"))}
    return [file for file, content in contents.items() if isinstance(content, dict) and "plan" in content]


def write(file: Path, out: Path) -> Path:
    """Write the page of one file of results; returns its path."""
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, out / "results.json")
    (out / "plan.yaml").write_text(dump_yaml(json.loads(file.read_text("utf-8"))["plan"]), encoding="utf-8")
    if code := sparsae(["report", str(out)]):
        sys.exit(code)
    return out / "report.html"


if __name__ == "__main__":
    for results in experiments(RESULTS):
        write(results, Path(sys.argv[1]) / results.relative_to(RESULTS).with_suffix(""))
