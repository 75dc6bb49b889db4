"""What every family keeps, and that nothing outside its file knows of it."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sparsae.config import Config, ModelConfig
from sparsae.config.editors import json_schema
from sparsae.config.load import resolve
from sparsae.config.narrow import count_parameters
from sparsae.core.randomness import generator
from sparsae.errors import InputError
from sparsae.evaluate.decoding import FastDecoder, ModelDecoder, open_decoder
from sparsae.evaluate.export import export_run
from sparsae.evaluate.loading import load_run
from sparsae.families import FAMILIES, Family
from sparsae.models import attention_modules, build_model, fold_attention_scale
from sparsae.nn.choice import layer_shapes, linear_layers
from sparsae.nn.mlp import FusedMLP
from sparsae.nn.sparsify import sparsify
from sparsae.train.run import start
from tests.support.runs import config_of, write_text

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "sparsae"
every_family = pytest.mark.parametrize("name", FAMILIES.names())

# Values of every setting that a family may have, other than the defaults.
OPTIONAL: dict[str, Any] = {"kv_heads": 2, "head_size": 12, "mlp_width": 40, "dropout": 0.1}


def model_of(name: str, **settings: Any) -> ModelConfig:
    return ModelConfig(family=name, **{"layers": 2, "heads": 4, "width": 32, "context": 16, **settings})


def variants(name: str) -> list[ModelConfig]:
    """A model of the defaults, one with a head of its own, and one with each setting that the family has."""
    has = FAMILIES[name].settings.values()
    more = [{key: value} for key, value in OPTIONAL.items() if key in has]
    return [model_of(name, **settings) for settings in ({}, {"tie_embeddings": False}, *more)]


def test_no_module_outside_names_a_family() -> None:
    words = {word for name in FAMILIES.own_names() for word in (name, FAMILIES[name].title, FAMILIES[name].model_type)}
    # What follows may make another word of it: llama3 is a way to scale rotations, a mixture of experts another model.
    pattern = re.compile(rf"({'|'.join(map(re.escape, words))})(?!\d|-?moe)", re.IGNORECASE)
    assert pattern.search("class GPT2Decoder")
    named = [
        f"{file.relative_to(SOURCE)}:{number}: {line.strip()}"
        for file in sorted(SOURCE.rglob("*.py"))
        if SOURCE / "families" not in file.parents
        for number, line in enumerate(file.read_text("utf-8").splitlines(), 1)
        if pattern.search(line)
    ]
    assert not named, "\n".join(named)


def test_families_are_read_without_torch() -> None:
    code = (
        "import sys; from sparsae import FAMILIES; from sparsae.config import Config; names = FAMILIES.names(); "
        "[FAMILIES[name].linear_shapes(Config().model) for name in names]; "
        "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]"]


@every_family
def test_what_a_family_says_of_its_shapes_is_so(name: str) -> None:
    family = FAMILIES[name]
    for config in variants(name):
        model = build_model(config, 100, 0)
        assert family.linear_shapes(config) == layer_shapes(linear_layers(model))
        assert count_parameters(config, 100) == sum(parameter.numel() for parameter in model.parameters())
        assert type(model).__name__ == family.model_class or family.model_class is None
        assert FAMILIES.of(model) is family
        heads = {module.head_dim for module in attention_modules(model)}
        assert heads == {family.head_size(config)}
        assert len(attention_modules(model)) == config.layers


@every_family
def test_roles_and_heads_are_of_modules_that_are_there(name: str) -> None:
    family, model = FAMILIES[name], build_model(model_of(name, tie_embeddings=False), 100, 0)
    modules = [module for module, _ in model.named_modules()]
    globs = [*family.densities.values(), *family.heads, *family.parameter_roles(False), *family.parameter_roles(True)]
    for glob in globs:
        assert any(fnmatchcase(module, glob) for module in modules), glob
    residual = [glob for glob, role in family.parameter_roles(standard=False).items() if role == "residual"]
    into = [module for module in family.linear_shapes(model_of(name)) if any(fnmatchcase(module, g) for g in residual)]
    assert len(into) == 2 * 2  # the output of the attention and of the MLP, of two blocks


@every_family
def test_a_setting_that_a_family_does_not_have_is_refused(name: str) -> None:
    has = FAMILIES[name].settings.values()
    for key, value in OPTIONAL.items():
        if key in has:
            assert getattr(model_of(name, **{key: value}), key) == value
        else:
            with pytest.raises(InputError, match=f"family {name} has no {key}: it must be (null|0.0)"):
                model_of(name, **{key: value})


@every_family
def test_the_mlp_of_a_family_is_fused(name: str) -> None:
    model = sparsify(build_model(model_of(name), 100, 0, device="cpu"), 0.9, backend="cpu")
    assert sum(isinstance(module, FusedMLP) for module in model.modules()) == 2


@every_family
def test_the_folded_scale_of_attention_computes_the_same(name: str) -> None:
    for config in variants(name):
        torch.manual_seed(0)
        model: Any = build_model(config, 100, 0, device="cpu").eval().requires_grad_(False)
        for parameter in model.parameters():  # large, so that the scale shows, and no norm or bias as at the start
            nn.init.normal_(parameter, generator=generator(0, str(parameter.shape)))
        tokens = torch.randint(100, (2, 16), generator=generator(1, "tokens"))
        size = FAMILIES[name].head_size(config)
        plain = model(tokens).logits
        for attention in attention_modules(model):
            attention.scaling = 1 / size
        scaled = model(tokens).logits
        assert float((scaled - plain).abs().max()) > 0.1
        fold_attention_scale(model)
        assert {attention.scaling for attention in attention_modules(model)} == {size**-0.5}
        torch.testing.assert_close(model(tokens).logits, scaled, rtol=1e-4, atol=1e-3)


@every_family
@pytest.mark.parametrize("parameterization", ["sp", "supar"])
def test_a_family_is_trained_exported_reloaded_and_decoded(name: str, parameterization: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    overrides = [f"{key}={value}" for key, value in settings_of(name).items()]
    overrides += [f"parameterization.name={parameterization}", "parameterization.base_width=16"]
    overrides += ["parameterization.base_density=0.5"] if parameterization == "supar" else []
    config = config_of(write_text(tmp_path / "text"), tmp_path / "cache", *overrides, method="set")
    summary = start(config, tmp_path / "run", quiet=True)
    assert summary["nnz"] == summary["nnz_target"]
    assert math.isfinite(summary["validation_loss"])
    assert summary["validation_perplexity"] < summary["untrained_perplexity"]
    model: Any = load_run(tmp_path / "run").model
    tokens = torch.randint(model.config.vocab_size, (2, 16), generator=generator(0, "tokens"))
    export_run(tmp_path / "run", tmp_path / "exported")
    assert FAMILIES[name].title in (tmp_path / "exported" / "README.md").read_text("utf-8")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").eval()
    with torch.no_grad():
        logits = model(tokens).logits
        torch.testing.assert_close(exported(tokens).logits, logits, rtol=1e-5, atol=1e-5)
    decoder = open_decoder(model, 16)
    assert isinstance(decoder, ModelDecoder if FAMILIES[name].model_class is None else FastDecoder)
    stepped = [decoder.read(tokens[0, :5].tolist()), *(decoder.step(token) for token in tokens[0, 5:].tolist())]
    torch.testing.assert_close(torch.stack(stepped), logits[0, 4:], rtol=1e-4, atol=1e-4)


def settings_of(name: str) -> dict[str, object]:
    """Settings of a small model that uses all that a family has, but for what is random."""
    has = {key: value for key, value in OPTIONAL.items() if key in FAMILIES[name].settings.values()}
    has.pop("dropout", None)
    return {f"model.{key}": value for key, value in {"family": name, "heads": 4, **has}.items()}


@every_family
def test_a_narrower_model_has_as_many_parameters(name: str) -> None:
    for model in variants(name):
        wide = Config(model=model.model_copy(update={"width": 64, "mlp_width": None}))
        narrow = resolve(method="dense-small", trees=[({"model": wide.model.model_dump()}, "test")])
        target = count_parameters(wide.model, wide.data.tokenizer_vocab, wide.sparsity)
        assert count_parameters(narrow.model, wide.data.tokenizer_vocab) == pytest.approx(target, rel=0.02)
        assert narrow.model == ModelConfig.model_validate(narrow.model.model_dump())


def test_a_family_that_nobody_knows_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^--set: model\.family: no family 'bert': use one of gpt2, llama") as caught:
        resolve(overrides=["model.family=bert"])
    assert "\n" not in str(caught.value)
    command = [sys.executable, "-m", "sparsae", "train", "--out", str(tmp_path / "run"), "--set", "model.family=bert"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert re.search("no family 'bert': use one of gpt2, llama", " ".join(done.stderr.split()))
    assert not (tmp_path / "run").exists()
    from transformers import BertConfig, BertModel

    with pytest.raises(InputError, match="BertModel is of no family that is known"):
        attention_modules(BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)))


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is registered meanwhile is forgotten afterwards."""
    FAMILIES.loaded()
    monkeypatch.setattr(FAMILIES, "_entries", dict(FAMILIES._entries))
    monkeypatch.setattr(FAMILIES, "_known_points", None)


@pytest.mark.usefixtures("forgotten")
def test_a_name_has_one_owner() -> None:
    mine = replace(FAMILIES["llama"], title="Mine")
    with pytest.raises(InputError, match="family 'llama' is registered already, by sparsae: take another name"):
        FAMILIES.register("llama", mine)
    assert FAMILIES.register("llama", FAMILIES["llama"]) is FAMILIES["llama"]  # as when its module is loaded anew
    FAMILIES.register("mine", mine)
    assert FAMILIES["mine"] is mine
    assert ModelConfig(family="mine", kv_heads=2).kv_heads == 2
    assert "mine" in json_schema()["$defs"]["ModelConfig"]["properties"]["family"]["enum"]
    with pytest.raises(InputError, match="family 'mine' is registered already, by this program"):
        FAMILIES.register("mine", FAMILIES["llama"])
    with pytest.raises(InputError, match="family 'other' must be a Family, not 3"):
        FAMILIES.register("other", 3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="a family needs a name"):
        FAMILIES.register("", mine)


def test_a_name_of_this_package_is_taken_before_its_file_is_read() -> None:
    code = (
        "from sparsae import FAMILIES; from dataclasses import replace; import sparsae.families.gpt2 as g\n"
        "try: FAMILIES.register('llama', replace(FAMILIES['gpt2'], title='Mine'))\n"
        "except Exception as error: print(error)\n"
        "print(FAMILIES['llama'].title)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == [
        "family 'llama' is registered already, by sparsae: take another name",
        "Llama",
    ]


@pytest.mark.usefixtures("forgotten")
def test_a_family_of_a_package_is_found_and_one_that_fails_hides_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = "from dataclasses import replace\nfrom sparsae import FAMILIES\n"
    good += "FAMILIES.register('theirs', replace(FAMILIES['llama'], title='Theirs'))\n"
    for package, code in {"theirs": good, "broken": "1 / 0", "silent": "x = 1"}.items():
        information = tmp_path / package / f"{package}-1.0.dist-info"
        information.mkdir(parents=True)
        (tmp_path / package / f"{package}_family.py").write_text(code)
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (information / "entry_points.txt").write_text(f"[sparsae.families]\n{package} = {package}_family\n")
        monkeypatch.syspath_prepend(str(tmp_path / package))
    assert {"theirs", "broken", "silent"} < set(FAMILIES.names())
    assert resolve(overrides=["model.family=theirs"]).model.family == "theirs"
    assert FAMILIES.origin("theirs") == "theirs"
    with pytest.raises(InputError, match="the entry point broken = broken_family cannot be loaded: ZeroDivisionError"):
        resolve(overrides=["model.family=broken"])
    with pytest.raises(InputError, match="registers no family of that name"):
        resolve(overrides=["model.family=silent"])
    assert all(isinstance(family, Family) for family in FAMILIES.loaded())


@pytest.mark.slow
def test_the_page_on_families_runs_as_it_stands(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "own-family.md").read_text("utf-8")
    blocks = re.findall(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "SPARSAE_CACHE": str(tmp_path / "cache"),
    }
    assert [title for _, title, _ in blocks if title] == ["mistral.py", "small.yaml", "pyproject.toml"]
    for language, title, text in blocks:
        if title:
            (tmp_path / title).write_text(text, "utf-8")
        elif language == "sh":
            command = ["bash", "-euo", "pipefail", "-c", text]
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    exported = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert exported["architectures"] == ["MistralForCausalLM"]
    assert exported["sliding_window"] is None
