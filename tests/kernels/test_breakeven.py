"""The densities above which layers are multiplied densely, held against what was measured."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsae.core.randomness import generator
from sparsae.core.topology import Topology
from sparsae.kernels.backend import Layout
from sparsae.kernels.cpu.breakeven import (
    ATTENTION,
    ATTENTION_SIZE,
    MLP,
    MLP_BLOCKS,
    MLP_TOKENS,
    fusing_pays,
    highest_density,
    pays,
)

RESULTS = Path(__file__).parents[2] / "docs/results/kernels"
MLP_SCRIPT = RESULTS.parents[2] / "benchmarks" / "mlp.py"
MEASURED, MEASURED_MLPS = sorted(RESULTS.glob("thresholds-*.json")), sorted(RESULTS.glob("mlp-*.json"))
MEASURED_ATTENTION = sorted((RESULTS.parent / "performance").glob("attention*.json"))


@pytest.mark.parametrize("file", MEASURED, ids=lambda file: file.stem)
def test_no_measured_layer_is_slower_than_dense_products_below_its_limit(file: Path) -> None:
    rows = json.loads(file.read_text())
    below = [row for row in rows if 1 - row["sparsity"] <= highest_density(_pair(row["unit"])) + 1e-9]
    assert min(row["cpu_ratio"] for row in below) > 1
    limits = {highest_density(_pair(row["unit"])) for row in rows}
    assert len(limits) == 5
    # Something of every kind was measured below its limit, and above it.
    assert {highest_density(_pair(row["unit"])) for row in below} == limits
    assert {highest_density(_pair(row["unit"])) for row in rows if row not in below} == limits


@pytest.mark.parametrize(
    ("unit", "limit"), [((1, 1), 0.36), ((8, 4), 0.45), ((6, 6), 0.25), ((2, 2), 0.15), ((3, 12), 0.15), ((2, 1), 0.1)]
)
def test_a_layer_is_multiplied_densely_above_the_limit_of_its_units(unit: tuple[int, int], limit: float) -> None:
    assert highest_density(unit) == limit
    shape = 48, 48
    units = (48 // unit[0]) * (48 // unit[1])

    def layout(count: int) -> Layout:
        topology = Topology.random(shape, count, generator(0, "breakeven"), unit)
        return Layout(topology.shape, topology.unit, topology.indices)

    last = int(limit * units)
    assert pays(layout(last), torch.float32)
    assert not pays(layout(last + 1), torch.float32)
    assert not pays(layout(last), torch.float64)


@pytest.mark.parametrize("file", MEASURED_MLPS, ids=lambda file: file.stem)
def test_no_measured_mlp_is_slower_at_once_below_its_limit(file: Path) -> None:
    rows = json.loads(file.read_text())
    alone = [row for row in rows if row["pass"] == "forward" and row["tokens"] >= MLP_TOKENS[row["gated"]]]
    assert min(row["cpu_ratio"] for row in alone) > 1
    assert {row["gated"] for row in alone} == {False, True}
    both = [row for row in rows if row["pass"] != "forward"]
    below = [row for row in both if row["density"] <= _mlp_limit(row)]
    assert min(row["cpu_ratio"] for row in below) > 1
    kinds = {(gated, again, unit) for gated in (False, True) for again in (False, True) for unit in ("1x1", "4x4")}
    assert {(row["gated"], row["keeps"] == "nothing", row["unit"]) for row in below} == kinds


def test_no_measured_attention_is_slower_than_torchs_where_it_is_taken() -> None:
    rows = [row for file in MEASURED_ATTENTION for row in json.loads(file.read_text())]
    taken = [row for row in rows if row["tokens"] >= ATTENTION[row["isa"]] and row["size"] <= ATTENTION_SIZE]
    assert min(row["torch_cpu_ratio"] for row in taken) > 1
    for isa, least in ATTENTION.items():
        sizes = {(row["tokens"], row["size"]) for row in taken if row["isa"] == isa}
        assert least == min(tokens for tokens, _ in sizes)
        assert max(size for _, size in sizes) == ATTENTION_SIZE


def test_the_script_measures_attention_that_is_the_same_three_ways() -> None:
    script = runpy.run_path(str(MLP_SCRIPT.with_name("attention.py")))
    case = (2, 4, 2, 70, 8)
    q, k, v = (torch.randn(2, heads, 70, 8, generator=generator(0, "attention")) for heads in (4, 2, 2))
    outputs = [way(q, k, v) for way in script["WAYS"].values()]
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0], rtol=0, atol=1e-5)
    forward, both = script["rows"]((case,), rounds=1)
    assert (forward["pass"], both["pass"]) == ("forward", "forward+backward")
    for row in (forward, both):
        flops = (4 if row is forward else 12) * 2 * 4 * (70 * 71 / 2) * 8
        assert row["ours_gflops"] == pytest.approx(flops / row["ours_cpu_seconds"] / 1e9)
        assert row["torch_cpu_ratio"] == row["torch_cpu_seconds"] / row["ours_cpu_seconds"]


def test_both_instruction_sets_were_measured() -> None:
    assert len(MEASURED) == len(MEASURED_MLPS) == len(MEASURED_ATTENTION) == 2


@pytest.mark.parametrize("unit", [(1, 1), (4, 4)])
@pytest.mark.parametrize("gated", [False, True])
def test_an_mlp_is_computed_layer_by_layer_above_its_limit_unless_no_backward_follows(
    unit: tuple[int, int], gated: bool
) -> None:
    units = (160 // unit[0]) * (160 // unit[1])

    def layouts(count: int) -> list[Layout]:
        topology = Topology.random((160, 160), count, generator(0, "breakeven"), unit)
        return [Layout(topology.shape, topology.unit, topology.indices)] * (3 if gated else 2)

    for keeps in ("nothing", "bfloat16", "float32"):
        last = int((MLP if unit == (1, 1) else MLP_BLOCKS)[gated, keeps == "nothing"] * units)
        assert fusing_pays(layouts(last), keeps, 1)
        assert not fusing_pays(layouts(last + 1), keeps, 4096)
    assert fusing_pays(layouts(units), None, MLP_TOKENS[gated])
    assert not fusing_pays(layouts(1), None, MLP_TOKENS[gated] - 1)


def test_the_page_has_the_tables_of_the_measured_mlps() -> None:
    rows = {file.stem.removeprefix("mlp-"): json.loads(file.read_text()) for file in MEASURED_MLPS}
    page = (RESULTS.parent / "kernels.md").read_text("utf-8")
    script = runpy.run_path(str(MLP_SCRIPT))
    assert script["table"](rows) in page
    assert script["token_table"](rows) in page


def test_the_measurement_of_mlps_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = runpy.run_path(str(MLP_SCRIPT))
    names = script["main"].__globals__
    monkeypatch.setitem(names, "SIZES", ((True, 64, 128),))
    monkeypatch.setitem(names, "DENSITIES", {(1, 1): (0.1,)})
    monkeypatch.setitem(names, "TOKENS", 64)
    monkeypatch.setitem(names, "FEW", (32,))
    monkeypatch.setitem(names, "keep_freed_memory", lambda device: None)  # it would stay for the tests that follow
    script["main"](tmp_path / "rows.json", 2)
    rows = json.loads((tmp_path / "rows.json").read_text())
    both = [("forward+backward", keeps) for keeps in ("nothing", "bfloat16", "float32")]
    ways = [("forward", "nothing")] * 2 + both
    assert [(row["pass"], row["keeps"]) for row in rows] == ways
    assert all(row["cpu_ratio"] > 0 for row in rows)
    assert set(rows[0]) == set(json.loads(MEASURED_MLPS[0].read_text())[0])


def _mlp_limit(row: dict[str, Any]) -> float:
    return (MLP if row["unit"] == "1x1" else MLP_BLOCKS)[row["gated"], row["keeps"] == "nothing"] + 1e-9


def _pair(text: str) -> tuple[int, int]:
    first, second = map(int, text.split("x"))
    return first, second
