"""Torch's default dtype and device, and the mode that somebody calls from, change nothing."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sparsae
from sparsae.config import RuleConfig, TeacherConfig
from sparsae.config.sparsifier import SparsifierConfig
from sparsae.core.randomness import generator
from sparsae.kernels.reference import SCRATCH
from sparsae.nn.linear import sparse_layers
from sparsae.nn.sparsify import densify, sparsify
from sparsae.optim import AdamW, parameter_groups
from sparsae.rules import EvolutionConfig, GmpConfig, GseConfig, RiglConfig, SetConfig
from sparsae.search.sparsifier import Sparsifier

SOURCES = Path(sparsae.__file__).parent
RULES: dict[str, RuleConfig] = {
    "evolution": EvolutionConfig(every=2, stop=1.0),
    "set": SetConfig(every=2, stop=1.0),
    "rigl": RiglConfig(every=2, stop=1.0),
    "gse": GseConfig(every=2),
    "gmp": GmpConfig(every=2, start=0.0, stop=1.0),
}


@contextmanager
def _defaults(dtype: torch.dtype | None, device: str | None) -> Iterator[None]:
    try:
        if dtype is not None:
            torch.set_default_dtype(dtype)
        if device is not None:
            torch.set_default_device(device)
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


def _train(rule: str, backend: str, unit: tuple[int, int], steps: int = 7) -> list[Tensor]:
    """Every tensor of a small training, with all its inputs float32 on the CPU by name."""
    options = {"dtype": torch.float32, "device": "cpu"}
    rng = generator(0, "defaults")
    model = nn.Sequential(nn.Linear(16, 32, **options), nn.GELU(), nn.Linear(32, 16, **options))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=rng, **options) / 4)
    prunes = rule == "gmp"
    sparsify(model, 0.0 if prunes else 0.8, unit=unit, backend=backend, seed=1)
    optimizer = AdamW(parameter_groups(model, weight_decay=0.1), lr=1e-2)
    config = SparsifierConfig(
        steps=steps,
        topology=RULES[rule],
        teacher=TeacherConfig(storage="union"),
        sparsity=0.8 if prunes else None,
    )
    held_out = torch.randn(8, 16, generator=rng, **options)
    score = None if rule != "evolution" else lambda step: (model(held_out) - held_out).square().mean()
    sparsifier = Sparsifier(model, optimizer, config, score=score)
    losses = []
    for step in range(steps):
        x = torch.randn(8, 16, generator=generator(step, "batch"), **options)
        loss = (model(x) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        sparsifier.before_step()
        optimizer.step()
        sparsifier.after_step()
        losses.append(loss.detach())
    assert sparsifier.teacher is not None
    found = [*losses, *model.state_dict().values(), *sparsifier.teacher.model.state_dict().values()]
    for p in model.parameters():
        found += [value for value in optimizer.state[p].values() if isinstance(value, Tensor)]
    densify(model)
    return [*found, *model.state_dict().values(), model(held_out).detach()]


@pytest.mark.parametrize(
    ("dtype", "device"),
    [(torch.bfloat16, None), (torch.float16, None), (torch.float64, None), (None, "meta")],
    ids=["bfloat16", "float16", "float64", "meta"],
)
@pytest.mark.parametrize(
    ("rule", "backend", "unit"),
    [
        *((rule, "auto", (1, 1)) for rule in RULES),
        ("evolution", "auto", (4, 4)),
        ("rigl", "reference", (4, 4)),
        ("gse", "reference", (1, 1)),
    ],
)
def test_other_defaults_change_no_bit(
    rule: str, backend: str, unit: tuple[int, int], dtype: torch.dtype | None, device: str | None
) -> None:
    expected = _train(rule, backend, unit)
    with _defaults(dtype, device):
        got = _train(rule, backend, unit)
    assert len(got) == len(expected)
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.dtype == theirs.dtype
        assert mine.device == theirs.device
        assert torch.equal(mine, theirs)


# What makes a tensor out of nothing, and so takes dtype and device from torch's defaults where it does not say.
_FACTORIES = {"empty", "zeros", "ones", "full", "rand", "randn", "eye", "linspace", "tensor", "scalar_tensor"}
_INTEGERS = {"arange", "randint", "randperm"}


def test_every_allocation_names_dtype_and_device() -> None:
    unnamed = []
    for path in sorted(SOURCES.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if not (isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"):
                continue
            named = {keyword.arg for keyword in node.keywords}
            wanted = {"device"} if node.func.attr in _INTEGERS else {"dtype", "device"}
            if node.func.attr in _FACTORIES | _INTEGERS and not wanted <= named:
                unnamed.append(f"{path.relative_to(SOURCES)}:{node.lineno} torch.{node.func.attr}")
    assert not unnamed, "\n".join(unnamed)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_training_goes_on_after_a_first_pass_in_inference_mode(backend: str, mode: type) -> None:
    model = sparsify(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)), 0.8, backend=backend)
    x = torch.randn(4, 16)
    SCRATCH._buffers.clear()
    with mode():
        for layer in sparse_layers(model).values():
            layer.set_topology(layer.topology, layer.values.clone())
        model(x)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.load_state_dict(state, assign=False)
        model(x)
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        model(x).square().mean().backward()
        optimizer.step()
    assert all(layer.values.grad is not None for layer in sparse_layers(model).values())
