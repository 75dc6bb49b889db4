"""The fused MLP: its kernels against float64, and the module against the layers that it fuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

from sparsae.core.randomness import generator
from sparsae.core.topology import Topology
from sparsae.kernels.backend import Layout, Weight
from sparsae.kernels.cpu import native
from sparsae.kernels.cpu.backend import BACKEND, is_native
from sparsae.kernels.mlp import ACTIVATIONS, composed_backward, sparse_mlp
from sparsae.kernels.probe import SampledGradients, new_key
from sparsae.nn import mlp
from sparsae.nn.linear import SparseLinear, sparse_layers
from sparsae.nn.mlp import FusedMLP, mlp_keeps
from sparsae.nn.sparsify import densify, sparsify
from tests.support.mlp_cases import Case, cases, close, everything, gpt2, llama

pytestmark = pytest.mark.skipif(native.absence() is not None, reason=str(native.absence()))


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one at each use of the fused operator."""
    calls: list[int] = []

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return sparse_mlp(*arguments)

    monkeypatch.setattr(mlp, "sparse_mlp", counted)
    return calls


@given(cases)
def test_against_float64(isa: str, case: Case) -> None:
    close(case.run(), case.exact(), 2e-5)


@given(cases)
def test_the_composed_backward_is_the_same(case: Case) -> None:
    keys = [new_key() for _ in case.weights]
    composed = composed_backward(BACKEND, case.weights, keys, case.dy, case.x, case.activation)
    close(Case.flat(composed), case.exact()[1:], 2e-5)


@given(cases, st.sampled_from([None, torch.float32, torch.bfloat16]))
def test_threads_do_not_change_a_bit(isa: str, case: Case, keeps: torch.dtype | None) -> None:
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(case.run(keeps))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@given(cases)
def test_bfloat16(isa: str, case: Case) -> None:
    case.x, case.dy = case.x.bfloat16(), case.dy.bfloat16()
    got = case.run()
    assert got[0].dtype == got[1].dtype == torch.bfloat16
    close(got, case.exact(), 2e-2)


def test_the_ends_of_float32(isa: str) -> None:
    """Activations of huge, tiny and undefined numbers: as torch has them."""
    z = torch.tensor([-1e30, -200.0, -90.0, -30.0, -1e-30, 0.0, 1e-30, 30.0, 90.0, 200.0, 1e30, float("nan")])
    one = Topology((1, 1), torch.zeros(1, dtype=torch.int32))
    layout = Layout((1, 1), (1, 1), one.indices)
    layout = layout._replace(derived=list(native.make_index(layout)))
    weight = Weight(torch.ones(1), None, layout)
    for name, function in ACTIVATIONS.items():
        x = z[:, None].clone().requires_grad_()
        want = function(x)
        got = native.mlp_forward([weight, weight], z[:, None], name)
        torch.testing.assert_close(got, want.detach(), rtol=1e-5, atol=1e-6, equal_nan=True)
        (dwant,) = torch.autograd.grad(want[:-1].sum(), x)
        dx = native.mlp_backward([weight, weight], torch.ones(11, 1), z[:-1, None], name).x
        finite = dwant[:-1].isfinite()
        torch.testing.assert_close(dx[finite], dwant[:-1][finite], rtol=1e-5, atol=1e-6)


def test_weights_that_are_no_mlp_are_refused() -> None:
    case = Case(((1, 1), 3, 4, 5), False, "relu", True, 7, 0)
    with pytest.raises(ValueError, match="are no MLP"):
        native.mlp_forward([case.weights[1], case.weights[1]], torch.ones(7, 4), "relu")
    other = Case(((2, 2), 3, 2, 5), False, "relu", True, 7, 0).weights[1]
    with pytest.raises(ValueError, match="different units"):
        native.mlp_forward([case.weights[0], other], case.x, "relu")
    with pytest.raises(ValueError, match=r"what is kept have shape \(7, 3\), not \(7, 4\)"):
        native.mlp_forward(case.weights, case.x, "relu", torch.empty(7, 3))
    with pytest.raises(ValueError, match="keep float32 or bfloat16"):
        native.mlp_backward(case.weights, case.dy, case.x, "relu", torch.empty(7, 4, dtype=torch.float16))


@pytest.mark.usefixtures("always_fused")
@pytest.mark.parametrize("make", [gpt2, llama, lambda: gpt2(activation="relu"), lambda: gpt2(activation="gelu")])
@pytest.mark.parametrize("unit", [(1, 1), (4, 4)])
def test_the_module_equals_the_one_that_it_stands_for(
    make: type, unit: tuple[int, int], fused_calls: list[int]
) -> None:
    model = sparsify(make(), 0.7, unit=unit, backend="cpu")
    (fused,) = model
    assert isinstance(fused, FusedMLP)
    before = len(fused_calls)
    x = torch.randn(3, 20, 32, generator=generator(0, "x"))
    got = everything(model, x)
    assert len(fused_calls) == before + 1
    assert len(got) == 2 + len(list(model.parameters()))
    close(got, everything(nn.Sequential(fused.original), x), 1e-5)


@pytest.mark.usefixtures("always_fused")
@pytest.mark.skipif(not is_native(torch.bfloat16), reason="bfloat16 is multiplied densely here")
@pytest.mark.parametrize("keeps", ["nothing", "bfloat16", "float32"])
def test_autocast(keeps: str) -> None:
    model = mlp_keeps(sparsify(llama(), 0.7, backend="cpu"), keeps)
    x = torch.randn(40, 32, generator=generator(0, "x"))
    with torch.autocast("cpu", torch.bfloat16):
        got, want = everything(model, x), everything(nn.Sequential(model[0].original), x)
    assert got[0].dtype == torch.bfloat16
    close(got, want, 3e-2)


def test_it_is_used_only_where_it_pays_and_serves(fused_calls: list[int]) -> None:
    x = torch.randn(20, 32)
    for sparsity, gated, keeps, backend, tokens, uses in [
        (0.7, False, "nothing", "auto", 20, True),
        (0.85, True, "nothing", "auto", 20, False),
        (0.85, True, "bfloat16", "auto", 20, True),
        (0.85, True, "float32", "auto", 20, True),
        (0.75, True, "float32", "auto", 20, False),
        (0.95, True, "nothing", "auto", 20, True),
        (0.95, False, "nothing", "reference", 20, False),
        (0.95, False, "nothing", "auto", 1, False),
    ]:
        model = mlp_keeps(sparsify(llama() if gated else gpt2(), sparsity, backend=backend), keeps)
        before = len(fused_calls)
        model(x[:tokens])
        assert (len(fused_calls) > before) == uses, (sparsity, gated, keeps, backend, tokens)


def test_the_number_of_tokens_decides_where_no_backward_follows(fused_calls: list[int]) -> None:
    model = sparsify(llama(), 0.7)
    with torch.no_grad():
        model(torch.randn(3, 256, 32))
        assert fused_calls == []
        model(torch.randn(4, 256, 32))
    assert fused_calls == [1]


def test_a_hook_on_a_layer_sees_what_goes_through() -> None:
    model = sparsify(gpt2(), 0.95)
    seen = []
    model[0].c_proj.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    model(torch.randn(20, 32))
    assert seen == [(20, 128)]


@pytest.mark.usefixtures("always_fused")
def test_every_hook_sends_the_mlp_through_its_layers() -> None:
    x = torch.randn(20, 32, requires_grad=True)

    def count(register: Callable[[nn.Module, Callable[..., None]], Any], *, before: bool = False) -> int:
        seen: list[int] = []

        def hook(*_: Any) -> None:
            seen.append(1)

        plain = gpt2()
        handle = register(plain, hook) if before else None
        model = sparsify(plain, 0.9, backend="cpu")
        handle = handle or register(model, hook)
        model(x).sum().backward()
        handle.remove()
        return len(seen)

    assert count(lambda model, hook: model[0].act.register_forward_hook(hook)) == 1
    assert count(lambda model, hook: model[0].c_fc.register_full_backward_pre_hook(hook)) == 1
    assert count(lambda model, hook: model[0].register_forward_hook(hook), before=True) == 1
    # The model, the MLP, the one that it stands for, two layers, the activation and the dropout.
    assert count(lambda model, hook: nn.modules.module.register_module_forward_hook(hook)) == 7


@pytest.mark.usefixtures("always_fused")
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU(), nn.GELU(approximate="tanh"), nn.Tanh()])
def test_the_activation_of_the_moment_counts(activation: nn.Module) -> None:
    model = sparsify(gpt2(), 0.7, backend="cpu")
    # Large enough that the two forms of GELU differ.
    x = 50 * torch.randn(20, 32, generator=generator(0, "x"))
    model[0].act = activation
    torch.testing.assert_close(model(x), model[0].original(x), rtol=1e-5, atol=2e-5)


@pytest.mark.usefixtures("always_fused")
def test_a_frozen_layer_gets_no_gradient() -> None:
    model = sparsify(gpt2(), 0.9, backend="cpu")
    model[0].c_fc.values.requires_grad_(False)
    x = torch.randn(20, 32, requires_grad=True)
    model(x).sum().backward()
    assert model[0].c_fc.values.grad is None
    assert model[0].c_proj.values.grad is not None


@pytest.mark.usefixtures("always_fused")
def test_probes_are_answered() -> None:
    model = sparsify(gpt2(), 0.9, backend="cpu")
    x = torch.randn(20, 32, generator=generator(0, "x"))
    want = everything(model, x)
    layers = sparse_layers(model)
    samples = {name: layer.topology.sample_inactive(9, generator(1, name)) for name, layer in layers.items()}
    probes = {name: SampledGradients(layers[name].key, units) for name, units in samples.items()}
    close(everything(model, x), want, 1e-5)
    found = {name: probe.gradient for name, probe in probes.items()}
    for probe in probes.values():
        probe.close()
    dense = densify(copy.deepcopy(model))
    everything(dense, x)
    for name, units in samples.items():
        rows, columns = units % layers[name].out_features, units // layers[name].out_features
        gradient_IO = dense.get_submodule(name).weight.grad
        torch.testing.assert_close(found[name], gradient_IO[columns, rows], rtol=1e-4, atol=1e-5)


def test_names_copies_and_the_way_back() -> None:
    plain = gpt2()
    names = set(plain.state_dict())
    model = sparsify(plain, 0.9)
    kept = {name.replace(".values", ".weight") for name in model.state_dict() if not name.endswith(".indices")}
    assert kept == names
    x = torch.randn(20, 32)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin[0].c_fc.values.zero_()
    assert twin[0].original.c_fc is twin[0].c_fc is not model[0].c_fc
    assert not torch.equal(twin(x), model(x))
    before = model(x)
    dense = densify(model)
    assert type(dense[0]) is GPT2MLP
    assert not any(isinstance(module, SparseLinear) for module in dense.modules())
    torch.testing.assert_close(dense(x), before, rtol=1e-4, atol=1e-5)


def test_dropout_still_drops() -> None:
    model = sparsify(gpt2(dropout=0.5), 0.95)
    x = torch.randn(50, 32)
    assert float((model(x) == 0).float().mean()) > 0.3
    model.eval()
    assert not bool((model(x) == 0).any())


@pytest.mark.slow
@pytest.mark.usefixtures("always_fused")
@pytest.mark.parametrize("keeps", ["nothing", "bfloat16"])
def test_it_compiles_to_one_graph(keeps: str) -> None:
    model = mlp_keeps(sparsify(gpt2(), 0.9, backend="cpu"), keeps)
    x = torch.randn(20, 32, generator=generator(0, "x"))
    want = everything(model, x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    close(everything(compiled, x), want, 1e-5)


@pytest.mark.usefixtures("always_fused")
@pytest.mark.parametrize("name", ["c_fc", "act", "c_proj"])
def test_a_forward_that_somebody_replaced_is_called(name: str) -> None:
    model, x = sparsify(gpt2(), 0.8), torch.randn(8, 32)
    before = model(x)
    part = model.get_submodule(f"0.{name}")
    forward = part.forward
    part.forward = lambda x: 2 * forward(x)  # type: ignore[method-assign]
    assert not torch.allclose(model(x), before)


@pytest.mark.usefixtures("always_fused")
def test_inputs_are_looked_at(fused_calls: list[int]) -> None:
    model = sparsify(gpt2(), 0.8, backend="cpu")
    with pytest.raises(ValueError, match="its last dimension must be 32"):
        model(torch.randn(8, 16))
    up = sparse_layers(model)["0.c_fc"]
    assert up.bias is not None
    before = model(torch.ones(8, 32))
    up.bias = nn.Parameter(torch.stack([up.bias.detach()] * 2, 1)[:, 0])
    assert not up.bias.is_contiguous()
    torch.testing.assert_close(model(torch.ones(8, 32)), before)
    torch.testing.assert_close(up(torch.ones(8, 32)), densify(nn.Sequential(copy.deepcopy(up)))(torch.ones(8, 32)))
    assert len(fused_calls) == 2
