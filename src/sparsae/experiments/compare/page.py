"""The body of a comparison's page."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from sparsae import __version__
from sparsae.config import Config
from sparsae.experiments.compare import figures as draw
from sparsae.experiments.compare.equal_loss import equal_loss_table
from sparsae.experiments.compare.plan import LEARNING_RATE
from sparsae.experiments.compare.record import Results, SummaryRow, TuningRow
from sparsae.experiments.compare.strategy import strategy_section
from sparsae.experiments.compare.stuck import stuck_table
from sparsae.experiments.compare.summary import FEW_UPDATES
from sparsae.experiments.compare.tables import contrast_table, rank_table, results_table
from sparsae.experiments.compare.tasks import tasks_section
from sparsae.report import markup
from sparsae.report.data import RunData, read_run
from sparsae.report.looks import Look, looks
from sparsae.report.markup import Tile
from sparsae.report.readable import UNKNOWN, compact, count, duration, in_short, percent, sparsity_text
from sparsae.report.tables import Table, interval_text

_TITLES = {"comparison": "Comparison", "ablation": "Ablation", "sensitivity": "Sensitivity to the micro-batch"}
_LOSSES = {
    "test_loss": "The loss is that on the test, held-out text that nothing was tuned or watched on.",
    "validation_loss": "The loss is that of the last validation, on the text that learning rates were tuned on.",
}
_MATCHED = {"flops": "counted training FLOPs, all parts", "tokens": "training tokens", "steps": "optimizer steps"}


def _first_runs(results: Results, out: Path) -> dict[tuple[str, float], RunData]:
    """The run of the first seed of each method and sparsity, where its directory is still there."""
    found: dict[tuple[str, float], RunData] = {}
    for row in results.rows:
        key = row.method, row.sparsity
        if key not in found and not row.diverged and (out / row.run / "config.yaml").is_file():
            found[key] = read_run(out / row.run)
    return found


def title(results: Results) -> str:
    """The page's heading."""
    return f"{_TITLES[results.kind]} · {results.asked.preset}"


def body(results: Results, out: Path) -> str:
    """The page, but for its frame; out: where the runs lie."""
    runs = _first_runs(results, out)
    parts = {
        "results": ("Results", _results(results)),
        "ranking": ("Ranking", _ranking(results)),
        "tasks": ("Tasks", tasks_section(results)),
        "curves": ("Curves", _curves(results)),
        "equal-loss": ("Equal loss", _equal_loss(results)),
        "topology": ("Topology", _topology(results, runs)),
        "strategy": ("Strategy", strategy_section(results, {key: run.path for key, run in runs.items()})),
        "cost": ("Cost", _cost(results)),
        "tuning": ("Tuning", _tuning(results)),
        "settings": ("Settings", _settings(runs)),
        "reading": ("How to read it", _reading()),
    }
    parts = {name: part for name, part in parts.items() if part[1]}
    links = "".join(f'<li><a href="#{name}">{label}</a></li>' for name, (label, _) in parts.items())
    asked, seeds = results.asked, len(results.asked.seeds)
    compared = {row.method for row in results.rows if not row.beside}
    lead = (
        f"{len(compared)} method{'s' if len(compared) > 1 else ''}, {seeds} seed{'s' if seeds > 1 else ''}, "
        f"{'sparsities' if len(asked.sparsities) > 1 else 'sparsity'} "
        f"{', '.join(sparsity_text(s) for s in asked.sparsities)}; matched on {_MATCHED[asked.match]}; "
        f"held against {results.reference}."
    )
    state = "" if results.complete else '<p class="state">This experiment is not complete: runs are missing.</p>'
    return "\n".join(
        [
            f'<header>\n<h1>{escape(title(results))}</h1>\n<p class="lead">{escape(lead)}</p>\n{state}',
            f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n</header>\n<main>',
            markup.tiles(_headline(results)),
            markup.notes(results.warnings),
            *(text for _, text in parts.values()),
            f"</main>\n<footer>Written by sparsae {escape(__version__)} from the metrics of its own runs.</footer>",
        ]
    )


def _headline(results: Results) -> list[Tile]:
    tuning, beside = results.tuning, {row.method for row in results.rows if row.beside}
    rows = list({row.run: row for row in results.rows}.values())  # equal settings are one run
    few = {(row.method, row.sparsity) for row in results.rows if row.moves and (row.updates or 0) < FEW_UPDATES}
    tiles = []
    for entry in results.conclusions:
        mine = (e for e in results.summary if e.sparsity == entry.sparsity and e.method not in beside)
        losses = {e.method: e.loss(results.judged_by) for e in mine}
        known = {method: interval for method, interval in losses.items() if interval}
        best = min(known, key=lambda method: known[method].mean, default=None)
        lowest = f"lowest mean: {best}, {interval_text(known[best])}" if best else ""
        hardly = (entry.winner, entry.sparsity) in few
        notes = [lowest, "of too few topology updates to be called a moving topology" if hardly else ""]
        tiles.append(Tile(f"Best at {sparsity_text(entry.sparsity)} sparsity", entry.winner or "no winner", notes))
    trials = list({trial.run: trial for group in tuning for trial in group.trials}.values())
    spent = sum(trial.train_flops or 0 for trial in trials)
    notes = [f"and {len(trials)} trials of tuning" if trials else "nothing was tuned"]
    tiles.append(Tile("Compared runs", count(len(rows)), notes))
    total = sum(row.train_flops or 0 for row in rows)
    tiles.append(Tile("FLOPs of the runs", compact(total), [f"tuning: {compact(spent)}" if trials else ""]))
    seconds = sum(row.seconds or 0 for row in rows)
    tried = sum(trial.seconds or 0 for trial in trials)
    if not results.is_stacked:
        tiles.append(Tile("Time of the runs", duration(seconds), [f"tuning: {duration(tried)}" if trials else ""]))
    return tiles


def _table(table: Table) -> str:
    """One column of names: the first two together."""
    rows = [[f"{row[1]} · {row[0]}", *row[2:]] for row in table.rows]
    return markup.table(table.title, [table.columns[1], *table.columns[2:]], rows)


def _results(results: Results) -> str:
    look, sparsities, loss = _looks(results), results.asked.sparsities, results.judged_by
    further = ", under a further match over those there" if any(row.beside for row in results.rows) else ""
    lead = (
        f"{_LOSSES[loss]} A star marks a paired difference with p < 0.05, adjusted by Holm's method over all "
        f"differences but the planned ones{further}; nothing is concluded from the others. Equivalent tokens: how many "
        "times its own tokens the reference would need for the same loss."
    )
    if any(row.nnz == 0 for row in results.rows):
        lead += " A dense model stands at each sparsity with that sparsity's budget."
    return markup.section(
        "results",
        "Final loss",
        lead,
        _table(results_table(results)),
        *map(markup.paragraph, _without_equivalent(results)),
        _table(contrast_table(results)) if results.contrasts else "",
        "<h3>In figures</h3>",
        markup.figures(
            [
                draw.loss_by_sparsity(results.summary, look, loss),
                *(
                    draw.differences(results.summary, results.rows, look, s, results.reference, loss)
                    for s in sparsities
                ),
            ]
        ),
    )


def _without_equivalent(results: Results) -> list[str]:
    """Why equivalent tokens are missing, where they are."""
    reasons: dict[str, list[str]] = {}
    for entry in results.summary:
        if entry.equivalent_tokens and entry.equivalent_tokens.ratio is None:
            whose = f"{entry.method} at {sparsity_text(entry.sparsity)}"
            reasons.setdefault(entry.equivalent_tokens.how, []).append(whose)
    return [f"No equivalent tokens of {', '.join(names)}: {why}." for why, names in reasons.items()]


def _ranking(results: Results) -> str:
    if not results.ranking:
        return ""
    lead = (
        "Candidates of each update were also scored on the whole validation set, apart from training: Kendall's tau "
        "of the ranking by the micro-batch against that by the whole set, and Pearson's correlation of the cross "
        "entropies (less their means in each update). 1 is perfect agreement, 0 none."
    )
    return markup.section("ranking", "Ranking of candidates", lead, _table(rank_table(results)))


def _curves(results: Results) -> str:
    look, rows = _looks(results), results.rows
    axes: tuple[draw.Against, ...] = ("train_flops", "tokens", "seconds")
    axes = axes[:2] if results.is_stacked else axes
    several = len(results.asked.sparsities) > 1
    blocks = [
        (f"<h3>{sparsity_text(sparsity)} sparse</h3>" if several else "")
        + markup.figures(draw.loss_curves(rows, look, against, sparsity) for against in axes)
        for sparsity in results.asked.sparsities
    ]
    lead = "Means over seeds; the bands reach from the best to the worst seed. The untrained model is beyond the top."
    return markup.section("curves", "Validation loss on the way", lead, *blocks)


def _equal_loss(results: Results) -> str:
    table = equal_loss_table(results.equal_loss)
    if table is None:
        return ""
    lead = (
        "The higher one of a method's and the dense model's final loss is where both have been, seed by seed. It is "
        "read from the validation curves, a few points a run. A run that goes on lower passed it while its learning "
        "rate was still high, so that it needed more than a run that was to end there would have."
    )
    return markup.section("equal-loss", "Time to equal loss", lead, _table(table))


def _topology(results: Results, runs: Mapping[tuple[str, float], RunData]) -> str:
    look, panels = _looks(results), []
    for sparsity in results.asked.sparsities:
        mine = {method: run for (method, at), run in runs.items() if at == sparsity}
        panels += [draw.telemetry(mine, look, sparsity, kind) for kind in ("turnover", "distance", "itop")]
        panels.append(draw.layer_densities(mine, look, sparsity))
    accepted = [
        [
            f"{entry.method} · {sparsity_text(entry.sparsity)}",
            f"{entry.updates:.4g}",
            _accepted(entry, entry.updates),
        ]
        for entry in results.summary
        if entry.updates
    ]
    if not accepted and not any(panels):
        return ""
    lead = "How the topologies moved, from the runs of the first seed; the table has the means over all seeds."
    columns = ["method", "updates", "accepted"]
    table = markup.table("Topology updates a run", columns, accepted) if accepted else ""
    stuck = stuck_table(results.rows)
    return markup.section("topology", "Topology", lead, markup.figures(panels), table, _table(stuck) if stuck else "")


def _accepted(entry: SummaryRow, updates: float) -> str:
    accepted = entry.accepted_updates or 0
    return "each" if accepted == updates else f"{accepted:.4g} ({percent(accepted / updates)})"


def _cost(results: Results) -> str:
    panels = []
    for sparsity in results.asked.sparsities:
        panels.append(draw.cost_bars(results.rows, sparsity, "FLOPs"))
        if not results.is_stacked:
            panels.append(draw.cost_bars(results.rows, sparsity, "time"))
    lead = "FLOPs are counted analytically, at the sparsity of each moment. " + (
        "These runs trained together, so that no time is any run's own."
        if results.is_stacked
        else "Time is what the machine took, with whatever else ran on it."
    )
    return markup.section("cost", "Cost by part", lead, markup.figures(panels))


def _where(group: TuningRow) -> str:
    """Where the best value lies in what was tried."""
    if group.has_failed:
        return "nowhere: every trial diverged"
    return f"at the edge: {', '.join(group.edges)}" if group.edges else "inside"


def _tuning(results: Results) -> str:
    if not results.tuning:
        return ""
    asked, tuning, look = results.asked, results.tuning, _looks(results)
    settings = list(dict.fromkeys(entry.setting for group in tuning for entry in group.looks))
    panels = [draw.tuning_curves(tuning, look, sparsity, name) for sparsity in asked.sparsities for name in settings]
    rows = [
        [
            f"{group.method} · {sparsity_text(group.sparsity)}",
            str(len(group.trials)),
            _steps(group),
            compact(group.train_flops),
            in_short(group.learning_rate),
            ", ".join(f"{name} {in_short(v)}" for name, v in group.settings.items() if name != LEARNING_RATE) or "-",
            ", ".join(in_short(value) for entry in group.looks for value in entry.added) or "-",
            _where(group),
        ]
        for group in tuning
    ]
    share, carried = results.trial_share, asked.tuning.budget is not None
    lead = (
        f"Every method tries the same values at every sparsity, on seed {asked.tuning.seed}, which is not "
        f"compared; the lowest validation loss decides, and a grid whose best value is at its end is extended by the "
        f"same ratio. Each trial is {percent(share)} of its method's run, the same share for all methods"
        + (", the longest that the budget of tuning carries." if carried and share < asked.tuning.share else ".")
    )
    columns = ["method", "trials", "steps", "FLOPs", "learning rate", "other settings", "beyond the grid", "best"]
    table = markup.table("What tuning took and found", columns, rows)
    return markup.section("tuning", "Tuning", lead, markup.figures(panels), table)


def _steps(group: TuningRow) -> str:
    """How long a method's trials were."""
    steps = sorted({trial.steps for trial in group.trials if trial.steps and not trial.diverged})
    return "-".join(f"{n:,}" for n in dict.fromkeys((steps[0], steps[-1]))) if steps else UNKNOWN


def _settings(runs: Mapping[tuple[str, float], RunData]) -> str:
    if not runs:  # of a page that is written from the numbers alone
        return ""
    flat = {key: dict(_leaves(run.config)) for key, run in runs.items()}
    names = list(dict.fromkeys(name for settings in flat.values() for name in settings))
    values = {name: {settings.get(name, UNKNOWN) for settings in flat.values()} for name in names}
    shared = [name for name in names if len(values[name]) == 1]
    one_by_one = [name for name in names if len(values[name]) > 1 and name != "method"]
    rows = [[name, *(settings.get(name, UNKNOWN) for settings in flat.values())] for name in one_by_one]
    columns = ["setting", *(f"{method} · {sparsity_text(sparsity)}" for method, sparsity in flat)]
    text = "\n".join(f"{name}: {next(iter(values[name]))}" for name in shared)
    lead = "Every setting of every run: those that all have in common, and those in which they differ (first seed)."
    return markup.section(
        "settings",
        "Settings",
        lead,
        f"<details><summary>The same in all runs ({len(shared)})</summary>\n<pre>{escape(text)}</pre></details>",
        f"<details><summary>Different ({len(rows)})</summary>\n"
        f"{markup.table('Settings that differ', columns, rows)}</details>" if rows else "",
    )  # fmt: skip


def _reading() -> str:
    lead = "What the numbers are, and what they are not."
    entries = [
        "Runs of one seed see the same data in the same order: differences are taken seed by seed.",
        "Intervals are two-sided 95 % intervals of Student's t over seeds, each by itself; p is that of the paired t "
        "test, adjusted by Holm's method over all methods and sparsities together (rows under a further match, such as "
        "rigl@steps, by themselves), but for contrasts that the plan names (planned), whose p stands as it is.",
        "A winner is named only where its paired interval against every other method excludes zero.",
        "Equivalent tokens come from the reference's own validation curve: interpolated for a higher loss, "
        "extrapolated by a fitted power law with a floor for a lower one, at most eightfold. The curve's learning rate "
        "decays to the end of the run, so they say what a difference is worth, not how a longer run would end.",
        "State is what training keeps of all parameters: weights, gradients, Adam's moments, indices and the teacher.",
    ]
    return markup.section("reading", "How to read it", lead, markup.notes(entries))


def _leaves(config: Config) -> list[tuple[str, str]]:
    def walk(tree: Mapping[str, Any], path: str) -> list[tuple[str, str]]:
        found = []
        for key, value in tree.items():
            found += walk(value, f"{path}{key}.") if isinstance(value, Mapping) else [(f"{path}{key}", _written(value))]
        return found

    return walk(config.model_dump(mode="json"), "")


def _written(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _looks(results: Results) -> dict[str, Look]:
    # Of a comparison that goes on, what was tuned may have no run yet.
    return looks([*results.methods, *(entry.method for entry in results.tuning)])
