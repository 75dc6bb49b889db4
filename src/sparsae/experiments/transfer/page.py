"""The body of a transfer experiment's page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import get_args

from sparsae import __version__
from sparsae.experiments.transfer import figures as draw
from sparsae.experiments.transfer.plan import Knob
from sparsae.experiments.transfer.record import MovementRow, Over, Results
from sparsae.experiments.transfer.results import LABELS, best_table, movement_table, optimum_table
from sparsae.report import markup
from sparsae.report.markup import Tile
from sparsae.report.readable import compact, count, duration
from sparsae.report.tables import Table


def title(results: Results) -> str:
    """The page's heading."""
    return f"Transfer · {results.asked.preset}"


def body(results: Results) -> str:
    """The page, but for its frame."""
    asked = results.asked
    lead = (
        f"{', '.join(asked.parameterizations)}, method {asked.method}; widths {_list(asked.widths)}, sparsities "
        f"{_list(asked.sparsities)}; every run has the same number of steps and tokens."
    )
    state = "" if results.complete else '<p class="state">This experiment is not complete: runs are missing.</p>'
    return "\n".join(
        [
            f'<header>\n<h1>{escape(title(results))}</h1>\n<p class="lead">{escape(lead)}</p>\n{state}',
            "</header>\n<main>",
            markup.tiles(_headline(results)),
            markup.notes(results.warnings),
            _movements(results),
            _together(results),
            *(_basins(results, knob) for knob in dict.fromkeys(entry.knob for entry in results.optima)),
            _reading(),
            f"</main>\n<footer>Written by sparsae {escape(__version__)} from the losses of its own runs.</footer>",
        ]
    )


def _headline(results: Results) -> list[Tile]:
    rows = results.rows
    tiles = [
        Tile(
            f"{entry.parameterization}: optimum over {entry.over}",
            "not known" if entry.at_least and entry.factor < 1.005 else _times(entry),
            [
                f"of the {LABELS[entry.knob]}, highest over lowest",
                "an optimum lies at an edge of what was tried" if entry.at_least else "",
            ],
        )
        for entry in results.movements
    ]
    tiles.append(Tile("Runs", count(len(rows)), [f"{count(sum(row.diverged for row in rows))} diverged"]))
    flops, seconds = sum(row.train_flops or 0 for row in rows), sum(row.seconds or 0 for row in rows)
    tiles.append(Tile("FLOPs of the runs", compact(flops), [duration(seconds)]))
    return tiles


def _times(entry: MovementRow) -> str:
    return f"{'≥ ' if entry.at_least else ''}{entry.factor:.2f} ×"


def _movements(results: Results) -> str:
    lead = (
        "The ratio of the highest to the lowest optimum, the largest over whatever is held fixed; and the slope of "
        "log optimum on log density or log width: 0 where one setting serves all."
    )
    blocks = [_table(movement_table(results), 3)] if results.movements else []
    panels = [
        draw.optimum_by(results.optima, knob, over)
        for knob in dict.fromkeys(entry.knob for entry in results.optima)
        for over in get_args(Over)
    ]
    return markup.section("movements", "How far optima move", lead, *blocks, markup.figures(panels))


def _together(results: Results) -> str:
    knobs = results.asked.together
    if not knobs:
        return ""
    lead = f"Values of {' and '.join(LABELS[knob] for knob in knobs)} that were best together: what to carry over."
    return markup.section("best", "Best combinations", lead, _table(best_table(results), 3))


def _basins(results: Results, knob: Knob) -> str:
    lead = (
        f"Final validation loss against the {LABELS[knob]}, means over seeds, the best of whatever else was swept. "
        "Every panel has the same scale."
    )
    table = optimum_table([entry for entry in results.optima if entry.knob == knob])
    name = f"basins-{knob.replace('_', '-')}"
    panels = markup.figures(draw.basins(results.rows, results.optima, knob))
    return markup.section(name, f"Basins of the {LABELS[knob]}", lead, panels, _table(table, 4))


def _reading() -> str:
    entries = [
        "An optimum is the vertex of a parabola in log2 of the setting, through the best value and its two neighbours.",
        "At an edge of what was tried, or where every higher value diverged, it is the best value itself, and a factor "
        "with such an optimum may be larger.",
        "Intervals are two-sided 95 % intervals of Student's t of the fits to each seed, in log2. A ratio of extremes "
        "is never below 1 and grows with noise: the slope is the fairer number where few seeds were run. "
        "Where an optimum lies at an edge of the grid, or nowhere, both are bounds, and have no interval.",
        "A value with which any seed diverged is left out of the means.",
    ]
    return markup.section("reading", "How to read it", "What the numbers are.", markup.notes(entries))


def _table(table: Table, names: int) -> str:
    """One column of names: the first few together."""
    rows = [[" · ".join(row[:names]), *row[names:]] for row in table.rows]
    return markup.table(table.title, [", ".join(table.columns[:names]), *table.columns[names:]], rows)


def _list(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
