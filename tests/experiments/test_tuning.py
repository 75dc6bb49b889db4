"""How tuning looks along its axes: on losses that are known in closed form, and what each variant's axes are."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsae.config.load import resolve
from sparsae.core.record import encode
from sparsae.errors import InputError
from sparsae.experiments.compare.earlier import of_now
from sparsae.experiments.compare.lengths import Jobs
from sparsae.experiments.compare.plan import ComparisonPlan
from sparsae.experiments.compare.results import Search, Trial, _tuning
from sparsae.experiments.compare.summary import summarize
from sparsae.experiments.compare.tuning import Axis, Found, Point, key_of, search
from sparsae.experiments.jobs import Job
from sparsae.experiments.plan import parse_plan
from sparsae.train.run import start
from tests.support.results import compare_row
from tests.support.runs import config_of, write_text

RATE, SCALE = Axis("training.learning_rate", (1.0, 2.0, 4.0)), Axis("parameterization.initial_scale", (1.0, 2.0))


def run(
    axes: list[Axis],
    loss: Callable[[Point], float],
    rounds: int = 1,
    extensions: int = 4,
    allowed: Callable[[Point], bool] = lambda _: True,
) -> tuple[Found, int]:
    """Try what is wanted until nothing is; how many trials that took."""
    known: dict[object, float] = {}
    while True:
        found = search(axes, rounds, extensions, lambda point, known=known: known.get(key_of(point)), allowed)
        if not found.wanted:
            return found, len(known)
        assert all(key_of(point) not in known for point in found.wanted)
        known |= {key_of(point): loss(point) for point in found.wanted}


def bowl(rate: float, scale: float = 1.0) -> Callable[[Point], float]:
    """Lowest at a rate and a scale; 3 is the scale of whoever gives none."""

    def loss(point: Point) -> float:
        r, s = point.get(RATE.setting, 1.0), point.get(SCALE.setting, 3.0)
        return math.log(r / rate) ** 2 + math.log(s / scale) ** 2

    return loss


def test_the_best_of_the_grid_is_taken_where_it_lies_inside() -> None:
    found, trials = run([RATE], bowl(2.0))
    assert (found.point, trials) == ({RATE.setting: 2.0}, 3)
    assert not found.looks[0].at_edge


@pytest.mark.parametrize(("best", "added"), [(16.0, [8.0, 16.0, 32.0]), (0.5, [0.5, 0.25])])
def test_a_best_value_at_an_edge_extends_the_grid_by_its_ratio_until_it_lies_inside(
    best: float, added: list[float]
) -> None:
    found, trials = run([RATE], bowl(best))
    assert found.point == {RATE.setting: best}
    assert found.looks[0].added == added
    assert trials == 3 + len(added)
    assert not found.looks[0].at_edge


def test_extensions_are_bounded_and_the_edge_is_told() -> None:
    found, trials = run([RATE], bowl(1e9), extensions=2)
    assert (found.point, trials) == ({RATE.setting: 16.0}, 5)
    assert found.looks[0].at_edge
    assert run([RATE], bowl(1e9), extensions=0)[1] == 3


def test_a_grid_is_not_extended_beyond_what_a_run_can_have() -> None:
    found, trials = run([RATE], bowl(1e9), allowed=lambda point: point[RATE.setting] <= 8.0)
    assert (found.point, trials) == ({RATE.setting: 8.0}, 4)
    assert found.looks[0].at_edge


def test_where_every_trial_fails_it_goes_on_below() -> None:
    found, _ = run([RATE], lambda point: math.inf if point[RATE.setting] > 0.3 else point[RATE.setting])
    assert found.point[RATE.setting] < 0.3


def test_axes_are_looked_along_one_after_another_at_the_best_so_far() -> None:
    found, trials = run([RATE, SCALE], bowl(2.0, scale=2.0))
    assert found.point == {RATE.setting: 2.0, SCALE.setting: 2.0}
    assert found.looks[1].values == [1.0, 2.0, 4.0]
    assert all(point[RATE.setting] == 2.0 for point in found.looks[1].points())
    assert trials == 6


def test_a_setting_stays_as_it_was_where_nothing_on_its_axis_is_better() -> None:
    found, _ = run([RATE, SCALE], bowl(2.0, scale=3.0))
    assert found.point == {RATE.setting: 2.0}
    assert found.looks[1].best is None
    assert not found.looks[1].at_edge


def test_a_second_round_looks_along_the_first_axis_again() -> None:
    def coupled(point: Point) -> float:
        # The best rate is twice the scale.
        rate, scale = math.log2(point[RATE.setting]), math.log2(point.get(SCALE.setting, 1.0))
        return 0.3 * (rate - scale - 1) ** 2 + (scale - 2) ** 2

    once, _ = run([RATE, Axis(SCALE.setting, (0.5, 1.0, 2.0))], coupled)
    twice, _ = run([RATE, Axis(SCALE.setting, (0.5, 1.0, 2.0))], coupled, rounds=4)
    assert coupled(twice.point) < coupled(once.point)


def test_a_later_round_compares_with_what_an_earlier_one_found_beyond_the_grid() -> None:
    losses = {(8.0, 1.0): 2.0, (2.0, 1.0): 2.2, (8.0, None): 2.5}

    def loss(point: Point) -> float:
        return losses.get((point[RATE.setting], point.get(SCALE.setting)), 3.0 + 1 / point[RATE.setting])

    found, _ = run([RATE, SCALE], loss, rounds=2)
    assert found.point == {RATE.setting: 8.0, SCALE.setting: 1.0}


@given(st.floats(-8, 8), st.floats(-3, 3), st.integers(0, 6), st.integers(1, 3))
def test_the_end_is_the_best_that_was_tried_and_no_look_passes_its_bounds(
    rate: float, scale: float, extensions: int, rounds: int
) -> None:
    loss = bowl(2.0**rate, 2.0**scale)
    found, trials = run([RATE, SCALE], loss, rounds, extensions)
    assert loss(found.point) == min(loss(point) for point in found.tried())
    assert trials == len(found.tried()) <= rounds * (5 + 2 * extensions)
    for look in found.looks:
        assert len(look.added) <= extensions
        assert look.values == sorted(look.values)
        if look.best is not None and not look.at_edge:
            assert look.values[0] < look.best < look.values[-1]


GRID = {
    "learning_rates": [1e-3, 2e-3],
    "grid": {
        "parameterization.initial_scale": [1, 2], "training.sparse_learning_rate": [0.01, 0.02],
        "topology.drop_fraction": [0.1, 0.3],
    },
}  # fmt: skip


def test_a_setting_is_tuned_where_it_matters_and_is_not_given() -> None:
    plan = ComparisonPlan(
        methods=["dense", "dense-small", "static", "rigl"],
        variants={  # type: ignore[arg-type]
            "one-rate": {"method": "static", "settings": {"training": {"sparse_learning_rate": None}}}
        },
        tuning=GRID,  # type: ignore[arg-type]
    )
    axes = {name: [axis.setting.rpartition(".")[2] for axis in plan.axes(name, 0.9)] for name in plan.all_variants}
    dense = ["learning_rate", "initial_scale"]
    assert axes["dense"] == axes["dense-small"] == axes["one-rate"] == dense
    assert axes["static"] == [*dense, "sparse_learning_rate"]
    assert axes["rigl"] == [*dense, "sparse_learning_rate", "drop_fraction"]


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"training.sparse_rate": [1, 2]}, "no setting 'training.sparse_rate'; did you mean"),
        ({"training.learning_rate": [1, 2]}, "give it by learning_rates"),
        ({"parameterization.initial_scale": [1]}, "two or more values"),
        ({"parameterization.initial_scale": [1, 1]}, "given twice"),
        ({"parameterization.initial_scale": [-1, 1]}, "must be at least 0"),
        ({"training.steps": [100, 200]}, "matched on gives every trial its length"),
    ],
)
def test_a_wrong_grid_gives_one_line(grid: dict[str, list[float]], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse_plan({"kind": "comparison", "methods": ["static"], "tuning": {"grid": grid}}, "plan.yaml", ComparisonPlan)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "values", "is_best", "ends"),
    [
        # (setting, grid, which value is best, what is tried in the end and what is best)
        ("training.batch_size", [2, 3], "high", [2, 3, 4, 5, 6, 7]),
        ("training.batch_size", [2, 3], "low", [1, 2, 3]),
        ("topology.window", [10, 15], "high", [10, 15, 22, 32, 47, 69]),
        ("topology.window", [2, 4], "low", [1, 2, 4]),
        ("topology.random_share", [0.5, 0.8], "high", [0.5, 0.8, 1.0]),
        ("topology.random_share", [0.0, 0.5], "low", [0.0, 0.5]),
        ("topology.strategy.sequences", [8, 16], "high", [8, 16, 32, 64]),
        ("training.weight_decay", [0, 0.1], "high", [0, 0.1, 0.2, 0.4, 0.8, 1.6]),
        ("training.sparse_learning_rate", [0.01, 0.02], "low", [0.000625, 0.00125, 0.0025, 0.005, 0.01, 0.02]),
    ],
)
def test_what_is_tried_beyond_a_grid_is_of_the_settings_type_and_inside_its_bounds(
    setting: str, values: list[float], is_best: str, ends: list[float]
) -> None:
    plan = parse_plan(
        {"methods": ["sparsae-evolved"], "tuning": {"grid": {setting: values}}}, "plan.yaml", ComparisonPlan
    )
    (axis,) = plan.axes("sparsae-evolved", 0.9)

    def allowed(point: Point) -> bool:
        try:
            plan.config("sparsae-evolved", 0.9, 0, point)
        except InputError:
            return False
        return True

    found, _ = run([axis], lambda point: (-1 if is_best == "high" else 1) * point[setting], allowed=allowed)
    (look,) = found.looks
    assert look.values == ends
    assert all(allowed(point) for point in found.tried())
    assert [type(value) for value in look.values] == [type(value) for value in ends]
    # It is told only where a value beyond could be tried.
    assert look.at_edge == (len(look.added) == 4)


class TestCadence:
    def every(self, plan: ComparisonPlan, variant: str) -> object:
        return plan.config(variant, 0.9, 0).topology.every  # type: ignore[attr-defined]

    def test_a_cadence_in_steps_becomes_a_share_of_the_run(self) -> None:
        plan = ComparisonPlan(methods=["rigl", "gse", "granet", "sparsae", "rigl-ramp"])
        assert {self.every(plan, name) for name in ("rigl", "gse", "granet", "rigl-ramp")} == {"2%"}
        assert self.every(plan, "sparsae") == self.every(ComparisonPlan(methods=["sparsae"], cadence=None), "sparsae")
        assert self.every(ComparisonPlan(methods=["gse"], cadence="5%"), "gse") == "5%"
        assert self.every(ComparisonPlan(methods=["gse"], cadence=None), "gse") == 1000

    def test_what_the_plan_gives_stays(self) -> None:
        variants = {"rigl-20": {"method": "rigl", "settings": {"topology": {"every": 20}}}}
        plan = ComparisonPlan(methods=["rigl"], variants=variants, settings={})  # type: ignore[arg-type]
        assert (self.every(plan, "rigl-20"), self.every(plan, "rigl")) == (20, "2%")
        assert self.every(ComparisonPlan(methods=["rigl"], settings={"topology": {"every": 50}}), "rigl") == 50


def test_further_matches_are_rows_of_their_own_with_the_tuning_of_what_they_are() -> None:
    small = {"small": {"method": "dense-small", "match": "steps"}}
    plan = ComparisonPlan(methods=["static", "rigl"], variants=small, also=["steps"])  # type: ignore[arg-type]
    assert list(plan.all_variants) == ["static", "rigl", "small", "rigl@steps"]
    assert plan.match_of("rigl@steps") == "steps"
    assert plan.tuned_as("rigl@steps") == "rigl"
    assert plan.config("rigl@steps", 0.9, 0) == plan.config("rigl", 0.9, 0)


@pytest.mark.parametrize(
    ("planned", "message"),
    [
        ([["static", "rigle"]], "'rigle' is not compared; did you mean rigl"),
        ([["static", "static"]], "two different variants"),
        ([["static", "rigl"], ["rigl", "static"]], "two different variants, once"),
        ([["static"]], "planned"),
    ],
)
def test_a_wrong_contrast_gives_one_line(planned: list[list[str]], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse_plan(
            {"kind": "comparison", "methods": ["static", "rigl"], "planned": planned}, "plan.yaml", ComparisonPlan
        )
    assert "\n" not in str(caught.value)


def test_what_an_earlier_version_tuned_is_shown_as_a_look_along_the_rate() -> None:
    trials = [{"learning_rate": r, "validation_loss": loss} for r, loss in ((1e-3, 3.0), (2e-3, 2.0))]
    rows = [compare_row("static", seed, 3.0) for seed in range(3)]
    rows += [compare_row("set", seed, 2.8 + 0.04 * seed) for seed in range(3)]
    entry = encode(summarize(rows, "static", "validation_loss")[1])
    assert entry["verdict"] == "better"
    entry["difference"]["p_holm"] = 0.06  # of many
    del entry["planned"]
    old = {"kind": "comparison", "plan": {"tuning": {"share": 0.4}}, "reference": "static", "summary": [entry]}
    found = of_now({**old, "tuning": [{"learning_rate": 2e-3, "at_edge": True, "trials": trials}]}, "here")
    assert (found["judged_by"], found["trial_share"]) == ("validation_loss", 0.4)
    (look,) = found["tuning"][0]["looks"]
    assert (look["values"], look["losses"], look["best"]) == ([1e-3, 2e-3], [3.0, 2.0], 2e-3)
    assert found["tuning"][0]["edges"] == ["training.learning_rate"]
    assert entry["verdict"] == "undecided"


@pytest.mark.parametrize("part", [{"plan": None}, {"tuning": [{"trials": 3}]}, {"summary": [{"method": "set"}]}])
def test_what_no_version_wrote_is_told_in_one_line(part: dict[str, Any]) -> None:
    old = {"kind": "comparison", "plan": {"tuning": {}}, "reference": "static"}
    with pytest.raises(InputError, match=r"^here: .*the file is damaged") as caught:
        of_now({**old, **part}, "here")
    assert "\n" not in str(caught.value)


def test_an_edge_is_that_of_the_last_look_along_a_setting(tmp_path: Path) -> None:
    """Of several rounds: an earlier look, at other settings, says nothing any more, and nothing is told twice."""

    def loss(point: Point) -> float:
        best = 2.0 if SCALE.setting in point else 3.0  # at the edge in the first round alone
        return (point.get(RATE.setting, 9.0) - best) ** 2 - 10 * point.get(SCALE.setting, 0.0)

    axes = [Axis(RATE.setting, (1.0, 2.0, 3.0)), Axis(SCALE.setting, (0.1, 0.2, 0.3))]
    found = search(axes, 2, 0, loss, lambda point: True)
    config = resolve(None, "demo", "static")
    trials = [Trial(point, Job(f"tuning/{n}", config, 1)) for n, point in enumerate(found.tried())]
    row = _tuning(tmp_path, Search("static", 0.9, found, trials), set())
    assert [look.at_edge for look in found.looks if look.setting == RATE.setting] == [True, False]
    assert row.edges == (SCALE.setting,)


def test_a_trial_that_exists_keeps_its_name_whichever_point_asks_for_it_first(tmp_path: Path) -> None:
    text, out = write_text(tmp_path / "text"), tmp_path / "out"
    config, other = (config_of(text, tmp_path / "cache", f"training.steps={n}", method="static") for n in (2, 3))
    start(config, out / "tuning" / "first", quiet=True)
    (out / "tuning" / "damaged").mkdir()
    (out / "tuning" / "damaged" / "config.yaml").write_text("neither: [nor")
    again = Jobs(out)
    assert again.add(Job("tuning/second", config, 1)).name == "tuning/first"
    assert again.add(Job("tuning/third", other, 1)).name == "tuning/third"
    assert Jobs(out).add(Job("runs/second", config, 1)).name == "runs/second"
    assert Jobs().add(Job("tuning/second", config, 1)).name == "tuning/second"
