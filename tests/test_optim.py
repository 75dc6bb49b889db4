"""AdamW against torch's, its steps per weight, its state, and who decays."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sparsae.config import ParameterizationConfig
from sparsae.core.randomness import generator
from sparsae.core.topology import Topology
from sparsae.errors import InputError
from sparsae.nn.linear import SparseLinear
from sparsae.optim import AdamW, _batches, _Own, parameter_groups, step_together
from sparsae.parameterization import Parameterization

SHAPES = [(7,), (3, 5), (2, 4, 4), ()]


def parameters(seed: int = 0, dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    rng = generator(seed, "parameters")
    return [nn.Parameter(torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)) for shape in SHAPES]


def give_gradients(params: list[nn.Parameter], step: int, seed: int = 0, skip: float = 0.0) -> None:
    """The same gradients for the same seed and step; a share `skip` of the parameters has none."""
    rng = generator(seed, "gradients", step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=rng, dtype=torch.float64).to(p.dtype)
        if float(torch.rand((), generator=rng)) < skip:
            p.grad = None


def run(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range, **how: Any) -> list[Tensor]:
    for step in steps:
        give_gradients(params, step, **how)
        optimizer.step()
    return [p.detach().clone() for p in params]


@given(
    st.booleans(),
    st.floats(1e-4, 0.1),
    st.sampled_from([0.0, 0.9, 0.99]),
    st.sampled_from([0.0, 0.95, 0.999, 0.99999]),
    st.sampled_from([0.0, 0.1]),
    st.integers(0, 2**20),
)
def test_it_equals_torch(per_weight: bool, lr: float, beta1: float, beta2: float, decay: float, seed: int) -> None:
    ours, theirs = parameters(seed), parameters(seed)
    settings: dict[str, Any] = {"lr": lr, "betas": (beta1, beta2), "eps": 1e-8, "weight_decay": decay}
    got = run(AdamW(ours, per_weight_step=per_weight, **settings), ours, range(12), seed=seed, skip=0.2)
    expected = run(torch.optim.AdamW(theirs, **settings), theirs, range(12), seed=seed, skip=0.2)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("per_weight", [False, True])
def test_it_equals_torch_in_float32_from_the_first_step_on(per_weight: bool) -> None:
    # At beta2 = 0.999 a bias correction that is taken in float32 as 1 - 0.999 is already wrong by 5e-5.
    ours, theirs = parameters(dtype=torch.float32), parameters(dtype=torch.float32)
    for step in range(3):
        got = run(AdamW(ours, lr=0.1, per_weight_step=per_weight), ours, range(step, step + 1))
        expected = run(torch.optim.AdamW(theirs, lr=0.1), theirs, range(step, step + 1))
        torch.testing.assert_close(got, expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("per_weight", [False, True])
def test_updating_all_parameters_together_is_the_same(per_weight: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # As on a GPU, where one call updates a whole group.
    ours, theirs = parameters(), parameters()
    expected = run(torch.optim.AdamW(theirs, weight_decay=0.1), theirs, range(5), skip=0.3)
    monkeypatch.setattr("sparsae.optim._batches", lambda together: [together] if together else [])
    got = run(AdamW(ours, weight_decay=0.1, per_weight_step=per_weight), ours, range(5), skip=0.3)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_small_parameters_are_updated_together_as_far_as_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsae.optim._TOGETHER", 100)
    monkeypatch.setattr("sparsae.optim._CACHED", 10)

    def owned(tensors: list[Tensor]) -> list[_Own]:
        return [_Own(tensor, {}, 0.1, 0.0) for tensor in tensors]

    def sizes(device: str) -> list[list[int]]:
        made = [torch.empty(n, device=device) for n in (60, 40, 1, 300, 5, 95, 6)]
        return [[each.p.numel() for each in batch] for batch in _batches(owned(made))]

    assert sizes("meta") == [[60, 40], [1], [300], [5, 95], [6]]
    assert sizes("cpu") == [[60], [40], [1], [300], [5], [95], [6]]
    monkeypatch.setattr("sparsae.optim._CACHED", 41)
    assert sizes("cpu") == [[60], [40, 1], [300], [5], [95], [6]]
    both = [torch.empty(2), torch.empty(2, device="meta"), torch.empty(2, device="meta"), torch.empty(2)]
    assert [len(batch) for batch in _batches(owned(both))] == [1, 2, 1]


@pytest.mark.parametrize("ramp", [0, 3])
def test_several_optimizers_together_are_each_one_alone(ramp: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, with rates, decays and ramps of their own."""

    def made() -> tuple[list[AdamW], list[list[nn.Parameter]]]:
        optimizers, all_parameters = [], []
        for number in range(3):
            own = parameters(number, dtype=torch.float32)
            sparse = {
                "params": own[:2],
                "per_weight_step": True,
                "lr": 0.1 / (1 + number),
                "weight_decay": 0.1 * number,
            }
            optimizer = AdamW([sparse, {"params": own[2:]}], lr=0.01)
            if ramp:
                optimizer.param_groups[0].update(ramp=ramp + number % 2, ramp_first=number == 2)
            optimizers.append(optimizer)
            all_parameters.append(own)
        return optimizers, all_parameters

    alone, together = made(), made()
    for step in range(6):
        for _, all_parameters in (alone, together):
            for number, own in enumerate(all_parameters):
                give_gradients(own, step, seed=number, skip=0.2)
        monkeypatch.setattr("sparsae.optim._CACHED", 0)
        for optimizer in alone[0]:
            optimizer.step()
        monkeypatch.setattr("sparsae.optim._CACHED", 2**20)
        step_together(together[0])
        for mine, theirs in zip(alone[1], together[1], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_groups_of_both_kinds_and_a_changing_rate() -> None:
    ours, theirs = parameters(), parameters()
    mine = AdamW([{"params": ours[:2], "per_weight_step": True}, {"params": ours[2:], "weight_decay": 0.0}], lr=1.0)
    other = torch.optim.AdamW([{"params": theirs[:2]}, {"params": theirs[2:], "weight_decay": 0.0}], lr=1.0)
    for step in range(6):
        for group in [*mine.param_groups, *other.param_groups]:
            group["lr"] = 0.01 * (step + 1)
        got, expected = run(mine, ours, range(step, step + 1)), run(other, theirs, range(step, step + 1))
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


def test_the_state_is_what_surgery_expects() -> None:
    params = parameters(dtype=torch.float32)
    optimizer = AdamW([{"params": params[:2], "per_weight_step": True}, {"params": params[2:]}])
    run(optimizer, params, range(3))
    for i, p in enumerate(params):
        state = optimizer.state[p]
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == p.shape
        assert state["step"].dtype == (torch.int32 if i < 2 else torch.float32)
        assert state["step"].shape == (p.shape if i < 2 else ())
        assert (state["step"] == 3).all()


def test_a_regrown_weight_gets_the_update_of_a_new_one() -> None:
    lr, betas = 0.01, (0.9, 0.999)

    def regrown_update(per_weight: bool) -> tuple[float, float]:
        params = [nn.Parameter(torch.randn(50, generator=generator(0, "values"), dtype=torch.float64))]
        optimizer = AdamW(params, lr=lr, betas=betas, weight_decay=0.0, per_weight_step=per_weight)
        run(optimizer, params, range(5000))
        state = optimizer.state[params[0]]
        for key in ("exp_avg", "exp_avg_sq", *(["step"] if per_weight else [])):
            state[key][7] = 0
        before = params[0].detach().clone()
        give_gradients(params, 5000)
        assert params[0].grad is not None
        optimizer.step()
        return float((before - params[0].detach())[7]), math.copysign(lr, float(params[0].grad[7]))

    update, fresh = regrown_update(per_weight=True)
    assert update == pytest.approx(fresh, rel=1e-6)
    update, fresh = regrown_update(per_weight=False)
    assert update == pytest.approx(3.17 * fresh, rel=0.01)


def test_without_a_gradient_nothing_happens() -> None:
    params = parameters()
    before = [p.detach().clone() for p in params]
    optimizer = AdamW(params, weight_decay=0.5)
    optimizer.step()
    assert not optimizer.state
    torch.testing.assert_close([p.detach() for p in params], before, rtol=0, atol=0)


def test_a_closure_is_run_with_gradients() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = AdamW([p])

    def closure() -> float:
        loss = p.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 3.0
    assert (p < 1).all()


def test_a_restored_optimizer_goes_on_as_the_one_that_was_saved() -> None:
    def make() -> tuple[list[nn.Parameter], AdamW]:
        params = parameters(dtype=torch.float32)
        return params, AdamW([{"params": params[:2], "per_weight_step": True}, {"params": params[2:]}], lr=0.05)

    params, optimizer = make()
    run(optimizer, params, range(4))
    optimizer.state[params[0]]["step"][2] = 0
    saved = optimizer.state_dict()

    others, restored = make()
    for p, other in zip(params, others, strict=True):
        other.data = p.detach().clone()
    restored.load_state_dict(saved)
    for p, other in zip(params, others, strict=True):
        for key, value in optimizer.state[p].items():
            assert restored.state[other][key].dtype == value.dtype
            torch.testing.assert_close(restored.state[other][key], value, rtol=0, atol=0)
        # In-place updates of one must not count for the other.
        assert restored.state[other]["step"].data_ptr() != optimizer.state[p]["step"].data_ptr()
    assert restored.param_groups[0]["per_weight_step"] is True
    expected = run(optimizer, params, range(4, 8))
    torch.testing.assert_close(run(restored, others, range(4, 8)), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": -1.0},
        {"lr": math.nan},
        {"betas": (1.0, 0.9)},
        {"betas": (0.9, -0.1)},
        {"eps": 0.0},
        {"weight_decay": -1.0},
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be a number"):
        AdamW(parameters(), **settings)


class Small(nn.Module):
    """An embedding tied to the head, a sparse layer of weights, one of blocks, a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.weights = SparseLinear(Topology.random((8, 8), 20, generator(0)), torch.ones(20), torch.zeros(8))
        self.blocks = SparseLinear(Topology.random((8, 8), 3, generator(0), (4, 2)), torch.ones(3, 4, 2))
        self.dense = nn.Linear(8, 8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight


def test_matrices_and_connections_decay_and_vectors_do_not() -> None:
    model = Small()
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, 0.1)
    assert [[names[id(p)] for p in group["params"]] for group in groups] == [
        ["weights.values", "blocks.values"],
        ["embedding.weight", "dense.weight"],
        ["norm.weight", "norm.bias", "weights.bias", "dense.bias"],
    ]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1, 0.0]
    optimizer = AdamW(groups)
    assert [group["per_weight_step"] for group in optimizer.param_groups] == [True, False, False]


def test_a_dense_model_has_no_empty_group() -> None:
    groups = parameter_groups(nn.Linear(3, 3), 0.1)
    assert [len(group["params"]) for group in groups] == [1, 1]


@pytest.mark.parametrize("per_weight", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_goes_on_from_a_state_of_torchs(per_weight: bool, dtype: torch.dtype) -> None:
    theirs = parameters(dtype=dtype)
    other = torch.optim.AdamW(theirs, lr=0.03, weight_decay=0.1)
    run(other, theirs, range(5))
    ours = [nn.Parameter(p.detach().clone()) for p in theirs]
    optimizer = AdamW(ours, lr=0.5, per_weight_step=per_weight)
    optimizer.load_state_dict(other.state_dict())
    assert optimizer.param_groups[0]["per_weight_step"] is per_weight
    assert optimizer.param_groups[0]["lr"] == 0.03
    for p in ours:
        step = optimizer.state[p]["step"]
        assert step.dtype == (torch.int32 if per_weight else torch.float32)
        assert step.shape == (p.shape if per_weight else ())
        assert (step == 5).all()
    tolerance = {"rtol": 2e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-6, "atol": 2**-6}
    got, expected = run(optimizer, ours, range(5, 9)), run(other, theirs, range(5, 9))
    torch.testing.assert_close(got, expected, **tolerance)
    # And its own state still fits a torch optimizer that counts per parameter.
    if not per_weight:
        other.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    ("kind", "settings", "named"),
    [
        (torch.optim.AdamW, {"amsgrad": True}, "amsgrad"),
        (torch.optim.AdamW, {"maximize": True}, "maximize"),
        (torch.optim.Adam, {"weight_decay": 0.1}, "Adam's weight decay"),
    ],
)
def test_a_state_that_would_be_read_otherwise_is_refused(kind: Any, settings: dict[str, Any], named: str) -> None:
    theirs = parameters()
    other = kind(theirs, lr=0.1, **settings)
    run(other, theirs, range(1))
    optimizer = AdamW(parameters())
    with pytest.raises(InputError, match=f"of an AdamW with {named}"):
        optimizer.load_state_dict(other.state_dict())
    assert not optimizer.state


@pytest.mark.parametrize("per_weight", [False, True])
def test_a_tensor_is_a_learning_rate(per_weight: bool) -> None:
    ours, theirs = parameters(), parameters()
    rate = torch.tensor(0.05, dtype=torch.float64)
    optimizer = AdamW(ours, lr=rate, per_weight_step=per_weight)
    expected = run(AdamW(theirs, lr=0.05, per_weight_step=per_weight), theirs, range(3))
    torch.testing.assert_close(run(optimizer, ours, range(3)), expected, rtol=1e-12, atol=1e-12)
    rate.zero_()
    assert optimizer.param_groups[0]["lr"] is rate
    still = [p.detach().clone() for p in ours]
    torch.testing.assert_close(run(optimizer, ours, range(3, 5)), still, rtol=0, atol=0)
    with pytest.raises(ValueError, match="one element"):
        AdamW(ours, lr=torch.ones(2))


def test_groups_of_a_parameterization_scale_a_tensor_each_for_itself() -> None:
    model = Small()
    supar = Parameterization(ParameterizationConfig(name="supar", base_width=4), 8, 1)
    plain = parameter_groups(model, 0.1, supar, lr=0.01)
    groups = parameter_groups(model, 0.1, supar, lr=torch.tensor(0.01, dtype=torch.float64))
    assert len({id(group["lr"]) for group in groups}) == len(groups)
    assert [float(group["lr"]) for group in groups] == pytest.approx([group["lr"] for group in plain])


@given(st.integers(0, 2**20), st.booleans(), st.sampled_from([(0.9, 0.95), (0.0, 0.999)]))
def test_torchs_fused_kernel_updates_the_same(seed: int, together: bool, betas: tuple[float, float]) -> None:
    """What a GPU takes for parameters that count their own steps, on a CPU, with rates of their own."""
    ours, theirs = (parameters(seed, dtype=torch.float32) for _ in range(2))
    mine, other = (
        AdamW([{"params": own[:2], "weight_decay": 0.1}, {"params": own[2:], "lr": 0.03}], lr=0.01, betas=betas)
        for own in (ours, theirs)
    )
    expected = run(other, theirs, range(5), seed=seed, skip=0.2)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("sparsae.optim._fits_one_launch", lambda *_: True)
        patched.setattr("sparsae.optim._CACHED", 2**20 if together else 0)
        got = run(mine, ours, range(5), seed=seed, skip=0.2)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    for p, q in zip(ours, theirs, strict=True):
        assert mine.state[p]["step"] == other.state[q]["step"]
        torch.testing.assert_close(mine.state[p]["exp_avg_sq"], other.state[q]["exp_avg_sq"], rtol=1e-5, atol=1e-8)


def test_a_group_may_have_a_ramp_without_more() -> None:
    p = nn.Parameter(torch.ones(4))
    optimizer = AdamW([{"params": [p], "ramp": 10}], per_weight_step=True)
    p.grad = torch.ones(4)
    optimizer.step()
    assert torch.equal(optimizer.state[p]["step"], torch.ones(4, dtype=torch.int32))
    assert float(optimizer.state[p]["total"]) == 1.0


def test_complex_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match=r"real parameters: give it torch\.view_as_real"):
        AdamW([nn.Parameter(torch.tensor([1 + 1j]))])
    optimizer = AdamW([nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match="real parameters"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.tensor([1j]))]})
    assert len(optimizer.param_groups) == 1
