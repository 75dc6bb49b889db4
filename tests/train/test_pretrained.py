"""Runs that continue a model of transformers': what they begin with, and that the settings say it all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from sparsae import InputError, sparse_layers, sparsify
from sparsae.cli import main
from sparsae.config.load import resolve
from sparsae.config.schema import Config, ModelConfig
from sparsae.data import load_tokenizer
from sparsae.evaluate.loading import load_run
from sparsae.files import read_json
from sparsae.models import build_model
from sparsae.train.pretrained import pretrained_settings, read_pretrained
from sparsae.train.run import start
from tests.support.architectures import ARCHITECTURES

LLAMA = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT2 = {"vocab_size": 320, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
# Each says something that a family's own settings do not.
MODELS: dict[str, Any] = {
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2, bos_token_id=0, eos_token_id=0)),
    "gpt2-relu": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2, activation_function="relu", layer_norm_epsilon=1e-3)),
    "llama": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(
            **LLAMA,
            rms_norm_eps=1e-2,
            rope_parameters={"rope_theta": 500.0, "rope_type": "default"},
            attention_bias=True,
            mlp_bias=True,
        )
    ),
    "llama-tied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA, tie_word_embeddings=True, hidden_act="gelu")),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**LLAMA, head_dim=16)),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for i in range(20):
        (folder / f"{i}.txt").write_text("\n".join(f"item {j} of list {i} has {j % 7} parts" for j in range(60)))
    return folder


@pytest.fixture(scope="module")
def tokenizer(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a tokenizer, as a run writes them."""
    out = tmp_path_factory.mktemp("run") / "run"
    small = ["training={batch_size: 2, validation_sequences: 2, steps: 1}", "data.tokenizer_vocab=300"]
    small += ["model={layers: 1, width: 16, heads: 2, context: 32}"]
    given = [option for setting in small for option in ("--set", setting)]
    data = ["--set", f"data.source={text}", "--set", f"data.cache={out.parent / 'cache'}"]
    assert main(["train", "--method", "dense", "--out", str(out), *given, *data]) == 0
    return out / "tokenizer"


def saved(name: str, tokenizer: Path, to: Path) -> Any:
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(to)
    shutil.copytree(tokenizer, to, dirs_exist_ok=True)
    return model.eval()


def settings(folder: Path, *overrides: str) -> Config:
    return resolve(None, "demo", "set", overrides, trees=[(pretrained_settings(folder), "--from")])


def first_model(folder: Path, *overrides: str) -> Any:
    config = settings(folder, "model.context=32", *overrides)
    return read_pretrained(folder, config).model(config, load_tokenizer(folder), torch.device("cpu")).eval()


@pytest.mark.parametrize("name", MODELS)
def test_the_largest_weights_of_a_model_are_the_first(name: str, tokenizer: Path, tmp_path: Path) -> None:
    dense = saved(name, tokenizer, tmp_path)
    tokens = torch.arange(24)[None]
    with torch.no_grad():
        same = first_model(tmp_path, "sparsity.sparsity=0", "topology={rule: static}")(tokens).logits
        torch.testing.assert_close(same, dense(tokens).logits)
    model = first_model(tmp_path, "sparsity.sparsity=0.6")
    wanted = sparsify(dense, 0.6, start="magnitude")
    assert sparse_layers(model).keys() == sparse_layers(wanted).keys()
    for layer, other in zip(sparse_layers(model).values(), sparse_layers(wanted).values(), strict=True):
        assert torch.equal(layer.topology.indices, other.topology.indices)
        assert torch.equal(layer.values, other.values)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, wanted(tokens).logits)


def test_a_run_continues_the_best_checkpoint_of_a_trainers_directory(
    text: Path, tokenizer: Path, tmp_path: Path
) -> None:
    trained, out = tmp_path / "trained", tmp_path / "run"
    for step in (3, 6):
        saved("llama", tokenizer, trained / f"checkpoint-{step}")
        state = {"global_step": step, "best_model_checkpoint": "/elsewhere/checkpoint-3"}
        (trained / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
    short = ["--set", "training={batch_size: 2, validation_sequences: 2}", "--set", "model.context=32"]
    data = ["--set", f"data.source={text}", "--set", f"data.cache={tmp_path / 'cache'}"]
    command = ["train", "--from", str(trained), "--best", "--out", str(out), "--steps", "1", *short, *data]
    assert main(command) == 0
    assert read_json(out / "summary.json")["started_from"]["path"] == str(trained / "checkpoint-3")
    assert main(["export", str(out), "--to", str(tmp_path / "hf")]) == 0
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "It was trained from another model's weights (checkpoint-3) with" in card
    assert "from scratch" not in card


def test_of_a_directory_that_no_trainer_wrote_there_is_no_best(tokenizer: Path, tmp_path: Path) -> None:
    saved("llama", tokenizer, tmp_path / "model")
    with pytest.raises(InputError, match="no Trainer says which"):
        start(settings(tmp_path / "model"), tmp_path / "run", quiet=True, source=tmp_path / "model", best=True)
    assert not (tmp_path / "run").exists()


def test_a_run_continues_a_directory_and_needs_it_no_more(text: Path, tokenizer: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "model", tmp_path / "run"
    dense = saved("llama", tokenizer, folder)
    short = ["--set", "training={batch_size: 2, validation_sequences: 2}", "--set", "model.context=32"]
    data = ["--set", f"data.source={text}", "--set", f"data.cache={tmp_path / 'cache'}"]
    assert main(["train", "--from", str(folder), "--out", str(out), "--steps", "4", *short, *data]) == 0
    summary = read_json(out / "summary.json")
    assert summary["started_from"]["path"] == str(folder)
    assert summary["nnz"] == summary["nnz_target"]
    (folder / "model.safetensors").unlink()
    assert main(["train", "--resume", str(out), "--steps", "6"]) == 0
    model = load_run(out).model
    assert model.config.rms_norm_eps == dense.config.rms_norm_eps  # type: ignore[union-attr]
    for command in (["evaluate", str(out)], ["generate", str(out), "--prompt", "item"], ["report", str(out)]):
        assert main(command) == 0
    # And what it exported sparse is where another begins.
    assert main(["export", str(out), "--to", str(tmp_path / "sparse"), "--format", "sparse"]) == 0
    again = first_model(tmp_path / "sparse")
    for name, layer in sparse_layers(model).items():
        assert torch.equal(sparse_layers(again)[name].topology.indices, layer.topology.indices)
        assert torch.equal(sparse_layers(again)[name].values, layer.values)
    with pytest.raises(InputError, match="active weights, these settings begin with"):
        first_model(tmp_path / "sparse", "sparsity.sparsity=0.5")


def test_what_cannot_be_continued_is_told(tokenizer: Path, tmp_path: Path) -> None:
    saved("gpt2", tokenizer, tmp_path / "gpt2")

    def refused(match: str, *overrides: str) -> None:
        with pytest.raises(InputError, match=match) as caught:
            read_pretrained(tmp_path / "gpt2", settings(tmp_path / "gpt2", *overrides))
        assert "\n" not in str(caught.value)

    refused(r"its model\.layers is 2, not 3", "model.layers=3")
    refused(r"its model\.context is 32, not 16", "model.context=16")
    refused(r"has parameterization\.name sp", "parameterization.name=mup")
    with pytest.raises(InputError, match=r"model\.transformers: n_layer is set by settings of its own"):
        build_model(ModelConfig(transformers={"n_layer": 3}), 320, 0)
    ARCHITECTURES["OPT"].build().save_pretrained(tmp_path / "opt")  # type: ignore[operator]
    with pytest.raises(InputError, match="its model_type is opt, and families are gpt2"):
        pretrained_settings(tmp_path / "opt")
    (tmp_path / "gpt2" / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(InputError, match="cannot be read"):
        first_model(tmp_path / "gpt2")
    (tmp_path / "gpt2" / "config.json").write_text("{")
    with pytest.raises(InputError, match="no configuration of a model"):
        pretrained_settings(tmp_path / "gpt2")
