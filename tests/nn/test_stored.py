"""A sparse model saved and loaded by transformers' own calls: the same model, or one line that says what is wrong."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers.trainer_utils import load_sharded_checkpoint

from sparsae import AdamW, InputError, Sparsifier, SparsifierConfig, densify, parameter_groups, sparse_layers, sparsify
from sparsae.nn.mlp import FusedMLP
from sparsae.rules import SetConfig
from tests.support.architectures import ARCHITECTURES, VOCABULARY, Architecture
from tests.support.hf import sparse_llama

TRAINING = [name for name, architecture in ARCHITECTURES.items() if architecture.refusal is None]
# The layers that units of 4x4 do not divide.
UNDIVIDED = {"Mamba": ["*.x_proj", "*.dt_proj"]}


def assert_same(one: nn.Module, two: nn.Module) -> None:
    """The same tensors, bit for bit, and nothing that marks one as loaded."""
    first, second = one.state_dict(), two.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name
    assert [type(m) for m in one.modules()] == [type(m) for m in two.modules()]
    for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
        assert getattr(two, mark, None) is None
    assert "quantization_config" not in two.config.to_dict()  # type: ignore[operator, union-attr]
    assert "transformers_weights" not in two.config.to_dict()  # type: ignore[operator, union-attr]


@pytest.mark.parametrize("blocks", [False, True], ids=["float32", "blocks-bfloat16-shards"])
@pytest.mark.parametrize("name", TRAINING)
def test_every_architecture_comes_back_the_same(name: str, blocks: bool, tmp_path: Path) -> None:
    architecture: Architecture = ARCHITECTURES[name]
    model: Any = architecture.build().eval()
    sparsify(model, 0.7, unit=(4, 4) if blocks else (1, 1), exclude=UNDIVIDED.get(name, ()) if blocks else ())
    if blocks:
        model.bfloat16()
    model.save_pretrained(tmp_path, max_shard_size="20KB" if blocks else "1MB")
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 or blocks
    again, told = type(model).from_pretrained(tmp_path, low_cpu_mem_usage=True, output_loading_info=True)
    assert not any(told.values()), told
    assert_same(model, again)
    batch = architecture.batch(torch.Generator().manual_seed(1))
    if not blocks:
        with torch.no_grad():
            assert torch.equal(again(**batch).loss, model(**batch).loss)
    again.save_pretrained(tmp_path / "again")
    assert_same(model, type(model).from_pretrained(tmp_path / "again"))


def test_shards_of_one_megabyte(tmp_path: Path) -> None:
    model = sparse_llama(hidden_size=256, intermediate_size=512, vocab_size=4096)
    model.save_pretrained(tmp_path, max_shard_size="1MB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    assert_same(model, hf.AutoModelForCausalLM.from_pretrained(tmp_path))
    # Saved whole into the same directory, and cut again: what was there before is nobody's.
    for size in ("1GB", "2MB"):
        with torch.no_grad():
            model.lm_head.weight += 1.0
        model.save_pretrained(tmp_path, max_shard_size=size)
        assert_same(model, hf.AutoModelForCausalLM.from_pretrained(tmp_path))


def test_a_trainer_resumes_from_shards_whatever_their_size(tmp_path: Path) -> None:
    """File by file, in any order, into a model of another topology and another number of connections."""
    model = sparse_llama()
    sizes = ("5KB", "9KB", "14KB", "20KB", "27KB", "33KB")
    for size in sizes:
        folder = tmp_path / size
        model.save_pretrained(folder, max_shard_size=size)
        index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        for name in sparse_layers(model):
            assert index[f"{name}.values"] == index[f"{name}.indices"]
        for file in set(index.values()):
            assert set(load_file(folder / file)) == {name for name, place in index.items() if place == file}
        assert {path.name for path in folder.glob("*.safetensors")} == set(index.values())
        assert_same(model, hf.AutoModelForCausalLM.from_pretrained(folder))
        torch.manual_seed(7)
        other = sparsify(densify(copy.deepcopy(model)), 0.5, seed=3)
        for layer in sparse_layers(other).values():
            torch.nn.init.normal_(layer.values)
        load_sharded_checkpoint(other, str(folder))
        assert_same(model, other)
        tokens = torch.arange(8)[None]
        with torch.no_grad():
            assert torch.equal(other.eval()(tokens).logits, model.eval()(tokens).logits)  # type: ignore[operator]


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_stay_tied(tied: bool, tmp_path: Path) -> None:
    model = sparse_llama(tied)
    model.save_pretrained(tmp_path)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same(model, again)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied


def test_what_a_layer_is_besides_its_topology_comes_back(tmp_path: Path) -> None:
    """A fused MLP, the backend's choice, and a dtype that is asked for."""
    torch.manual_seed(0)
    model = sparsify(hf.GPT2LMHeadModel(hf.GPT2Config(**ARCHITECTURES["GPT-2"].settings)), 0.7)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    again = hf.GPT2LMHeadModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert sum(isinstance(module, FusedMLP) for module in again.modules()) == 2
    for name, layer in sparse_layers(again).items():
        before = sparse_layers(model)[name]
        assert layer.kernel == before.kernel or layer.values.dtype != before.values.dtype
        assert layer.kind == before.kind
        assert torch.equal(layer.topology.indices, before.topology.indices)
        assert layer.indices.dtype == before.indices.dtype
        assert torch.equal(layer.values, before.values.bfloat16())


def test_the_base_and_another_head_load_what_they_have(tmp_path: Path) -> None:
    model = sparse_llama()
    model.save_pretrained(tmp_path / "whole")
    base = hf.AutoModel.from_pretrained(tmp_path / "whole")
    assert_same(model.model, base)
    classifier = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole", num_labels=3)
    assert_same(model.model, classifier.model)
    base.save_pretrained(tmp_path / "base")
    assert_same(model.model, hf.LlamaForCausalLM.from_pretrained(tmp_path / "base").model)
    with pytest.raises(InputError, match=r"none of the sparse layers that were saved, such as model\.layers\.0"):
        hf.ViTModel.from_pretrained(tmp_path / "whole", config=vision(tmp_path / "whole"))


def vision(folder: Path) -> Any:
    config = hf.ViTConfig(**ARCHITECTURES["ViT"].settings)
    config.quantization_config = json.loads((folder / "config.json").read_text())["quantization_config"]
    return config


def test_a_part_and_a_copy_save_themselves(tmp_path: Path) -> None:
    model = sparse_llama()
    model.model.save_pretrained(tmp_path / "part")
    assert_same(model.model, hf.AutoModel.from_pretrained(tmp_path / "part"))
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.save_pretrained(tmp_path / "other")
    assert_same(other, hf.AutoModelForCausalLM.from_pretrained(tmp_path / "other"))
    assert (model.lm_head.weight != 0).any()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_and_what_nobody_else_holds_are_saved(copied: Callable[[Any], Any], tmp_path: Path) -> None:
    copied(sparse_llama()).save_pretrained(tmp_path)
    hf.AutoModelForCausalLM.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    assert_same(sparse_llama(), hf.AutoModelForCausalLM.from_pretrained(tmp_path / "again"))


def test_a_densified_model_is_saved_as_any(tmp_path: Path) -> None:
    """In the form that others expect of the architecture, also after it was loaded sparse."""
    model: Any = sparsify(ARCHITECTURES["Mixtral"].build(), 0.7).eval()
    model.save_pretrained(tmp_path / "sparse")
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    for each, name in ((model, "one"), (again, "two")):
        densify(each).save_pretrained(tmp_path / name)
        assert "quantization_config" not in json.loads((tmp_path / name / "config.json").read_text())
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert any(".experts.0." in name for name in one)
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


# --- training goes on


class Tokens(Dataset):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = torch.randint(3, VOCABULARY, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


def trained(model: Any, steps: int = 12, compiled: bool = False) -> nn.Module:
    """After some steps under a rule that moves connections."""
    model.train()
    optimizer = AdamW(parameter_groups(model, 0.1), lr=1e-2)
    sparsifier = Sparsifier(model, optimizer, SparsifierConfig(steps=steps, topology=SetConfig(every=4)))
    called = torch.compile(model, backend="aot_eager") if compiled else model
    for step in range(steps):
        called(**{key: t[None] for key, t in Tokens()[step].items()}).loss.backward()
        sparsifier.before_step()
        optimizer.step()
        sparsifier.after_step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_training_goes_on_bit_for_bit(compiled: bool, tmp_path: Path) -> None:
    model = sparse_llama()
    model.save_pretrained(tmp_path)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    before = again.state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    assert_same(trained(model, compiled=compiled), trained(again, compiled=compiled))
    moved = [name for name, tensor in again.state_dict().items() if not torch.equal(tensor, before[name])]
    assert any(name.endswith("indices") for name in moved)


def trainer(model: nn.Module, out: Path, steps: int, **settings: Any) -> hf.Trainer:
    pytest.importorskip("accelerate")
    arguments = hf.TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        **settings,
    )
    return hf.Trainer(model, arguments, train_dataset=Tokens(), eval_dataset=Tokens())


@pytest.mark.filterwarnings("ignore")
def test_a_trainer_trains_on_saves_and_resumes(tmp_path: Path) -> None:
    model = sparse_llama()
    model.save_pretrained(tmp_path / "start")
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "start")
    whole = trainer(loaded, tmp_path / "whole", 6, save_strategy="no")
    whole.train()
    whole.save_model(str(tmp_path / "saved"))
    assert_same(loaded.eval(), hf.AutoModelForCausalLM.from_pretrained(tmp_path / "saved"))
    settings = {"save_steps": 3, "eval_steps": 3, "eval_strategy": "steps", "load_best_model_at_end": True}
    half = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "start")
    trainer(half, tmp_path / "halves", 3, **settings).train()
    rest = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "start")
    resumed = trainer(rest, tmp_path / "halves", 6, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "halves" / "checkpoint-3"))
    best = hf.AutoModelForCausalLM.from_pretrained(str(resumed.state.best_model_checkpoint))
    assert_same(best, rest.eval())
    assert_same(loaded.eval(), hf.AutoModelForCausalLM.from_pretrained(tmp_path / "halves" / "checkpoint-6"))


# --- the hub


def test_what_is_pushed_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import ModelCard

    model, seen = sparse_llama(), []

    class Api:
        def create_repo(self, repo_id: str, **_: Any) -> Any:
            return type("Repo", (), {"repo_id": repo_id})

    def upload(self: object, folder: str, repo_id: str, *_: Any, **told: Any) -> None:
        seen.append((repo_id, told["commit_message"], hf.AutoModelForCausalLM.from_pretrained(folder)))

    monkeypatch.setattr("transformers.utils.hub.hf_api", lambda: Api())
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *_, **__: ModelCard("card"))
    monkeypatch.setattr(hf.PreTrainedModel, "_upload_modified_files", upload)
    model.push_to_hub("me/model", commit_message="first", max_shard_size="20KB")
    model.save_pretrained(tmp_path / "named", push_to_hub=True, commit_message="second")
    model.save_pretrained(tmp_path / "x", push_to_hub=True, repo_id="me/other", private=True, max_shard_size="20KB")
    assert [entry[:2] for entry in seen] == [("me/model", "first"), ("named", "second"), ("me/other", None)]
    for *_, loaded in seen:
        assert_same(model, loaded)


# --- who has imported what

STOCK = """
import sys, warnings
sys.modules["sparsae"] = None  # as where it is not installed
import transformers as hf
hf.logging.set_verbosity_error()
for folder in sys.argv[1:]:
    for cls in (hf.AutoModelForCausalLM, hf.LlamaForCausalLM, hf.AutoModel):
        try:
            cls.from_pretrained(folder)
        except OSError as error:
            assert "import-sparsae-before-loading.safetensors" in str(error), error
        else:
            sys.exit("loaded")
"""
BEFORE = """
import sys
import sparsae
assert not {"torch", "transformers", "numpy"} & sys.modules.keys()
"""
LOADS = """
layers = sparsae.sparse_layers(transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]))
assert len(layers) == 14, layers
"""
ORDERS = {
    "sparsae is not there": STOCK,
    "sparsae first": BEFORE + "import transformers\n" + LOADS,
    "transformers first": "import sys, transformers\ntransformers.PreTrainedModel\nimport sparsae\n" + LOADS,
    "transformers first, and not used": "import sys, transformers\nimport sparsae\n" + LOADS,
    "twice": BEFORE + "import importlib\nimportlib.reload(sparsae)\nimport transformers\n" + LOADS,
}


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_whoever_imports_first(order: str, tmp_path: Path) -> None:
    folders = [str(tmp_path / shards) for shards in ("1GB", "20KB")]
    for folder in folders:
        sparse_llama().save_pretrained(folder, max_shard_size=Path(folder).name)
    told = subprocess.run([sys.executable, "-c", ORDERS[order], *folders], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
