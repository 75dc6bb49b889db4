"""What every kind of layer keeps, held by an example of each; and that nothing else knows one kind from another."""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import sparsae
from sparsae import KINDS, densify, sparse_layers, sparsify
from sparsae.nn.kinds.kind import kind_in, parameter_of
from tests.nn.test_experts import experts_of, routed
from tests.support.masked_twin import require_equal

Example = tuple[nn.Module, Callable[[nn.Module], Tensor]]


def _rows() -> Tensor:
    return torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def _image() -> Tensor:
    return torch.randn(2, 4, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def _experts(name: str) -> Example:
    return experts_of(name).experts, lambda m: m(*routed(2))  # type: ignore[return-value]


EXAMPLES: dict[str, Callable[[], Example]] = {
    "Linear": lambda: (nn.Linear(8, 12).double(), lambda m: m(_rows())),
    "Linear without bias": lambda: (nn.Linear(8, 12, bias=False).double(), lambda m: m(_rows())),
    "Conv1D": lambda: (Conv1D(12, 8).double(), lambda m: m(_rows())),
    "Conv2d": lambda: (nn.Conv2d(4, 12, (3, 2), padding=1).double(), lambda m: m(_image())),
    "Experts": lambda: _experts("Mixtral"),
    "transposed Experts": lambda: _experts("gpt_oss"),
}


def test_every_kind_of_the_package_has_an_example() -> None:
    kinds = {kind for kind in KINDS if kind.__module__.startswith("sparsae.")}
    assert {type(KINDS.of(make()[0])) for make in EXAMPLES.values()} == kinds


@pytest.mark.parametrize("name", EXAMPLES)
def test_matrices_are_views_of_a_weight_and_make_it_again(name: str) -> None:
    module, _ = EXAMPLES[name]()
    kind = KINDS.of(module)
    assert set(kind.weights) | {n for n in kind.biases if parameter_or_none(module, n)} == set(
        dict(module.named_parameters(recurse=False))
    )
    for weight in kind.weights:
        tensor = parameter_of(module, weight).detach().clone()
        matrices = kind.split(weight, tensor)
        assert tuple(matrices) == kind.parts(weight)
        assert torch.equal(kind.join(weight, matrices), tensor)
        assert sum(matrix.numel() for matrix in matrices.values()) == tensor.numel()
        for matrix in matrices.values():
            rows, columns = matrix.shape
            out, inputs, *kernel = kind.shape((rows, columns))
            assert (out, inputs * torch.Size(kernel).numel()) == (rows, columns)
            matrix.zero_()
        assert not tensor.any()


def parameter_or_none(module: nn.Module, name: str) -> bool:
    return module._parameters.get(name) is not None


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_module_becomes_sparse_and_is_itself_again(name: str) -> None:
    module, compute = EXAMPLES[name]()
    own = set(vars(module)) | set(dict(module.named_parameters())) | {n for n, _ in module.named_children()}
    kind, shape = KINDS.of(module), {n: p.shape for n, p in module.named_parameters()}
    module.mark = "somebody's"  # type: ignore[assignment]
    model = sparsify(nn.Sequential(copy.deepcopy(module)), 0.5)
    assert kind_in(model[0]) == kind  # type: ignore[index]
    assert {n.partition(".")[2] for n in sparse_layers(model)} == {p for w in kind.weights for p in kind.parts(w)}
    for weight in kind.weights:
        assert getattr(model[0], weight).shape == shape[weight]  # type: ignore[index]
    twin = require_equal(model, lambda m: compute(m[0]).sin().sum())  # type: ignore[index]
    again: Any = densify(model)[0]  # type: ignore[index]
    assert type(again) is type(module)
    assert again.mark == "somebody's"
    assert {n: p.shape for n, p in again.named_parameters()} == shape
    assert list(again.state_dict()) == list(module.state_dict())
    assert own <= set(vars(again)) | set(dict(again.named_parameters())) | {n for n, _ in again.named_children()}
    with torch.no_grad():
        torch.testing.assert_close(compute(again), compute(twin[0]))  # type: ignore[index]


# Dynamo looks at what it has after the routing, whose sizes it does not know.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("name", EXAMPLES)
def test_a_sparse_module_compiles_and_computes_under_autocast(name: str) -> None:
    module, compute = EXAMPLES[name]()
    model = sparsify(nn.Sequential(module), 0.5)
    torch.testing.assert_close(compute(torch.compile(model[0], backend="aot_eager")), compute(model[0]))  # type: ignore[index,arg-type]
    model = model.float()

    def as_float(*inputs: Tensor) -> Tensor:
        y: Tensor = model[0](*(t.float() if t.is_floating_point() else t for t in inputs))  # type: ignore[index,operator]
        return y

    with torch.autocast("cpu", torch.bfloat16):
        got = compute(as_float)  # type: ignore[arg-type]
    want = compute(as_float)  # type: ignore[arg-type]
    assert float((got - want).detach().norm() / want.detach().norm()) < 0.02


def test_no_other_code_names_a_kind() -> None:
    """Every other module asks KINDS: a new kind is one file."""
    source = Path(sparsae.__file__).parent
    words = {"conv1d", "is_conv1d", "conv2d"}
    for path in source.rglob("*.py"):
        if path.parent == source / "nn" / "kinds":
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = {getattr(node, part, None) for part in ("id", "attr", "arg", "name")}
            found = {name for name in names if isinstance(name, str) and name.lower() in words}
            assert not found, f"{path}: {found}"
