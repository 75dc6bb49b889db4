"""The benchmarks on tiny cases: rows are whole and agree with themselves, files are there, bad options are refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsae.bench.clock import interleaved
from sparsae.bench.kernels import layer_of, means
from sparsae.bench.rivals import RIVALS
from sparsae.bench.rows import Column, markdown
from sparsae.bench.topology import UPDATES, Subject, slopes
from sparsae.cli import main
from sparsae.core.randomness import generator
from sparsae.core.topology import Topology
from sparsae.kernels.cpu import native
from sparsae.nn.linear import SparseLinear
from tests.support.bench import run

ROOT = Path(__file__).parents[2]
needs_kernels = pytest.mark.skipif(native.absence() is not None, reason="the native kernels were not compiled")

KERNELS = "bench kernels --shapes 32x16,16x48 --tokens 24 --sparsities 0.5,0.9 --units 1x1,4x4 --rounds 1"
NAMES = {"backend", "unit", "out", "in", "tokens", "sparsity", "dtype", "threads", "pass"}
NUMBERS = {"seconds", "dense_seconds", "ratio", "cpu_seconds", "dense_cpu_seconds", "cpu_ratio"}


def test_rows_of_kernels_are_whole_and_agree_with_themselves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = run(f"{KERNELS} --backends reference,torch-csr,torch-bsr", tmp_path)
    cases = {(r["backend"], r["unit"], r["out"], r["sparsity"], r["pass"]) for r in rows}
    assert len(cases) == len(rows)
    # reference: both units, both passes. CSR: single weights, both passes. BSR: blocks, forward only.
    assert len(rows) == 2 * 2 * (2 * 2 + 2 + 1)
    for row in rows:
        assert set(row) >= NAMES | NUMBERS
        assert row["ratio"] == pytest.approx(row["dense_seconds"] / row["seconds"])
        assert row["pass"] in ("forward", "forward+backward")
        assert (row["out"], row["in"]) in ((32, 16), (16, 48))
        assert (row["tokens"], row["dtype"]) == (24, "float32")
        assert ("backward_seconds" in row) == (row["pass"] == "forward+backward")
    assert {(r["unit"], r["pass"]) for r in rows if r["backend"] == "torch-bsr"} == {("4x4", "forward")}
    out = capsys.readouterr().out
    assert "torch-csr: left out for 4x4 in float32: it computes single weights" in out
    assert "Geometric means" in out


def test_every_number_of_threads_and_dtype_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--shapes 16x16 --tokens 8 --sparsities 0.5 --units 1x1 --rounds 1 --dtypes float32,bfloat16"
    rows = run(f"bench kernels {options} --threads 1,2 --backends reference,torch-csr", tmp_path)
    cases = {(row["backend"], row["dtype"], row["threads"]) for row in rows}
    assert cases == {("reference", d, t) for d in ("float32", "bfloat16") for t in (1, 2)} | {
        ("torch-csr", "float32", 1),
        ("torch-csr", "float32", 2),
    }
    assert "torch-csr: left out for 1x1 in bfloat16" in capsys.readouterr().out
    assert torch.get_num_threads() == 1


@needs_kernels
def test_shares_of_the_peak_are_what_the_rows_say(tmp_path: Path) -> None:
    rows = run(f"{KERNELS} --backends cpu", tmp_path)
    assert {row["backend"] for row in rows} == {"cpu"}
    for row in rows:
        # The peak that both shares are of: operations of the dense layer over its seconds and its share.
        peaks = [row["out"] * row["in"] / row["dense_seconds"] / row["dense_peak_share"]]
        nnz = round((1 - row["sparsity"]) * row["out"] * row["in"] / (16 if row["unit"] == "4x4" else 1))
        nnz *= 16 if row["unit"] == "4x4" else 1
        peaks.append(nnz / row["seconds"] / row["peak_share"])
        assert peaks[0] == pytest.approx(peaks[1])


def test_the_json_on_standard_output_is_alone_there(capsys: pytest.CaptureFixture[str]) -> None:
    command = "bench kernels --shapes 16x16 --tokens 8 --sparsities 0.5 --units 1x1 --rounds 1 --backends auto --json -"
    assert main(command.split()) == 0
    out, err = capsys.readouterr()
    assert [row["backend"] for row in json.loads(out)] == ["auto", "auto"]
    assert "Layers beside F.linear" in err


def test_a_rival_that_is_absent_is_named_and_skipped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in ("sparselab", "sparseprop")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [_Hiding(), *sys.meta_path])
    command = "bench kernels --shapes 16x16 --tokens 8 --sparsities 0.5 --units 1x1 --rounds 1"
    assert main([*command.split(), "--backends", "sparselab,sparseprop,reference", "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert {row["backend"] for row in json.loads(out)} == {"reference"}
    for name in ("sparselab", "sparseprop"):
        (line,) = [line for line in err.splitlines() if line.startswith(name)]
        assert line.startswith(f"{name}: not installed (pip install")
    assert main([*command.split(), "--backends", "sparselab"]) == 2
    assert "not installed" in capsys.readouterr().err


class _Hiding:
    """An import system in which the other libraries are not installed."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] in ("sparselab", "sparseprop"):
            raise ModuleNotFoundError(f"No module named '{name}'", name=name.partition(".")[0])


@pytest.mark.parametrize("name", RIVALS)
def test_rivals_compute_the_same_layer(name: str) -> None:
    rival = RIVALS[name]
    if rival.absence() is not None:
        pytest.skip(str(rival.absence()))
    rng = generator(3, name)
    topology = Topology.random((32, 48), 24, rng, (4, 4) if rival.blocks else (1, 1))
    values = torch.randn(topology.values_shape, generator=rng)
    layers: list[nn.Module] = [layer_of("reference", topology, values), layer_of(name, topology, values)]
    for layer in layers:
        bias = layer.bias
        assert isinstance(bias, torch.Tensor)
        with torch.no_grad():
            bias.copy_(torch.linspace(-1, 1, 32))
    x_TI, dy_TO = torch.randn(16, 48, generator=rng), torch.randn(16, 32, generator=rng)
    outcomes = []
    for layer in layers:
        x = x_TI.clone().requires_grad_(rival.trains)
        y = layer(x)
        if rival.trains:
            y.backward(dy_TO)
        outcomes.append((y.detach(), x.grad))
    torch.testing.assert_close(outcomes[1][0], outcomes[0][0])
    if rival.trains:
        torch.testing.assert_close(outcomes[1][1], outcomes[0][1])


def test_contenders_take_turns_and_the_first_round_does_not_count() -> None:
    calls: list[str] = []
    contenders = [{"work": lambda: calls.append("a")}, {"one": lambda: calls.append("b"), "two": lambda: None}]
    timings = interleaved(contenders, rounds=3, threads=1)
    assert calls == ["a", "b"] * 4
    assert list(timings[1].phases) == ["one", "two"]
    assert timings[1].seconds >= max(timings[1].phases.values()) > 0


def test_means_are_geometric_and_scaling_is_against_the_fewest_threads() -> None:
    case = {"backend": "cpu", "unit": "1x1", "tokens": 8, "sparsity": 0.9, "dtype": "float32", "pass": "forward"}
    rows = [
        {**case, "threads": threads, "seconds": seconds, "dense_seconds": dense, "ratio": dense / seconds}
        for threads, seconds, dense in ((1, 1.0, 2.0), (1, 1.0, 8.0), (2, 0.5, 2.0), (2, 0.5, 2.0))
    ]
    one, two = means(rows)
    assert one["ratio"] == pytest.approx(4.0)
    assert "scaling" not in one
    assert two["scaling"] == pytest.approx(2.0)
    assert two["dense_scaling"] == pytest.approx(2.0)


def test_topology_updates_by_their_parts(tmp_path: Path) -> None:
    command = "bench topology --widths 48,64 --sparsities 0.5,0.9 --unit 4x4 --tokens 8 --rounds 2 --backend reference"
    rows = run(command, tmp_path)
    assert len(rows) == 2 * 2 * len(UPDATES)
    for row in rows:
        units = (row["width"] // 4) ** 2
        assert row["nnz"] == 16 * round((1 - row["sparsity"]) * units)
        parts = {name: seconds for name, seconds in row["parts"].items() if name != "index"}
        assert max(parts.values()) <= row["seconds"]
        assert ("sddmm" in parts) == (row["update"] != "random")


@pytest.mark.parametrize("kind", UPDATES)
def test_an_update_of_the_benchmark_is_a_real_one(kind: str) -> None:
    subject = Subject(width=32, sparsity=0.75, unit=(1, 1), tokens=8, share=0.25, backend="reference")
    before = subject.layer.topology
    for part in UPDATES[kind](subject).values():
        part()
    after = subject.layer.topology
    assert after.count == before.count == 256
    moved = int((~before.contains(after.indices)).sum())
    # What RigL drops may grow again at once: it was never away.
    assert 0 < moved <= 64 if kind == "rigl" else moved == subject.moved == 64
    state = subject.optimizer.state[subject.layer.values]
    assert int((state["exp_avg"] == 0).sum()) == moved


def test_slopes_over_sizes() -> None:
    case = {"update": "guided", "backend": "auto", "unit": "1x1", "sparsity": 0.9}
    rows = [{**case, "nnz": nnz, "seconds": 1e-8 * nnz**1.5, "cpu_seconds": 1e-8 * nnz} for nnz in (100, 1000, 10_000)]
    (found,) = slopes(rows)
    assert (found["slope"], found["cpu_slope"], found["sizes"]) == (pytest.approx(1.5), pytest.approx(1.0), 3)
    assert slopes(rows[:1]) == []


@needs_kernels
def test_the_roofline(tmp_path: Path) -> None:
    (row,) = run("bench roofline --threads 1 --seconds 0", tmp_path)
    assert row["isa"] == native.isa()
    assert row["ridge_flops_per_byte"] == pytest.approx(row["flops_per_second"] / row["bytes_per_second"])
    assert min(row["flops_per_second"], row["bytes_per_second"]) > 1e8


@needs_kernels
@pytest.mark.parametrize("isa", ["portable", "neon", "avx2", "avx512"])
def test_the_loops_of_the_roofline_do_their_work(isa: str) -> None:
    before = native.isa()
    if not native.select_isa(isa):
        pytest.skip(f"no {isa} here")
    try:
        lanes = {"portable": 4, "neon": 4, "avx2": 8, "avx512": 16}[isa]
        assert native.multiply_add(1000, 2) == 2 * lanes * 12 * 1000 * 2
        a, b, c = torch.zeros(1003), torch.arange(1003.0), torch.ones(1003)
        native.triad(a, b, c, 2)
        assert torch.equal(a, b + 3)
        with pytest.raises(ValueError, match="shape"):
            native.triad(a, b[1:], c, 1)
    finally:
        native.select_isa(before)


@pytest.mark.parametrize(
    ("command", "words"),
    {
        "kernels --shapes 4x": ["--shapes", "768x768"],
        "kernels --shapes 30x30 --units 4x4": ["--units", "4x4", "30x30"],
        "kernels --tokens 0": ["--tokens", "at least 1"],
        "kernels --sparsities 1.0": ["--sparsities", "below 1"],
        "kernels --dtypes float64": ["--dtypes", "bfloat16"],
        "kernels --device gpu": ["--device", "gpu", "cuda"],
        "kernels --device cuda:77": ["--device", "cuda:77", "CUDA devices found"],
        "kernels --threads two": ["--threads", "whole number"],
        "kernels --backends cpuu": ["--backends", "cpuu", "sparselab"],
        "kernels --backends torch-bsr --units 1x1": ["nothing to measure", "blocks"],
        "kernels --json none/x": ["--json", "none"],
        "kernels --plot none/x": ["--plot", "none"],
        "kernels --plot -": ["--plot", "file"],
        "step --preset demoo": ["demoo", "demo"],
        "step --set training.stepss=3": ["training.stepss"],
        "step --backends none": ["none", "reference"],
        "step --sparsity 0": ["--sparsity", "0"],
        "step --steps 0": ["--steps"],
        "step --set training.device=cuda": ["training.device", "--device"],
        "memory --device cuda:77": ["--device", "cuda:77"],
        "memory --set training.device=cuda": ["training.device", "--device"],
        "topology --updates guide": ["--updates", "guided"],
        "topology --widths 30 --unit 4x4": ["--widths", "4x4"],
        "topology --share 2": ["--share", "below 1"],
        "roofline --threads 0": ["--threads", "at least 1"],
        "kernel": ["kernel"],
    }.items(),
)
def test_wrong_options_are_one_line(
    command: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *command.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("sparsae: error: ")
    assert len(err.splitlines()) == 1
    for word in words:
        assert word in err
    assert list(tmp_path.iterdir()) == []


def test_markdown_has_a_dash_where_nothing_was_measured() -> None:
    columns = [Column("name", "name"), Column("half", lambda row: row["n"] / 2, ".1f"), Column("peak", "peak")]
    assert markdown(columns, [{"name": "a", "n": 3}]).splitlines()[-1] == "| a | 1.5 | - |"


def test_the_script_for_gpus_knows_its_parts() -> None:
    script = ROOT / "benchmarks" / "gpu.sh"
    wrong = subprocess.run([str(script), "kernel"], capture_output=True, text=True, check=False)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "no part 'kernel'" in wrong.stderr
    told = subprocess.run([str(script), "--help"], capture_output=True, text=True, check=True).stdout
    named = re.search(r'^ALL="(.*)"$', script.read_text("utf-8"), re.MULTILINE)
    assert named is not None
    assert all(part in told for part in named[1].split())
    assert not (ROOT / "runs" / "gpu").exists()


def test_rows_are_added_to_a_file_of_lines(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"before": 1}\n')
    command = "bench kernels --shapes 16x16 --tokens 8 --sparsities 0.5 --units 1x1 --rounds 1 --backends reference"
    assert main([*command.split(), "--json", str(file)]) == 0
    before, *rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    assert before == {"before": 1}
    assert [row["pass"] for row in rows] == ["forward", "forward+backward"]


class _Operators:
    """What `BlockProduct` asks of blksprs, with dense arithmetic: blocks of a layout, row by row."""

    @staticmethod
    def to_sparse_row_striped(x: Tensor, layout: Tensor, side: int, layout_cache: dict[str, Any]) -> Tensor:
        assert layout.shape == (1, x.shape[1] // side, x.shape[2] // side)
        return x

    to_dense_row_striped = to_sparse_row_striped

    @staticmethod
    def matmul(
        x: Tensor,
        whole_x: Tensor,
        y: Tensor,
        layout: Tensor,
        whole: Tensor,
        side: int,
        layout_cache: dict[str, Any],
    ) -> Tensor:
        blocks = y.new_zeros(*layout.shape[1:], side, side).index_put(layout[0].nonzero(as_tuple=True), y)
        return x @ blocks.permute(0, 2, 1, 3).flatten(0, 1).flatten(1)


def test_blksprs_is_given_the_layer_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    utils = SimpleNamespace(disable_validation=lambda: None)
    monkeypatch.setitem(sys.modules, "blksprs", SimpleNamespace(ops=_Operators, utils=utils))
    rng = generator(3, "blksprs")
    topology = Topology.random((64, 96), 11, rng, (16, 16))
    values, bias = torch.randn(topology.values_shape, generator=rng), torch.randn(64, generator=rng)
    theirs, ours = RIVALS["blksprs"].layer(topology, values, bias), SparseLinear(topology, values.clone(), bias.clone())
    x, dy = torch.randn(48, 96, generator=rng), torch.randn(48, 64, generator=rng)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [layer(each) for layer, each in zip((theirs, ours), inputs, strict=True)]
    torch.testing.assert_close(*outputs)
    for y in outputs:
        y.backward(dy)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    gradient = dict(theirs.named_parameters())["weight"].grad
    assert gradient is not None
    torch.testing.assert_close(gradient.transpose(1, 2), ours.values.grad)
    with pytest.raises(NotImplementedError, match="whole blocks"):
        theirs(x[:-1])
    for unit in ((8, 8), (16, 32), (48, 48)):
        assert RIVALS["blksprs"].refusal(unit, torch.bfloat16, torch.device("cuda")) is not None
    assert RIVALS["blksprs"].refusal((64, 64), torch.bfloat16, torch.device("cuda")) is None
