"""The tables and the numbers of the performance page and of the README, held against the rows they tell of."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsae.bench.kernels import BOTH, means
from sparsae.core.randomness import generator
from sparsae.kernels.cpu import native
from sparsae.nn.linear import sparse_layers

ROOT = Path(__file__).parents[2]


def test_the_tables_of_the_performance_page_are_those_of_its_files() -> None:
    script = runpy.run_path(str(ROOT / "benchmarks" / "performance.py"))
    page = (ROOT / "docs" / "performance.md").read_text("utf-8")
    assert script["filled"](page, ROOT / "docs" / "results" / "performance") == page


def rows_of(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((ROOT / f"docs/results/performance/{name}.json").read_text("utf-8"))
    return found


def test_the_readme_tells_of_the_steps_of_the_performance_pages_files() -> None:
    rows = [(name, row) for name in ("step", "step-threads", "step-xeon") for row in rows_of(name)]
    steps = {(name, row["sparsity"], row["threads"]): row for name, row in rows if row["what"] == "step"}

    def ratios(name: str, sparsity: float, *keys: str, threads: int = 1) -> list[str]:
        return [f"{steps[name, sparsity, threads][key]:.1f}" for key in keys]

    text = (ROOT / "README.md").read_text("utf-8")
    claims = " ".join(text[text.index("A whole training step of a 25M GPT") :].split())
    both = ("ratio", "stock_ratio")
    here, beside = ratios("step", 0.9, *both)
    assert f"on one Zen 4 core, handles {here} times" in claims
    assert f"and {beside} times those of transformers" in claims
    assert "; {} and {} times at 95 %".format(*ratios("step", 0.95, *both)) in claims
    xeon = [*ratios("step-xeon", 0.9, *both), *ratios("step-xeon", 0.95, *both)]
    assert "it is {} and {} times at 90 %, {} and {} at 95 %".format(*xeon) in claims
    files = ("step-threads", "step-xeon")
    two = [ratios(name, sparsity, "ratio", threads=2)[0] for sparsity in (0.9, 0.95) for name in files]
    assert "with two cores {} times dense (Zen 4) and {} (Xeon) at 90 %, {} and {} at 95 %".format(*two) in claims
    decoded = [row["ratio"] for _, row in rows if row["what"] == "decode"]
    assert f"decoded {min(decoded):.1f} to {max(decoded):.0f} times as fast" in claims
    updates = [row["steps"] for _, row in rows if row["what"] == "update"]
    assert f"takes as long as {min(updates):.1f} to {max(updates):.1f} of a step" in claims


def test_the_readme_and_the_page_tell_of_layers_as_they_were_measured() -> None:
    found = means(rows_of("kernels"))
    at_90 = {
        row["backend"]: row["ratio"]
        for row in found
        if (row["pass"], row["unit"], row["sparsity"]) == (BOTH, "1x1", 0.9)
    }
    ours, lab, prop = (at_90[name] for name in ("cpu", "sparselab", "sparseprop"))
    text = " ".join((ROOT / "README.md").read_text("utf-8").split())
    assert f"a layer is {ours:.1f} times as fast as a dense one" in text
    assert f"where SparseLab is at {lab:.1f} and sparseprop at {prop:.1f}" in text
    page = " ".join((ROOT / "docs" / "performance.md").read_text("utf-8").split())
    assert f"At 90 % that is {ours / lab:.1f} times SparseLab's speed and {ours / prop:.1f} times sparseprop's" in page
    assert f"where they are {ours:.1f} times here" in page
    each = {
        (row["update"], row["sparsity"]): row["seconds"] / row["nnz"] * 1e9
        for row in rows_of("topology")
        if row["width"] == 16384
    }
    gse = sorted(each["gse", sparsity] for sparsity in (0.9, 0.99, 0.999))
    assert f"GSE takes {gse[0]:.0f} to {gse[-1]:.0f} ns for each active weight from 90 to 99.9 %" in page
    assert f"RigL takes {each['rigl', 0.999] / each['rigl', 0.9]:.0f} times as long at the end" in page
    pairs = zip(rows_of("attention"), rows_of("attention-avx2"), strict=True)
    assert max(abs(1 - b["torch_cpu_ratio"] / a["torch_cpu_ratio"]) for a, b in pairs) < 0.12
    at_512 = [row["torch_cpu_ratio"] for row in rows_of("attention") if row["tokens"] == 512]
    assert min(at_512) > 1.95


def test_what_keeping_the_hidden_layer_gains_is_told_as_it_was_measured() -> None:
    page = (ROOT / "docs" / "performance.md").read_text("utf-8")
    kept, nothing, xeon = (
        [row for row in rows_of(name) if row["what"] == "step"] for name in ("step-kept", "step", "step-xeon-kept")
    )
    ratios = " and ".join(f"{row['ratio']:.2f}" for row in kept)
    assert f"the steps at 90 and 95 % are {ratios} times as fast as dense ones" in page
    pairs = list(zip(kept, nothing, strict=True))
    more = " and ".join(f"{(a['peak_bytes'] - b['peak_bytes']) / 1e6:.0f}" for a, b in pairs)
    assert f"{more} MB more at the peak" in page
    gains = sorted(a["ratio"] / b["ratio"] - 1 for a, b in pairs)
    assert f"gains [{100 * gains[0]:.0f} to {100 * gains[1]:.0f} % on dense steps]" in page
    told = " and ".join(f"{row['ratio']:.2f}" for row in xeon)
    assert f"[{told}](results/performance/step-xeon-kept.json)" in page


@pytest.mark.skipif(native.absence() is not None, reason="the native kernels were not compiled")
@pytest.mark.parametrize(("gated", "hidden"), [(False, 2048), (True, 1376)])
def test_gradients_of_a_rounded_hidden_layer_are_as_far_off_as_the_page_says(gated: bool, hidden: int) -> None:
    off = runpy.run_path(str(ROOT / "benchmarks" / "performance.py"))["OFF"][gated]
    mlp = runpy.run_path(str(ROOT / "benchmarks" / "mlp.py"))["mlp_of"](gated, 512, hidden, 0.1, (1, 1))
    x, dy = (torch.randn(256, 512, generator=generator(0, name)) for name in ("x", "dy"))
    found = []
    for mlp.keeps in ("bfloat16", "nothing"):
        at = x.clone().requires_grad_()
        values = [layer.values for layer in sparse_layers(mlp).values()]
        found.append(torch.autograd.grad(mlp(at), [at, *values], dy))
    *into, down = (float((rounded - exact).norm() / exact.norm()) for rounded, exact in zip(*found, strict=True))
    assert (max(into), down) == pytest.approx(off, rel=0.15)
