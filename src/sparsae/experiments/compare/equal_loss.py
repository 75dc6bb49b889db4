"""Time to equal loss: what a method and a dense model each took to the loss that both of them reached."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from sparsae.experiments.compare.record import CurvePoint, EqualLossRow, Measure, Row
from sparsae.report.readable import UNKNOWN, compact, duration, sparsity_text
from sparsae.report.tables import Table

DENSE = "dense"
Spent = Callable[[CurvePoint], float]


def equal_loss(rows: Sequence[Row]) -> tuple[EqualLossRow, ...]:
    """An entry a sparsity and method, where a dense model was compared at that sparsity.

    For each seed the loss is the higher one of the two final validation losses, so that both have it; each gets there
    where its validation curve first does, by linear interpolation. An entry has the mean `loss`, in how many of the
    `seeds` the method ended at least as `low` as dense, and for steps, train_flops and seconds the means of what the
    method (`own`) and the dense model (`dense`) took, and the geometric mean of their `ratio`. Where any run
    was stacked no seconds are told: its time is that of all runs together.
    """
    dense: dict[tuple[float, int], Row] = {}
    named: dict[float, str] = {}
    for row in rows:
        if row.base_method == DENSE and named.setdefault(row.sparsity, row.method) == row.method:
            dense[row.sparsity, row.seed] = row
    pairs: dict[tuple[float, str], list[tuple[Row, Row]]] = {}
    for row in rows:
        other = dense.get((row.sparsity, row.seed))
        if other and row.method != other.method and len(row.curve) > 1 and len(other.curve) > 1:
            pairs.setdefault((row.sparsity, row.method), []).append((row, other))
    return tuple(_of_pairs(mine, sparsity, method, named[sparsity]) for (sparsity, method), mine in pairs.items())


def equal_loss_table(entries: Sequence[EqualLossRow]) -> Table | None:
    """Each method's cost over dense's; None where there is nothing to tell."""
    if not entries:
        return None
    cells = []
    for entry in entries:
        cells.append(
            [
                sparsity_text(entry.sparsity),
                entry.method,
                f"{entry.loss:.4f}",
                f"{entry.low} of {entry.seeds}",
                _cell(entry.steps, lambda x: f"{x:,.0f}"),
                _cell(entry.train_flops, compact),
                UNKNOWN if entry.seconds is None else _cell(entry.seconds, duration),
            ]
        )
    title = (
        "Time to equal loss: what each method took to the loss that it and the dense model both reached, over what "
        "the dense model took."
    )
    columns = ["sparsity", "method", "loss (nats)", "ends as low", "steps", "FLOPs", "time"]
    return Table(title, columns, cells)


def _of_pairs(pairs: Sequence[tuple[Row, Row]], sparsity: float, method: str, against: str) -> EqualLossRow:
    ends = [(own.curve[-1].loss, dense.curve[-1].loss) for own, dense in pairs]
    targets = [max(both) for both in ends]

    def took(spent: Spent) -> Measure:
        both = [
            (_reached(own.curve, spent, target), _reached(dense.curve, spent, target))
            for (own, dense), target in zip(pairs, targets, strict=True)
        ]
        return Measure(
            own=sum(own for own, _ in both) / len(both),
            dense=sum(dense for _, dense in both) / len(both),
            ratio=math.exp(sum(math.log(own / dense) for own, dense in both) / len(both))
            if all(own > 0 and dense > 0 for own, dense in both)
            else None,
        )

    is_stacked = any(row.stacked for pair in pairs for row in pair)
    return EqualLossRow(
        sparsity=sparsity,
        method=method,
        against=against,
        seeds=len(pairs),
        loss=sum(targets) / len(targets),
        low=sum(own <= dense for own, dense in ends),
        steps=took(lambda point: point.step),
        train_flops=took(lambda point: point.train_flops),
        seconds=None if is_stacked else took(lambda point: point.seconds or 0.0),
    )


def _reached(curve: Sequence[CurvePoint], spent: Spent, loss: float) -> float:
    """What a curve had spent when it first was at a loss that it does reach."""
    before = curve[0]
    if before.loss <= loss:
        return float(spent(before))
    for point in curve[1:]:
        if point.loss <= loss:
            way = (before.loss - loss) / (before.loss - point.loss)
            return float(spent(before) + way * (spent(point) - spent(before)))
        before = point
    raise ValueError(f"the curve ends at {before.loss}, above {loss}")


def _cell(measure: Measure, written: Callable[[float], str]) -> str:
    ratio = UNKNOWN if measure.ratio is None else f"{measure.ratio:.2f} ×"
    return f"{written(measure.own)} / {written(measure.dense)} ({ratio})"
