"""What a fused MLP keeps of its hidden layer from forward to backward."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from sparsae.config.load import resolve
from sparsae.core.randomness import generator
from sparsae.errors import InputError
from sparsae.kernels.cpu import native
from sparsae.nn.mlp import FusedMLP, mlp_keeps
from sparsae.nn.sparsify import densify, sparsify
from sparsae.train.model import model_of
from tests.support.mlp_cases import Case, cases, close, everything, gpt2, llama

pytestmark = pytest.mark.skipif(native.absence() is not None, reason=str(native.absence()))


@given(cases)
def test_a_hidden_layer_that_is_kept_against_float64(isa: str, case: Case) -> None:
    kept = case.run(torch.float32)
    close(kept, case.exact(), 2e-5)
    rounded = case.run(torch.bfloat16)
    assert torch.equal(rounded[0], kept[0])
    close(rounded, case.exact(), 1e-2)


@given(cases)
def test_one_kept_in_float32_is_the_one_computed_again(isa: str, case: Case) -> None:
    """As backward computes it, whose tiles may be smaller than those of a forward pass that keeps nothing."""
    kept, again = case.run(torch.float32), case.run()
    close(kept[:1], again[:1], 2e-5)
    assert all(torch.equal(a, b) for a, b in zip(kept[1:], again[1:], strict=True))


@pytest.mark.usefixtures("always_fused")
@pytest.mark.parametrize(("keeps", "bytes_each"), [("nothing", 0), ("bfloat16", 2), ("float32", 4)])
@pytest.mark.parametrize("gated", [False, True])
def test_what_is_kept_is_what_the_setting_says(keeps: str, bytes_each: int, gated: bool) -> None:
    model = mlp_keeps(sparsify(llama() if gated else gpt2(), 0.7, backend="cpu"), keeps)
    x = torch.randn(3, 20, 32, generator=generator(0, "x"))
    hidden = 2 * 48 if gated else 128
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    kept = [tensor for tensor in saved if tensor.shape == (60, hidden)]
    assert sum(tensor.nbytes for tensor in kept) == bytes_each * 60 * hidden
    assert not any(tensor.requires_grad for tensor in kept)
    want = everything(nn.Sequential(model[0].original), x)
    close([y.detach()], want[:1], 1e-5)
    close(everything(model, x), want, 1e-2 if keeps == "bfloat16" else 1e-5)


@pytest.mark.usefixtures("always_fused")
def test_nothing_is_kept_where_nothing_is_differentiated() -> None:
    model = mlp_keeps(sparsify(gpt2(), 0.7, backend="cpu"), "float32")
    x = torch.randn(20, 32, generator=generator(0, "x"))
    most: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if func is torch.ops.sparsae.fused_mlp.default:
                most.append(result[1].numel())
            return result

    with Watch():
        model(x)
        with torch.no_grad():
            model(x)
    assert most == [20 * 128, 0]


@pytest.mark.usefixtures("always_fused")
@pytest.mark.parametrize("keeps", ["nothing", "bfloat16", "float32"])
def test_checkpointed_activations_give_the_same_gradients(keeps: str) -> None:
    model = mlp_keeps(sparsify(gpt2(), 0.7, backend="cpu"), keeps)
    x = torch.randn(20, 32, generator=generator(0, "x"))

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = checkpoint(self.inner, x, use_reentrant=False)
            return result

    want = everything(model, x)
    assert all(torch.equal(a, b) for a, b in zip(everything(Checkpointed(), x), want, strict=True))


def test_an_mlp_keeps_one_of_three_things() -> None:
    model = sparsify(gpt2(), 0.9)
    assert model[0].keeps == resolve().training.mlp_keeps == "nothing"
    assert mlp_keeps(model, "bfloat16") is model
    assert copy.deepcopy(model)[0].keeps == "bfloat16"
    with pytest.raises(InputError, match="mlp_keeps: must be one of nothing, bfloat16, float32, not 'float16'"):
        mlp_keeps(model, "float16")
    assert not hasattr(densify(model)[0], "keeps")


def test_the_mlps_of_a_run_keep_what_its_settings_say() -> None:
    config = resolve(overrides=["training.mlp_keeps=bfloat16", "model.layers=1"])
    model = model_of(config, 64, 0, torch.device("cpu"))
    assert [module.keeps for module in model.modules() if isinstance(module, FusedMLP)] == ["bfloat16"]
