"""Rows put together: each method at each sparsity over its seeds, against the reference, and what may be concluded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from operator import getitem

from sparsae.config import Config
from sparsae.config.effect import idle_settings
from sparsae.core.intervals import CONFIDENCE, Interval, mean_interval
from sparsae.core.record import encode
from sparsae.experiments.compare.record import (
    Conclusion,
    Contrast,
    EquivalentTokens,
    Loss,
    Paired,
    Results,
    Row,
    SummaryRow,
)
from sparsae.experiments.statistics import (
    Difference,
    Verdict,
    equivalent_tokens,
    holm,
    paired_difference,
    winner,
)

# Of a row: its names, what was asked of it, and what depends on the machine.
_NO_RESULT = (
    "method", "base_method", "run", "match", "budget", "budget_deviation", "learning_rate", "settings", "rule", "moves",
    "beside", "stacked", "device", "torch", "seconds", "seconds_by_part", "tokens_per_second", "peak_memory_bytes",
)  # fmt: skip

FEW_UPDATES = 5  # of a rule that moves: with fewer it has hardly moved


def judged_by(rows: Sequence[Row]) -> Loss:
    """The loss by which runs are compared: on the test, which nothing was tuned on, where every run has one."""
    return "test_loss" if all(row.diverged or row.test_loss is not None for row in rows) else "validation_loss"


def summarize(
    rows: Sequence[Row], reference: str, loss: Loss, planned: Sequence[tuple[str, str]] = ()
) -> tuple[SummaryRow, ...]:
    """An entry a sparsity and method, in the order of the rows; differences are of this loss.

    A planned difference from the reference is decided by its own p, and every other by Holm's adjustment over all of
    those together, at whichever sparsity. Rows under a further match are a question of their own, and a family.
    """
    pairs = {frozenset(pair) for pair in planned}
    entries: list[SummaryRow] = []
    for sparsity in dict.fromkeys(row.sparsity for row in rows):
        groups: dict[str, list[Row]] = {}
        for row in rows:
            if row.sparsity == sparsity:
                groups.setdefault(row.method, []).append(row)
        for entry in _of_one_sparsity(groups, sparsity, reference, loss):
            entries.append(replace(entry, planned=frozenset((entry.method, reference)) in pairs))
    further = {row.method: row.match for row in rows if row.beside}
    entries = _adjusted(entries, [further.get(entry.method) for entry in entries])
    unknown = {entry.sparsity for entry in entries if entry.method == reference and entry.diverged}
    return tuple(
        replace(entry, verdict=verdict_of(entry, entry.method == reference, entry.sparsity in unknown))
        for entry in entries
    )


def _adjusted(entries: Sequence[SummaryRow], families: Sequence[str | None]) -> list[SummaryRow]:
    """With Holm's p of every difference that was not planned, over those of its family."""
    found = list(entries)
    for each in dict.fromkeys(families):
        family = {
            at: (entry.difference, entry.difference.p)
            for at, entry in enumerate(entries)
            if families[at] == each and not entry.planned and entry.difference and entry.difference.p is not None
        }
        for (at, (difference, _)), p in zip(family.items(), holm([p for _, p in family.values()]), strict=True):
            found[at] = replace(found[at], difference=replace(difference, p_holm=p))
    return found


def contrasts(rows: Sequence[Row], loss: Loss, planned: Sequence[tuple[str, str]]) -> tuple[Contrast, ...]:
    """The planned differences, a less b, at each sparsity, each by its own paired test."""
    found = []
    for sparsity in dict.fromkeys(row.sparsity for row in rows):
        mine = [row for row in rows if row.sparsity == sparsity]
        losses, failed = losses_of(mine, loss), diverged(mine)
        for a, b in planned:
            difference = paired_difference(losses.get(a, {}), losses.get(b, {}))
            is_known = difference is not None and failed.isdisjoint((a, b))
            verdict: Verdict = difference.verdict if difference and is_known else "undecided"
            found.append(Contrast(sparsity=sparsity, a=a, b=b, difference=_paired(difference), verdict=verdict))
    return tuple(found)


def losses_of(rows: Iterable[Row], loss: Loss) -> dict[str, dict[int, float]]:
    """By method and seed, of the runs that did not diverge."""
    losses: dict[str, dict[int, float]] = {}
    for row in rows:
        if not row.diverged and (known := row.loss(loss)) is not None:
            losses.setdefault(row.method, {})[row.seed] = known
    return losses


def conclusions(rows: Sequence[Row], loss: Loss) -> tuple[Conclusion, ...]:
    """For each sparsity the method that is better than every other, or None: where any diverged nobody knows.

    Rows under a further match are beside the comparison.
    """
    found = []
    for sparsity in dict.fromkeys(row.sparsity for row in rows):
        mine = [row for row in rows if row.sparsity == sparsity and not row.beside]
        found.append(Conclusion(sparsity=sparsity, winner=None if diverged(mine) else winner(losses_of(mine, loss))))
    return tuple(found)


def diverged(rows: Iterable[Row]) -> set[str]:
    """The methods of which a run diverged: those that are left of theirs decide nothing."""
    return {row.method for row in rows if row.diverged}


def warnings(results: Results, settings: Mapping[str, Config]) -> list[str]:
    """What a reader must know before believing a number; settings: those of every run, by its name."""
    found = []
    if results.judged_by == "validation_loss":
        found.append(
            "the losses compared are those of validation, the text on which learning rates were tuned: not every run "
            "has a test loss (set training.validation_sequences lower, or begin the comparison anew)"
        )
    found += [
        f"{group.method} at {group.sparsity:g}: every trial of its tuning diverged: no value is the best"
        for group in results.tuning
        if group.has_failed
    ]
    edges = [
        f"{group.method} at {group.sparsity:g} ({setting.rpartition('.')[2]} {group.settings[setting]:g})"
        for group in results.tuning
        for setting in group.edges
    ]
    if edges:
        found.append(
            "the best value is at the edge of what was tried, and tuning.extensions or its own bounds did not "
            f"let tuning go on: {', '.join(edges)}"
        )
    lost: dict[str, list[str]] = {}
    for row in results.rows:
        where = f"{row.method} at sparsity {row.sparsity:g}"
        if row.diverged:
            lost.setdefault(where, []).append(str(row.seed))
        elif row.budget_deviation is not None and abs(row.budget_deviation) > 0.02:
            found.append(f"{where}, seed {row.seed}: spent {row.budget_deviation:+.1%} of its budget of {row.match}")
        if row.nnz is not None and row.nnz_target is not None and row.nnz != row.nnz_target:
            found.append(
                f"{where}, seed {row.seed}: ended with {row.nnz:,} connections where that sparsity has "
                f"{row.nnz_target:,}: its rule did not prune to it, and it is no method of that sparsity"
            )
    for where, seeds_lost in lost.items():
        found.append(f"{where}: diverged (seed {', '.join(seeds_lost)})")
    found += _of_equal_runs(results.rows, settings)
    found += _of_few_updates(results.rows)
    seeds = {row.seed for row in results.rows}
    if len(seeds) == 1:
        found.append("one seed: there are no intervals, and no method can be called better")
    return found


def _of_equal_runs(rows: Sequence[Row], settings: Mapping[str, Config]) -> Iterator[str]:
    """Methods whose runs gave the same results with every seed: because they are one, or what differs had no effect."""
    runs: dict[tuple[float, str], list[Row]] = {}
    for row in rows:
        if len(row.curve) > 1 and not row.diverged:
            runs.setdefault((row.sparsity, row.method), []).append(row)
    alike: dict[str, list[Row]] = {}
    for mine in runs.values():
        alike.setdefault("".join(map(_results_of, mine)), []).append(mine[0])
    for found in alike.values():
        if len(found) > 1:
            where, same = f"at sparsity {found[0].sparsity:g}", dict[str, list[str]]()
            for row in found:
                same.setdefault(_with_effect(settings[row.run]), []).append(row.method)
            for names in (names for names in same.values() if len(names) > 1):
                yield f"{' and '.join(names)} {where} are the same run: the plan's settings make them equal"
            if len(same) > 1:
                names = [names[0] for names in same.values()]
                why = "what their settings differ by changed nothing in these runs"
                yield f"{' and '.join(names)} {where} gave the same results: {why}"


def _results_of(row: Row) -> str:
    """All that a run gave, equal for equal runs: without its names, what was asked of it and what the machine took."""
    content = encode(replace(row, curve=tuple(replace(point, seconds=0.0) for point in row.curve)))
    return repr({key: value for key, value in content.items() if key not in _NO_RESULT})


def _with_effect(config: Config) -> str:
    """The settings that a run depends on: neither the name of its method nor those that have no effect in it."""
    tree = config.model_dump(mode="json", exclude={"method"})
    for *sections, name in idle_settings(config):
        del reduce(getitem, sections, tree)[name]
    return repr(tree)


def _of_few_updates(rows: Sequence[Row]) -> Iterator[str]:
    """A moving rule that hardly moved is not what its name says."""
    few = (row for row in rows if row.moves and (row.updates or 0) < FEW_UPDATES)
    for method, sparsity, steps, updates in dict.fromkeys(
        (row.method, row.sparsity, row.steps or 0, row.updates or 0) for row in few
    ):
        made = {0: "no topology update", 1: "one topology update"}.get(updates, f"{updates} topology updates")
        yield (
            f"{method} at sparsity {sparsity:g}: {made} in {steps:,} steps, "
            f"{'so it was static' if not updates else 'too few to call it a moving topology'} (train longer, or "
            "set topology.every or the plan's cadence lower)"
        )


def _of_one_sparsity(
    groups: Mapping[str, list[Row]], sparsity: float, reference: str, loss: Loss
) -> Iterator[SummaryRow]:
    """Without what depends on other entries: whether a difference was planned, its adjusted p and what it says."""
    losses = losses_of((row for rows in groups.values() for row in rows), loss)
    curve = _mean_curve(groups.get(reference, []))
    for name, rows in groups.items():
        done = [row for row in rows if not row.diverged]
        is_reference = name == reference
        difference = None if is_reference else paired_difference(losses.get(name, {}), losses.get(reference, {}))
        yield SummaryRow(
            method=name,
            sparsity=sparsity,
            test_loss=_interval(row.test_loss for row in done),
            validation_loss=_interval(row.validation_loss for row in done),
            diverged=len(rows) - len(done),
            learning_rate=rows[0].learning_rate,
            settings=rows[0].settings,
            train_flops=_mean(row.train_flops for row in done),
            tokens=_mean(row.tokens for row in done),
            steps=_mean(row.steps for row in done),
            seconds=_mean(row.seconds for row in done),
            parameters=_mean(row.parameters for row in done),
            state_bytes=_mean(row.state_bytes for row in done),
            accepted_updates=_mean(row.accepted_updates for row in done),
            updates=_mean(row.updates for row in done),
            difference=_paired(difference),
            equivalent_tokens=_equivalent(curve, difference) if difference else None,
            planned=False,
            verdict="undecided",
        )


def verdict_of(entry: SummaryRow, is_reference: bool, reference_diverged: bool = False) -> Verdict:
    """What an entry's difference says. Nothing is decided by the runs that are left where others diverged."""
    p = decisive_p(entry)
    if is_reference:
        return "reference"
    if entry.difference is None or p is None or p >= 1.0 - CONFIDENCE or entry.diverged or reference_diverged:
        return "undecided"
    return "better" if entry.difference.mean < 0 else "worse"


def decisive_p(entry: SummaryRow) -> float | None:
    """The p value by which an entry's difference is judged; None where there is none."""
    if entry.difference is None:
        return None
    return entry.difference.p if entry.planned else entry.difference.p_holm


def _paired(difference: Difference | None) -> Paired | None:
    if difference is None:
        return None
    interval = difference.interval
    return Paired(
        n=interval.n, mean=interval.mean, low=interval.low, high=interval.high, t=difference.t, p=difference.p,
        p_holm=None,
    )  # fmt: skip


def _equivalent(curve: Sequence[tuple[float, float]], difference: Difference) -> EquivalentTokens:
    """Of the mean difference and, where there is one, of the ends of its interval: a lower loss is worth more."""
    interval = difference.interval
    middle = equivalent_tokens(curve, interval.mean)
    ends = [None if end is None else equivalent_tokens(curve, end).ratio for end in (interval.high, interval.low)]
    tokens = curve[-1][0] if curve else None
    return EquivalentTokens(
        ratio=middle.ratio,
        low=ends[0],
        high=ends[1],
        more_tokens=None if middle.ratio is None or tokens is None else (middle.ratio - 1) * tokens,
        how=middle.how,
    )


def _mean_curve(rows: Sequence[Row]) -> list[tuple[float, float]]:
    """(tokens, mean loss) at the steps that all seeds were validated at."""
    curves = [{point.tokens: point.loss for point in row.curve} for row in rows if not row.diverged]
    if not curves:
        return []
    shared = sorted(set.intersection(*(set(curve) for curve in curves)))
    return [(tokens, sum(curve[tokens] for curve in curves) / len(curves)) for tokens in shared]


def _interval(values: Iterable[float | None]) -> Interval | None:
    known = [value for value in values if value is not None]
    return mean_interval(known) if known else None


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
