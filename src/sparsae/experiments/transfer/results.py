"""What a transfer experiment found: a row a run, an optimum a width and sparsity, and how far optima move."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from sparsae import __version__
from sparsae.config import Config
from sparsae.core.intervals import Interval, mean_interval
from sparsae.experiments.directory import write_all
from sparsae.experiments.jobs import Failure
from sparsae.experiments.transfer.basins import (
    Basin,
    Cell,
    fit_basin,
    log2_interval,
    mean_losses,
    movement,
)
from sparsae.experiments.transfer.plan import KNOBS, Knob, Point, TransferPlan
from sparsae.experiments.transfer.record import (
    Best,
    MovementRow,
    Optimum,
    Over,
    Place,
    Results,
    Row,
    SeedOptimum,
)
from sparsae.report.readable import UNKNOWN, sparsity_text
from sparsae.report.tables import Table, interval_text
from sparsae.runs.summary import Summary

LABELS = {name: name.replace("_", " ") for name in KNOBS}
_NAMED = 6  # optima that a warning names
_COPIED = ("validation_loss", "steps", "tokens", "train_flops", "parameters", "nnz", "seconds", "device", "torch")


def collect(plan: TransferPlan, done: Mapping[Point, Summary | Failure], configs: Mapping[Point, Config]) -> Results:
    """The content of results.json from the outcomes of the runs that are done."""
    rows = tuple(_row(point, found, configs[point]) for point, found in done.items())
    optima = tuple(entry for knob in plan.knobs for entry in _optima(rows, knob))
    lacking = _without_optimum(rows, optima)
    results = Results(
        kind=plan.kind,
        complete=len(rows) == len(list(plan.points())),
        sparsae=__version__,
        plan=plan.model_dump(mode="json"),
        rows=rows,
        optima=optima,
        best=_best(rows, plan.knobs),
        without_optimum=lacking,
        movements=_movements(optima, {place.parameterization for place in lacking}),
        warnings=(),
    )
    return replace(results, warnings=tuple(_warnings(results)))


def write_results(results: Results, out: Path) -> None:
    """results.json, table.md and table.tex, each whole or not at all."""
    write_all(results, tables(results), out)


def tables(results: Results) -> list[Table]:
    """What was found, in the order in which it is told."""
    found = [movement_table(results)] if results.movements else []
    found.append(optimum_table(results.optima))
    return [*found, best_table(results)] if results.asked.together else found


def movement_table(results: Results) -> Table:
    """How far the optimum moves under each parameterization, beside each other."""
    rows = []
    for entry in results.movements:
        interval = entry.factor_interval
        rows.append(
            [
                LABELS[entry.knob],
                entry.over,
                entry.parameterization,
                f"{'≥ ' if entry.at_least else ''}{entry.factor:.2f}",
                f"{interval.low:.2f}–{interval.high:.2f}" if interval else UNKNOWN,
                _slope_text(entry),
            ]
        )
    columns = ["optimum of", "over", "parameterization", "factor", "95 % interval", "slope"]
    heading = "How far the optimum moves: highest over lowest, and log-log slope (in brackets: one lies at an edge)."
    return Table(heading, columns, rows, 3)


def optimum_table(optima: Sequence[Optimum]) -> Table:
    """The optimum at each width and sparsity."""
    rows = []
    for entry in optima:
        interval = entry.interval
        rows.append(
            [
                LABELS[entry.knob],
                entry.parameterization,
                str(entry.width),
                sparsity_text(entry.sparsity),
                f"{entry.optimum:.3g}",
                f"{interval.low:.3g}–{interval.high:.3g}" if interval else UNKNOWN,
                f"{entry.loss:.4f}",
                {None: "inside", "divergence": "before divergence"}.get(entry.edge, f"{entry.edge} tried"),
                str(entry.diverged),
            ]
        )
    columns = [
        "optimum of", "parameterization", "width", "sparsity", "optimum", "95 % interval", "loss (nats)", "where",
        "diverged",
    ]  # fmt: skip
    return Table("Optima by parabolas through the mean losses over seeds.", columns, rows, 2)


def best_table(results: Results) -> Table:
    """What was best at each width and sparsity, of all combinations of values that were tried."""
    knobs = results.asked.together
    rows = [
        [
            entry.parameterization,
            str(entry.width),
            sparsity_text(entry.sparsity),
            *(f"{entry.values.get(knob, math.nan):.3g}" for knob in knobs),
            f"{entry.loss:.4f}",
        ]
        for entry in results.best
    ]
    columns = ["parameterization", "width", "sparsity", *(LABELS[knob] for knob in knobs), "loss (nats)"]
    return Table("The best of all combinations that were tried, by mean losses over seeds.", columns, rows, 3)


def basin_of(rows: Sequence[Row], knob: Knob) -> dict[int, dict[float, float | None]]:
    """Seed -> value of the setting -> validation loss: the lowest over the other settings; None where all diverged."""
    found: dict[int, dict[float, float | None]] = {}
    for row in rows:
        losses, value = found.setdefault(row.seed, {}), row.value(knob)
        known = [loss for loss in (losses.get(value), row.validation_loss) if loss is not None]
        losses[value] = min(known, default=None)
    return found


def by_cell(rows: Sequence[Row]) -> dict[tuple[str, int, float], list[Row]]:
    """Rows by (parameterization, width, sparsity)."""
    groups: dict[tuple[str, int, float], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.parameterization, row.width, row.sparsity), []).append(row)
    return groups


def _slope_text(entry: MovementRow) -> str:
    if entry.slope_interval is None:
        return UNKNOWN
    text = interval_text(entry.slope_interval, signed=True)
    return f"({text})" if entry.at_least else text


def _row(point: Point, found: Summary | Failure, config: Config) -> Row:
    return Row(
        parameterization=point.parameterization,
        width=point.width,
        sparsity=point.sparsity,
        learning_rate=config.training.learning_rate,
        initial_scale=config.parameterization.initial_scale,
        embedding_multiplier=config.parameterization.embedding_multiplier,
        seed=point.seed,
        heads=config.model.heads,
        diverged=isinstance(found, Failure),
        **{name: getattr(found, name, None) for name in _COPIED},
        run=point.name,
    )


def _optima(rows: Sequence[Row], knob: Knob) -> Iterator[Optimum]:
    """An entry a parameterization, width and sparsity of which a run came to its end."""
    for (parameterization, width, sparsity), mine in by_cell(rows).items():
        curves = basin_of(mine, knob)
        basin = fit_basin(mean_losses(list(curves.values())))
        if basin is None:
            continue
        seeds = {seed: found for seed, curve in curves.items() if (found := fit_basin(curve))}
        # What lies at an edge of the grid says nothing of how much seeds differ.
        inside = all(found.edge is None for found in seeds.values())
        yield Optimum(
            knob=knob,
            parameterization=parameterization,
            width=width,
            sparsity=sparsity,
            optimum=basin.value,
            loss=basin.loss,
            edge=basin.edge,
            interval=log2_interval([found.value for found in seeds.values()]) if inside else None,
            by_seed={
                str(seed): SeedOptimum(optimum=found.value, loss=found.loss, edge=found.edge)
                for seed, found in seeds.items()
            },
            diverged=sum(row.diverged for row in mine),
        )


def _best(rows: Sequence[Row], knobs: Sequence[Knob]) -> tuple[Best, ...]:
    """The values that led to the lowest mean loss over seeds, of each parameterization, width and sparsity."""
    entries = []
    for (parameterization, width, sparsity), mine in by_cell(rows).items():
        curves: dict[int, dict[tuple[float, ...], float | None]] = {}
        for row in mine:
            curves.setdefault(row.seed, {})[tuple(row.value(knob) for knob in knobs)] = row.validation_loss
        known = [(loss, values) for values, loss in mean_losses(list(curves.values())).items() if loss is not None]
        if known:
            loss, values = min(known)
            named: dict[str, float] = dict(zip(knobs, values, strict=True))
            entries.append(
                Best(parameterization=parameterization, width=width, sparsity=sparsity, values=named, loss=loss)
            )
    return tuple(entries)


def _without_optimum(rows: Sequence[Row], optima: Sequence[Optimum]) -> tuple[Place, ...]:
    """Where no value of the setting came to its end with every seed: the optimum may be anywhere."""
    found = {(entry.parameterization, entry.width, entry.sparsity) for entry in optima}
    return tuple(
        Place(parameterization=parameterization, width=width, sparsity=sparsity)
        for parameterization, width, sparsity in by_cell(rows)
        if (parameterization, width, sparsity) not in found
    )


def _movements(optima: Sequence[Optimum], lacking: Collection[str]) -> tuple[MovementRow, ...]:
    """An entry a setting, what it moves over and parameterization, so that these stand beside each other.

    lacking: parameterizations with a width and sparsity that has no optimum.
    """
    entries = []
    groups: dict[Knob, dict[str, list[Optimum]]] = {}
    for entry in optima:
        groups.setdefault(entry.knob, {}).setdefault(entry.parameterization, []).append(entry)
    for mine in groups.values():
        for over in get_args(Over):
            for parameterization, group in mine.items():
                if moved := _movement(group, over, parameterization in lacking):
                    entries.append(moved)
    return tuple(entries)


def _movement(optima: Sequence[Optimum], over: Over, lacks: bool) -> MovementRow | None:
    whole = movement({_cell(e): _fitted(e) for e in optima}, over)
    if whole is None:
        return None
    seeds = sorted(set.intersection(*(set(entry.by_seed) for entry in optima)))
    found = [movement({_cell(e): _fitted(e.by_seed[seed]) for e in optima}, over) for seed in seeds]
    each = [one for one in found if one is not None]
    bound = lacks or whole.at_least or any(one.at_least for one in each)
    slopes = [one.slope for one in each if one.slope is not None]
    slope = mean_interval(slopes) if slopes else None
    if slope and bound:
        slope = Interval(slope.n, slope.mean, None, None)
    return MovementRow(
        knob=optima[0].knob,
        over=over,
        parameterization=optima[0].parameterization,
        factor=whole.factor,
        factor_interval=None if bound else log2_interval([one.factor for one in each]),
        slope=whole.slope,
        slope_interval=slope,
        at_least=bound,
    )


def _cell(entry: Optimum) -> Cell:
    return entry.width, entry.sparsity


def _fitted(entry: Optimum | SeedOptimum) -> Basin:
    return Basin(math.log2(entry.optimum), entry.loss, entry.edge)


def _warnings(results: Results) -> list[str]:
    found: list[str] = []
    for edge, what in (
        ("lowest", "the lowest value tried: the grid was too narrow"),
        ("highest", "the highest value tried: the grid was too narrow"),
        ("divergence", "the last value before runs diverge: it is known as well as the grid is fine"),
    ):
        cells = [
            (f"{LABELS[entry.knob]} of " if results.asked.together else "") + _place(entry)
            for entry in results.optima
            if entry.edge == edge
        ]
        if cells:
            more = f"; and {len(cells) - _NAMED} more" if len(cells) > _NAMED else ""
            found.append(f"the optimum is {what}, for {'; '.join(cells[:_NAMED])}{more}")
    lacking = [_place(place) for place in results.without_optimum]
    if lacking:
        more = f"; and {len(lacking) - _NAMED} more" if len(lacking) > _NAMED else ""
        found.append(f"no value came to its end with every seed, for {'; '.join(lacking[:_NAMED])}{more}")
    diverged = sum(row.diverged for row in results.rows)
    if diverged:
        found.append(f"{diverged} of {len(results.rows)} runs diverged; their values are left out of the fits")
    if len({row.seed for row in results.rows}) == 1:
        found.append("one seed: there are no intervals")
    return found


def _place(entry: Optimum | Place) -> str:
    return f"{entry.parameterization} at width {entry.width}, sparsity {entry.sparsity:g}"
