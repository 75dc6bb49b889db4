"""Experts whose weights are one parameter: what their layers compute, and mixtures of experts that train."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from sparsae import AdamW, InputError, Sparsifier, SparsifierConfig, densify, sparse_layers, sparsify, summary
from sparsae.config.teacher import TeacherConfig
from sparsae.nn.conversion import dense_matrices, sparse_modules
from sparsae.nn.dense import gathered
from sparsae.nn.kinds.experts import SparseExperts
from sparsae.nn.linear import SparseLinear
from sparsae.rules.gse import GseConfig
from sparsae.rules.rigl import RiglConfig
from sparsae.rules.set import SetConfig
from tests.support.architectures import ARCHITECTURES
from tests.support.masked_twin import require_equal
from tests.support.versions import IS_OLD

NAMES = ["Mixtral", "Qwen3-MoE", "gpt_oss"]
TOKENS = torch.randint(3, 48, (4, 16), generator=torch.Generator().manual_seed(3))


def build(name: str) -> Any:
    model: Any = ARCHITECTURES[name].build()
    model.set_experts_implementation("eager")
    return model


def experts_of(name: str) -> nn.Module:
    """The first block's experts with random weights and biases, in float64."""
    experts = build(name).model.layers[0].mlp.experts.double()
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_()
    return nn.ModuleDict({"experts": experts})


def routed(count: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, and where they go: never to expert 1, and here and there to one that does not exist."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(20, 32, dtype=torch.float64, generator=rng, requires_grad=True)
    experts = torch.stack([torch.tensor([0, 2, 3])[torch.randperm(3, generator=rng)[:2]] for _ in range(20)])
    experts[3, 0] = count
    return x, experts, torch.rand(20, 2, dtype=torch.float64, generator=rng)


@pytest.mark.parametrize("name", NAMES)
def test_experts_compute_what_their_dense_twins_do(name: str) -> None:
    model = sparsify(experts_of(name), 0.7)
    x, experts, weights = routed(-1 if name == "gpt_oss" else 4)
    if name == "gpt_oss" or IS_OLD:  # whose one_hot knows no expert that does not exist
        experts[3, 0] = 2
    twin = require_equal(model, lambda m: m.experts(x, experts, weights).sin().sum())  # type: ignore[operator]
    dense = experts_of(name).experts
    assert type(twin.experts) is type(dense)
    assert vars(twin.experts).keys() == vars(dense).keys()
    assert [n for n, _ in twin.named_parameters()] == [n for n, _ in experts_of(name).named_parameters()]
    for layer in sparse_layers(model).values():
        assert layer.values.grad is not None
    with torch.no_grad():
        got = model.eval().experts(x, experts, weights)  # type: ignore[operator]
        torch.testing.assert_close(got, twin.experts(x, experts, weights))  # type: ignore[operator]


@pytest.mark.parametrize("name", NAMES)
def test_a_mixture_has_the_gradients_of_its_masked_twin(name: str) -> None:
    model = sparsify(build(name), 0.7).double()
    # Norms and routers of these models compute in float32, whatever the model's dtype is.
    require_equal(model, lambda m: m(input_ids=TOKENS, labels=TOKENS).loss, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("start", ["random", "magnitude"])
@pytest.mark.parametrize("unit", [(1, 1), (4, 4)])
def test_active_weights_of_experts_stay_and_can_be_read(name: str, start: Any, unit: tuple[int, int]) -> None:
    dense, model = experts_of(name).experts, sparsify(copy.deepcopy(experts_of(name)), 0.5, start=start, unit=unit)
    experts = model.experts
    assert isinstance(experts, SparseExperts)
    for weight in ("gate_up_proj", "down_proj"):
        masks = [experts.get_submodule(f"{e}.{weight}").topology.to_mask() for e in range(4)]  # type: ignore[union-attr]
        mask = torch.stack([mask.T if name == "gpt_oss" else mask for mask in masks])
        whole = dict(dense.named_parameters())[weight]
        read = getattr(experts, weight)
        assert read.shape == whole.shape
        assert (read.dtype, read.device) == (whole.dtype, whole.device)
        assert torch.equal(read + 0, whole * mask)
    with pytest.raises(AttributeError, match="no attribute 'up_proj'"):
        experts.up_proj  # noqa: B018


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "topology", [RiglConfig(every=3), GseConfig(every=3), SetConfig(every=3)], ids=["rigl", "gse", "set"]
)
def test_a_mixture_trains_with_exact_nnz_while_connections_move(name: str, topology: Any) -> None:
    model = build(name)
    stacked = [p.numel() for n, p in model.named_parameters() if n.endswith(("gate_up_proj", "down_proj"))]
    linear = [m.weight.numel() for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    sparsify(model, 0.7, seed=1)
    layers = sparse_layers(model)
    assert len([n for n in layers if ".experts." in n]) == 2 * 2 * 4
    assert not any(parameter.dim() == 3 for parameter in model.parameters())
    nnz = round(0.3 * (sum(stacked) + sum(linear)))
    adam = AdamW(model.parameters(), lr=3e-3)
    sparsifier = Sparsifier(model, adam, SparsifierConfig(steps=12, topology=topology))
    before = {n: layer.topology.to_mask() for n, layer in layers.items()}
    losses = []
    for _ in range(12):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        adam.zero_grad()
        loss.backward()
        sparsifier.before_step()
        adam.step()
        sparsifier.after_step()
        losses.append(float(loss.detach()))
        assert sparsifier.nnz == nnz
    assert losses[-1] < 0.95 * losses[0]
    assert all(not torch.equal(layer.topology.to_mask(), before[n]) for n, layer in layers.items())

    model.eval()
    with torch.no_grad():
        wanted = model(input_ids=TOKENS).logits
        again = sparsify(build(name), 0.7, seed=2).eval()
        again.load_state_dict(model.state_dict())
        assert torch.equal(again(input_ids=TOKENS).logits, wanted)
        plain = build(name).eval()
        plain.load_state_dict(densify(model).state_dict())
        torch.testing.assert_close(plain(input_ids=TOKENS).logits, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_an_optimizer_follows_experts_both_ways(name: str) -> None:
    model = experts_of(name)
    adam = AdamW(model.named_parameters(), lr=0.01, per_weight_step=True)
    x, experts, weights = routed(2)
    model.experts(x, experts, weights).square().sum().backward()  # type: ignore[operator]
    adam.step()
    names, parameters = adam.param_groups[0]["param_names"], adam.param_groups[0]["params"]
    before = list(names)
    moments = {n: adam.state[p]["exp_avg"].clone() for n, p in model.named_parameters()}
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    sparsify(model, 0.5, optimizer=adam)
    assert names == [n for n, _ in sorted(model.named_parameters(), key=lambda item: _place(item[1], parameters))]
    for layer_name, layer in sparse_layers(model).items():
        expert, weight = layer_name.split(".")[1:]
        whole = moments[f"experts.{weight}"][int(expert)]
        matrix = whole.T if name == "gpt_oss" else whole
        assert torch.equal(adam.state[layer.values]["exp_avg"], gathered(matrix, layer.topology))
    masks = {n: layer.topology.to_mask() for n, layer in sparse_layers(model).items()}
    densify(model, optimizer=adam)
    assert names == before
    assert {id(p) for p in parameters} == {id(p) for p in model.parameters()}
    for n, parameter in model.named_parameters():
        mask: Any = 1.0
        if not n.endswith("bias"):
            weight = n.split(".")[1]
            each = [masks[f"experts.{e}.{weight}"] for e in range(4)]
            mask = torch.stack([m.T if name == "gpt_oss" else m for m in each])
        assert torch.equal(adam.state[parameter]["exp_avg"], moments[n] * mask)
        assert torch.equal(parameter.grad, gradients[n] * mask)


def _place(parameter: nn.Parameter, parameters: list[nn.Parameter]) -> int:
    return next(i for i, other in enumerate(parameters) if other is parameter)


def test_experts_of_different_groups_do_not_become_one_parameter() -> None:
    model = sparsify(experts_of("Mixtral"), 0.5)
    first, *others = model.parameters()
    adam = torch.optim.AdamW([{"params": [first]}, {"params": others}])
    with pytest.raises(InputError, match=r"the parts of experts\.gate_up_proj are in different groups"):
        densify(model, optimizer=adam)
    first.requires_grad_(False)
    with pytest.raises(InputError, match=r"some layers of experts\.gate_up_proj are frozen"):
        densify(model)
    assert len(sparse_layers(model)) == 8


def test_experts_are_chosen_as_one_and_named_in_the_summary() -> None:
    model = build("gpt_oss")
    report = summary(sparsify(model, 0.5, exclude=["*.0.mlp.experts"]))
    assert {row.name: row.reason for row in report.dense}["model.layers.0.mlp.experts"] == "left out by the patterns"
    names = [row.name for row in report.sparse if ".experts." in row.name]
    assert names[0] == "model.layers.1.mlp.experts.0.gate_up_proj"
    assert len(names) == 8
    assert report.nnz == sum(row.nnz for row in report.sparse)
    assert "model.layers.*.mlp.experts.*.gate_up_proj" in str(report)
    for setting in ("include", "exclude"):
        with pytest.raises(InputError, match=r"the layers of model\.layers\.0\.mlp\.experts become sparse together"):
            sparsify(build("gpt_oss"), 0.5, **{setting: ["*.experts.3.*"]})  # type: ignore[arg-type]


def test_experts_that_compute_otherwise_stay_dense() -> None:
    class Own(hf.models.mixtral.modeling_mixtral.MixtralExperts):
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return super().forward(*args, **kwargs) * 2

    config = ARCHITECTURES["Mixtral"].config(**ARCHITECTURES["Mixtral"].settings)
    model = nn.Sequential(Own(config), nn.Linear(8, 8), copy.deepcopy(experts_of("Mixtral").experts))
    model[2]._is_expert_parallel = True
    reasons = {row.name: row.reason for row in summary(sparsify(model, 0.5)).dense}
    assert reasons["0"] == "experts with a forward of their own (Own)"
    assert reasons["2"] == "experts that are spread over processes"
    assert isinstance(model[1], SparseLinear)


def test_a_density_schedule_and_factors_know_experts_by_their_layers() -> None:
    model = sparsify(build("Mixtral"), 0.7, budget="uniform", density={"*.experts.*.down_proj": 2.0})
    densities = {n: layer.topology.density for n, layer in sparse_layers(model).items()}
    down = [d for n, d in densities.items() if n.endswith(".down_proj")]
    others = [d for n, d in densities.items() if not n.endswith(".down_proj")]
    assert min(down) / max(others) == pytest.approx(2.0, rel=0.02)


@pytest.mark.parametrize("storage", ["union", "masked", "dense"])
@pytest.mark.parametrize("name", ["Mixtral", "gpt_oss"])
def test_a_teacher_of_experts_is_their_average(name: str, storage: Any) -> None:
    model = sparsify(build(name), 0.7)
    adam = AdamW(model.parameters(), lr=3e-3)
    config = SparsifierConfig(
        steps=12,
        topology=SetConfig(every=3),
        teacher=TeacherConfig(enabled=True, storage=storage, beta=0.5, ramp=False),
    )
    sparsifier = Sparsifier(model, adam, config)
    layers = sparse_layers(model)
    average = {n: layer.dense_weight() for n, layer in layers.items()}
    for _ in range(4):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        sparsifier.before_step()
        adam.step()
        adam.zero_grad()
        before = {n: layer.dense_weight() for n, layer in layers.items()}
        sparsifier.after_step()
        average = {n: weight.lerp(before[n], 0.5) for n, weight in average.items()}
    assert sparsifier.teacher is not None
    teacher = densify(copy.deepcopy(sparsifier.teacher.model))
    for full, weight in dense_matrices({n: teacher.get_submodule(n) for n in sparse_modules(model)}).items():
        kept = layers[full].topology.to_mask() if storage == "masked" else torch.ones_like(weight, dtype=torch.bool)
        torch.testing.assert_close(weight[kept], average[full][kept], rtol=1e-4, atol=1e-6)
