"""What tests of benchmarks share: a tiny model's options, and a command's rows."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from sparsae.cli import main

MODEL = "layers=1 width=32 heads=2 context=16"
MODEL_OPTIONS = [word for setting in MODEL.split() for word in ("--set", f"model.{setting}")]
MODEL_OPTIONS += ["--set", "data.tokenizer_vocab=300", "--set", "training.batch_size=2", "--set", "training.threads=1"]


def run(command: str | list[str], folder: Path) -> list[dict[str, Any]]:
    """The rows that a command wrote, after a look at its plot."""
    words = command.split() if isinstance(command, str) else command
    rows, plot = folder / "rows.json", folder / "plot.svg"
    assert main([*words, "--json", str(rows), "--plot", str(plot)]) == 0
    assert ElementTree.parse(plot).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    found = json.loads(rows.read_text("utf-8"))
    assert isinstance(found, list)
    return found
