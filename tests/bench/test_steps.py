"""The benchmark of steps on tiny models: sparse beside dense, by parts, decoded by other programs, and in bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sparsae.bench import parts, state, step
from sparsae.bench.memory import held
from sparsae.bench.runtimes import Decoding
from sparsae.bench.stock import Stock
from sparsae.cli import main
from sparsae.config import Config
from sparsae.config.load import resolve
from sparsae.errors import InputError
from sparsae.evaluate.decoding import open_decoder
from sparsae.train.model import model_of
from tests.support.bench import MODEL_OPTIONS, run

SETTINGS = [option for option in MODEL_OPTIONS if option != "--set"]


def test_steps_dense_beside_sparse(tmp_path: Path) -> None:
    command = "bench step --preset demo --sparsity 0.75 --steps 1 --decode 3 --no-memory --backends reference"
    rows = run([*command.split(), *MODEL_OPTIONS], tmp_path)
    whats = ["step", *["part"] * len(parts.NAMES), "decode", "update"]
    assert [(row["what"], row["sparsity"]) for row in rows] == [(what, 0.75) for what in whats]
    for row in rows:
        assert row["nnz"] == round((1 - row["sparsity"]) * 12 * 32**2)
        assert row["dense_parameters"] - row["parameters"] == 12 * 32**2 - row["nnz"]
        if row["what"] == "update":
            assert row["steps"] == pytest.approx(row["seconds"] / row["step_seconds"])
        elif row["what"] == "part":
            working = row["part"] in ("attention", "layers", "head", "optimizer")
            assert (row["seconds"] > 0 and row["dense_seconds"] > 0) or not working
        else:
            assert row["tokens"] == (32 if row["what"] == "step" else 1)
            assert row["ratio"] == pytest.approx(row["dense_seconds"] / row["seconds"])
            assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"])
        if row["what"] == "step":
            # By the count of operations; dense layers have more of them.
            sparse_flops, dense_flops = (row[f"{d}flops_per_second"] * row[f"{d}seconds"] for d in ("", "dense_"))
            assert dense_flops - sparse_flops == pytest.approx(6 * 32 * (12 * 32**2 - row["nnz"]))
            assert row["stock_ratio"] == pytest.approx(row["stock_seconds"] / row["seconds"])


def test_the_stock_model_is_the_dense_one_in_the_hands_of_transformers_and_torch() -> None:
    overrides = ["model.layers=2", "model.width=32", "model.heads=2", "model.context=8", "training.accumulation=2"]
    config = resolve(None, "demo", "dense", [*overrides, "training.learning_rate=0.01", "training.batch_size=3"])
    stock, ours = Stock(config), step.trainer(config)
    assert sum(p.numel() for p in stock.model.parameters()) == sum(p.numel() for p in ours.model.parameters())
    assert stock.model.config._attn_implementation == "sdpa"
    ours.model.load_state_dict(stock.model.state_dict())
    losses = []
    for number in range(3):
        expected = sum(float(ours.objective.loss(batch, 0.0, 0).total.detach()) for batch in stock.tokens_ABT) / 2
        losses.append(stock.step(counts=number > 0))
        assert losses[-1] == pytest.approx(expected, rel=1e-5)
        ours.model.load_state_dict(stock.model.state_dict())
    assert losses[2] < losses[0]
    assert len(stock.seconds) == 2


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_another_runtime_decodes_the_same_dense_model(family: str) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    overrides = [f"model.family={family}", "model.layers=2", "model.width=32", "model.heads=2", "model.context=8"]
    config = resolve(None, "demo", "dense", overrides)
    model = model_of(config, 50, 0, torch.device("cpu")).eval().requires_grad_(False)
    others, ours = Decoding(model, "onnxruntime", context=8, threads=1).logits(), open_decoder(model, 8)
    token = 0
    for position in range(4):
        logits = next(others)
        expected = ours.step(token) if position else ours.read([token])
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-5)
        token = int(logits.argmax())


def test_runtimes_that_are_none_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for options, said in (
        (["--decode", "2", "--runtimes", "fast"], "fast is none of"),
        (["--runtimes", "x"], "--decode"),
    ):
        assert main(["bench", "step", *options]) == 2
        assert said in capsys.readouterr().err


def test_the_parts_of_a_step_are_all_of_it_and_what_is_inside_counts_once() -> None:
    layer, searched = torch.nn.Linear(64, 64), iter([0.0, 0.25])
    x = torch.ones(4, 200, 8, 16).transpose(1, 2).requires_grad_()

    def step() -> None:
        torch.nn.functional.scaled_dot_product_attention(x, x, x).sum().backward()
        for _ in range(20):
            layer(torch.ones(512, 64)).sum().backward()

    found = parts.seconds_by_part(step, lambda: next(searched))
    assert tuple(found) == parts.NAMES
    assert found["attention"] > 0
    assert found["layers"] > 0
    assert found["head"] == found["optimizer"] == 0
    assert found["search"] == 0.25


@pytest.mark.slow
def test_peak_memory_of_a_step_is_that_of_a_process_of_its_own(tmp_path: Path) -> None:
    command = "bench step --preset demo --method static --sparsity 0.99 --steps 1"
    wide = [*MODEL_OPTIONS, "--set", "model.width=512"]
    row, *others = run([*command.split(), *wide], tmp_path)
    assert row["what"] == "step"
    assert {other["what"] for other in others} == {"part"}
    # Weight, gradient and two moments of the weights that do not exist: 16 bytes each, at least half of it in the peak.
    missing = row["dense_parameters"] - row["parameters"]
    assert row["dense_peak_bytes"] - row["peak_bytes"] > 8 * missing
    assert row["peak_bytes"] > row["base_bytes"] > 0


def test_what_training_holds_is_said_by_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "in_a_process", held)
    file = tmp_path / "rows.json"
    command = ["bench", "memory", "--preset", "demo", "--threads", "1", "--json", str(file), *MODEL_OPTIONS]
    assert main(command) == 0
    for row in json.loads(file.read_text("utf-8")):  # of a method that has no teacher
        assert row["teacher_bytes"] == 0
    assert main([*command, "--set", "teacher.enabled=true"]) == 0
    dense, sparse = json.loads(file.read_text("utf-8"))
    assert (dense["model"], sparse["model"], sparse["sparsity"]) == ("dense", "sparse", 0.9)
    for row in (dense, sparse):
        assert row["parameters_bytes"] == row["teacher_bytes"] == 4 * row["weights"]
        assert row["state_bytes"] == sum(
            row[f"{part}_bytes"] for part in ("parameters", "indices", "optimizer", "teacher")
        )
        assert row["peak_bytes"] >= row["base_bytes"] > 0  # in this process, which may hold more already
    # Two moments of each weight, and a count of steps: of each where weights are dropped and grown.
    assert 0 <= dense["optimizer_bytes"] - 8 * dense["weights"] < 1000
    nnz = sparse["weights"] - (dense["weights"] - 12 * 32**2)
    assert dense["indices_bytes"] == 0 < 4 * nnz <= sparse["indices_bytes"]
    assert sparse["state_ratio"] == pytest.approx(sparse["state_bytes"] / dense["state_bytes"])


def test_a_teacher_teaches_in_the_steps_that_are_timed() -> None:
    settings = [*SETTINGS, "teacher.enabled=true", "teacher.alpha=0.5"]
    (config,) = step.Steps("demo", "sparsae", settings, [0.9], ["auto"], 2, 0, 1, False, teacher=True).configs()
    loop = step.trainer(config)
    for _ in range(2):
        loop.train_step()
    assert loop.account.flops.parts["teacher"] > 0


def test_the_dense_twin_has_nothing_of_what_is_sparse() -> None:
    more = ["sparsity.schedule.kind=bump", "rules={'*mlp*': {rule: set}}", "sparsity.budget=uniform"]
    twin = step.dense_twin(resolve(None, "demo", "static", [*SETTINGS, *more]))
    assert Config.model_validate_json(twin.model_dump_json()) == twin  # which another process reads
    step.trainer(twin).train_step()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--method", "gmp"], "method gmp begins with sparsity 0, not 0.9, and what is measured are first steps"),
        (["--set", "sparsity.schedule.kind=bump"], "begins with sparsity 0.8, not 0.9"),
    ],
)
@pytest.mark.parametrize("kind", ["step", "memory"])
def test_first_steps_of_another_sparsity_are_not_measured(
    kind: str, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", kind, "--preset", "demo", *options, *MODEL_OPTIONS]) == 2
    assert said in capsys.readouterr().err


def test_other_programs_decode_no_further_than_the_context() -> None:
    pytest.importorskip("onnxruntime")
    given = ("demo", "static", SETTINGS, [0.9], ["auto"], 1)  # whose context is 16
    step.Steps(*given, 15, 1, False, runtimes=["onnxruntime"])
    with pytest.raises(InputError, match=r"--decode: 16 tokens and the first do not fit model\.context 16"):
        step.Steps(*given, 16, 1, False, runtimes=["onnxruntime"])
