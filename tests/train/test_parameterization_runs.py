"""SµPar and µP in runs: layers whose density moves, stopping and going on, attention, export."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from sparsae.config import Config, ParameterizationConfig
from sparsae.config.load import resolve
from sparsae.config.sparsifier import SparsifierConfig
from sparsae.core.cadence import rate_factor
from sparsae.core.randomness import generator
from sparsae.evaluate.decoding import FastDecoder, open_decoder
from sparsae.evaluate.export import export_run
from sparsae.evaluate.loading import load_run
from sparsae.losses import language_model_loss
from sparsae.models import attention_modules, decoder_and_head, fold_attention_scale, hidden_states
from sparsae.nn.linear import sparse_layers
from sparsae.nn.sparsify import densify
from sparsae.optim import AdamW, parameter_groups
from sparsae.parameterization import Parameterization
from sparsae.rules import EvolutionConfig
from sparsae.search.sparsifier import Sparsifier
from sparsae.search.teacher import Teacher
from tests.support.loops import LLAMA, SUPAR, built, config_of, mlp


@pytest.mark.parametrize("dynamic", [True, False])
def test_rates_and_grown_weights_follow_the_live_density_or_do_not(dynamic: bool) -> None:
    model = mlp(sparsity=0.5)
    mine = Parameterization(ParameterizationConfig(name="supar", base_width=24, dynamic=dynamic), 24, 1, std=1.0)
    optimizer = AdamW(parameter_groups(model, 0.1, mine, lr=1e-3))
    topology = EvolutionConfig(every=1, proposer="shift", mutation_rate=0.4, initialization="normal", start=0.0)
    settings = SparsifierConfig(steps=10, topology=topology)
    sparsifier = Sparsifier(model, optimizer, settings, parameterization=mine)
    layers = sparse_layers(model)
    before = {name: layer.topology.density for name, layer in layers.items()}

    def one_step() -> Any:
        model(torch.randn(4, 24, generator=generator(0, "x"))).square().mean().backward()
        sparsifier.before_step()
        optimizer.step()
        optimizer.zero_grad()
        return sparsifier.after_step()

    update = one_step()
    assert update.accepted
    live = {name: layer.topology.density for name, layer in layers.items()}
    assert live != before
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, layer in layers.items():
        density = live[name] if dynamic else before[name]
        group = groups[id(layer.values)]
        assert group["lr_scale"] == pytest.approx(1 / density)
        assert group["lr"] == pytest.approx(1e-3 / density)
        assert group["weight_decay"] == pytest.approx(0.1 * density)
        grown = layer.values.detach()[update.changes[name].grown]
        if grown.numel() > 50:
            assert float(grown.std()) == pytest.approx(density**-0.5, rel=5 / grown.numel() ** 0.5)
    again = Sparsifier(model, optimizer, settings, parameterization=mine)
    again.load_state_dict(sparsifier.state_dict())
    assert again._initial_densities == before


@pytest.mark.parametrize("method", ["rigl", "gmp", "sparsae-guided"])
def test_a_run_that_stops_and_goes_on_is_the_same(
    method: str, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparsae.train.loop import Trainer
    from sparsae.train.run import resume, start

    grown = ["topology.initialization=normal", "topology.proposer=shift"] if method == "sparsae-guided" else []
    config = run_config(
        text, tmp_path, *SUPAR, "parameterization.dynamic=true", "topology.every=3", *grown, method=method
    )
    start(config, tmp_path / "whole", quiet=True)
    scales, step = [], Trainer.stepping

    def interrupted(self: Trainer) -> Iterator[Any]:
        yield from step(self)
        scales.append([group["lr_scale"] for group in self.optimizer.param_groups])
        schedule = config.training.warmup, config.training.final_learning_rate
        rate = config.training.learning_rate * rate_factor(self.step - 1, config.training.steps, *schedule)
        for group in self.optimizer.param_groups:
            assert group["lr"] == pytest.approx(rate * group["lr_scale"])
        for name, layer in self.sparsifier._layers.items():  # type: ignore[union-attr]
            group = next(g for g in self.optimizer.param_groups if g["params"][0] is layer.values)
            assert group["lr_scale"] == pytest.approx(16 / 32 / layer.topology.density), name
        if self.step == 10:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "stepping", interrupted)
    assert not start(config, tmp_path / "stopped", quiet=True)["finished"]
    assert resume(tmp_path / "stopped", quiet=True)["finished"]
    assert (scales[0] == scales[-1]) == (method == "rigl")  # the others change layers' densities
    one, two = (load_run(tmp_path / name).model.state_dict() for name in ("whole", "stopped"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def run_config(text: Path, folder: Path, *overrides: str, method: str = "sparsae-guided") -> Config:
    return resolve(None, "demo", method, [
        f"data.source={text}", f"data.cache={folder / 'cache'}", "data.tokenizer_vocab=300", "model.layers=2",
        "model.width=32", "model.heads=2", "model.context=32", "training.steps=16", "training.batch_size=2",
        "training.validation_sequences=2", "training.device=cpu", *overrides,
    ])  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for i in range(20):
        (folder / f"{i}.txt").write_text("\n".join(f"item {j} of list {i} has {j % 7} parts" for j in range(60)))
    return folder


@pytest.mark.parametrize("family", [[], [*LLAMA, "model.heads=4"]], ids=["gpt2", "llama"])
def test_training_evaluation_decoding_and_export_compute_the_same(
    family: list[str], tmp_path: Path, text: Path
) -> None:
    from transformers import AutoModelForCausalLM

    from sparsae.train.run import start

    multipliers = ["parameterization.embedding_multiplier=3.0", "parameterization.output_multiplier=4.0"]
    config = run_config(text, tmp_path, *SUPAR, *multipliers, *family)
    summary = start(config, tmp_path / "run", quiet=True)
    assert summary["nnz"] == summary["nnz_target"]
    loaded = load_run(tmp_path / "run")
    model: Any = loaded.model
    head_size = 32 // config.model.heads
    assert {attention.scaling for attention in attention_modules(model)} == {1 / head_size}
    tokens = torch.randint(loaded.tokenizer.vocab_size, (2, 24), generator=generator(0, "tokens"))
    with torch.no_grad():
        logits = model(tokens).logits
        decoder, head = decoder_and_head(model)
        hidden = hidden_states(decoder, tokens[:, :-1])
        loss = language_model_loss(hidden, head, tokens[:, 1:].reshape(-1)).cross_entropy
        expected = functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].reshape(-1))
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(model(tokens, labels=tokens).logits, logits)
        fast = open_decoder(model, 32)
        assert isinstance(fast, FastDecoder)
        stepped = [fast.read(tokens[0, :5].tolist()), *(fast.step(t) for t in tokens[0, 5:].tolist())]
        torch.testing.assert_close(torch.stack(stepped), logits[0, 4:], rtol=1e-4, atol=1e-4)
    for form in ("dense", "sparse"):
        export_run(tmp_path / "run", tmp_path / form, form=form)
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / form).eval()
        with torch.no_grad():
            torch.testing.assert_close(exported(tokens).logits, logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", [[], LLAMA], ids=["gpt2", "llama"])
def test_every_way_to_attend_uses_the_scale(family: list[str]) -> None:
    model = built(config_of(*SUPAR, *family)).requires_grad_(False)
    for parameter in model.parameters():  # large, so that the scale shows
        nn.init.normal_(parameter, generator=generator(0, str(parameter.shape)))
    tokens = torch.randint(300, (2, 24), generator=generator(0, "tokens"))
    whole = model(tokens).logits
    teacher = Teacher(model, config_of().teacher).model
    torch.testing.assert_close(teacher(tokens).logits, whole)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(tokens).logits, whole, rtol=1e-4, atol=1e-3)
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(torch.compile(model, backend="eager")(tokens).logits, whole, rtol=1e-4, atol=1e-3)
    torch.compiler.reset()  # what was traced would stay alive
    for attention in attention_modules(model):
        attention.scaling = 1 / 4
    assert float((model(tokens).logits - whole).abs().max()) > 0.1
    for attention in attention_modules(model):
        attention.scaling = 1 / 16
    fold_attention_scale(densify(model))
    assert {attention.scaling for attention in attention_modules(model)} == {1 / 4}
    torch.testing.assert_close(model(tokens).logits, whole, rtol=1e-4, atol=1e-3)
