"""The essential-sparsity curve of runs and of directories."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsae.cli import main
from sparsae.errors import InputError
from sparsae.evaluate import perplexity
from sparsae.evaluate.essential import Essential, Pruned, bend, essential_sparsity
from sparsae.evaluate.export import export_run
from sparsae.evaluate.loading import load_run
from sparsae.evaluate.perplexity import evaluate_run
from sparsae.nn.linear import sparse_layers
from sparsae.report.essential import body, essential_curve, remark, verdict
from sparsae.report.readable import percent
from sparsae.train.pretrained import best_of_trainer
from sparsae.train.run import start
from tests.support.runs import config_of, contents, write_text


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("essential")
    for method in ("dense", "static"):
        start(config_of(write_text(folder / "text"), folder / "cache", method=method), folder / method, quiet=True)
    return folder


def test_every_loss_is_that_of_the_pruned_model(runs: Path) -> None:
    """Of a dense run, pruned here from the beginning at each sparsity, where the curve prunes one model further."""
    found = essential_sparsity(runs / "dense", sparsities=[0.9, 0.5])
    assert (found.own_sparsity, found.layers) == (0.0, 4)
    assert found.unpruned_loss == pytest.approx(evaluate_run(runs / "dense")["loss"], abs=1e-9)
    assert [(row.allocation, round(row.sparsity, 2)) for row in found.rows] == [
        ("uniform", 0.5), ("uniform", 0.9), ("global", 0.5), ("global", 0.9),
    ]  # fmt: skip
    for row in found.rows:
        loaded = load_run(runs / "dense")
        weights = [
            p
            for name, p in loaded.model.named_parameters()
            if name.endswith(("attn.weight", "proj.weight", "fc.weight"))
        ]
        assert len(weights) == 4
        every = torch.cat([weight.abs().flatten() for weight in weights])
        for weight in weights:
            ranked = weight.abs().flatten() if row.allocation == "uniform" else every
            weight *= weight.abs() > ranked.sort().values[round(row.sparsity * len(ranked)) - 1]
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(perplexity, "load_run", lambda *_, loaded=loaded: loaded)
            assert row.loss == pytest.approx(evaluate_run(runs / "dense")["loss"], abs=1e-5)


def test_what_a_sparse_run_has_not_counts_as_zero(runs: Path) -> None:
    before = contents(runs / "static")
    found = essential_sparsity(runs / "static", sparsities=[0.5, 0.95])
    layers = sparse_layers(load_run(runs / "static").model).values()
    nnz = sum(layer.topology.nnz for layer in layers)
    positions = sum(layer.in_features * layer.out_features for layer in layers)
    assert found.own_sparsity == 1 - nnz / positions
    assert [round(row.sparsity, 3) for row in found.rows] == [0.95, 0.95]
    assert found.left_out == (0.5,)
    assert remark(found) == f"Left out: 50 %, since {percent(found.own_sparsity, 4)} are zero before any pruning."
    assert str(remark(found)) in body(found)
    assert contents(runs / "static") == before
    default = essential_sparsity(runs / "static", max_tokens=40)
    assert default.tokens == 40
    assert default.rows[0].sparsity == pytest.approx(1 - 0.9 * (1 - found.own_sparsity), abs=1e-3)
    with pytest.raises(InputError, match=r"before any pruning: give a higher one, not 0\.5"):
        essential_sparsity(runs / "static", sparsities=[0.5])


@pytest.mark.parametrize(("method", "form"), [("dense", "dense"), ("static", "dense"), ("static", "sparse")])
def test_a_directory_gives_the_curve_of_its_run(runs: Path, tmp_path: Path, method: str, form: str) -> None:
    export_run(runs / method, tmp_path / "hf", form=form)
    text = str(runs / "text" / "0.txt")
    ours, theirs = (essential_sparsity(path, text, [0.95]) for path in (runs / method, tmp_path / "hf"))
    assert ours.own_sparsity == pytest.approx(theirs.own_sparsity, abs=1e-9)
    for one, other in zip(ours.rows, theirs.rows, strict=True):
        assert (one.allocation, one.sparsity) == (other.allocation, other.sparsity)
        assert one.loss == pytest.approx(other.loss, abs=1e-4)
    with pytest.raises(InputError, match="--data"):
        essential_sparsity(tmp_path / "hf")
    with pytest.raises(InputError, match="no Trainer says which"):
        essential_sparsity(tmp_path / "hf", text, best=True)
    with pytest.raises(InputError, match="--teacher"):
        essential_sparsity(tmp_path / "hf", text, teacher=True)


def test_the_best_checkpoint_of_a_trainers_directory(runs: Path, tmp_path: Path) -> None:
    """As transformers' Trainer leaves it, moved elsewhere; from the directory and from any checkpoint in it."""
    text = str(runs / "text" / "0.txt")
    for step, method in ((3, "static"), (6, "dense")):
        export_run(runs / method, tmp_path / f"checkpoint-{step}")
        state = {"global_step": step, "best_model_checkpoint": "/where/it/was/checkpoint-3" if step == 6 else None}
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
    wanted = essential_sparsity(runs / "static", text, [0.95], max_tokens=200).unpruned_loss
    for path in (tmp_path, tmp_path / "checkpoint-6"):
        found = essential_sparsity(path, text, [0.95], best=True, max_tokens=200)
        assert found.model == str(tmp_path / "checkpoint-3")
        assert found.unpruned_loss == pytest.approx(wanted, abs=1e-4)
    with pytest.raises(InputError, match="knows no best checkpoint"):
        essential_sparsity(tmp_path / "checkpoint-3", text, best=True)
    shutil.rmtree(tmp_path / "checkpoint-3")
    with pytest.raises(InputError, match="checkpoint-3' is gone"):
        essential_sparsity(tmp_path, text, best=True)


@pytest.mark.parametrize(
    ("state", "told"),
    [
        ({"best_model_checkpoint": 7}, "damaged"),
        ({"global_step": None, "best_model_checkpoint": "checkpoint-3"}, "damaged"),
        ({"global_step": 1e400, "best_model_checkpoint": "checkpoint-3"}, "damaged"),
        ({"global_step": 3, "best_model_checkpoint": ""}, "'' is gone"),
        ({"global_step": 3, "best_model_checkpoint": "/there/.."}, r"'\.\.' is gone"),
    ],
)
def test_a_trainers_state_that_names_no_checkpoint(state: dict[str, Any], told: str, tmp_path: Path) -> None:
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    with pytest.raises(InputError, match=told):
        best_of_trainer(tmp_path)


def test_the_best_checkpoint_from_inside_of_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (5, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    state = {"global_step": 10, "best_model_checkpoint": "C:\\runs\\checkpoint-5"}
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text(json.dumps(state))
    monkeypatch.chdir(tmp_path / "checkpoint-10")
    assert best_of_trainer(Path()) == tmp_path / "checkpoint-5"


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([2.0, 2.01, 2.1], 0.2),
        ([2.1, 2.0, 2.0], 0.0),
        ([1.9, 1.9, 1.9], 0.3),
        ([2.0, float("nan"), 2.0], 0.1),
    ],
)
def test_the_bend_is_where_the_first_loss_is_too_high(losses: list[float], expected: float) -> None:
    rows = [Pruned("global", share, loss, 1.0) for share, loss in zip((0.1, 0.2, 0.3), losses, strict=True)]
    assert bend(rows, 0.0, 2.0, 0.01) == expected


def test_the_command_writes_table_json_and_page(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "curve"
    asked = ["check", "sparsity", str(runs / "dense"), "--sparsities", "0.2,0.6,0.99", "--out", str(out)]
    assert main(asked) == 0
    said = capsys.readouterr().out
    assert "against unpruned" in said
    assert "Essential sparsity: " in said
    written = json.loads((out / "sparsity.json").read_text())
    assert len(written["rows"]) == 6
    assert set(written["essential"]) == {"uniform", "global"}
    page = (out / "report.html").read_text()
    assert page.count("<svg") >= 1
    assert main(asked) == 2  # the directory is there
    assert main([*asked[:3], "--sparsities", "1.5"]) == 2
    assert main([*asked[:3], "--json", "-"]) == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 20


def test_a_curve_that_never_bends_says_at_least() -> None:
    rows = [Pruned("global", s, loss, 1.0) for s, loss in ((0.5, 2.0), (0.9, 2.01), (0.95, 4.0))]
    known = Essential("run", "text", 9, 4, 0.0, 2.0, 0.01, {"global": 0.9}, tuple(rows))
    assert verdict(known).startswith("Essential sparsity: 90 % (global), the largest")
    flat = Essential("run", "text", 9, 4, 0.0, 2.0, 0.01, {"global": 0.9}, tuple(rows[:2]))
    assert verdict(flat).startswith("Essential sparsity: at least 90 % (global): at no measured")


def test_where_the_curve_bends_has_a_figure_of_its_own() -> None:
    rows = [Pruned("global", s, loss, 1.0) for s, loss in ((0.5, 2.0), (0.7, 2.1), (0.9, 4.0), (0.95, 9.0))]
    found = Essential("run", "text", 9, 4, 0.0, 2.0, 0.01, {"global": 0.5}, tuple(rows))
    whole, near = essential_curve(found), essential_curve(found, near=True)
    assert whole is not None
    assert "9 at 95 %" in whole.description
    assert near is not None
    assert "4 at 90 %" in near.description
    assert "95 %" not in near.description
    assert essential_curve(Essential("run", "text", 9, 4, 0.0, 2.0, 0.01, {}, tuple(rows[:2])), near=True) is None
