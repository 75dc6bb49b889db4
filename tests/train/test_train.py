"""Whole runs on a small text: files, accounting, determinism, the other commands."""

from __future__ import annotations

import itertools
import json
import math
import os
import stat
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from sparsae.config import Config
from sparsae.config.load import resolve
from sparsae.core.record import encode
from sparsae.errors import InputError
from sparsae.evaluate.export import export_run
from sparsae.evaluate.generation import generate_text, write_sample
from sparsae.evaluate.loading import load_run
from sparsae.evaluate.perplexity import evaluate_run
from sparsae.files import read_json
from sparsae.nn.linear import sparse_layers
from sparsae.runs.directory import RunDirectory
from sparsae.train.forecast import forecast
from sparsae.train.objective import Objective
from sparsae.train.run import resume, start
from tests.support.runs import stopped_at
from tests.support.training import ISSUE_KEYS, metrics


def test_a_run_leaves_what_it_promises(small: Callable[..., Config], tmp_path: Path) -> None:
    config = small("topology.every=4", "training.steps=60")
    summary = start(config, tmp_path / "run", quiet=True)
    assert set(summary) >= ISSUE_KEYS
    run = RunDirectory(tmp_path / "run")
    written = run.read_summary()
    assert written is not None
    assert encode(written) == json.loads(json.dumps(summary))
    assert summary["finished"]
    assert summary["nnz"] == summary["nnz_target"]
    assert summary["validation_perplexity"] < summary["untrained_perplexity"]
    assert summary["topology_updates"] == summary["topology_updates_accepted"] == 13
    assert set(summary["train_flops_by_part"]) == {"student", "teacher", "search", "dense_gradients"}
    assert all(flops > 0 for flops in summary["train_flops_by_part"].values())
    assert sum(summary["train_flops_by_part"].values()) == summary["train_flops"]
    assert resolve(tmp_path / "run" / "config.yaml") == config
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(5, 61, 5))
    updates = [row for row in rows if row["kind"] == "topology"]
    assert updates[0]["step"] == 0
    last = updates[-1]
    assert last["nnz"] == summary["nnz"]
    assert 0 < last["hamming_last"] <= last["hamming_start"] <= 1
    assert summary["sparsity"] == pytest.approx(0.9, abs=1e-3)
    assert last["itop_rate"] > 1 - summary["sparsity"]
    assert len(last["layers"]) == 8
    attention = last["layers"]["transformer.h.0.attn.c_attn"]
    assert len(attention["head_densities"]) == 6
    assert attention["gradient_activity"] > 0
    assert all(candidate["score"] is not None for candidate in last["candidates"])


def test_model_state_at_90_percent_is_a_fifth_of_dense_training(small: Callable[..., Config], tmp_path: Path) -> None:
    for method in ("sparsae", "sparsae-written"):
        config = small("topology.every=4", "model.width=64", method=method)
        summary = start(config, tmp_path / method, quiet=True)
        ratio = summary["state_bytes_sparse_layers"] / summary["state_bytes_sparse_layers_dense_equivalent"]
        assert ratio <= 0.20
        assert set(summary["state_bytes_by_part"]) == {"values", "gradients", "optimizer", "indices", "teacher"}
        assert summary["state_bytes_by_part"]["values"] == 4 * summary["nnz"]
        assert summary["state_bytes_by_part"]["gradients"] == 4 * summary["nnz"]
        assert summary["state_bytes_by_part"]["optimizer"] == 12 * summary["nnz"]


@pytest.mark.parametrize(
    "method", ["sparsae", "sparsae-written", "static", "dense", "rigl", "gse", "gmp", "granet", "magnitude"]
)
def test_same_seed_same_metrics_and_resume_changes_nothing(
    small: Callable[..., Config], tmp_path: Path, method: str
) -> None:
    extra = [] if method in ("static", "dense", "magnitude") else ["topology.every=3"]
    config = small(*extra, method=method)
    whole = start(config, tmp_path / "whole", quiet=True)
    # A signal arrives in the middle of a step: the step ends, is saved, and the run continues from there; for some
    # methods after their last pruning.
    last = 17 if method in ("gmp", "magnitude") else 8

    with stopped_at(last):
        stopped = start(config, tmp_path / "stopped", quiet=True)
    assert not stopped["finished"]
    assert stopped["steps"] == last
    resumed = resume(tmp_path / "stopped", quiet=True)
    assert resumed["finished"]
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "stopped")
    assert resumed["validation_loss"] == whole["validation_loss"]
    assert resumed["train_flops_by_part"] == whole["train_flops_by_part"]
    model, again = (load_run(tmp_path / name).model for name in ("whole", "stopped"))
    for (name, one), two in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, two), name


def test_the_test_is_read_once_at_the_end_and_by_nothing_else(
    small: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row that the run validates, scores candidates or is tested on, as the objective sees them."""
    read: list[tuple[str, torch.Tensor]] = []
    for name in ("mean", "score"):

        def recorded(self: Objective, rows: torch.Tensor, *rest: object, name: str = name, old: Any = None) -> Any:
            read.append((name, rows))
            return old(self, rows, *rest)

        monkeypatch.setattr(Objective, name, partialmethod(recorded, old=getattr(Objective, name)))
    config = small("topology.every=4", "training.test_sequences=5", method="sparsae-guided")
    summary = start(config, tmp_path / "run", quiet=True)
    name, test = read.pop()
    assert (name, len(test)) == ("mean", 5)
    windows = {tuple(row.tolist()) for row in test}
    assert not windows & {tuple(row.tolist()) for name, rows in read if name == "mean" for row in rows}
    last = sum(1 for name, _ in read if name == "score")
    assert last > 0
    assert math.isfinite(summary["test_loss"])
    assert summary["test_loss"] != summary["validation_loss"]
    with stopped_at(6):
        assert start(config, tmp_path / "stopped", quiet=True)["test_loss"] is None
    assert resume(tmp_path / "stopped", quiet=True)["test_loss"] == summary["test_loss"]


def test_a_text_that_validation_reads_whole_has_no_test(
    small: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = start(small("training.validation_sequences=100000", "training.steps=2"), tmp_path / "run")
    assert summary["test_loss"] is None
    assert "none is left for a test: set training.validation_sequences lower" in capsys.readouterr().err


def test_another_seed_is_another_run(small: Callable[..., Config], tmp_path: Path) -> None:
    losses = [start(small(f"seed={seed}"), tmp_path / str(seed), quiet=True)["validation_loss"] for seed in (0, 1)]
    assert losses[0] != losses[1]


@pytest.mark.parametrize(
    "dropout", [["model.dropout=0.5"], ["model.family=llama", "model.transformers={attention_dropout: 0.5}"]]
)
def test_a_seed_fixes_what_dropout_drops(small: Callable[..., Config], tmp_path: Path, dropout: list[str]) -> None:
    losses = []
    for name in ("a", "b"):
        torch.manual_seed(len(losses))
        losses.append(start(small(*dropout), tmp_path / name, quiet=True)["validation_loss"])
    assert losses[0] == losses[1]
    whole = start(small(dropout[0].replace("dropout=0.5", "dropout=0")), tmp_path / "whole", quiet=True)
    assert whole["validation_loss"] != losses[0]


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.family=llama", "model.tie_embeddings=false", "sparsity.sparsify_head=true"],
        ["model.family=llama", "model.heads=4", "model.kv_heads=2", "sparsity.budget=uniform"],
        ["sparsity.unit=[4,4]", "training.precision=bfloat16"],
        ["sparsity.unit=[16,16]", "sparsity.sparsity=0.5", "training.accumulation=2"],
        ["teacher.storage=dense", "sparsity.head_min_density=0.05", "topology.proposer=uniform"],
        ["teacher.warmup=validation", "teacher.warmup_improvement=0.1", "model.dropout=0.1"],
        [
            "topology.micro_batch.mode=static",
            "topology.proxy.terms.activity.source=moments",
            "topology.proxy.standardize=true",
        ],
        [
            "topology.micro_batch.mode=pooled",
            "topology.proxy.terms.activity.source=training",
            "topology.proxy.anneal=cosine",
        ],
        ["topology.selection=elitist", "topology.adaptation.enabled=true", "topology.proposer=shift"],
        ["sparsity.budget=er", "sparsity.exclude=['*.mlp.*']", "training.clip=null", "sparsity.backend=reference"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_every_choice_trains(small: Callable[..., Config], tmp_path: Path, overrides: list[str]) -> None:
    config = small("topology.every=4", "training.steps=12", *overrides)
    summary = start(config, tmp_path / "run", quiet=True)
    assert summary["finished"]
    assert summary["nnz"] == summary["nnz_target"]
    assert math.isfinite(summary["validation_loss"])
    assert summary["topology_updates"] == 2


@pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning")
@pytest.mark.parametrize("proposer", ["guided", "uniform"])
def test_compiled_training_learns_the_same(small: Callable[..., Config], tmp_path: Path, proposer: str) -> None:
    losses = []
    for value in ("false", "true"):
        config = small(
            "training.steps=8",
            "topology.every=2",
            f"topology.proposer={proposer}",
            f"training.compile={value}",
            "model.layers=1",
        )
        losses.append(start(config, tmp_path / value, quiet=True)["validation_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_evaluate_generate_and_export_agree_with_the_run(
    small: Callable[..., Config], tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    umask = os.umask(0o022)
    os.umask(umask)
    start(small("training.steps=40"), run, quiet=True)
    held_out = evaluate_run(run)
    assert held_out["perplexity"] == pytest.approx(math.exp(held_out["loss"]))
    told: list[tuple[str, int, int | None]] = []
    again = evaluate_run(run, str(text / "3.txt"), progress=lambda *stage: told.append(stage))
    assert told[-1] == ("evaluate", again["tokens"], again["tokens"])
    assert told[0] == ("tokenize", 1, 1)
    short = evaluate_run(run, str(text / "3.txt"), max_tokens=100)
    assert short["tokens"] == 99
    assert again["bits_per_byte"] == pytest.approx(
        again["loss"] * again["tokens"] / math.log(2) / again["bytes"], rel=1e-2
    )
    assert again["documents"] == 1
    taught = evaluate_run(run, str(text / "3.txt"), teacher=True)
    assert taught["loss"] != again["loss"]
    assert generate_text(run, "item 3", 40, seed=1) == generate_text(run, "item 3", 40, seed=1)
    assert generate_text(run, "item 3", 8, temperature=0.0) != ""
    write_sample(run)
    sample = read_json(run / "sample.json")
    assert set(sample) >= {"prompt", "text", "teacher_text"}
    assert sample["prompt"]
    assert sample["text"]

    from transformers import AutoModelForCausalLM, AutoTokenizer

    export_run(run, tmp_path / "exported")
    loaded = load_run(run)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").eval()
    tokens = torch.tensor([AutoTokenizer.from_pretrained(tmp_path / "exported")("item 3 of list 4")["input_ids"]])
    assert tokens[0].tolist() == loaded.tokenizer.encode("item 3 of list 4")
    with torch.no_grad():
        torch.testing.assert_close(exported(tokens).logits, loaded.model(tokens).logits, rtol=1e-5, atol=1e-5)
    from safetensors.torch import load_file

    exported_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert exported_tokenizer.model_max_length == 32
    assert exported_tokenizer.pad_token_id == exported.config.pad_token_id == exported.generation_config.pad_token_id
    assert exported_tokenizer.pad_token_id is not None
    batch = exported_tokenizer(["item 3", "item 3 of list 4"], return_tensors="pt", padding=True)
    assert batch["attention_mask"].sum(1).unique().numel() == 2
    card = (tmp_path / "exported" / "README.md").read_text()
    last = [row for row in metrics(run) if row["kind"] == "validation"][-1]
    assert f"| validation loss, nats a token | {last['loss']:.4f} |" in card
    assert f"At step {last['step']}, on held-out text" in card
    assert f"{sum(p.numel() for p in exported.parameters()):,} weights" in card
    assert str(text) not in card
    export_run(run, tmp_path / "taught", teacher=True)
    taught_card = (tmp_path / "taught" / "README.md").read_text()
    assert f"| {last['teacher_loss']:.4f} |" in taught_card
    assert "teacher" in taught_card
    for file in (run / "summary.json", *run.rglob("*.safetensors"), *(tmp_path / "exported").iterdir()):
        assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~umask, file
    topology = load_file(tmp_path / "exported" / "topology.safetensors")
    layers = sparse_layers(loaded.model)
    assert {f"{name}.indices" for name in layers} == set(topology)
    assert all(torch.equal(topology[f"{name}.indices"], layer.indices) for name, layer in layers.items())
    with pytest.raises(InputError, match="is there already"):
        export_run(run, tmp_path / "exported")
    export_run(run, tmp_path / "sparse", form="sparse")
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    one, two = loaded.model.state_dict(), kept.state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert kept.config.pad_token_id == exported_tokenizer.pad_token_id
    card = (tmp_path / "sparse" / "README.md").read_text()
    assert "import sparsae" in card
    assert f"{sum(p.numel() for p in exported.parameters()):,} weights" in card
    assert not (tmp_path / "sparse" / "topology.safetensors").exists()

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("sparsae.evaluate.export.save_file", full)
    with pytest.raises(InputError, match=r"full: cannot be written: .*No space left"):
        export_run(run, tmp_path / "full")
    assert not list(tmp_path.glob("*full*"))


def test_held_out_text_inside_one_document_is_a_document(
    small: Callable[..., Config], tmp_path: Path, text: Path
) -> None:
    run, source = tmp_path / "run", tmp_path / "one.txt"
    source.write_text("\n\n".join((text / f"{i}.txt").read_text() for i in range(10)))
    start(small(f"data.source={source}", "training.steps=1", "data.validation_share=0.1"), run, quiet=True)
    held_out = evaluate_run(run)
    assert (held_out["documents"], held_out["tokens"] > 0) == (1, True)


def test_a_run_is_evaluated_with_its_own_threads(small: Callable[..., Config], tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        start(small("training.steps=1", "training.threads=1"), tmp_path / "run", quiet=True)
        torch.set_num_threads(2)
        evaluate_run(tmp_path / "run")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("sparsae-guided", []),
        ("rigl", ["topology.every=5"]),
        ("gse", ["topology.every=5"]),
        ("sparsae-rigl", []),
        ("rigl", ["topology.every=5", "topology.window=3"]),
        ("rigl", ["topology.every=5", "topology.window=100%", "topology.window_every=2", "topology.accumulate=sum"]),
        ("gse", ["topology.every=5", "topology.window=4", "topology.random_share=0.5"]),
        ("set", ["topology.every=6"]),
        (
            "sparsae",
            [
                "topology.random_share=0.5",
                "topology.window=9",
                "topology.window_every=4",
                "topology.every=6",
                "topology.ramp=0",
            ],
        ),
    ],
)
def test_plan_agrees_with_the_run(
    small: Callable[..., Config], tmp_path: Path, method: str, settings: list[str]
) -> None:
    config = small("training.accumulation=2", *settings, method=method)
    expected = forecast(config)
    summary = start(config, tmp_path / "run", quiet=True)
    assert sum(layer["nnz"] for layer in expected["layers"]) == summary["nnz"]
    assert expected["train_flops"] == summary["train_flops_by_part"]
    assert expected["train_flops_dense_equivalent"] == summary["train_flops_dense_equivalent"]
    # The estimate by formula is what the live tensors hold.
    assert expected["state_bytes"] == summary["state_bytes_by_part"]
    assert ("window" in expected["state_bytes"]) == any("window=" in setting for setting in settings)
    assert expected["expected_seconds"] > 0


@pytest.mark.parametrize("method", ["gmp", "granet", "magnitude"])
def test_a_run_that_prunes_costs_less_as_it_goes_and_ends_at_its_target(
    small: Callable[..., Config], tmp_path: Path, method: str
) -> None:
    every = [] if method == "magnitude" else ["topology.every=2"]
    config = small("sparsity.sparsity=0.95", "training.log_every=1", *every, method=method)
    expected = forecast(config)
    summary = start(config, tmp_path / "run", quiet=True)
    assert summary["nnz"] == summary["nnz_target"]
    assert summary["sparsity"] == pytest.approx(0.95, abs=1e-3)
    rows = [row for row in metrics(tmp_path / "run") if row["kind"] == "train"]
    assert rows[0]["density"] == (0.5 if method == "granet" else 1.0)
    assert rows[-1]["nnz"] == summary["nnz"]
    # The step before the first update, and the last one: neither takes a dense gradient.
    spent = [two["train_flops"] - one["train_flops"] for one, two in itertools.pairwise([{"train_flops": 0}, *rows])]
    # Three products a token with each weight that was dropped.
    assert spent[0] - spent[-1] == 6 * 4 * 32 * (rows[0]["nnz"] - rows[-1]["nnz"])
    student = summary["train_flops_by_part"]["student"]
    # To within the rounding of layers, and of which layers a global ranking prunes.
    assert student == pytest.approx(expected["train_flops"]["student"], rel=1e-3)
    assert summary["train_flops_dense_equivalent"] > student
    assert load_run(tmp_path / "run").model is not None
    assert evaluate_run(tmp_path / "run", max_tokens=64)["tokens"] == 63
