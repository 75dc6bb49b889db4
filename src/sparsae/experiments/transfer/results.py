"""What a transfer experiment found: a row a run, an optimum a width and sparsity, and how far optima move."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from sparsae import __version__
from sparsae.config import Config
from sparsae.core.intervals import Interval, mean_interval
from sparsae.experiments.transfer.basins import (
    Basin,
    Cell,
    Over,
    fit_basin,
    log2_interval,
    mean_losses,
    movement,
)
from sparsae.experiments.transfer.plan import KNOBS, Point, TransferPlan
from sparsae.files import to_json, write_atomically
from sparsae.report.readable import UNKNOWN, percent
from sparsae.report.tables import Table, interval_text

Row = Mapping[str, Any]
LABELS = {name: name.replace("_", " ") for name in KNOBS}
_NAMED = 6  # optima that a warning names
_COPIED = ("validation_loss", "steps", "tokens", "train_flops", "parameters", "nnz", "seconds", "device", "torch")


def collect(
    plan: TransferPlan, done: Mapping[Point, Mapping[str, Any]], configs: Mapping[Point, Config]
) -> dict[str, Any]:
    """The content of results.json from the outcomes of the runs that are done."""
    rows = [_row(point, found, configs[point]) for point, found in done.items()]
    optima = [entry for knob in plan.knobs for entry in _optima(rows, knob)]
    lacking = _without_optimum(rows, optima)
    results: dict[str, Any] = {
        "kind": plan.kind,
        "complete": len(rows) == len(list(plan.points())),
        "sparsae": __version__,
        "plan": plan.model_dump(mode="json"),
        "rows": rows,
        "optima": optima,
        "best": _best(rows, plan.knobs),
        "without_optimum": lacking,
        "movements": _movements(optima, {cell["parameterization"] for cell in lacking}),
    }
    results["warnings"] = _warnings(results)
    return results


def write_results(results: Mapping[str, Any], out: Path) -> None:
    """results.json, table.md and table.tex, each whole or not at all."""
    found = tables(results)
    write_atomically(out / "results.json", to_json(results, indent=1) + "\n")
    write_atomically(out / "table.md", "\n".join(table.markdown() for table in found))
    write_atomically(out / "table.tex", "\n".join(table.latex() for table in found))


def tables(results: Mapping[str, Any]) -> list[Table]:
    """What was found, in the order in which it is told."""
    found = [movement_table(results)] if results["movements"] else []
    found.append(optimum_table(results))
    return [*found, best_table(results)] if swept_together(results) else found


def movement_table(results: Mapping[str, Any]) -> Table:
    """How far the optimum moves under each parameterization, beside each other."""
    rows = []
    for entry in results["movements"]:
        interval = entry["factor_interval"]
        rows.append(
            [
                LABELS[entry["knob"]],
                entry["over"],
                entry["parameterization"],
                f"{'≥ ' if entry['at_least'] else ''}{entry['factor']:.2f}",
                f"{interval['low']:.2f}–{interval['high']:.2f}" if interval else UNKNOWN,
                _slope_text(entry),
            ]
        )
    columns = ["optimum of", "over", "parameterization", "factor", "95 % interval", "slope"]
    heading = "How far the optimum moves: highest over lowest, and log-log slope (in brackets: one lies at an edge)."
    return Table(heading, columns, rows, 3)


def optimum_table(results: Mapping[str, Any]) -> Table:
    """The optimum at each width and sparsity."""
    rows = []
    for entry in results["optima"]:
        interval = entry["interval"]
        rows.append(
            [
                LABELS[entry["knob"]],
                entry["parameterization"],
                str(entry["width"]),
                percent(entry["sparsity"]),
                f"{entry['optimum']:.3g}",
                f"{interval['low']:.3g}–{interval['high']:.3g}" if interval else UNKNOWN,
                f"{entry['loss']:.4f}",
                {None: "inside", "divergence": "before divergence"}.get(entry["edge"], f"{entry['edge']} tried"),
                str(entry["diverged"]),
            ]
        )
    columns = [
        "optimum of", "parameterization", "width", "sparsity", "optimum", "95 % interval", "loss (nats)", "where",
        "diverged",
    ]  # fmt: skip
    return Table("Optima by parabolas through the mean losses over seeds.", columns, rows, 2)


def swept_together(results: Mapping[str, Any]) -> list[str]:
    """The settings that were swept, where they are two or more: then the best of each says little by itself."""
    knobs = [name for name in KNOBS if len(results["plan"][f"{name}s"]) > 1]
    return knobs if len(knobs) > 1 else []


def best_table(results: Mapping[str, Any]) -> Table:
    """What was best at each width and sparsity, of all combinations of values that were tried."""
    knobs = swept_together(results)
    rows = [
        [
            entry["parameterization"],
            str(entry["width"]),
            percent(entry["sparsity"]),
            *(f"{entry[knob]:.3g}" for knob in knobs),
            f"{entry['loss']:.4f}",
        ]
        for entry in results["best"]
    ]
    columns = ["parameterization", "width", "sparsity", *(LABELS[knob] for knob in knobs), "loss (nats)"]
    return Table("The best of all combinations that were tried, by mean losses over seeds.", columns, rows, 3)


def basin_of(rows: Sequence[Row], knob: str) -> dict[int, dict[float, float | None]]:
    """Seed -> value of the setting -> validation loss: the lowest over the other settings; None where all diverged."""
    found: dict[int, dict[float, float | None]] = {}
    for row in rows:
        losses = found.setdefault(row["seed"], {})
        known = [loss for loss in (losses.get(row[knob]), row["validation_loss"]) if loss is not None]
        losses[row[knob]] = min(known, default=None)
    return found


def by_cell(rows: Sequence[Row]) -> dict[tuple[str, int, float], list[Row]]:
    """Rows by (parameterization, width, sparsity)."""
    groups: dict[tuple[str, int, float], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["parameterization"], row["width"], row["sparsity"]), []).append(row)
    return groups


def _slope_text(entry: Row) -> str:
    if entry["slope_interval"] is None:
        return UNKNOWN
    text = interval_text(entry["slope_interval"], signed=True)
    return f"({text})" if entry["at_least"] else text


def _row(point: Point, found: Mapping[str, Any], config: Config) -> dict[str, Any]:
    return {
        "parameterization": point.parameterization,
        "width": point.width,
        "sparsity": point.sparsity,
        "learning_rate": config.training.learning_rate,
        "initial_scale": config.parameterization.initial_scale,
        "embedding_multiplier": config.parameterization.embedding_multiplier,
        "seed": point.seed,
        "heads": config.model.heads,
        "diverged": bool(found.get("diverged")),
        **{key: found.get(key) for key in _COPIED},
        "run": point.name,
    }


def _optima(rows: Sequence[Row], knob: str) -> list[dict[str, Any]]:
    """An entry a parameterization, width and sparsity of which a run came to its end."""
    entries = []
    for (parameterization, width, sparsity), mine in by_cell(rows).items():
        curves = basin_of(mine, knob)
        basin = fit_basin(mean_losses(list(curves.values())))
        if basin is None:
            continue
        seeds = {seed: found for seed, curve in curves.items() if (found := fit_basin(curve))}
        # What lies at an edge of the grid says nothing of how much seeds differ.
        inside = all(found.edge is None for found in seeds.values())
        interval = log2_interval([found.value for found in seeds.values()]) if inside else None
        entries.append(
            {
                "knob": knob,
                "parameterization": parameterization,
                "width": width,
                "sparsity": sparsity,
                "optimum": basin.value,
                "loss": basin.loss,
                "edge": basin.edge,
                "interval": interval and {"n": interval.n, "low": interval.low, "high": interval.high},
                "by_seed": {str(seed): _basin(found) for seed, found in seeds.items()},
                "diverged": sum(row["diverged"] for row in mine),
            }
        )
    return entries


def _best(rows: Sequence[Row], knobs: Sequence[str]) -> list[dict[str, Any]]:
    """The values that led to the lowest mean loss over seeds, of each parameterization, width and sparsity."""
    entries = []
    for (parameterization, width, sparsity), mine in by_cell(rows).items():
        curves: dict[int, dict[tuple[float, ...], float | None]] = {}
        for row in mine:
            curves.setdefault(row["seed"], {})[tuple(row[knob] for knob in knobs)] = row["validation_loss"]
        known = [(loss, values) for values, loss in mean_losses(list(curves.values())).items() if loss is not None]
        if known:
            loss, values = min(known)
            cell = {"parameterization": parameterization, "width": width, "sparsity": sparsity}
            entries.append({**cell, **dict(zip(knobs, values, strict=True)), "loss": loss})
    return entries


def _without_optimum(rows: Sequence[Row], optima: Sequence[Row]) -> list[dict[str, Any]]:
    """Where no value of the setting came to its end with every seed: the optimum may be anywhere."""
    names = ("parameterization", "width", "sparsity")
    found = {tuple(entry[name] for name in names) for entry in optima}
    return [dict(zip(names, cell, strict=True)) for cell in by_cell(rows) if cell not in found]


def _movements(optima: Sequence[Row], lacking: Collection[str]) -> list[dict[str, Any]]:
    """An entry a setting, what it moves over and parameterization, so that these stand beside each other.

    lacking: parameterizations with a width and sparsity that has no optimum.
    """
    entries = []
    keys = dict.fromkeys((entry["knob"], entry["parameterization"]) for entry in optima)
    for knob in dict.fromkeys(knob for knob, _ in keys):
        for over in get_args(Over):
            for parameterization in [name for of, name in keys if of == knob]:
                mine = [e for e in optima if (e["knob"], e["parameterization"]) == (knob, parameterization)]
                if entry := _movement(mine, over, parameterization in lacking):
                    entries.append({"knob": knob, "over": over, "parameterization": parameterization, **entry})
    return entries


def _movement(optima: Sequence[Row], over: Over, lacks: bool) -> dict[str, Any] | None:
    whole = movement({_cell(e): _fitted(e) for e in optima}, over)
    if whole is None:
        return None
    seeds = sorted(set.intersection(*(set(entry["by_seed"]) for entry in optima)))
    found = [movement({_cell(e): _fitted(e["by_seed"][seed]) for e in optima}, over) for seed in seeds]
    each = [one for one in found if one is not None]
    bound = lacks or whole.at_least or any(one.at_least for one in each)
    factors = None if bound else log2_interval([one.factor for one in each])
    slopes = [one.slope for one in each if one.slope is not None]
    slope = mean_interval(slopes) if slopes else None
    if slope and bound:
        slope = Interval(slope.n, slope.mean, None, None)
    return {
        "factor": whole.factor,
        "factor_interval": factors and {"n": factors.n, "low": factors.low, "high": factors.high},
        "slope": whole.slope,
        "slope_interval": slope and {"n": slope.n, "mean": slope.mean, "low": slope.low, "high": slope.high},
        "at_least": bound,
    }


def _cell(entry: Row) -> Cell:
    return entry["width"], entry["sparsity"]


def _basin(basin: Basin) -> dict[str, Any]:
    return {"optimum": basin.value, "loss": basin.loss, "edge": basin.edge}


def _fitted(entry: Row) -> Basin:
    return Basin(math.log2(entry["optimum"]), entry["loss"], entry["edge"])


def _warnings(results: Mapping[str, Any]) -> list[str]:
    found, together = [], swept_together(results)
    for edge, what in (
        ("lowest", "the lowest value tried: the grid was too narrow"),
        ("highest", "the highest value tried: the grid was too narrow"),
        ("divergence", "the last value before runs diverge: it is known as well as the grid is fine"),
    ):
        cells = [
            (f"{LABELS[e['knob']]} of " if together else "")
            + f"{e['parameterization']} at width {e['width']}, sparsity {e['sparsity']:g}"
            for e in results["optima"]
            if e["edge"] == edge
        ]
        if cells:
            more = f"; and {len(cells) - _NAMED} more" if len(cells) > _NAMED else ""
            found.append(f"the optimum is {what}, for {'; '.join(cells[:_NAMED])}{more}")
    lacking = [
        f"{cell['parameterization']} at width {cell['width']}, sparsity {cell['sparsity']:g}"
        for cell in results["without_optimum"]
    ]
    if lacking:
        more = f"; and {len(lacking) - _NAMED} more" if len(lacking) > _NAMED else ""
        found.append(f"no value came to its end with every seed, for {'; '.join(lacking[:_NAMED])}{more}")
    diverged = sum(row["diverged"] for row in results["rows"])
    if diverged:
        found.append(f"{diverged} of {len(results['rows'])} runs diverged; their values are left out of the fits")
    if len({row["seed"] for row in results["rows"]}) == 1:
        found.append("one seed: there are no intervals")
    return found
