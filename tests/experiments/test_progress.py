"""What a comparison says of searches that got stuck, and of the time to equal loss."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsae.cli import main
from sparsae.core.record import encode
from sparsae.experiments.compare.equal_loss import equal_loss, equal_loss_table
from sparsae.experiments.compare.record import CurvePoint, Measure, Row, Stuck
from sparsae.experiments.compare.stuck import PATIENCE, stuck_counts, stuck_table
from sparsae.report.readable import UNKNOWN
from sparsae.runs.rows import TopologyRow
from tests.support.records import candidate_row, topology_row
from tests.support.results import compare_row
from tests.support.runs import write_text


def update(
    step: int, accepted: bool, current: float | None, chosen: float = 0.0, proposer: str = "uniform"
) -> TopologyRow:
    return topology_row(
        step,
        accepted=accepted,
        chosen=1 if accepted else None,
        candidates=(candidate_row(math.nan), candidate_row(chosen, proposer)),
        current=None if current is None else candidate_row(current, "current"),
    )


def rows_of(outcomes: Sequence[tuple[bool, float]]) -> list[TopologyRow]:
    """First the topology of step 0, which is no update, as a run's metrics have it."""
    return [
        topology_row(0),
        *(update(i + 1, a, s, s) for i, (a, s) in enumerate(outcomes)),
    ]


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3).map(float)), max_size=40))
def test_stretches_are_counted(outcomes: list[tuple[bool, float]]) -> None:
    found = stuck_counts(rows_of(outcomes))
    if not outcomes:
        assert found is None
        return
    assert found is not None
    counts = encode(found)
    same = [not accepted for accepted, _ in outcomes]
    scores = [score for _, score in outcomes]
    worse = [i > 0 and score >= min(scores[:i]) for i, score in enumerate(scores)]
    for name, flags in {
        "unchanged": same,
        "no_better": worse,
        "stuck": [a and b for a, b in zip(same, worse, strict=True)],
    }.items():
        stretches = "".join("x" if flag else " " for flag in flags).split()
        assert counts[name] == sum(len(part) >= PATIENCE for part in stretches), name
        if name == "stuck":
            assert found.longest_stuck == max(map(len, stretches), default=0)
    assert found.updates == len(outcomes)


def test_the_proxy_is_that_of_the_topology_that_is_left_and_resets_that_were_taken_count() -> None:
    # The candidate that is taken is better than what was there, five times; then nothing is for as many updates.
    taken = [update(i, True, 10.0, 9.0 - i, "redraw" if i == 2 else "uniform") for i in range(1, 6)]
    kept = [update(i, False, 8.0) for i in range(6, 11)]
    skipped = topology_row(11, skipped="gradient")
    found = stuck_counts([*taken, *kept, skipped])
    assert found == Stuck(updates=10, unchanged=1, no_better=1, stuck=1, longest_stuck=5, resets=1)
    # A rule that compares nothing cannot be stuck.
    assert stuck_counts([update(i, False, None) for i in range(1, 9)]) is None
    # Results from before they were counted have none either.
    assert stuck_table([compare_row("set", 0, 3.0)]) is None
    table = stuck_table([compare_row("set", seed, 3.0, stuck=found) for seed in (0, 1)])
    assert table is not None
    assert table.rows == [["90 %", "set", "10", "1", "1", "1", "5", "1"]]


def row(method: str, seed: int, losses: Sequence[float], base: str | None = None, per_step: int = 10) -> Row:
    curve = tuple(
        CurvePoint(step=i * 10, tokens=i, train_flops=i * per_step, seconds=float(i), loss=loss)
        for i, loss in enumerate(losses)
    )
    return compare_row(method, seed, 3.0, base_method=base or method, curve=curve)


def test_time_to_equal_loss_is_read_from_both_curves() -> None:
    rows = [
        row("dense", 0, [8, 6, 4], per_step=100),
        row("fast", 0, [8, 4, 2]),  # is at dense's 4 after one validation
        row("slow", 0, [8, 7, 5]),  # ends at 5, where dense is in the middle of its second
        row("lost", 0, []),
    ]
    fast, slow = equal_loss(rows)
    assert (fast.method, fast.against, fast.loss, fast.low, fast.seeds) == ("fast", "dense", 4, 1, 1)
    assert fast.steps == Measure(own=10, dense=20, ratio=pytest.approx(0.5))
    assert fast.train_flops == Measure(own=10, dense=200, ratio=pytest.approx(0.05))
    assert (slow.loss, slow.low) == (5, 0)
    assert slow.steps == Measure(own=20, dense=15, ratio=pytest.approx(20 / 15))
    assert slow.seconds is not None
    assert slow.seconds.ratio == pytest.approx(2 / 1.5)
    # Seeds are paired, and ratios averaged as ratios are.
    rows += [row("dense", 1, [8, 6, 4], per_step=100), row("fast", 1, [8, 8, 4])]
    (of_two,) = [entry for entry in equal_loss(rows) if entry.method == "fast"]
    assert of_two.steps.ratio == pytest.approx(math.sqrt(0.5 * 1.0))
    assert (of_two.low, of_two.seeds) == (2, 2)
    table = equal_loss_table([of_two])
    assert table is not None
    assert table.rows[0][4] == "15 / 20 (0.71 ×)"
    # A dense model by another name serves; without one there is nothing to hold against.
    assert equal_loss([row("base", 0, [8, 4], "dense"), row("fast", 0, [8, 4])])[0].against == "base"
    assert equal_loss([row("static", 0, [8, 4]), row("fast", 0, [8, 4])]) == ()
    assert equal_loss_table([]) is None


@pytest.mark.slow
def test_the_page_of_a_comparison_says_both(tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        f"""
methods: [dense, static]
variants:
  written: {{method: sparsae-written, settings: {{topology: {{every: 4}}}}}}
  no-resets:
    method: sparsae-written
    settings: {{topology: {{every: 4, reset: {{probability: 0.0, boosted_probability: 0.0}}}}}}
seeds: 1
match: steps
settings:
  data: {{source: {write_text(tmp_path / "text")}, cache: {tmp_path / "cache"}, tokenizer_vocab: 300}}
  model: {{layers: 1, width: 32, heads: 2, context: 16}}
  training: {{steps: 24, batch_size: 2, validation_sequences: 4, device: cpu, threads: 1}}
"""
    )
    out = tmp_path / "out"
    assert main(["compare", str(plan), "--out", str(out)]) == 0
    found = json.loads((out / "results.json").read_text())
    counts = {entry["method"]: entry["stuck"] for entry in found["rows"]}
    assert counts["dense"] is None
    assert counts["static"] is None
    assert counts["written"]["updates"] == 5
    assert counts["no-resets"]["resets"] == 0
    assert [entry["method"] for entry in found["equal_loss"]] == ["static", "written", "no-resets"]
    static = found["equal_loss"][0]
    assert 0 < static["train_flops"]["ratio"] < static["steps"]["ratio"]  # at 90 % a step is cheaper
    text = (out / "report.html").read_text()
    assert "How often a run got stuck" in text
    assert 'id="equal-loss"' in text


def test_connections_that_a_schedule_moved_are_no_candidate() -> None:
    moved = topology_row(1, accepted=True)
    assert stuck_counts([moved]) is None
    found = stuck_counts([update(i, True, 9.0, 8.0) for i in range(1, 3)] + [topology_row(3, accepted=True)])
    assert found is not None
    assert (found.updates, found.resets) == (3, 0)


def test_the_time_of_runs_that_trained_together_is_no_runs_own() -> None:
    """Neither where both were stacked nor where one was: the column says that it is not known."""
    rows = [row("dense", 0, [8, 6, 4]), replace(row("fast", 0, [8, 4, 2]), stacked=True)]
    (entry,) = equal_loss(rows)
    assert entry.seconds is None
    assert entry.steps.ratio == pytest.approx(0.5)
    table = equal_loss_table([entry])
    assert table is not None
    assert table.rows[0][-1] == UNKNOWN
