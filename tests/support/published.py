"""The results that the pages and the README tell, read from the rows that are kept, and in the words of the pages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sparsae.experiments.statistics import Difference, paired_difference

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
README, PAGE = ROOT / "README.md", RESULTS / "books-2m.md"
# RigL at the rate that was best for it, and everything else, by the file that has it.
FILES = {
    "rigl": ("rates-0.0075", "tuned-95", "tuned-90", "tuned-90-2", "six-95", "six-90"),
    "static": ("results", "six-95", "six-90"),
    "sparsae": ("results", "six-95", "six-90"),
    "set": ("results", "set-95", "set-90"),
}


def words_of(page: Path) -> str:
    """Its text as one line, whatever it is wrapped to, without stress and with hyphens for minus signs."""
    return " ".join(page.read_text("utf-8").replace("*", "").replace("\u2212", "-").split())


def rows_of(*names: str, folder: str = "books-2m") -> list[dict[str, Any]]:
    """The rows of those files, one after the other."""
    return [row for name in names for row in json.loads((RESULTS / folder / f"{name}.json").read_text())["rows"]]


def by_seed_of(rows: list[dict[str, Any]], method: str, sparsity: float | None = 0.95) -> dict[int, float]:
    """Test losses by seed, of which none has two; sparsity None: whatever it is."""
    of_method = [row for row in rows if row["method"] == method and sparsity in (None, row["sparsity"])]
    found = [(row["seed"], row["test_loss"]) for row in of_method]
    assert len(found) == len(dict(found)) > 0
    return dict(sorted(found))


def between(one: dict[int, float], other: dict[int, float]) -> Difference:
    """The paired difference over the seeds that both have."""
    found = paired_difference(one, other)
    assert found is not None
    return found


def losses(method: str, sparsity: float) -> dict[int, float]:
    """Test losses after 5 million tokens, by seed: all six."""
    found = by_seed_of(rows_of(*FILES[method]), method, sparsity)
    assert len(found) == 6
    return found


def longer(method: str) -> dict[int, float]:
    """Test losses at 95 % after 28 million tokens, by seed, RigL at the rate that was best for it."""
    return by_seed_of(rows_of("longer-95", "longer-rigl", "longer-rigl-2"), method)


def bumped(method: str) -> dict[int, float]:
    """As `longer`, `sparsae` with twice the density at first."""
    rows = rows_of("longer-bump", "longer-bump-2")
    return by_seed_of(rows, "sparsae-bump") if method == "sparsae" else longer(method)


def of_depth(method: str, sparsity: float) -> dict[int, float]:
    """Test losses by seed, of runs whose first block is denser."""
    files = ("depth-95", "parts-95", "density-95", "depth-90")
    rows = rows_of(*files)
    named = {method, f"{method}-depth"}
    return {row["seed"]: row["test_loss"] for row in rows if row["method"] in named and row["sparsity"] == sparsity}


def told(found: Difference) -> str:
    """Mean and half of the interval."""
    interval = found.interval
    assert interval.low is not None
    assert interval.high is not None
    sign = "−" if interval.mean < 0 else "+"
    return f"{sign}{abs(interval.mean):.3f} ± {(interval.high - interval.low) / 2:.3f}"


def in_order(losses: dict[int, float], form: str) -> str:
    return ", ".join(format(losses[seed], form) for seed in sorted(losses)).replace("-", "−")


def by_seed(one: dict[int, float], other: dict[int, float]) -> str:
    return in_order({seed: one[seed] - other[seed] for seed in one}, "+.3f")


def cells_of(one: dict[int, float], other: dict[int, float]) -> str:
    """The cells of a paired difference."""
    found = between(one, other)
    return f"{told(found)} | {by_seed(one, other)}"
