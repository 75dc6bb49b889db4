"""How often a search got stuck: updates in a row that neither changed the topology nor found a better proxy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from sparsae.report.readable import percent
from sparsae.report.tables import Table

Row = Mapping[str, Any]
PATIENCE = 5  # updates in a row
_RESETS = ("reshuffle", "redraw")
_COUNTS = ("updates", "unchanged", "no_better", "stuck", "longest_stuck", "resets")


def stuck_counts(metrics: Sequence[Row]) -> dict[str, int] | None:
    """How many times `PATIENCE` updates or more in a row of a run left the topology `unchanged`, found `no_better`
    proxy than the best so far, or both (`stuck`; `longest_stuck` is in updates), and the global `resets` taken.

    metrics: the run's rows. The proxy is that of the topology which an update leaves. None for a run whose updates
    compared nothing.
    """
    updates = [row for row in metrics if row.get("kind") == "topology" and row["step"] and not row.get("skipped")]
    scores = [_score_left(row) for row in updates]
    if all(score is None for score in scores):
        return None
    same = [not row["accepted"] for row in updates]
    worse = list(_no_better(scores))
    both = [a and b for a, b in zip(same, worse, strict=True)]
    taken = [row["candidates"][row["chosen"]]["proposer"] for row in updates if _is_taken(row)]
    return {
        "updates": len(updates),
        "unchanged": _stretches(same),
        "no_better": _stretches(worse),
        "stuck": _stretches(both),
        "longest_stuck": max((len(list(run)) for holds, run in groupby(both) if holds), default=0),
        "resets": sum(proposer in _RESETS for proposer in taken),
    }


def stuck_table(rows: Sequence[Row]) -> Table | None:
    """Means over seeds by method and sparsity, of runs that compared; None where none did."""
    groups: dict[tuple[float, str], list[Row]] = {}
    for row in rows:
        if row.get("stuck"):
            groups.setdefault((row["sparsity"], row["method"]), []).append(row["stuck"])
    if not groups:
        return None
    cells = [
        [percent(sparsity), method, *(f"{sum(run[name] for run in mine) / len(mine):.3g}" for name in _COUNTS)]
        for (sparsity, method), mine in groups.items()
    ]
    title = (
        f"How often a run got stuck, means over seeds: times that {PATIENCE} updates or more in a row changed nothing, "
        "found no better proxy, or both; the longest of the latter in updates."
    )
    columns = ["sparsity", "method", "updates", "unchanged", "no better", "stuck", "longest", "resets taken"]
    return Table(title, columns, cells)


def _is_taken(row: Row) -> bool:
    """Whether an update took a candidate; a schedule changes connections without one."""
    return row["accepted"] and row["chosen"] is not None


def _score_left(row: Row) -> float | None:
    left = row["candidates"][row["chosen"]] if _is_taken(row) else row.get("current")
    score = left.get("score") if left else None
    return None if score is None else float(score)


def _no_better(scores: Sequence[float | None]) -> Iterator[bool]:
    best: float | None = None
    for score in scores:
        better = score is not None and (best is None or score < best)
        yield not better
        if better:
            best = score


def _stretches(flags: Sequence[bool]) -> int:
    """Maximal runs of true ones that are long enough."""
    return sum(holds and len(list(run)) >= PATIENCE for holds, run in groupby(flags))
