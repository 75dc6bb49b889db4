"""Rows put together: each method at each sparsity over its seeds, against the reference, and what may be concluded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from sparsae.core.intervals import CONFIDENCE, Interval, mean_interval
from sparsae.experiments.statistics import (
    Difference,
    Verdict,
    equivalent_tokens,
    holm,
    paired_difference,
    winner,
)

Row = Mapping[str, Any]
Loss = Literal["test_loss", "validation_loss"]
FEW_UPDATES = 5  # of a rule that moves: with fewer it has hardly moved
_MEANS = ("train_flops", "tokens", "steps", "seconds", "parameters", "state_bytes", "accepted_updates", "updates")


def judged_by(rows: Sequence[Row]) -> Loss:
    """The loss by which runs are compared: on the test, which nothing was tuned on, where every run has one."""
    return "test_loss" if all(row["diverged"] or row["test_loss"] is not None for row in rows) else "validation_loss"


def summarize(
    rows: Sequence[Row], reference: str, loss: Loss, planned: Sequence[tuple[str, str]] = ()
) -> list[dict[str, Any]]:
    """An entry a sparsity and method, in the order of the rows; differences are of this loss.

    A planned difference from the reference is decided by its own p, and every other by Holm's adjustment over all of
    those together, at whichever sparsity.
    """
    entries = []
    for sparsity in dict.fromkeys(row["sparsity"] for row in rows):
        groups: dict[str, list[Row]] = {}
        for row in rows:
            if row["sparsity"] == sparsity:
                groups.setdefault(row["method"], []).append(row)
        entries += _of_one_sparsity(groups, sparsity, reference, loss)
    pairs = {frozenset(pair) for pair in planned}
    for entry in entries:
        entry["planned"] = frozenset((entry["method"], reference)) in pairs
    unplanned = [entry["difference"] for entry in entries if entry["difference"] and not entry["planned"]]
    family = [difference for difference in unplanned if difference["p"] is not None]
    for difference, adjusted in zip(family, holm([d["p"] for d in family]), strict=True):
        difference["p_holm"] = adjusted
    for entry in entries:
        entry["verdict"] = verdict_of(entry, entry["method"] == reference)
    return entries


def contrasts(rows: Sequence[Row], loss: Loss, planned: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """The planned differences, a less b, at each sparsity, each by its own paired test."""
    found = []
    for sparsity in dict.fromkeys(row["sparsity"] for row in rows):
        losses: dict[str, dict[int, float]] = {}
        for row in rows:
            if row["sparsity"] == sparsity and not row["diverged"]:
                losses.setdefault(row["method"], {})[row["seed"]] = row[loss]
        for a, b in planned:
            difference = paired_difference(losses.get(a, {}), losses.get(b, {}))
            entry = {"sparsity": sparsity, "a": a, "b": b, "difference": _difference(difference)}
            found.append(entry | {"verdict": "undecided" if difference is None else difference.verdict})
    return found


def conclusions(rows: Sequence[Row], loss: Loss) -> list[dict[str, Any]]:
    """For each sparsity the method that is better than every other, or None; one that ever diverged is not.

    Rows under a further match are beside the comparison.
    """
    found = []
    for sparsity in dict.fromkeys(row["sparsity"] for row in rows):
        losses: dict[str, dict[int, float]] = {}
        for row in rows:
            if row["sparsity"] == sparsity and not row["diverged"] and not row.get("beside"):
                losses.setdefault(row["method"], {})[row["seed"]] = row[loss]
        failed = {row["method"] for row in rows if row["sparsity"] == sparsity and row["diverged"]}
        best = winner(losses)
        found.append({"sparsity": sparsity, "winner": None if best in failed else best})
    return found


def warnings(results: Mapping[str, Any]) -> list[str]:
    """What a reader must know before believing a number."""
    found = []
    if results["judged_by"] == "validation_loss":
        found.append(
            "the losses compared are those of validation, the text on which learning rates were tuned: not every run "
            "has a test loss (set training.validation_sequences lower, or begin the comparison anew)"
        )
    edges = [
        f"{group['method']} at {group['sparsity']:g} ({setting.rpartition('.')[2]} {group['settings'][setting]:g})"
        for group in results["tuning"]
        for setting in group["edges"]
    ]
    if edges:
        found.append(
            f"the best value is at the edge of the grid, which tuning.extensions did not let go on: {', '.join(edges)}"
        )
    for row in results["rows"]:
        if row["diverged"]:
            found.append(f"{row['method']} at sparsity {row['sparsity']:g}, seed {row['seed']}: diverged")
        elif abs(row["budget_deviation"]) > 0.02:
            found.append(
                f"{row['method']} at sparsity {row['sparsity']:g}, seed {row['seed']}: spent "
                f"{row['budget_deviation']:+.1%} of its budget of {row['match']}"
            )
    found += _of_few_updates(results["rows"])
    seeds = {row["seed"] for row in results["rows"]}
    if len(seeds) == 1:
        found.append("one seed: there are no intervals, and no method can be called better")
    return found


def _of_few_updates(rows: Sequence[Row]) -> Iterator[str]:
    """A moving rule that hardly moved is not what its name says."""
    few = (row for row in rows if row.get("moves") and row["updates"] < FEW_UPDATES)
    for method, sparsity, steps, updates in dict.fromkeys(
        (row["method"], row["sparsity"], row["steps"], row["updates"]) for row in few
    ):
        made = {0: "no topology update", 1: "one topology update"}.get(updates, f"{updates} topology updates")
        yield (
            f"{method} at sparsity {sparsity:g}: {made} in {steps:,} steps, "
            f"{'so it was static' if not updates else 'too few to call it a moving topology'} (train longer, or "
            "set topology.every or the plan's cadence lower)"
        )


def _of_one_sparsity(
    groups: Mapping[str, list[Row]], sparsity: float, reference: str, loss: Loss
) -> list[dict[str, Any]]:
    losses = {name: {r["seed"]: r[loss] for r in rows if not r["diverged"]} for name, rows in groups.items()}
    held_against = losses.get(reference, {})
    differences = {name: paired_difference(mine, held_against) for name, mine in losses.items() if name != reference}
    curve = _mean_curve(groups.get(reference, []))
    entries = []
    for name, rows in groups.items():
        done = [row for row in rows if not row["diverged"]]
        difference = differences.get(name)
        entries.append(
            {
                "method": name,
                "sparsity": sparsity,
                **{name: _mean_of(done, name) for name in ("test_loss", "validation_loss")},
                "diverged": len(rows) - len(done),
                "learning_rate": rows[0]["learning_rate"],
                "settings": rows[0].get("settings", {}),
                **{key: _mean([row[key] for row in done]) for key in _MEANS},
                "difference": _difference(difference),
                "equivalent_tokens": _equivalent(curve, difference) if difference else None,
            }
        )
    return entries


def verdict_of(entry: Mapping[str, Any], is_reference: bool) -> Verdict:
    """What an entry's difference says. Nothing is decided by the runs that are left where others diverged."""
    p = decisive_p(entry)
    if is_reference:
        return "reference"
    if p is None or p >= 1.0 - CONFIDENCE or entry["diverged"]:
        return "undecided"
    return "better" if entry["difference"]["mean"] < 0 else "worse"


def decisive_p(entry: Mapping[str, Any]) -> float | None:
    """The p value by which an entry's difference is judged; None where there is none."""
    difference = entry["difference"]
    p: float | None = difference and difference["p" if entry["planned"] else "p_holm"]
    return p


def _interval(interval: Interval) -> dict[str, Any]:
    return {"n": interval.n, "mean": interval.mean, "low": interval.low, "high": interval.high}


def _difference(difference: Difference | None) -> dict[str, Any] | None:
    if difference is None:
        return None
    return {**_interval(difference.interval), "t": difference.t, "p": difference.p, "p_holm": None}


def _equivalent(curve: Sequence[tuple[float, float]], difference: Difference) -> dict[str, Any]:
    """Of the mean difference and, where there is one, of the ends of its interval: a lower loss is worth more."""
    interval = difference.interval
    middle = equivalent_tokens(curve, interval.mean)
    ends = [None if end is None else equivalent_tokens(curve, end).ratio for end in (interval.high, interval.low)]
    tokens = curve[-1][0] if curve else None
    return {
        "ratio": middle.ratio,
        "low": ends[0],
        "high": ends[1],
        "more_tokens": None if middle.ratio is None or tokens is None else (middle.ratio - 1) * tokens,
        "how": middle.how,
    }


def _mean_curve(rows: Sequence[Row]) -> list[tuple[float, float]]:
    """(tokens, mean loss) at the steps that all seeds were validated at."""
    curves = [{point["tokens"]: point["loss"] for point in row["curve"]} for row in rows if not row["diverged"]]
    if not curves:
        return []
    shared = sorted(set.intersection(*(set(curve) for curve in curves)))
    return [(tokens, sum(curve[tokens] for curve in curves) / len(curves)) for tokens in shared]


def _mean_of(rows: Sequence[Row], loss: str) -> dict[str, Any] | None:
    values = [row[loss] for row in rows if row[loss] is not None]
    return _interval(mean_interval(values)) if values else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
