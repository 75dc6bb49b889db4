"""2:4 models as torch packs them: the packed weights are the run's, and refusals are one line. Nothing needs a GPU."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensorCUTLASS

from sparsae.cli import main
from sparsae.errors import InputError
from sparsae.evaluate.export import export_run
from sparsae.evaluate.formats import semi_structured as form
from sparsae.evaluate.formats.semi_structured import load_semi_structured, packed, unpacked, write_semi_structured
from sparsae.evaluate.loading import LoadedRun, load_run
from sparsae.files import read_sealed
from sparsae.nn.linear import sparse_layers
from sparsae.runs.directory import RunDirectory
from sparsae.train.run import start
from tests.support import loops
from tests.support.runs import config_of, contents, write_text

SIZES = ("model.width=64", "model.mlp_width=128", "training.steps=4", "topology.every=2")
FAMILIES = {"gpt2": ("sparsity.unit=2:4",), "llama": ("sparsity.unit=1:4", "model.family=llama", "model.kv_heads=1")}


@pytest.fixture(scope="module", params=FAMILIES)
def run(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    config = config_of(write_text(folder / "text"), folder / "cache", *SIZES, *FAMILIES[request.param], method="set")
    start(config, folder / "run", quiet=True)
    return folder / "run"


@settings(max_examples=25)
@given(
    st.integers(0, 2**32), st.integers(1, 3), st.integers(1, 3), st.sampled_from([torch.bfloat16, torch.float16]),
    st.floats(0, 1),
)  # fmt: skip
def test_packing_loses_nothing(seed: int, rows: int, columns: int, dtype: torch.dtype, zeros: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(32 * rows, 16 * columns, 4, generator=rng)
    weight[torch.rand(weight.shape, generator=rng).argsort(2) >= 2] = 0
    weight[torch.rand(weight.shape, generator=rng) < zeros] = 0
    weight_OI = weight.flatten(1).to(dtype)
    values, meta = packed(weight_OI)
    assert (values.shape, meta.shape) == ((32 * rows, 32 * columns), (32 * rows, 4 * columns))
    assert (values.dtype, meta.dtype) == (dtype, torch.int16)
    assert torch.equal(unpacked(values, meta), weight_OI)


def ids() -> Tensor:
    return torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_on_a_cpu_it_is_the_dense_model(run: Path, tmp_path: Path, precision: str) -> None:
    out = tmp_path / "packed"
    command = ["export", str(run), "--to", str(out), "--format", "semi-structured", "--precision", precision]
    assert main(command) == 0
    export_run(run, tmp_path / "dense")
    dtype = getattr(torch, precision)
    dense = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=dtype)
    again = load_semi_structured(out)
    assert not again.training
    theirs = dense.state_dict()
    assert {name: tensor.dtype for name, tensor in again.state_dict().items()} == dict.fromkeys(theirs, dtype)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in again.state_dict().items())
    assert torch.equal(again(ids()).logits, dense(ids()).logits)
    assert hf.AutoTokenizer.from_pretrained(out)("item 3")["input_ids"]
    # Half of the dense weights, and an eighth of that for their places.
    for name, layer in sparse_layers(load_run(run).model).items():
        values, meta = packed(layer.dense_weight().to(dtype))
        assert values.nbytes + meta.nbytes == pytest.approx(0.5625 * 2 * layer.in_features * layer.out_features), name
    with pytest.raises(OSError, match=r"model\.safetensors"):  # rather than one with random weights
        hf.AutoModelForCausalLM.from_pretrained(out)


def test_on_cuda_the_layers_have_torchs_own_tensors(run: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """What is done there, done here: all but the products, in whose place the packed weights are unpacked."""
    export_run(run, tmp_path / "out", form="semi-structured")
    expected = load_semi_structured(tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(form, "_on_cuda", lambda model, pairs, layers, device: (pairs, layers, device))
        pairs, layers, device = load_semi_structured(tmp_path / "out", "cuda")
    assert device == torch.device("cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype of torch's
        model = form._on_cuda(load_semi_structured(tmp_path / "out"), pairs, layers, torch.device("cpu"))
        for name, layer in sparse_layers(load_run(run).model).items():
            linear = model.get_submodule(name)
            assert type(linear) is nn.Linear
            assert type(linear.weight) is SparseSemiStructuredTensorCUTLASS
            assert (linear.weight.shape, linear.weight.dtype) == (layer.topology.shape, torch.bfloat16)
            assert not linear.weight.requires_grad

        def multiplied(
            self: Any, right: Tensor, *, bias: Tensor | None = None, should_transpose_dense: bool = False
        ) -> Tensor:
            product = unpacked(self.packed, self.meta) @ (right.t() if should_transpose_dense else right)
            product = product if bias is None else product + bias[:, None]
            return product.t() if should_transpose_dense else product

        monkeypatch.setattr(SparseSemiStructuredTensorCUTLASS, "_mm", multiplied)
        with torch.no_grad():
            assert torch.allclose(model(ids()).logits, expected(ids()).logits, atol=0.05)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("sparsity.sparsity=0.9",), "more than 2 weights in"),
        (("sparsity.unit=3:4",), "more than 2 weights in"),
        (("sparsity.unit=[4, 4]",), "has units of 4x4"),
        (("sparsity.unit=2:4", "model.width=32"), "multiples of 32 and 64"),
        (("sparsity.sparsity=0.9", "model.width=32"), "more than 2 weights in .*, and has .* multiples of 32 and 64"),
        (("sparsity.sparsity=0.9", "model.width=30", "model.heads=3"), "has 90 outputs and 30 inputs"),
        (("sparsity.sparsity=0.0",), "this one is dense"),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path: Path, overrides: tuple[str, ...], message: str) -> None:
    config = loops.config_of(*overrides)
    loaded = LoadedRun(RunDirectory(tmp_path), config, loops.built(config), None, torch.device("cpu"), 0, "")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=message) as refused:
        write_semi_structured(loaded, tmp_path, "bfloat16")
    assert "--format semi-structured" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_precisions_that_there_are_not(run: Path, tmp_path: Path, capsys: Any) -> None:
    command = ["export", str(run), "--to", str(tmp_path / "out"), "--format", "semi-structured"]
    assert main([*command, "--precision", "float32"]) == 2
    assert "--precision: must be bfloat16 or float16" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_damaged_export_is_refused(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_run(run, out, form="semi-structured")
    assert read_sealed(out / form.NAME)["files"].keys() == contents(out).keys() - {form.NAME}
    for file in sorted(out.iterdir()):
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(InputError, match=str(file)):
            load_semi_structured(out)
        file.write_bytes(whole)
