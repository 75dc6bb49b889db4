"""The check of coordinates: scales against dense oracles, slopes against known ones, the command end to end."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sparsae.cli import main
from sparsae.config.load import resolve
from sparsae.core.topology import Topology
from sparsae.data import prepare
from sparsae.experiments.coordinates.measure import Gauge, Scale, scales
from sparsae.experiments.coordinates.page import _apart
from sparsae.experiments.coordinates.plan import Case, CoordinatesPlan
from sparsae.experiments.coordinates.slopes import slope, slopes, summary, without_slope
from sparsae.experiments.plan import parse_plan
from sparsae.nn.linear import SparseLinear

SMALL = [
    "data.tokenizer_vocab=300", "model.width=32", "model.heads=2", "model.context=16", "training.batch_size=2",
    "training.device=cpu", "training.threads=1", "parameterization.base_width=16",
]  # fmt: skip


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings of every run: a tiny model on a few lines."""
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("\n".join(f"item {j} has {j % 7} parts and {j % 3} colours" for j in range(2000)))
    return [*SMALL, f"data.source={text}", f"data.cache={tmp_path_factory.mktemp('cache')}"]


def rms(values: torch.Tensor) -> float:
    return math.sqrt(float(values.double().square().mean()))


class TestGauge:
    def test_scales_of_a_linear_layer_by_hand(self) -> None:
        """In two calls, as a loss in chunks makes them: W x + b, the gradient g, and (W' - W) x without b."""
        torch.manual_seed(0)
        layer = nn.Linear(6, 4).double()
        gauge = Gauge(layer)
        x, g = torch.randn(8, 6, dtype=torch.float64), torch.randn(8, 4, dtype=torch.float64)
        for rows in (slice(0, 5), slice(5, 8)):
            y = layer(x[rows])
            gauge.see((x[rows],), y)
            (y * g[rows]).sum().backward()
        gauge.mark()
        change = 1e-3 * torch.randn(4, 6, dtype=torch.float64)
        with torch.no_grad():
            expected_y = rms(layer(x))
            layer.weight += change
            layer.bias += 5.0
        gauge.compare()
        found = gauge.take()
        assert found["activation"] == pytest.approx(expected_y)
        assert found["gradient"] == pytest.approx(rms(g))
        assert found["update"] == pytest.approx(rms(x @ change.T))
        assert gauge.take() == {}

    def test_an_update_counts_connections_that_went_and_that_came(self) -> None:
        rng = torch.Generator().manual_seed(1)
        shape = (12, 16)
        before, after = (Topology.random(shape, 40, rng) for _ in range(2))
        layer = SparseLinear(before, torch.randn(40, generator=rng, dtype=torch.float64), backend="reference")
        old = layer.dense_weight().detach()
        x = torch.randn(5, 16, generator=rng, dtype=torch.float64)
        gauge = Gauge(layer)
        gauge.see((x,), layer(x))
        gauge.mark()
        layer.set_topology(after, torch.randn(40, generator=rng, dtype=torch.float64))
        gauge.compare()
        assert gauge.take()["update"] == pytest.approx(rms(x @ (layer.dense_weight().detach() - old).T))


@given(
    power=st.floats(-2, 2),
    factor=st.floats(1e-6, 1e6),
    xs=st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=8, unique_by=lambda x: round(math.log(x), 2)),
)
def test_the_slope_of_a_power_law_is_its_power(power: float, factor: float, xs: list[float]) -> None:
    assert slope((x, factor * x**power) for x in xs) == pytest.approx(power, abs=1e-6)


def test_no_slope_without_two_places() -> None:
    assert slope([]) is None
    assert slope([(0.5, 1.0), (0.5, 2.0)]) is None


def test_slopes_of_a_known_scaling() -> None:
    """Updates that grow as density^0.25 and activations that do not, averaged in the log over two seeds."""
    measured = {
        Case("supar", width, sparsity, seed): [
            Scale("layer", "activation", 0, 3.0 * 2.0 ** (seed - 0.5), 1 - sparsity, width),
            Scale("layer", "gradient", 0, 1.0 / width, 1 - sparsity, width),
            Scale("layer", "update", 0, width**0.5 * (1 - sparsity) ** 0.25, 1 - sparsity, width * (1 - sparsity)),
            Scale("silent", "update", 0, 0.0, 1 - sparsity, width),
        ]
        for width in (16, 64)
        for sparsity in (0.0, 0.5, 0.9)
        for seed in (0, 1)
    }
    rows = slopes(measured)
    assert len(rows) == 3 * 2 + 3 * 3  # three quantities: over density at two widths, over width at three sparsities
    found: dict[tuple[str, str], set[tuple[float, bool]]] = {}
    for row in rows:
        assert row.layer == "layer"
        assert (row.width is None) == (row.axis == "width") != (row.sparsity is None)
        found.setdefault((row.axis, row.quantity), set()).add((round(row.slope, 9), row.within))
    assert found == {
        ("density", "activation"): {(0.0, True)},
        ("density", "gradient"): {(0.0, True)},
        ("density", "update"): {(0.25, False)},
        ("width", "activation"): {(0.0, True)},
        ("width", "gradient"): {(-1.0, True)},
        ("width", "update"): {(0.5, False)},
    }
    points = next(row for row in rows if row.quantity == "activation" and row.axis == "density").points
    assert [point.scale for point in points] == pytest.approx([3.0] * 3)
    shares = {(e.axis, e.quantity): e.share_within for e in summary(rows)}
    assert shares["density", "update"] == 0
    assert shares["width", "gradient"] == 1
    # The update's layer sums width * density weights.
    few = [row for row in slopes(measured, 32) if row.quantity == "update"]
    assert [(row.axis, row.width, [p.sparsity for p in row.points]) for row in few] == [("density", 64, [0.0, 0.5])]


@pytest.mark.parametrize("method", ["static", "rigl", "dense"])
def test_every_layer_is_seen_in_every_step(method: str, settings: list[str]) -> None:
    """Also those inside an MLP that one operator would compute, and through updates of the topology."""
    own = ["model.layers=2", "training.steps=4", "training.warmup=0"]
    own += ["topology.every=2", "topology.stop=1.0"] if method == "rigl" else []
    config = resolve(None, None, method, [*settings, *own])
    found = list(scales(config, prepare(config.data)))
    blocks = [f"{i}.{name}" for i in range(2) for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    wanted = {(layer, step) for layer in ("embedding", *blocks, "logits") for step in range(4)}
    for quantity in ("activation", "gradient", "update"):
        assert {(s.layer, s.step) for s in found if s.quantity == quantity} == wanted
    assert all(math.isfinite(s.scale) and s.scale > 0 for s in found)
    if method == "rigl":  # the update takes a third of the connections with it
        size = {s.step: s.scale for s in found if (s.layer, s.quantity) == ("0.mlp.c_fc", "update")}
        assert size[1] > 1.2 * size[0]


def test_the_first_update_of_adam_is_its_learning_rate(settings: list[str]) -> None:
    """Each entry of the embedding that occurs moves by eta, but for the decay and epsilon."""
    own = ["model.layers=1", "training.steps=1", "training.warmup=0", "training.weight_decay=0", "training.clip=null"]
    config = resolve(
        None, None, "static", [*settings, *own, "training.learning_rate=0.001", "model.tie_embeddings=false"]
    )
    (update,) = [s for s in scales(config, prepare(config.data)) if (s.layer, s.quantity) == ("embedding", "update")]
    assert update.scale == pytest.approx(1e-3, rel=0.01)


COMMAND = "check coordinates --widths 16,32 --sparsities 0.5,0.9 --steps 2 --layers 1 --heads constant"


def test_the_command_writes_slopes_a_table_and_a_page(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "slopes.json"
    arguments = [*COMMAND.split(), "--out", str(tmp_path / "out"), "--json", str(file), *settings]
    assert main(arguments) == 0
    found: dict[str, Any] = json.loads((tmp_path / "out" / "coordinates.json").read_text())
    assert found["rows"] == json.loads(file.read_text())
    # six layers, three quantities, two steps, at two widths and at two sparsities, three parameterizations
    assert len(found["rows"]) == 6 * 3 * 2 * 4 * 3
    assert {row["parameterization"] for row in found["rows"]} == {"sp", "mup", "supar"}
    assert all(len(row["points"]) == 2 for row in found["rows"])
    assert found["diverged"] == []
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script" not in page
    assert page.count("<svg") == 3 * 3 * 2 * 2
    printed = capsys.readouterr().out
    assert "supar" in printed
    assert "report.html" in printed
    assert main(arguments) == 2  # the directory is taken
    assert "out" in capsys.readouterr().err


def test_a_run_that_diverges_is_told(settings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    options = "--parameterizations sp --widths 16 --learning-rate 1e30 --steps 3 --json -"
    of_standard = [setting for setting in settings if not setting.startswith("parameterization.base_width")]
    assert main([*COMMAND.split(), *options.split(), *of_standard]) == 0
    printed = capsys.readouterr()
    assert {row["step"] for row in json.loads(printed.out)} < {0, 1, 2}
    assert printed.err.count("sp at width 16, sparsity 0.5, seed 0: diverged after") == 1
    assert printed.err.count("sp at width 16, sparsity 0.9, seed 0: diverged after") == 1


def test_published_baselines_know_nothing_of_density() -> None:
    plan = parse_plan(
        {"widths": [128], "sparsities": [0.0, 0.75], "parameterizations": ["sp", "mup-active"]}, "here", CoordinatesPlan
    )
    configs = {(case.parameterization, case.sparsity): config for case, config in plan.configs()}
    assert configs["sp", 0.75].parameterization.initial_fan_in == "dense"
    active = configs["mup-active", 0.75].parameterization
    assert (active.name, active.initial_fan_in) == ("mup", "active")
    assert {config.method for (_, sparsity), config in configs.items() if sparsity == 0} == {"dense"}
    for config in configs.values():
        training = config.training
        assert (training.warmup, training.final_learning_rate, training.clip) == (0.0, 1.0, None)
        assert (config.model.width, config.model.heads) == (128, 2)  # heads of 64, as in the preset
        assert not config.teacher.enabled


WRONG = {
    "an unknown parameterization": (["--parameterizations", "supra"], "did you mean supar"),
    "a width for no whole heads": (["--widths", "100"], "model.heads would be"),
    "no number": (["--widths", "wide"], "--widths: must be whole numbers"),
    "sparsity 1": (["--sparsities", "1"], "must be below 1"),
    "a setting that the check makes": (["training.clip=1.0"], "leave out training.clip"),
    "a setting that the grid makes": (["sparsity.sparsity=0.5"], "leave out sparsity.sparsity"),
    "an unknown setting": (["training.stepz=3"], "did you mean"),
    "a method without sparsity": (["--method", "dense"], "no sparsity to vary"),
    "no slope": (["--widths", "64", "--sparsities", "0.5"], "one width and one sparsity have no slope"),
    "a method that prunes": (["--method", "gmp"], "starts at sparsity 0"),
    "no steps": (["--steps", "0"], "must be at least 1"),
    "heads of no kind": (["--heads", "many"], "'scaled' or 'constant'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_gives_one_line_and_writes_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    options, expected = WRONG[name]
    assert main(["check", "coordinates", *options, "--out", "out", "--json", "out.json"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line
    assert list(tmp_path.iterdir()) == []


def test_layers_that_least_fan_in_leaves_out_are_named() -> None:
    measured = {
        Case("sp", 16, sparsity, 0): [
            Scale("embedding", "update", 0, 1.0, 1 - sparsity, math.inf),
            Scale("layer", "update", 0, 1.0, 1 - sparsity, 16 * (1 - sparsity)),
        ]
        for sparsity in (0.0, 0.5)
    }
    assert without_slope(measured, slopes(measured, 8)) == ()
    assert without_slope(measured, slopes(measured, 16)) == ("layer",)


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=30))
def test_labels_of_a_logarithmic_axis_have_room(values: list[float]) -> None:
    ticks = sorted(set(values))
    shown = _apart(ticks)
    assert shown[0] == ticks[0]
    assert set(shown) <= set(ticks)
    assert len(shown) <= 9
    gaps = [math.log(b / a) for a, b in pairwise(shown)]
    assert all(gap > math.log(ticks[-1] / ticks[0]) / 8 for gap in gaps)
