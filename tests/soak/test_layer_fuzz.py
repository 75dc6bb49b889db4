"""Layers in anybody's hands: random sequences of what people do to a module, each against a dense twin.

The interpreter must survive, so the examples run in child processes; every output and gradient is the dense twin's, or
there was one clear error.
"""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from sparsae.core.randomness import generator
from sparsae.core.topology import Topology
from sparsae.errors import InputError
from sparsae.kernels.probe import LargestGradients, SampledGradients
from sparsae.nn.linear import sparse_layers
from sparsae.nn.sparsify import densify, sparsify

pytestmark = pytest.mark.soak

EXAMPLES, BATCH = 2400, 60
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# What may be said: in the package's words, or in torch's about dtypes that nn.Linear refuses in the same place.
CLEAR = (InputError, ValueError)


def _model(seed: int, unit: tuple[int, int], dtype: torch.dtype, backend: str, sparsity: float) -> nn.Module:
    rng = generator(seed, "fuzz")
    options: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    model = nn.Sequential(nn.Linear(16, 24, **options), nn.Tanh(), nn.Linear(24, 16, **options))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=rng, **options) / 4)
    model = model.to(dtype)
    return sparsify(model, sparsity, unit=unit, backend=backend, seed=seed, budget="uniform")


# Each takes (model, another model, a random generator) and gives the model to continue with.
def _write(model: nn.Module, other: nn.Module, rng: torch.Generator) -> nn.Module:
    for mine, theirs in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        if mine.shape == theirs.shape:
            mine.data.copy_(theirs)
    return model


def _garbage(model: nn.Module, other: nn.Module, rng: torch.Generator) -> nn.Module:
    layer = sparse_layers(model)["0"]
    high = int(torch.randint(1, 2**31 - 1, (), generator=rng, device="cpu"))
    layer.indices.data.copy_(torch.randint(-high, high, layer.indices.shape, generator=rng, device="cpu"))
    return model


def _float_indices(model: nn.Module, other: nn.Module, rng: torch.Generator) -> nn.Module:
    layer = sparse_layers(model)["0"]
    layer.indices = layer.indices.float() * 0.9
    return model


def _load(model: nn.Module, other: nn.Module, rng: torch.Generator) -> nn.Module:
    model.load_state_dict(other.state_dict())
    return model


def _assign(model: nn.Module, other: nn.Module, rng: torch.Generator) -> nn.Module:
    model.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)
    return model


def _torn(model: nn.Module, other: nn.Module, rng: torch.Generator) -> nn.Module:
    state = copy.deepcopy(other.state_dict())
    state["0.indices"] = state["0.indices"][torch.randperm(state["0.indices"].numel(), generator=rng, device="cpu")]
    model.load_state_dict(state)
    return model


def _new_topology(model: nn.Module, other: nn.Module, rng: torch.Generator) -> nn.Module:
    layer = sparse_layers(model)["2"]
    topology = Topology.random((16, 24), max(1, layer.topology.count - 1), rng, layer.unit)
    values = torch.randn(topology.values_shape, generator=rng, dtype=torch.float32, device="cpu")
    layer.set_topology(topology, values.to(layer.values.dtype))
    return model


def _averaged(model: nn.Module, other: nn.Module, rng: torch.Generator) -> nn.Module:
    with torch.device("cpu"):  # its counter would be on the default device
        averaged = AveragedModel(model)
    if [p.shape for p in model.parameters()] == [p.shape for p in other.parameters()]:  # else torch's own error
        averaged.update_parameters(other)
    return averaged.module


def _pickled(model: nn.Module, other: nn.Module, rng: torch.Generator) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def _saved(model: nn.Module, other: nn.Module, rng: torch.Generator) -> nn.Module:
    data = io.BytesIO()
    torch.save(model, data)
    data.seek(0)
    return torch.load(data, weights_only=False)


def _back_and_forth(model: nn.Module, other: nn.Module, rng: torch.Generator) -> nn.Module:
    dtype = next(model.parameters()).dtype
    return model.double().to(torch.float32).to(dtype)


def _swapped(model: nn.Module, other: nn.Module, rng: torch.Generator) -> nn.Module:
    torch.utils.swap_tensors(sparse_layers(model)["0"].indices, sparse_layers(other)["0"].indices)
    return model


def _frozen(model: nn.Module, other: nn.Module, rng: torch.Generator) -> nn.Module:
    sparse_layers(model)["0"].values.requires_grad_(False)
    return model


def _clone_output(module: nn.Module, args: Any, y: Tensor) -> Tensor:
    return y.clone()


def _look_on(module: nn.Module, dx: Any, dy: Any) -> None:
    return None


def _watched(model: nn.Module, other: nn.Module, rng: torch.Generator) -> nn.Module:
    model[0].register_forward_hook(_clone_output)  # type: ignore[index]
    model[2].register_full_backward_hook(_look_on)  # type: ignore[index]
    return model


ACTIONS: list[Callable[[nn.Module, nn.Module, torch.Generator], nn.Module]] = [
    *(_write, _garbage, _float_indices, _load, _assign, _torn, _new_topology, _averaged),
    *(_pickled, _saved, _back_and_forth, _swapped, _frozen, _watched, lambda m, o, r: copy.deepcopy(m)),
]
WAYS = ["plain", "checkpoint", "reentrant", "offload", "copies", "functional", "inference", "no_grad", "weight"]
CASES = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 10**6),
        "unit": st.sampled_from([(1, 1), (4, 4), (2, 8)]),
        "dtype": st.sampled_from(DTYPES),
        "backend": st.sampled_from(["auto", "reference"]),
        "sparsities": st.tuples(st.sampled_from([0.5, 0.8]), st.sampled_from([0.5, 0.8])),
        "default": st.sampled_from([None, *DTYPES]),
        "meta": st.booleans(),
        "actions": st.lists(st.integers(0, len(ACTIONS) - 1), max_size=4),
        "way": st.sampled_from(WAYS),
        "probe": st.sampled_from([None, "sampled", "last", "sum"]),
        "layout": st.sampled_from(["rows", "columns", "strided", "expanded", "empty", "wrong", "batched"]),
        "autocast": st.booleans(),
    }
)


def _input(layout: str, dtype: torch.dtype, seed: int) -> Tensor:
    x = torch.randn(6, 16, generator=generator(seed, "x"), dtype=torch.float32, device="cpu").to(dtype)
    made = {
        "rows": x,
        "columns": x.T.contiguous().T,
        "strided": torch.cat([x, x], dim=1)[:, ::2],
        "expanded": x[:1].expand(6, 16),
        "empty": x[:0],
        "wrong": x[:, :8].reshape(3, 16)[:, :8],
        "batched": x.reshape(2, 3, 16),
    }
    return made[layout].detach().requires_grad_()


def _run(model: nn.Module, x: Tensor, way: str) -> Tensor:
    if way == "checkpoint":
        return checkpoint(model, x, use_reentrant=False)
    if way == "reentrant":
        return checkpoint(model, x, use_reentrant=True)
    if way == "functional":
        return functional_call(model, {name: t.clone() for name, t in model.state_dict(keep_vars=True).items()}, (x,))
    if way == "weight" and x.shape[-1] == 16:
        hidden = torch.tanh(x @ model[0].weight.T + model[0].bias)  # type: ignore[index]
        return nn.functional.linear(hidden, model[2].weight, model[2].bias)  # type: ignore[index]
    return model(x)


def _close(got: Tensor, want: Tensor, exact: bool) -> None:
    """Sums of half precision are as exact as the largest of what they are sums of."""
    got, want = got.double(), want.double()
    largest = float(want.abs().max()) if want.numel() else 0.0
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if exact else {"rtol": 0.1, "atol": 0.1 * (1 + largest)}
    torch.testing.assert_close(got, want, **tolerance)


def _check(case: dict[str, Any]) -> str:
    """Runs one example: "equal", or "refused: ..." in clear words; raises for anything else."""
    rng = generator(case["seed"], "actions")
    sparsity, other_sparsity = case["sparsities"]
    model = _model(case["seed"], case["unit"], case["dtype"], case["backend"], sparsity)
    other = _model(case["seed"] + 1, case["unit"], case["dtype"], case["backend"], other_sparsity)
    x = _input(case["layout"], case["dtype"], case["seed"])
    try:
        if case["layout"] != "wrong":
            model(x), other(x)
        for number in case["actions"]:
            model = ACTIONS[number](model, other, rng)
        for module in model.modules():
            module._forward_hooks.clear() if case["way"] == "weight" else None
        # The twin is made of what the layers say they are; where they refuse to say, they must refuse to compute.
        try:
            twin = densify(copy.deepcopy(model))
        except CLEAR as refusal:
            with pytest.raises(CLEAR):
                model(x)
            return f"refused: {refusal}"
        layers, probes = sparse_layers(model), {}
        if case["probe"] is not None:
            for name, layer in layers.items():
                units = layer.topology.sample_inactive(3, rng)
                probes[name] = (
                    SampledGradients(layer.key, units)
                    if case["probe"] == "sampled"
                    else LargestGradients(layer.key, 10**6, case["probe"])
                )
        with ExitStack() as stack:
            if case["way"] in ("inference", "no_grad"):
                stack.enter_context(torch.inference_mode() if case["way"] == "inference" else torch.no_grad())
            if case["way"] == "offload":
                stack.enter_context(save_on_cpu())
            if case["way"] == "copies":
                stack.enter_context(saved_tensors_hooks(lambda t: t.clone(), lambda t: t))
            stack.enter_context(torch.autocast("cpu", torch.bfloat16, enabled=case["autocast"]))
            y, mine = _run(model, x, case["way"]), x.grad
        with torch.autocast("cpu", torch.bfloat16, enabled=case["autocast"]):
            twin_x = x.detach().clone().requires_grad_()
            want = twin(twin_x)
    except CLEAR as error:
        return f"refused: {error}"
    assert y.dtype == want.dtype
    assert y.shape == want.shape
    exact = case["dtype"] in (torch.float32, torch.float64) and not case["autocast"]
    _close(y.detach().clone(), want.detach(), exact)
    if not y.requires_grad:
        return "equal"
    assert mine is None
    y.double().square().sum().backward()
    want.double().square().sum().backward()
    _close(x.grad, twin_x.grad, exact)
    for name, layer in sparse_layers(model).items():
        gradient_OI = twin.get_submodule(name).weight.grad
        if not layer.values.requires_grad or case["way"] == "functional":
            continue
        assert layer.values.grad is not None
        (b_out, b_in), (rows, columns) = layer.unit, layer.topology.grid
        blocks = gradient_OI.reshape(rows, b_out, columns, b_in).permute(2, 0, 1, 3).reshape(-1, b_out, b_in).double()
        active = blocks[layer.topology.indices.long()].reshape(layer.values.shape)
        _close(layer.values.grad, active, exact)
        if name in probes:
            probe = probes[name]
            probe.close()
            assert probe.gradient is not None
            assert probe.units is not None
            want_there = blocks[probe.units.long()]
            if case["probe"] == "sampled":
                _close(probe.gradient, want_there.reshape(probe.gradient.shape), exact)
            else:
                _close(probe.gradient, want_there.flatten(1).norm(dim=1), exact)
    return "equal"


def _batch(cases: list[dict[str, Any]], answers: Any) -> None:
    """In a child process: the answers, one at a time, so that the parent knows which example ended it."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for case in cases:
        try:
            torch.set_default_dtype(case["default"] or torch.float32)
            torch.set_default_device("meta" if case["meta"] else None)
            answer = _check(case)
        except BaseException as error:
            answer = f"failed: {type(error).__name__}: {error}"
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_default_device(None)
        answers.send(answer)
    answers.close()


seen: dict[str, int] = {}


@settings(max_examples=EXAMPLES // BATCH, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(st.lists(CASES, min_size=BATCH, max_size=BATCH))
def test_no_crash_and_no_wrong_number(cases: list[dict[str, Any]]) -> None:
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_batch, args=(cases, there))
    child.start()
    there.close()
    for case in cases:
        try:
            answer = here.recv()
        except EOFError:
            child.join()
            pytest.fail(f"the interpreter ended with {child.exitcode} in {case}")
        assert not answer.startswith("failed"), f"{answer} in {case}"
        seen[answer[:7]] = seen.get(answer[:7], 0) + 1
    child.join()
    assert child.exitcode == 0


def test_both_kinds_of_answer_were_seen() -> None:
    assert sum(seen.values()) >= 2000
    assert min(seen["equal"], seen["refused"]) > 200
