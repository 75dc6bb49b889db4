"""The headline numbers of a run's page, and the small facts beneath them."""

from __future__ import annotations

import math
from collections.abc import Callable

from sparsae.report.data import RunData, or_nan
from sparsae.report.markup import Tile
from sparsae.report.readable import UNKNOWN, compact, count, decimal, duration, in_bytes, percent
from sparsae.runs.rows import perplexity


def headline(run: RunData) -> list[Tile]:
    """What came out, and what it cost."""
    totals, reached = run.totals, run.reached
    validated = run.validation[-1] if run.validation else None
    references = {"unigram": run.unigram_loss, "at the start": run.untrained_loss}
    against = [f"{name} {decimal(perplexity(loss))}" for name, loss in references.items() if math.isfinite(loss)]
    teacher = or_nan(validated.teacher_loss) if validated else math.nan
    nnz = reached.nnz if reached else sum(layer.nnz for layer in run.last_layers.values()) or math.nan
    flops = reached.train_flops if reached else math.nan
    state = totals.state_bytes_sparse_layers if totals else math.nan
    dense_state = totals.state_bytes_sparse_layers_dense_equivalent if totals else math.nan
    earlier = f"after step {count(validated.step)}" if validated and validated.step != run.steps else ""
    tested = or_nan(totals.test_loss) if totals else math.nan
    tiles = [
        Tile(
            "Validation perplexity",
            decimal(perplexity(validated.loss)) if validated else UNKNOWN,
            [
                earlier,
                f"test {decimal(perplexity(tested))}" if math.isfinite(tested) else "",
                ", ".join(against),
                f"teacher {decimal(perplexity(teacher))}" if math.isfinite(teacher) else "",
            ],
        ),
        _ratio_tile("Training FLOPs", flops, totals.train_flops_dense_equivalent if totals else math.nan, compact),
        Tile("Tokens per second", count(or_nan(reached.tokens_per_second) if reached else math.nan), _arithmetic(run)),
    ]
    if not run.layers:
        return tiles
    target = _against_target(nnz, totals.nnz_target if totals else math.nan)
    return [
        tiles[0],
        Tile("Active connections", count(nnz), [target]),
        tiles[1],
        _ratio_tile("State of sparse layers, at most", state, dense_state, in_bytes),
        tiles[2],
        _updates_tile(run),
    ]


def _arithmetic(run: RunData) -> list[str]:
    """Tokens read, counted operations a second, and which share of the peak they are."""
    if (pace := run.reached) is None:
        return []
    said = [f"{compact(pace.tokens)} tokens"]
    if pace.flops_per_second is not None:
        said.append(f"{compact(pace.flops_per_second, 'FLOP')} a second")
    if pace.mfu is not None:
        said.append(f"{percent(pace.mfu)} of the peak (MFU)")
    return said


def _updates_tile(run: RunData) -> Tile:
    updates, accepted = len(run.updates), sum(update.accepted for update in run.updates)
    if not updates:
        return Tile("Topology updates", "none", ["the topology stays as drawn"])
    if accepted == updates and not run.rule.declines:
        return Tile("Topology updates", count(updates), ["each took a new topology, as its rule always does"])
    return Tile("Updates accepted", f"{accepted} of {updates}", ["of the topology"])


def _ratio_tile(label: str, value: float, dense: float, written: Callable[[float], str]) -> Tile:
    if not math.isfinite(value) or not math.isfinite(dense) or not dense:
        return Tile(label, written(value))
    return Tile(label, written(value), [f"{value / dense:.3f} of dense, {written(dense)}"])


def _against_target(nnz: float, target: float) -> str:
    if not math.isfinite(target):
        return ""
    return "exactly the target" if nnz == target else f"target {count(target)}"


def facts(run: RunData) -> list[tuple[str, str]]:
    """Of the model, the machine and the time."""
    totals, steps = run.totals, ("Steps", count(run.steps))
    if totals is None:
        return [steps]
    return [
        ("Parameters", count(totals.parameters)),
        ("dense", count(totals.parameters_dense)),
        ("Peak memory", in_bytes(totals.peak_memory_bytes)),
        ("Time", duration(totals.seconds)),
        steps,
        ("Device", totals.device),
        ("torch", totals.torch),
    ]
