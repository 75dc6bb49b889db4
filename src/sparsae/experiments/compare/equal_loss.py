"""Time to equal loss: what a method and a dense model each took to the loss that both of them reached."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sparsae.report.readable import UNKNOWN, compact, duration, percent
from sparsae.report.tables import Table

Row = Mapping[str, Any]
DENSE = "dense"
_MEASURES = {"step": "steps", "train_flops": "train_flops", "seconds": "seconds"}  # of a curve -> of an entry


def equal_loss(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """An entry a sparsity and method, where a dense model was compared at that sparsity.

    For each seed the loss is the higher one of the two final validation losses, so that both have it; each gets there
    where its validation curve first does, by linear interpolation. An entry has the mean `loss`, in how many of the
    `seeds` the method ended at least as `low` as dense, and for steps, train_flops and seconds the means of what the
    method (`own`) and the dense model (`dense`) took, and the geometric mean of their `ratio`.
    """
    dense: dict[tuple[float, int], Row] = {}
    named: dict[float, str] = {}
    for row in rows:
        if row["base_method"] == DENSE and named.setdefault(row["sparsity"], row["method"]) == row["method"]:
            dense[row["sparsity"], row["seed"]] = row
    pairs: dict[tuple[float, str], list[tuple[Row, Row]]] = {}
    for row in rows:
        other = dense.get((row["sparsity"], row["seed"]))
        if other and row["method"] != other["method"] and len(row["curve"]) > 1 and len(other["curve"]) > 1:
            pairs.setdefault((row["sparsity"], row["method"]), []).append((row, other))
    found = []
    for (sparsity, method), mine in pairs.items():
        entry = {"sparsity": sparsity, "method": method, "against": named[sparsity], **_of_pairs(mine)}
        found.append(entry)
    return found


def equal_loss_table(entries: Sequence[Row]) -> Table | None:
    """Each method's cost over dense's; None where there is nothing to tell."""
    if not entries:
        return None
    written = {"steps": lambda x: f"{x:,.0f}", "train_flops": compact, "seconds": duration}
    cells = []
    for entry in entries:
        cells.append(
            [
                percent(entry["sparsity"]),
                entry["method"],
                f"{entry['loss']:.4f}",
                f"{entry['low']} of {entry['seeds']}",
                *(_cell(entry[name], form) for name, form in written.items()),
            ]
        )
    title = (
        "Time to equal loss: what each method took to the loss that it and the dense model both reached, over what "
        "the dense model took."
    )
    columns = ["sparsity", "method", "loss (nats)", "ends as low", "steps", "FLOPs", "time"]
    return Table(title, columns, cells)


def _of_pairs(pairs: Sequence[tuple[Row, Row]]) -> dict[str, Any]:
    ends = [(own["curve"][-1]["loss"], dense["curve"][-1]["loss"]) for own, dense in pairs]
    targets = [max(both) for both in ends]
    entry: dict[str, Any] = {
        "seeds": len(pairs),
        "loss": sum(targets) / len(targets),
        "low": sum(own <= dense for own, dense in ends),
    }
    for key, name in _MEASURES.items():
        took = [
            (_reached(own["curve"], key, target), _reached(dense["curve"], key, target))
            for (own, dense), target in zip(pairs, targets, strict=True)
        ]
        entry[name] = {
            "own": sum(own for own, _ in took) / len(took),
            "dense": sum(dense for _, dense in took) / len(took),
            "ratio": math.exp(sum(math.log(own / dense) for own, dense in took) / len(took))
            if all(own > 0 and dense > 0 for own, dense in took)
            else None,
        }
    return entry


def _reached(curve: Sequence[Row], key: str, loss: float) -> float:
    """What a curve had spent when it first was at a loss that it does reach."""
    before = curve[0]
    if before["loss"] <= loss:
        return float(before[key])
    for point in curve[1:]:
        if point["loss"] <= loss:
            way = (before["loss"] - loss) / (before["loss"] - point["loss"])
            return float(before[key] + way * (point[key] - before[key]))
        before = point
    raise ValueError(f"the curve ends at {before['loss']}, above {loss}")


def _cell(measure: Row, written: Any) -> str:
    ratio = UNKNOWN if measure["ratio"] is None else f"{measure['ratio']:.2f} ×"
    return f"{written(measure['own'])} / {written(measure['dense'])} ({ratio})"
