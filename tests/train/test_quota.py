"""A run whose unit is 2:4, from its settings to its page: stopped and resumed, saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sparsae import InputError, sparse_layers
from sparsae.cli import main
from sparsae.config.load import resolve
from sparsae.evaluate.export import export_run
from sparsae.evaluate.loading import load_run
from sparsae.report.page import write_report
from sparsae.runs.directory import describe
from sparsae.train.forecast import count_flops, untrained
from sparsae.train.run import resume, start
from tests.rules.test_quota import require_kept
from tests.support.runs import config_of, rows, stopped_at, weights, write_text

TWO_OF_FOUR = ("sparsity.unit=2:4", "training.checkpoint_every=3", "topology.every=3")


@pytest.mark.parametrize(
    ("method", "overrides"),
    [
        ("sparsae", ("teacher.enabled=true", "teacher.warmup_fraction=0.1", "teacher.storage=union")),
        ("sparsae-written", ()),
    ],
)
def test_a_stopped_run_ends_as_one_that_was_not(method: str, overrides: tuple[str, ...], tmp_path: Path) -> None:
    config = config_of(write_text(tmp_path / "text"), tmp_path / "cache", *TWO_OF_FOUR, *overrides, method=method)
    start(config, tmp_path / "whole", quiet=True)
    with stopped_at(7):
        start(config, tmp_path / "parts", quiet=True)
    resume(tmp_path / "parts", quiet=True)
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    updates = [row for row in rows(tmp_path / "whole") if row["kind"] == "topology" and row["step"] > 0]
    assert sum(row["swaps"] for row in updates) > 0 or method == "sparsae-written"
    model = load_run(tmp_path / "whole").model
    require_kept(model)
    known = describe(tmp_path / "whole")
    assert (known["unit"], known["sparsity"], known["nnz"] == known["nnz_target"]) == ("2:4", 0.5, True)
    if method == "sparsae":
        assert "2:4 sparse" in write_report(tmp_path / "whole").read_text()
        taught = sparse_layers(load_run(tmp_path / "whole", teacher=True).model)
        assert sum(layer.topology.nnz for layer in taught.values()) > known["nnz"]
        require_exports_come_back(tmp_path, model)


def require_exports_come_back(folder: Path, model: Any) -> None:
    import transformers

    export_run(folder / "whole", folder / "sparse", form="sparse")
    export_run(folder / "whole", folder / "compact", form="compact", precision="float32")
    assert "2:4" in (folder / "sparse" / "README.md").read_text()
    for again in (
        transformers.AutoModelForCausalLM.from_pretrained(folder / "sparse"),
        load_run(folder / "compact").model,
    ):
        require_kept(again)
        for name, layer in sparse_layers(model).items():
            assert torch.equal(layer.indices, sparse_layers(again)[name].indices)
            assert torch.equal(layer.values, sparse_layers(again)[name].values)


@pytest.mark.parametrize(
    ("method", "settings", "lines"),
    [
        ("set", ["sparsity.unit=2:5"], ["sparsity.unit 2:5 does not divide", "sparsity.exclude"]),
        ("set", ["sparsity.unit=4:4"], ["sparsity.unit", "N < M"]),
        ("set", ["sparsity.unit=2:4", "sparsity.sparsity=0.9"], ["sparsity.sparsity", "2:4 has sparsity 0.5, not 0.9"]),
        ("set", ["sparsity.unit=2:4", "sparsity.budget=er"], ["sparsity.budget", "leave budget out"]),
        ("set", ["sparsity.unit=2:4", "sparsity.fan_in=[1, 1]"], ["sparsity.fan_in", "leave fan_in out"]),
        ("set", ["sparsity.unit=2:4", "sparsity.density={mlp: 0.5}"], ["sparsity.density", "leave density out"]),
        ("set", ["sparsity.unit=2:4", "sparsity.schedule.kind=bump"], ["sparsity.schedule.kind", "2:4"]),
        ("set", ["sparsity.unit=2:4", "sparsity.min_density=0.1"], ["sparsity.min_density", "2:4"]),
        ("granet", ["sparsity.unit=2:4"], ["rule granet prunes", "2:4"]),
        ("supar", ["sparsity.unit=2:4", "topology.proposer=shift"], ["topology.proposer shift", "2:4"]),
    ],
)
def test_what_does_not_fit_is_one_line(method: str, settings: list[str], lines: list[str], capsys: Any) -> None:
    given = [part for setting in settings for part in ("--set", setting)]
    given += ["--set", "model.width=32", "--set", "model.layers=1"]
    command = ["train", "--method", "sparsae-guided" if method == "supar" else method, *given, "--dry-run"]
    assert main(command) == 2
    told = capsys.readouterr().err.strip()
    assert told.count("\n") == 0
    for line in lines:
        assert line in told


def test_settings_of_a_plan_reach_the_dense_method_too() -> None:
    assert resolve(method="dense", overrides=["sparsity.unit=2:4"]).sparsity.sparsity == 0
    narrow = resolve(method="dense-small", overrides=["sparsity.unit=2:4"])
    wide = resolve(method="set", overrides=["sparsity.unit=2:4"])
    assert narrow.model.width < wide.model.width
    assert wide.sparsity.sparsity == 0.5


def test_the_forecast_knows_the_density() -> None:
    small = ["sparsity.unit=1:4", "model.width=32", "model.layers=1", "training.steps=20"]
    config = resolve(method="set", overrides=small)
    model = untrained(config, 300)
    flops, _ = count_flops(config, model)
    assert all(layer.topology.density == 0.25 for layer in sparse_layers(model).values())
    assert flops.total < flops.dense_equivalent


def test_indices_that_do_not_keep_it_are_refused() -> None:
    from tests.rules.test_quota import built

    model = built("2:4")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["0.indices"] = built("2:8").state_dict()["0.indices"]
    state["0.values"] = state["0.values"][: state["0.indices"].numel()]
    with pytest.raises(InputError, match=r"groups of 4 have not 2"):
        model.load_state_dict(state)
