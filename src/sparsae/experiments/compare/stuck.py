"""How often a search got stuck: updates in a row that neither changed the topology nor found a better proxy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from sparsae.core.record import encode, field_names
from sparsae.experiments.compare.record import Row, Stuck
from sparsae.report.readable import sparsity_text
from sparsae.report.tables import Table
from sparsae.runs.rows import TopologyRow

PATIENCE = 5  # updates in a row
_RESETS = ("reshuffle", "redraw")
_COUNTS = field_names(Stuck)


def stuck_counts(topologies: Sequence[TopologyRow]) -> Stuck | None:
    """How many times `PATIENCE` updates or more in a row of a run left the topology `unchanged`, found `no_better`
    proxy than the best so far, or both (`stuck`; `longest_stuck` is in updates), and the global `resets` taken.

    topologies: the run's rows of them. The proxy is that of the topology which an update leaves. None for a run whose
    updates compared nothing.
    """
    updates = [row for row in topologies if row.step and not row.skipped]
    scores = [_score_left(row) for row in updates]
    if all(score is None for score in scores):
        return None
    same = [not row.accepted for row in updates]
    worse = list(_no_better(scores))
    both = [a and b for a, b in zip(same, worse, strict=True)]
    return Stuck(
        updates=len(updates),
        unchanged=_stretches(same),
        no_better=_stretches(worse),
        stuck=_stretches(both),
        longest_stuck=max((len(list(run)) for holds, run in groupby(both) if holds), default=0),
        resets=sum(row.taken.proposer in _RESETS for row in updates if row.taken),
    )


def stuck_table(rows: Sequence[Row]) -> Table | None:
    """Means over seeds by method and sparsity, of runs that compared; None where none did."""
    groups: dict[tuple[float, str], list[dict[str, int]]] = {}
    for row in rows:
        if row.stuck:
            groups.setdefault((row.sparsity, row.method), []).append(encode(row.stuck))
    if not groups:
        return None
    cells = [
        [sparsity_text(sparsity), method, *(f"{sum(run[name] for run in mine) / len(mine):.3g}" for name in _COUNTS)]
        for (sparsity, method), mine in groups.items()
    ]
    title = (
        f"How often a run got stuck, means over seeds: times that {PATIENCE} updates or more in a row changed nothing, "
        "found no better proxy, or both; the longest of the latter in updates."
    )
    columns = ["sparsity", "method", "updates", "unchanged", "no better", "stuck", "longest", "resets taken"]
    return Table(title, columns, cells)


def _score_left(row: TopologyRow) -> float | None:
    left = row.taken or row.current
    return left.score if left and left.is_scored else None


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
