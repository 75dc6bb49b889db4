"""The one forward pass that training, scores, validation and evaluation share."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import sparsae
from sparsae.config import Config
from sparsae.core.randomness import generator
from sparsae.errors import InputError
from sparsae.kernels.probe import SampledGradients
from sparsae.losses import distillation_loss
from sparsae.models import decoder_and_head
from sparsae.nn.linear import sparse_layers
from sparsae.search.teacher import Teacher
from sparsae.train.objective import HeldOutStudy, Objective, failed_compilation_is_told
from sparsae.train.stopwatch import Stopwatch
from tests.support.loops import built, config_of

CPU = torch.device("cpu")


def tokens(rows: int) -> Tensor:
    return torch.randint(300, (rows, 25), generator=generator(0, "tokens"))


def objective_of(config: Config, model: Any) -> Objective:
    teacher = Teacher(model, config.teacher) if config.teacher.enabled else None
    return Objective(model, config.training, CPU, teacher=teacher)


def test_the_loss_is_that_of_whole_logits() -> None:
    config = config_of("teacher.enabled=true", "training.loss_chunk=7", "teacher.warmup_fraction=0.5")
    model = built(config)
    objective = objective_of(config, model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator(1, str(parameter.shape)))
    batch, alpha = tokens(3), 0.7
    parts = objective.loss(batch, alpha)
    assert objective.teacher is not None
    logits, taught = (m(batch[:, :-1]).logits for m in (model, objective.teacher.model))
    expected = distillation_loss(logits, taught, batch[:, 1:], alpha)
    torch.testing.assert_close(parts.total, expected.total)
    assert float(parts.distillation) == pytest.approx(float(expected.distillation), rel=1e-4)
    assert float(parts.distillation) > 0.01
    # The score, and what validation says, are the cross entropy alone.
    assert float(objective.score(batch).detach()) == float(parts.cross_entropy) == objective.cross_entropy(batch)
    assert objective.alpha(0) == 0.0
    assert objective.alpha(config.training.steps - 1) == config.teacher.alpha


def test_a_score_has_the_gradient_of_sparse_layers_and_none_of_a_dense_head() -> None:
    for overrides, dense in (([], True), (["model.tie_embeddings=false", "sparsity.sparsify_head=true"], False)):
        model = built(config_of(*overrides))
        objective_of(config_of(*overrides), model).score(tokens(2)).backward()
        assert all(layer.values.grad is not None for layer in sparse_layers(model).values())
        head = decoder_and_head(model)[1]
        if dense:  # its weight is the embedding's too: rows of tokens that were not read have no other gradient
            unread = sorted(set(range(300)) - set(tokens(2)[:, :-1].flatten().tolist()))
            assert head.weight.grad is not None
            assert not head.weight.grad[unread].any()
        else:
            assert head in sparse_layers(model).values()


def test_the_mean_counts_every_row_alike_and_the_first_validation_is_the_teachers_start() -> None:
    config = config_of("training.batch_size=3", "teacher.enabled=true", "teacher.warmup=validation")
    model = built(config)
    objective = objective_of(config, model)
    rows = tokens(7)
    model.train()
    loss, teacher_loss = objective.validate(rows)
    assert not model.training
    logits = model(rows[:, :-1]).logits.detach()
    expected = functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    assert loss == pytest.approx(float(expected), rel=1e-5)
    assert teacher_loss == loss
    assert objective.alpha(0) == 0.0
    again = objective_of(config, model)
    again.load_state_dict(objective.state_dict())
    for _ in range(20):
        model.zero_grad()
        objective.loss(rows, 0.0).total.backward()
        for parameter in model.parameters():
            parameter.data -= 0.5 * parameter.grad
    for warm in (objective, again):
        assert warm.validate(rows)[0] < loss - config.teacher.warmup_improvement
        assert warm.alpha(0) == config.teacher.alpha
    watch = Stopwatch()
    assert HeldOutStudy(objective, rows, watch)() == objective.mean(rows)
    assert list(watch.seconds) == ["study"]


def test_no_other_module_computes_a_language_models_loss() -> None:
    """A second forward pass would get another precision, chunk or teacher sooner or later."""
    root = Path(sparsae.__file__).parent
    callers = {
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("language_model_loss", "hidden_states")
    }
    assert callers == {"train/objective.py", "stack/program.py"}  # the latter for the former, of many runs at once


def test_a_backward_pass_that_is_looked_into_is_no_cuda_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be repeated without what looks."""
    modes: list[str] = []

    def noted(decoder: Any, *, dynamic: bool | None, mode: str) -> Any:
        modes.append(mode)
        return lambda **given: asked.append(mode) or decoder(**given)

    asked: list[str] = []
    monkeypatch.setattr("sparsae.train.objective.torch.compile", noted)
    model = built(config := config_of("training.compile=true", "training.compile_mode=reduce-overhead"))
    objective, layers = objective_of(config, model), sparse_layers(model)
    name = next(iter(layers))
    for looks in (False, True, False):
        probe = SampledGradients(layers[name].key, torch.tensor([1])) if looks else None
        objective.loss(tokens(2), 0.0).total.backward()
        objective.score(tokens(2)).backward()
        assert (probe is not None) == looks
    assert modes == ["reduce-overhead", "default"]
    assert asked == ["reduce-overhead"] * 2 + ["default"] * 2 + ["reduce-overhead"] * 2


def test_what_the_compiler_cannot_do_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(graph: Any, inputs: Any) -> Any:
        raise OSError("no compiler here\nand more")

    compile_ = torch.compile
    monkeypatch.setattr(
        "sparsae.train.objective.torch.compile", lambda decoder, **_: compile_(decoder, backend=refusing)
    )
    objective = objective_of(config := config_of("training.compile=true"), built(config))

    @failed_compilation_is_told()
    def objective_loss() -> None:
        objective.loss(tokens(2), 0.0)

    with pytest.raises(InputError, match=r"training\.compile: torch\.compile failed \(.*no compiler here and more\)"):
        objective_loss()
    with pytest.raises(RuntimeError, match="of another kind"), failed_compilation_is_told():
        raise RuntimeError("of another kind")
