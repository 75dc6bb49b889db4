"""Transfer experiments: parabolas on known basins, how far optima move, the command from plan to page."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsae.cli import main
from sparsae.config.load import resolve
from sparsae.core.record import encode
from sparsae.experiments.compare.results import TIMING
from sparsae.experiments.jobs import Failure
from sparsae.experiments.plan import parse_plan
from sparsae.experiments.transfer.basins import Basin, fit_basin, mean_losses, movement
from sparsae.experiments.transfer.plan import KNOBS, Point, TransferPlan
from sparsae.experiments.transfer.record import Place, Results
from sparsae.experiments.transfer.results import best_table, collect, movement_table
from sparsae.runs.summary import Summary
from sparsae.train.model import model_of
from tests.support.records import summary_of

CPU = torch.device("cpu")

SMALL = [
    "data.tokenizer_vocab=300", "model.layers=1", "model.width=32", "model.heads=2", "model.context=16",
    "training.batch_size=2", "training.log_every=5", "training.validation_sequences=4", "training.device=cpu",
    "training.threads=1", "training.steps=12", "parameterization.base_width=16",
]  # fmt: skip


class TestBasins:
    @given(
        vertex=st.floats(-9, -3), width=st.floats(0.1, 10), loss=st.floats(0, 10), step=st.sampled_from([0.5, 1.0, 2.0])
    )
    def test_the_vertex_of_a_parabola_is_found(self, vertex: float, width: float, loss: float, step: float) -> None:
        grid = [-12 + step * i for i in range(int(12 / step) + 1)]
        basin = fit_basin({2.0**x: loss + width * (x - vertex) ** 2 for x in grid})
        assert basin is not None
        assert basin.edge is None
        assert basin.log2 == pytest.approx(vertex, abs=1e-6)
        assert basin.loss == pytest.approx(loss, abs=1e-6)

    def test_unequal_steps(self) -> None:
        basin = fit_basin({2.0**x: 3 + (x + 5.2) ** 2 for x in (-9, -6, -5.5, -2)})
        assert basin == Basin(pytest.approx(-5.2), pytest.approx(3.0), None)

    def test_the_vertex_lies_between_the_neighbours_of_the_best(self) -> None:
        basin = fit_basin({1.0: 9.0, 2.0: 2.0, 4.0: 1.0, 8.0: 50.0})
        assert basin is not None
        assert 0.5 < basin.log2 < 2.5

    @pytest.mark.parametrize(
        ("losses", "edge", "value"),
        [
            ({1.0: 1.0, 2.0: 2.0, 4.0: 3.0}, "lowest", 1.0),
            ({1.0: 3.0, 2.0: 2.0, 4.0: 1.0}, "highest", 4.0),
            ({1.0: 3.0, 2.0: 2.0, 4.0: 1.0, 8.0: None}, "divergence", 4.0),
            ({1.0: 3.0, 2.0: 2.0}, "highest", 2.0),
            ({1.0: 2.0, 2.0: 3.0}, "lowest", 1.0),
            ({1.0: 3.0, 2.0: None}, "divergence", 1.0),
            ({1.0: 3.0, 2.0: 1.0, 4.0: None, 8.0: 2.0}, None, None),
        ],
    )
    def test_edges_and_divergence(self, losses: dict[float, float | None], edge: str | None, value: float) -> None:
        basin = fit_basin(losses)
        assert basin is not None
        assert basin.edge == edge
        if edge is not None:
            assert (basin.value, basin.loss) == (value, losses[value])

    def test_equal_losses_and_nothing_left(self) -> None:
        assert fit_basin({1.0: 2.0, 2.0: 2.0, 4.0: 2.0}) == Basin(0.0, 2.0, "lowest")
        assert fit_basin({1.0: None, 2.0: None}) is None

    def test_a_value_with_which_one_seed_diverged_has_no_mean(self) -> None:
        assert mean_losses([{1.0: 2.0, 2.0: 1.0}, {1.0: 4.0, 2.0: None}]) == {1.0: 3.0, 2.0: None}


class TestMovement:
    def test_the_largest_factor_and_the_common_slope(self) -> None:
        """Optima that double with every halving of the density at width 64, and stay at width 128."""
        optima = {(64, 1 - 2.0**-i): Basin(i - 9.0, 1.0, None) for i in range(1, 4)}
        optima |= {(128, 1 - 2.0**-i): Basin(-7.0, 1.0, None) for i in range(1, 4)}
        found = movement(optima, "sparsity")
        assert found is not None
        assert (found.factor, found.slope, found.at_least) == (4.0, pytest.approx(-0.5), False)
        over_width = movement(optima, "width")
        assert over_width is not None
        assert over_width.factor == 2.0  # at the extreme densities
        assert over_width.slope == pytest.approx(0.0)

    def test_an_optimum_at_an_edge_is_told(self) -> None:
        found = movement({(64, 0.5): Basin(-7.0, 1.0, "highest"), (64, 0.9): Basin(-9.0, 1.0, None)}, "sparsity")
        assert found is not None
        assert found.at_least

    def test_nothing_varies(self) -> None:
        assert movement({(64, 0.5): Basin(-7.0, 1.0, None), (128, 0.9): Basin(-9.0, 1.0, None)}, "sparsity") is None


def _aside(value: float | None) -> float:
    return math.log2(value or 1.0) ** 2


def outcomes(plan: TransferPlan, best: dict[str, float]) -> Results:
    """results.json of runs whose loss is 3 + log2(rate / optimum)^2 + log2(scale)^2 + log2(multiplier)^2.

    The optimum is density^best.
    """
    done: dict[Point, Summary | Failure] = {}
    configs = {}
    for point in plan.points():
        optimum = -8 + best[point.parameterization] * math.log2(1 - point.sparsity) + 0.1 * point.seed
        distance = math.log2(point.learning_rate) - optimum
        diverged = distance > 2.5
        loss = 3 + distance**2 + _aside(point.initial_scale) + _aside(point.embedding_multiplier)
        failure = Failure(steps=1, train_flops=1, message="")
        done[point] = failure if diverged else summary_of(validation_loss=loss)
        configs[point] = plan.config(point)
    return collect(plan, done, configs)


class TestResults:
    def test_optima_and_movements_with_intervals_over_seeds(self) -> None:
        tree = {
            "parameterizations": ["sp", "supar"], "sparsities": [0.5, 0.75], "seeds": 3,
            "learning_rates": [2.0**-n for n in range(4, 12)],
        }  # fmt: skip
        found = outcomes(parse_plan(tree, "here", TransferPlan), {"sp": -1.0, "supar": 0.0})
        assert found.complete
        assert len(found.rows) == 2 * 2 * 8 * 3
        optima = {(e.parameterization, e.sparsity): e for e in found.optima}
        assert math.log2(optima["sp", 0.75].optimum) == pytest.approx(-8 + 2 + 0.1)
        assert optima["supar", 0.5].interval.low < 2**-7.9 < optima["supar", 0.5].interval.high
        moved = {e.parameterization: e for e in found.movements}
        assert {e.over for e in found.movements} == {"sparsity"}
        assert moved["sp"].factor == pytest.approx(2.0)
        assert moved["sp"].slope_interval.mean == pytest.approx(-1.0)
        assert moved["supar"].factor == pytest.approx(1.0)
        assert moved["supar"].factor_interval.n == 3
        assert sum(row.diverged for row in found.rows) > 0
        assert any("diverged" in warning for warning in found.warnings)
        assert [row[2] for row in movement_table(found).rows] == ["sp", "supar"]

    def test_what_lies_at_an_edge_or_nowhere_is_a_bound(self) -> None:
        tree = {
            "parameterizations": ["sp", "supar"], "sparsities": [0.5, 0.75, 0.9], "seeds": 2,
            "learning_rates": [2.0**-n for n in range(6, 10)],
        }  # fmt: skip
        # Under "sp" the optimum leaves the grid: every rate diverges at the highest sparsity.
        found = outcomes(parse_plan(tree, "here", TransferPlan), {"sp": 1.2, "supar": -1.0})
        assert found.without_optimum == (Place(parameterization="sp", width=256, sparsity=0.9),)
        assert any("no value came to its end with every seed, for sp at" in warning for warning in found.warnings)
        moved = {e.parameterization: e for e in found.movements}
        for name in ("sp", "supar"):
            assert moved[name].at_least
            assert moved[name].factor_interval is None
            assert moved[name].slope_interval.high is None
        assert all(row[5].startswith("(") for row in movement_table(found).rows)
        edges = [entry for entry in found.optima if entry.edge]
        assert edges
        assert all(entry.interval is None for entry in edges)

    def test_more_knobs_are_swept_and_the_best_of_the_others_taken(self) -> None:
        tree = {
            "parameterizations": ["supar"], "sparsities": [0.5], "initial_scales": [4.0, 0.5, 1.0],
            "embedding_multipliers": [2.0, 0.25, 1.0], "learning_rates": [2.0**-n for n in range(6, 11)], "seeds": 2,
        }  # fmt: skip
        found = outcomes(parse_plan(tree, "here", TransferPlan), {"supar": 0.0})
        assert {entry.knob: entry.edge for entry in found.optima} == dict.fromkeys(KNOBS)
        assert [entry.optimum for entry in found.optima] == pytest.approx([2.0**-7.95, 1.0, 1.0])
        assert found.movements == ()
        assert {row.initial_scale for row in found.rows} == {0.5, 1.0, 4.0}
        (best,) = found.best
        assert encode(best) == {
            "parameterization": "supar", "width": 256, "sparsity": 0.5, "learning_rate": 2.0**-8,
            "initial_scale": 1.0, "embedding_multiplier": 1.0, "loss": pytest.approx(3.005),
        }  # fmt: skip
        assert best_table(found).rows == [["supar", "256", "50 %", "0.00391", "1", "1", "3.0050"]]

    def test_of_several_knobs_a_warning_names_the_one_at_its_edge(self) -> None:
        tree = {"parameterizations": ["supar"], "sparsities": [0.5], "initial_scales": [1.0, 4.0]}
        found = outcomes(parse_plan(tree, "here", TransferPlan), {"supar": 0.0})
        (edge,) = (warning for warning in found.warnings if "too narrow" in warning)
        assert edge.endswith("for initial scale of supar at width 256, sparsity 0.5")

    def test_what_is_not_swept_is_as_in_the_settings(self) -> None:
        tree = {"sparsities": [0.5], "settings": {"parameterization": {"initial_scale": 3.0}}}
        plan = parse_plan(tree, "here", TransferPlan)
        assert {plan.config(point).parameterization.initial_scale for point in plan.points()} == {3.0}
        found = outcomes(plan, dict.fromkeys(plan.parameterizations, 0.0))
        assert {(row.initial_scale, row.embedding_multiplier) for row in found.rows} == {(3.0, 1.0)}
        assert found.asked.together == []


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A small sweep over everything."""
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("\n".join(f"item {j} has {j % 7} parts and {j % 3} colours" for j in range(2000)))
    plan = "transfer --widths 16 --sparsities 0,0.8 --parameterizations sp,supar --learning-rates 2e-3,8e-3,1e30"
    return [*plan.split(), *SMALL, f"data.source={text}", f"data.cache={tmp_path_factory.mktemp('cache')}"]


@pytest.fixture(scope="module")
def unbroken(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its directory, run without a stop."""
    out = tmp_path_factory.mktemp("unbroken") / "out"
    assert main([*arguments, "--out", str(out)]) == 0
    return out


def without_timing(value: Any) -> Any:
    """The part of results.json that a second experiment repeats."""
    if isinstance(value, dict):
        return {key: without_timing(inner) for key, inner in value.items() if key not in TIMING}
    return [without_timing(inner) for inner in value] if isinstance(value, list) else value


def results(out: Path) -> dict[str, Any]:
    return without_timing(json.loads((out / "results.json").read_text()))


@pytest.mark.slow
class TestCommand:
    def test_every_run_is_a_row_and_every_cell_an_optimum(self, unbroken: Path) -> None:
        found = results(unbroken)
        assert found["complete"]
        keys = {(r["parameterization"], r["width"], r["sparsity"], r["learning_rate"]) for r in found["rows"]}
        assert len(keys) == len(found["rows"]) == 2 * 2 * 3
        assert {(row["width"], row["heads"]) for row in found["rows"]} == {(16, 1)}
        assert {row["steps"] for row in found["rows"] if not row["diverged"]} == {12}
        assert {row["diverged"] for row in found["rows"] if row["learning_rate"] == 1e30} == {True}
        assert len(found["optima"]) == 4
        assert {entry["over"] for entry in found["movements"]} == {"sparsity"}
        assert not list(unbroken.glob("runs/*/checkpoints"))

    def test_what_it_takes_is_shown_before_anything_is_run(
        self, arguments: list[str], unbroken: Path, tmp_path: Path
    ) -> None:
        file = tmp_path / "foreseen.json"
        assert main([*arguments, "--dry-run", "--json", str(file)]) == 0
        foreseen = json.loads(file.read_text())
        assert [(row["what"], row["sparsity"], row["runs"]) for row in foreseen["rows"]] == [
            ("width 16", sparsity, 2 * 3) for sparsity in (0.0, 0.8)
        ]
        for row in foreseen["rows"]:
            runs = [run for run in results(unbroken)["rows"] if run["sparsity"] == row["sparsity"]]
            assert {run["steps"] for run in runs if not run["diverged"]} == {row["steps"]}
            assert row["tokens"] > row["steps"]
        assert foreseen["train_flops"] == sum(row["runs"] * row["train_flops"] for row in foreseen["rows"])

    def test_the_page_stands_alone_and_is_written_again(
        self, unbroken: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        page = (unbroken / "report.html").read_text()
        for section in ("movements", "basins-learning-rate", "reading"):
            assert f'<section id="{section}"' in page
        assert page.count("<svg") == 2 + 1
        assert not re.search(r'(?:src|href)="(?:https?:)?//', page)
        identifiers = re.findall(r'\bid="([^"]+)"', page)
        assert len(identifiers) == len(set(identifiers))
        (unbroken / "report.html").unlink()
        assert main(["report", str(unbroken)]) == 0
        assert (unbroken / "report.html").read_text() == page
        assert str(unbroken / "report.html") in capsys.readouterr().out

    def test_the_tables_have_every_cell(self, unbroken: Path) -> None:
        markdown, latex = (unbroken / "table.md").read_text(), (unbroken / "table.tex").read_text()
        assert len(re.findall(r"^\| learning rate \| (?:sp|supar) \|", markdown, re.MULTILINE)) == 4
        assert latex.count(r"\toprule") == 2

    def test_killed_and_started_again_it_ends_with_the_same_results(
        self, arguments: list[str], unbroken: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        command = [sys.executable, "-m", "sparsae", *arguments, "--out", str(out)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)
        try:
            deadline = time.monotonic() + 60
            while not any(out.glob("runs/*-w16-s0.8-*/metrics.jsonl")) and time.monotonic() < deadline:
                assert process.poll() is None
                time.sleep(0.01)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate(timeout=60)
        assert not results(out)["complete"]
        assert main([*arguments, "--out", str(out)]) == 0
        assert results(out) == results(unbroken)

    def test_another_plan_in_the_same_place_is_refused(
        self, arguments: list[str], unbroken: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main([*arguments, "--seeds", "2", "--out", str(unbroken)]) == 2
        assert "seeds differ" in capsys.readouterr().err
        compare = ["compare", "--methods", "static", "--out", str(unbroken), *SMALL]
        assert main(compare) == 2
        assert "kind differ" in capsys.readouterr().err


WRONG = {
    "a grid of one": (["--learning-rates", "1e-3"], "one value is no sweep"),
    "an unknown parameterization": (["--parameterizations", "sp,mub"], "did you mean mup"),
    "a width twice": (["--widths", "128,128"], "--widths: one is given twice"),
    "a width for no whole heads": (["--widths", "96"], "model.heads would be 1.5"),
    "no number": (["--initial-scales", "big"], "--initial-scales: must be numbers"),
    "a rate of zero": (["--learning-rates", "0,1"], "must be above 0"),
    "a multiplier twice": (["--embedding-multipliers", "2,2"], "--embedding-multipliers: one is given twice"),
    "a swept scale": (
        ["--initial-scales", "1,2", "parameterization.initial_scale=2"],
        "leave out parameterization.initial_scale",
    ),
    "a swept setting": (["training.learning_rate=1e-3"], "leave out training.learning_rate"),
    "a setting of the parameterization": (["parameterization.name=sp"], "leave out parameterization.name"),
    "a method without sparsity": (["--method", "dense-small"], "no sparsity to vary"),
    "both ways to run": (["--jobs", "2", "--ray", "auto"], "give one of them"),
    "a key of another kind of plan": (["plan.yaml"], "no such setting"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_plan_gives_one_line_and_writes_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.yaml").write_text("methods: [static]\n")
    options, expected = WRONG[name]
    assert main(["transfer", *options, "--out", "out"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line
    assert [path.name for path in tmp_path.iterdir()] == ["plan.yaml"]


def test_dense_runs_leave_the_rule_and_heads_stay_or_grow() -> None:
    tree = {
        "method": "rigl", "widths": [128, 512], "sparsities": [0.0, 0.5], "parameterizations": ["supar-dynamic"],
        "preset": "llama-130m", "settings": {"topology": {"every": 7}},
    }  # fmt: skip
    plan = parse_plan(tree, "here", TransferPlan)
    configs = {(point.width, point.sparsity): plan.config(point) for point in plan.points()}
    assert {at: config.topology.rule for at, config in configs.items()} == {
        (width, sparsity): "rigl" if sparsity else "static" for width in (128, 512) for sparsity in (0.0, 0.5)
    }
    assert configs[512, 0.5].topology.every == 7
    models = {width: configs[width, 0.5].model for width in (128, 512)}
    assert {width: model.width // model.heads for width, model in models.items()} == {128: 64, 512: 64}
    assert {width: model.mlp_width for width, model in models.items()} == {128: 341, 512: 1365}


def test_the_initial_scale_multiplies_every_weight_that_is_drawn() -> None:
    """Matrices and active values, not norms and biases."""
    once, twice = (
        model_of(resolve(None, None, "static", [*SMALL, f"parameterization.initial_scale={scale}"]), 300, 0, CPU)
        for scale in (1.0, 2.0)
    )
    others = dict(twice.named_parameters())
    for name, parameter in once.named_parameters():
        drawn = parameter.dim() > 1 or name.endswith(".values")
        torch.testing.assert_close(others[name], 2 * parameter if drawn else parameter)
