"""What is wrong only once a model is built, or with several settings together, is told where it was given too."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsae.config.load import resolve
from sparsae.errors import InputError
from sparsae.train.forecast import forecast
from sparsae.train.run import start
from tests.support.runs import config_of, write_text

# (settings of a file, --set, options, whose place is told and how the line goes on)
WRONG = {
    "unit": ("sparsity: {unit: [3, 3]}", (), {}, "FILE: sparsity.unit 3x3 does not divide layer"),
    "sparsity": ("", ("sparsity.unit=[256, 256]",), {}, "--set: "),
    "backend": ("sparsity: {backend: none}", (), {}, "FILE: unknown sparsity.backend 'none'"),
    "device": ("training: {device: cuda:77}", (), {}, "FILE: training.device 'cuda:77' is not there"),
    "of no kind": ("", ("training.device=meta",), {}, "--set: training.device 'meta' is not supported"),
    "width": ("model: {width: 4000000}", ("model.heads=8",), {}, "FILE: a model of "),
    "batch": ("model: {context: 100}", ("training.batch_size=2000000000",), {}, "--set: a batch of"),
    "rule": ("topology: {rule: set}", (), {"--sparsity": ("sparsity.sparsity", 0.0)}, "FILE: sparsity is 0, so"),
    "ramp": ("topology: {rule: static, ramp: 3}", (), {}, "FILE: topology.ramp: rule 'static' grows no connection"),
    "constant": ("model: {transformers: {n_embd: 3}}", (), {}, "FILE: model.transformers: n_embd is set"),
    "entry": ("", ("model.transformers={foo_bar: 1}",), {}, "--set: model.transformers.foo_bar: family gpt2 has no"),
    "option": ("", (), {"--steps": ("training.steps", "1 epochs")}, "--steps: "),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_place_is_told(name: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    settings, overrides, options, line = WRONG[name]
    file.write_text(settings, "utf-8")
    with pytest.raises(InputError) as caught:
        forecast(resolve(file, None, None, overrides, options=options, counted_by="--dry-run"))
    message = str(caught.value)
    assert message.startswith(line.replace("FILE", str(file)))
    assert message.count(str(file)) + message.count("--set: ") <= 1


def test_a_run_that_begins_tells_the_place_and_leaves_nothing(tmp_path: Path) -> None:
    text = write_text(tmp_path)
    config = config_of(text, tmp_path / "cache", "training.threads=100000")
    with pytest.raises(InputError, match=r"^--set: training\.threads 100000: this machine has"):
        start(config, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_settings_are_the_same_wherever_they_were_given(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("training: {steps: 9}", "utf-8")
    here, there = resolve(file), resolve(overrides=["training.steps=9"])
    assert here == there
    assert "given" not in here.model_dump()
    assert here.given.origins != there.given.origins


@pytest.mark.parametrize(("method", "counted"), [("sparsae-written", False), ("sparsae-guided", True), ("set", True)])
def test_a_forecast_names_what_it_does_not_count(method: str, counted: bool) -> None:
    """A union teacher remembers dropped weights, so that a later moment may have more bytes than the first."""
    assert bool(forecast(resolve(method=method))["uncounted"]) is not counted
