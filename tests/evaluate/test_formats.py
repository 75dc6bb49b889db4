"""What a run's model is written as: few bytes that read back, and a graph that computes the same."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsae.cli import main
from sparsae.config.load import resolve
from sparsae.data.tokenizer import load_tokenizer, train_tokenizer
from sparsae.errors import InputError
from sparsae.evaluate.export import export_run
from sparsae.evaluate.formats.compact import write_compact
from sparsae.evaluate.formats.positions import decode, encode
from sparsae.evaluate.generation import generate_text
from sparsae.evaluate.loading import LoadedRun, load_run
from sparsae.evaluate.perplexity import evaluate_run
from sparsae.files import write_sealed
from sparsae.nn.linear import sparse_layers
from sparsae.nn.tensors import model_tensors
from sparsae.runs.directory import RunDirectory
from sparsae.train.model import model_of
from sparsae.train.run import start
from tests.support.runs import config_of, write_text


@given(st.integers(1, 3000), st.floats(0.0, 1.0), st.integers(0, 100))
def test_positions_come_back_from_the_shorter_code(units: int, density: float, seed: int) -> None:
    positions = np.flatnonzero(np.random.default_rng(seed).random(units) < density)
    code, data = encode(positions, units)
    assert decode(code, data, units).tolist() == positions.tolist()
    assert len(data) <= min(-(-units // 8), len(positions) + units // 255)


@pytest.mark.parametrize(
    ("code", "data", "units"),
    [("bits", [255], 6), ("bits", [1, 1], 6), ("gaps", [0, 5], 6), ("gaps", [0, 255], 400), ("letters", [1], 6)],
)
def test_bytes_that_are_no_positions_are_refused(code: str, data: list[int], units: int) -> None:
    with pytest.raises(ValueError, match=r"last one|bit for each|no code"):
        decode(code, np.array(data, np.uint8), units)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("formats")
    config = config_of(
        write_text(folder / "text"), folder / "cache", "teacher.enabled=true", "teacher.storage=dense",
        "sparsity.unit=[2,2]", "teacher.start=0.2", method="sparsae",
    )  # fmt: skip
    start(config, folder / "run", quiet=True)
    return folder / "run"


@pytest.mark.parametrize("teacher", [False, True])
def test_in_float32_it_is_the_same_model_and_everything_reads_it(run: Path, tmp_path: Path, teacher: bool) -> None:
    export_run(run, tmp_path / "out", teacher, "compact", "float32")
    before, after = load_run(run, teacher), load_run(tmp_path / "out")
    ours, theirs = model_tensors(before.model), model_tensors(after.model)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert evaluate_run(tmp_path / "out")["loss"] == evaluate_run(run, teacher=teacher)["loss"]
    assert generate_text(tmp_path / "out", "item 3", 8) == generate_text(run, "item 3", 8, teacher=teacher)
    with pytest.raises(InputError, match="leave out --teacher"):
        load_run(tmp_path / "out", teacher=True)


def test_in_bfloat16_it_is_nearly_so(run: Path, tmp_path: Path) -> None:
    assert main(["export", str(run), "--to", str(tmp_path / "out"), "--format", "compact"]) == 0
    assert evaluate_run(tmp_path / "out")["loss"] == pytest.approx(evaluate_run(run)["loss"], rel=1e-3)


def test_linear_layers_at_90_percent_take_a_sixth_of_their_dense_bytes_and_load_at_once(tmp_path: Path) -> None:
    config = resolve(None, "tiny", "sparsae", ["data.tokenizer_vocab=300", "training.device=cpu"])
    tokenizer = train_tokenizer(["some text to learn from " * 50], 300)
    model = model_of(config, tokenizer.vocab_size, tokenizer.eos_id, torch.device("cpu"))
    loaded = LoadedRun(RunDirectory(tmp_path), config, model, tokenizer, torch.device("cpu"), 3, "corpus")
    write_compact(loaded, tmp_path, "bfloat16", teacher=False)
    layers = sparse_layers(model)
    dense = sum(2 * layer.out_features * layer.in_features for layer in layers.values())
    assert sum(layer.topology.nnz for layer in layers.values()) / (dense / 2) == pytest.approx(0.1, abs=1e-3)
    others = {name: t for name, t in model_tensors(model).items() if not name.endswith((".values", ".indices"))}
    beside = sum(t.numel() * (2 if t.dim() > 1 else 4) for t in others.values())
    assert ((tmp_path / "model.safetensors").stat().st_size - beside) / dense < 0.17
    took = []
    for _ in range(2):
        began = time.process_time()
        again = load_run(tmp_path)
        took.append(time.process_time() - began)
    assert min(took) < 1.0
    assert torch.equal(next(iter(layers.values())).indices, next(iter(sparse_layers(again.model).values())).indices)


def test_a_damaged_export_is_refused_in_a_line(run: Path, tmp_path: Path) -> None:
    export_run(run, tmp_path / "out", form="compact")
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert len(files) > 3
    for file in files:
        whole = file.read_bytes()
        for damaged in (whole[: len(whole) // 2], whole[:-1] + bytes([whole[-1] ^ 1]), None):
            if damaged is None and file.name == "compact.json":
                continue  # then it is no export at all
            file.unlink() if damaged is None else file.write_bytes(damaged)
            with pytest.raises(InputError) as refused:
                load_run(tmp_path / "out")
            assert "\n" not in str(refused.value)
            assert str(tmp_path / "out") in str(refused.value)
            file.write_bytes(whole)
    # One that its seals call whole, and that says what cannot be.
    path = tmp_path / "out" / "compact.json"
    content = json.loads(path.read_text())
    content.pop("sha256")
    for key, value in (("format", 9), ("layers", {}), ("config", {"seed": -1})):
        write_sealed(path, {**content, key: value})
        with pytest.raises(InputError, match=str(tmp_path)):
            load_run(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "gguf"], "--format: must be dense"),
        (["--precision", "float32"], "is for --format compact"),
        (["--format", "compact", "--precision", "int8"], "--precision: must be bfloat16 or float32"),
    ],
)
def test_forms_that_there_are_not(
    run: Path, tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(run), "--to", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_no_new_directory_and_what_is_an_export_already_are_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    export_run(run, tmp_path / "compact", form="compact")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for to in (".", "", str(tmp_path / "empty")):
        assert main(["export", str(run), "--to", to]) == 2
        assert "is no new directory; name one" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "compact"), "--to", "out"]) == 2
    assert "is an export already" in capsys.readouterr().err
    assert list((tmp_path / "empty").iterdir()) == []


@pytest.mark.slow
def test_another_runtime_computes_the_same_logits(run: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    export_run(run, tmp_path / "out", form="onnx")
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    loaded = load_run(run)
    for rows, tokens in ((1, 5), (3, 16)):
        ids = torch.randint(0, 300, (rows, tokens), generator=torch.Generator().manual_seed(0))
        (logits,) = session.run(["logits"], {"input_ids": ids.numpy()})
        expected = loaded.model(input_ids=ids, use_cache=False).logits
        assert torch.allclose(torch.from_numpy(logits), expected, atol=1e-4)
    assert load_tokenizer(tmp_path / "out").vocab_size == loaded.tokenizer.vocab_size
