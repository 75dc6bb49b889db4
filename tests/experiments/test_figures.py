"""What the figures and tiles of a comparison's page say."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from sparsae.experiments.compare import figures as draw
from sparsae.experiments.compare.page import _headline
from sparsae.experiments.compare.record import Conclusion, Look, TuningRow
from sparsae.experiments.compare.summary import summarize
from sparsae.report.looks import looks
from tests.support.records import topology_row
from tests.support.results import compare_results, compare_row


def tuned(setting: str, *values: float) -> TuningRow:
    losses = tuple(3.0 + value for value in values)
    look = Look(setting=setting, around={}, values=values, added=(), best=values[0], losses=losses)
    return TuningRow(
        method="set", sparsity=0.9, learning_rate=1e-3, settings={setting: values[0]}, at_edge=False, edges=(),
        train_flops=0, looks=(look,), trials=(),
    )  # fmt: skip


def test_turnover_is_a_share_of_the_connections_that_there_were() -> None:
    """Of blocks and where density moves, too: an update's own numbers say it, not the first topology's weights."""
    rows = [topology_row(0), *(topology_row(n, swaps=5, hamming_last=0.2 / n) for n in (1, 2))]
    run: Any = SimpleNamespace(updates=rows[1:], topologies=rows, last_step=2)
    panel = draw.telemetry({"set": run}, looks(["set"]), 0.9, "turnover")
    assert panel is not None
    assert "set from 0.2 to 0.1" in panel.description


def test_settings_of_one_last_name_have_figures_of_their_own() -> None:
    panels = [
        draw.tuning_curves([tuned(setting, 0.1, 0.5)], looks(["set"]), 0.9, setting)
        for setting in ("topology.start", "teacher.start")
    ]
    assert len({panel.name for panel in panels if panel is not None}) == 2


def test_a_value_of_zero_has_its_place() -> None:
    for values, scale in (((0.0, 0.5, 1.0), "linear"), ((0.1, 0.5, 1.0), "log")):
        setting = "topology.random_share"
        panel = draw.tuning_curves([tuned(setting, *values)], looks(["set"]), 0.9, setting)
        assert panel is not None
        axes = panel.figure().axes[0]
        assert axes.get_xscale() == scale
        low, high = axes.get_xlim()
        assert low <= values[0] < values[-1] <= high


def test_the_tiles_count_a_run_once_and_only_what_is_compared() -> None:
    rows = [compare_row("static", seed, 3.5 + seed) for seed in (0, 1)]
    rows += [compare_row("rigl", seed, 3.4 + seed) for seed in (0, 1)]
    rows += [compare_row("rigl@steps", seed, 3.0, beside=True) for seed in (0, 1)]
    rows.append(replace(rows[0], sparsity=0.95))  # of equal settings: one run
    results = compare_results(
        rows,
        judged_by="validation_loss",
        summary=summarize(rows, "static", "validation_loss"),
        conclusions=(Conclusion(sparsity=0.9, winner=None),),
    )
    best, compared, flops, *_ = _headline(results)
    assert best.notes[0].startswith("lowest mean: rigl,")
    assert (compared.value, flops.value) == ("6", "6")
