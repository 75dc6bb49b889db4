"""SµPar and µP: the scales by hand, multipliers that are folded, what is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from sparsae.config import ModelConfig, ParameterizationConfig
from sparsae.config.sparsifier import SparsifierConfig
from sparsae.core.randomness import generator
from sparsae.core.swap import Swap
from sparsae.core.topology import Topology
from sparsae.errors import InputError
from sparsae.models import attention_modules, decoder_and_head, parameterized
from sparsae.nn.linear import SparseLinear, sparse_layers
from sparsae.nn.sparsify import sparsify
from sparsae.optim import AdamW, follow_density, parameter_groups
from sparsae.parameterization import Parameterization, Role, initialize
from sparsae.rules import EvolutionConfig
from sparsae.search.sparsifier import Sparsifier
from sparsae.surgery import prepare_swap
from sparsae.train.assemble import optimizer_of
from tests.support.loops import LLAMA, SUPAR, built, config_of, mlp

# (name, role, density): (initial std, factor on the learning rate, factor on epsilon)
# at width 512, base width 128 (m = 4), base density 1, 4 blocks, embedding multiplier 10, output multiplier 2.
ROOT_HALF = 0.02 / math.sqrt(8)  # of residual projections: 1 / sqrt(2 * 4)
FREE: dict[tuple[str, Role, float], tuple[float, float, float]] = {
    ("supar", "hidden", 0.25): (0.02, 1.0, 0.25),  # m rho = 1
    ("supar", "hidden", 0.05): (0.02 / math.sqrt(0.2), 5.0, 0.25),  # m rho = 0.2
    ("supar", "hidden", 1.0): (0.01, 0.25, 0.25),
    ("supar", "residual", 0.25): (ROOT_HALF, 1.0, 0.25),
    ("supar", "residual", 0.05): (ROOT_HALF / math.sqrt(0.2), 5.0, 0.25),
    ("supar", "embedding", 1.0): (0.2, 10.0, 0.025),
    ("supar", "head", 1.0): (0.01, 0.5, 0.5),  # multiplier 2 / 4; epsilon 1 / 4 / (2 / 4)
    ("supar", "head", 0.25): (0.04, 2.0, 0.5),  # multiplier 2 / (4 * 0.25)
    ("mup", "hidden", 0.25): (0.02, 0.25, 0.25),
    ("mup", "hidden", 0.05): (0.02 / math.sqrt(0.2), 0.25, 0.25),
    ("mup", "residual", 0.05): (ROOT_HALF / math.sqrt(0.2), 0.25, 0.25),
    ("mup", "embedding", 1.0): (0.2, 10.0, 0.025),
    ("mup", "head", 1.0): (0.01, 0.5, 0.5),
    ("sp", "hidden", 0.25): (0.04, 1.0, 1.0),
    ("sp", "hidden", 0.05): (0.02 / math.sqrt(0.05), 1.0, 1.0),
    ("sp", "residual", 0.25): (2 * ROOT_HALF, 1.0, 1.0),
    ("sp", "embedding", 1.0): (0.2, 10.0, 0.1),
    ("sp", "head", 1.0): (0.04, 2.0, 0.5),
}
NORMS: dict[tuple[str, Role, bool], tuple[float, float, float]] = {  # initial value instead of a deviation
    ("supar", "vector", False): (1.0, 1.0, 0.25),
    ("supar", "final_norm", False): (1.0, 1.0, 0.25),
    ("supar", "final_norm", True): (0.05, 0.05, 5.0),  # multiplier 2 / 4 / 10
    ("mup", "final_norm", True): (0.05, 0.05, 5.0),
    ("sp", "vector", False): (1.0, 1.0, 1.0),
    ("sp", "final_norm", True): (0.2, 0.2, 5.0),
}


def at_512(tied: bool = False, **settings: Any) -> Parameterization:
    multipliers = {"embedding_multiplier": 10.0, "output_multiplier": 2.0}
    config = ParameterizationConfig(base_width=128, **multipliers | settings)
    return Parameterization(config, 512, 4, {"norm": "final_norm"}, tied)


@pytest.mark.parametrize("key", FREE, ids=lambda key: "-".join(map(str, key)))
def test_scales_of_weights_are_those_worked_out_by_hand(key: tuple[str, Role, float]) -> None:
    (name, role, density), (std, rate, epsilon) = key, FREE[key]
    mine = at_512(name=name)
    scale = mine.scale(role, density)
    assert mine.initial_std(role, density) == pytest.approx(std, rel=1e-12)
    assert (scale.rate, scale.epsilon) == pytest.approx((rate, epsilon), rel=1e-12)
    # A step decays by eta * wd, or by the layer's own rate, without the multiplier, in place of eta.
    assert scale.rate * scale.decay == pytest.approx(1.0)
    coupled = at_512(name=name, weight_decay="coupled").scale(role, density)
    own = rate if role in ("hidden", "residual") else 1.0
    assert coupled.rate * coupled.decay == pytest.approx(own)
    fixed = at_512(name=name, scale_epsilon=False).scale(role, density).epsilon
    assert fixed == pytest.approx(1.0 if role in ("hidden", "residual") else 1.0 / scale.multiplier)


@pytest.mark.parametrize("key", NORMS, ids=lambda key: "-".join(map(str, key)))
def test_scales_of_norms_are_those_worked_out_by_hand(key: tuple[str, Role, bool]) -> None:
    (name, role, tied), expected = key, NORMS[key]
    scale = at_512(tied, name=name).scale(role)
    assert (scale.multiplier, scale.rate, scale.epsilon) == pytest.approx(expected, rel=1e-12)


def test_densities_count_from_the_base_density_and_initial_fan_in_can_be_dense() -> None:
    mine = at_512(name="supar", base_density=0.25)
    assert mine.initial_std("hidden", 0.05) == pytest.approx(0.02 / math.sqrt(0.8))
    assert mine.scale("hidden", 0.05).rate == pytest.approx(1 / 0.8)
    assert at_512(name="mup", initial_fan_in="dense").initial_std("hidden", 0.05) == pytest.approx(0.01)
    assert at_512(name="sp", initial_fan_in="dense").initial_std("hidden", 0.05) == pytest.approx(0.02)


@given(st.floats(0.001, 1.0), st.integers(1, 4096))
def test_outputs_keep_their_variance_and_updates_their_size(density: float, width: int) -> None:
    mine = Parameterization(ParameterizationConfig(name="supar", base_width=64), width, 2)
    active_fan_in = width * density
    assert active_fan_in * mine.initial_std("hidden", density) ** 2 == pytest.approx(64 * 0.02**2)
    assert active_fan_in * mine.scale("hidden", density).rate == pytest.approx(64)


@pytest.mark.parametrize("family", [[], LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_built_model_starts_and_learns_by_its_scales(family: list[str], tied: bool) -> None:
    multipliers = ["parameterization.embedding_multiplier=3.0", "parameterization.output_multiplier=2.0"]
    config = config_of(*SUPAR, *family, *multipliers, f"model.tie_embeddings={str(tied).lower()}")
    model = built(config)
    optimizer = optimizer_of(model, config)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(groups) == len([*model.parameters()])
    residual = (".c_proj", ".o_proj", ".down_proj")
    for name, layer in sparse_layers(model).items():
        m_rho = 4 * layer.topology.density
        std = 0.02 / math.sqrt(m_rho) / (2 if name.endswith(residual) else 1)  # 2 blocks
        assert float(layer.values.detach().std()) == pytest.approx(std, rel=5 / layer.topology.nnz**0.5), name
        group = groups[id(layer.values)]
        assert group["per_weight_step"]
        assert group["lr"] == pytest.approx(2e-3 / m_rho)
        assert group["lr"] * group["weight_decay"] == pytest.approx(2e-3 * 0.1)
        assert group["eps"] == pytest.approx(1e-8 / 4)
    embedding, (_, head) = model.get_input_embeddings().weight, decoder_and_head(model)
    assert float(embedding.detach().std()) == pytest.approx(0.06, rel=0.05)
    assert groups[id(embedding)]["lr"] == pytest.approx(6e-3)
    norm = model.get_submodule("model.norm" if family else "transformer.ln_f").weight
    if tied:
        assert (norm == 2 / 4 / 3).all()
        assert groups[id(norm)]["lr"] == pytest.approx(2e-3 / 6)
        assert groups[id(norm)]["eps"] == pytest.approx(1e-8 * 3 / 2)
    else:
        assert (norm == 1).all()
        assert float(head.weight.detach().std()) == pytest.approx(0.01, rel=0.05)
        assert groups[id(head.weight)]["lr"] == pytest.approx(1e-3)


@pytest.mark.parametrize(
    "extra", [[], ["model.tie_embeddings=false"], ["model.family=llama"]], ids=["tied", "free", "llama"]
)
def test_epsilon_follows_the_gradients(extra: list[str]) -> None:
    def gradients(width: int, sparsity: float) -> dict[str, tuple[Role, float, float]]:
        shape = [f"model.width={width}", f"model.heads={width // 16}", f"sparsity.sparsity={sparsity}"]
        config = config_of(*shape, "parameterization.name=supar", "sparsity.budget=uniform", *extra)
        model, mine = built(config), parameterized(config.model, config.parameterization)
        tokens = torch.randint(300, (8, 25), generator=generator(0, "tokens"))
        functional.cross_entropy(model(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        return {
            name.replace(".values", ".weight"): (
                role,
                float(p.grad.square().mean().sqrt()),
                mine.scale(role, d).epsilon,
            )
            for name, p, role, d in mine.parameters(model)
        }

    base, wide = gradients(64, 0.0), gradients(256, 0.9)
    for name, (role, gradient, epsilon) in wide.items():
        tolerance = 0.5 if role in ("vector", "final_norm") else 0.2
        assert gradient / base[name][1] == pytest.approx(epsilon / base[name][2], rel=tolerance), name


def test_a_narrower_dense_model_is_scaled_by_its_own_width() -> None:
    config = config_of(*SUPAR, "model.vocab_size=300", method="dense-small")
    assert config.model.width < 64
    model = built(config)
    group = next(
        g
        for g in optimizer_of(model, config).param_groups
        if g["params"][0].shape == (config.model.width, 3 * config.model.width)
    )
    assert group["lr_scale"] == pytest.approx(16 / config.model.width)


@pytest.mark.parametrize("more", [[], ["model.tie_embeddings=false", "sparsity.exclude=['*.c_attn']"]])
@pytest.mark.parametrize(("base", "fan_in"), [("sparsity.sparsity=0", "active"), ("sparsity.sparsity=0.75", "dense")])
def test_at_the_base_all_three_are_the_same_but_for_attention(base: str, fan_in: str, more: list[str]) -> None:
    shape = [base, "sparsity.budget=uniform", "parameterization.base_width=64", *more]
    density = "parameterization.base_density=" + ("1.0" if "=0.75" not in base else "0.25")
    models, groups = [], []
    for name in ("sp", "mup", "supar"):
        config = config_of(*shape, density, f"parameterization.name={name}")
        if name != "supar":
            config = config_of(*shape, f"parameterization.name={name}", f"parameterization.initial_fan_in={fan_in}")
        models.append(built(config))
        groups.append(optimizer_of(models[-1], config).param_groups)
        for attention in attention_modules(models[-1]):
            assert attention.scaling == (0.25 if name == "sp" else 1 / 16)
    for other, its_groups in zip(models[1:], groups[1:], strict=True):
        for (name, one), two in zip(models[0].named_parameters(), other.parameters(), strict=True):
            assert torch.equal(one, two), name
        for mine, its in zip(groups[0], its_groups, strict=True):
            assert [mine[k] for k in ("lr", "eps", "weight_decay")] == [its[k] for k in ("lr", "eps", "weight_decay")]


def test_the_standard_one_has_a_group_for_all_sparse_layers() -> None:
    config = config_of()
    model = built(config)
    plain = parameter_groups(model, 0.1)
    made = optimizer_of(model, config).param_groups
    assert [[id(p) for p in g["params"]] for g in made] == [[id(p) for p in g["params"]] for g in plain]
    assert [(g["lr"], g["eps"], g["weight_decay"]) for g in made] == [(2e-3, 1e-8, d) for d in (0.1, 0.1, 0.0)]
    even = config_of(*SUPAR, "sparsity.budget=uniform", "sparsity.sparsity=0.75")
    assert len([g for g in optimizer_of(built(even), even).param_groups if g["per_weight_step"]]) == 1


class Net(nn.Module):
    """Embedding, hidden layer, norm and head, with multipliers in the forward pass."""

    def __init__(self, tied: bool, embedding: float = 1.0, output: float = 1.0) -> None:
        super().__init__()
        self.embed, self.hidden, self.norm = nn.Embedding(11, 8), nn.Linear(8, 8), nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.multipliers = embedding, output

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.multipliers[0] * self.embed(tokens)
        return self.multipliers[1] * self.head(self.norm(x + torch.tanh(self.hidden(x))))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("decay", "scaled"), [("independent", True), ("coupled", False)])
@pytest.mark.parametrize("library", [AdamW, torch.optim.AdamW])
def test_folded_multipliers_equal_explicit_ones(tied: bool, decay: Any, scaled: bool, library: Any) -> None:
    lr, eps, wd, m, e, out = 0.02, 1e-3, 0.3, 8 / 2, 3.0, 5.0
    config = ParameterizationConfig(
        name="mup",
        base_width=2,
        embedding_multiplier=e,
        output_multiplier=out,
        weight_decay=decay,
        scale_epsilon=scaled,
    )
    roles: Mapping[str, Role] = {"head": "head", "norm": "final_norm"}
    mine = Parameterization(config, 8, 1, roles, tied)
    torch.manual_seed(0)
    explicit, folded = Net(tied, e, out / m).double(), Net(tied).double()
    folded.load_state_dict(explicit.state_dict())
    with torch.no_grad():
        folded.embed.weight *= e
        (folded.norm.weight if tied else folded.head.weight).mul_(
            mine.scale("final_norm" if tied else "head").multiplier
        )
    hidden = [explicit.hidden.weight]
    other = list({explicit.embed.weight, explicit.head.weight})
    vectors = [explicit.hidden.bias, *explicit.norm.parameters()]
    common = {"eps": eps / m if scaled else eps, "lr": lr}
    own = wd if decay == "coupled" else wd * m
    reference = torch.optim.AdamW([
        {"params": hidden, **common, "lr": lr / m, "weight_decay": own},
        {"params": other, **common, "weight_decay": wd},
        {"params": vectors, **common, "weight_decay": 0.0},
    ])  # fmt: skip
    optimizer = library(parameter_groups(folded, wd, mine, lr=lr, eps=eps) if library is AdamW else [
        {key: value for key, value in group.items() if key != "per_weight_step"}
        for group in parameter_groups(folded, wd, mine, lr=lr, eps=eps)
    ])  # fmt: skip
    for step in range(6):
        tokens, targets = torch.randint(11, (2, 40), generator=generator(step, "tokens"))
        for model, stepper in ((explicit, reference), (folded, optimizer)):
            stepper.zero_grad()
            functional.cross_entropy(model(tokens), targets).backward()
            stepper.step()
        torch.testing.assert_close(folded(tokens), explicit(tokens), rtol=1e-10, atol=1e-10)


def test_initialize_draws_for_the_role_and_the_density() -> None:
    model = nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 256), nn.Linear(256, 64), nn.LayerNorm(64))
    model.append(nn.Linear(64, 50))
    sparsify(model, 0.75, exclude=["4"], unit=(4, 4))
    config = ParameterizationConfig(name="supar", base_width=16, output_multiplier=2.0)
    mine = Parameterization(config, 64, 8, {"2": "residual", "3": "final_norm", "4": "head"}, std=0.1)
    bias = model[1].bias.detach().clone()
    initialize(model, mine, seed=3)
    densities = [layer.topology.density for layer in sparse_layers(model).values()]
    expected = [0.1, 0.1 / math.sqrt(4 * densities[0]), 0.1 / math.sqrt(4 * densities[1]) / 4, 0.05]
    weights = [model[0].weight, model[1].values, model[2].values, model[4].weight]
    for weight, std in zip(weights, expected, strict=True):
        assert float(weight.detach().std()) == pytest.approx(std, rel=5 / weight.numel() ** 0.5)
    assert torch.equal(model[1].bias, bias)
    first = [weight.detach().clone() for weight in weights]
    initialize(model, mine, seed=3)
    assert all(torch.equal(weight, one) for weight, one in zip(weights, first, strict=True))


def test_grown_weights_are_drawn_as_the_first_ones() -> None:
    topology = Topology.random((200, 200), 4000, generator(0))
    layer = SparseLinear(topology, torch.zeros(4000))
    drop, grow = topology.indices[:2000], topology.sample_inactive(2000, generator(1))
    asked = []

    def std(name: str, after: Topology) -> float:
        asked.append((name, after.count))
        return 0.5

    change = prepare_swap({"a": layer}, Swap({"a": drop}, {"a": grow}), "normal", generator(2), std).changes["a"]
    assert asked == [("a", 4000)]
    assert (change.values[~change.grown] == 0).all()
    assert float(change.values[change.grown].std()) == pytest.approx(0.5, rel=0.1)
    with pytest.raises(ValueError, match="with initial_std normal"):
        prepare_swap({"a": layer}, Swap({"a": drop}, {"a": grow}), "normal", generator(2))


REFUSED: dict[str, tuple[list[str], str]] = {
    "dense fan-in with supar": (["name=supar", "initial_fan_in=dense"], "initial_fan_in must be active"),
    "dynamic without density": (["name=mup", "dynamic=true"], "set name supar"),
    "no density": (["base_density=0"], "base_density: must be"),
    "more than dense": (["base_density=1.5"], "base_density: must be at most 1"),
    "no width": (["base_width=0"], "base_width: must be at least 1"),
    "no output": (["output_multiplier=0.0"], "output_multiplier: must be above 0"),
    "unknown name": (["name=mupar"], "must be 'sp', 'mup' or 'supar'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_do_not_fit_are_refused(case: str) -> None:
    given_settings, expected = REFUSED[case]
    with pytest.raises(InputError, match=r"--set: parameterization") as error:
        config_of(*(f"parameterization.{setting}" for setting in given_settings))
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_models_and_optimizers_that_do_not_fit_are_refused() -> None:
    config = ParameterizationConfig(name="supar", base_width=24, dynamic=True)
    model, mine = mlp(), Parameterization(config, 24, 1)
    with pytest.raises(InputError, match=r"role 'output' of 2 does not exist: use one of embedding, hidden"):
        Parameterization(config, 24, 1, {"2": "output"})  # type: ignore[dict-item]
    with pytest.raises(InputError, match="give that the role final_norm"):
        Parameterization(config, 48, 1, tied=True)
    with pytest.raises(InputError, match=r"role head: lm_head matches no module"):
        parameter_groups(model, 0.1, Parameterization(config, 24, 1, {"lm_head": "head"}), lr=1e-3)
    with pytest.raises(ValueError, match="give lr"):
        parameter_groups(model, 0.1, mine)
    with pytest.raises(InputError, match="no group for 0 alone"):
        follow_density(torch.optim.SGD(model.parameters(), 0.1), sparse_layers(model), mine)
    with pytest.raises(InputError, match="no group for 0 alone"):
        Sparsifier(model, AdamW(parameter_groups(model, 0.1)), SparsifierConfig(steps=5), parameterization=mine)
    normal = SparsifierConfig(steps=5, topology=EvolutionConfig(initialization="normal"))
    with pytest.raises(InputError, match="give Sparsifier one"):
        Sparsifier(model, AdamW(model.parameters()), normal)


def test_the_roles_of_the_architectures() -> None:
    gpt2 = parameterized(ModelConfig(), ParameterizationConfig(name="supar"))
    assert gpt2.role("transformer.h.0.attn.c_proj") == gpt2.role("transformer.h.3.mlp.c_proj") == "residual"
    assert (gpt2.role("transformer.h.0.mlp.c_fc"), gpt2.role("lm_head")) == ("hidden", "head")
    assert (gpt2.role("transformer.ln_f"), gpt2.role("transformer.wpe", nn.Embedding(2, 2))) == (
        "final_norm",
        "embedding",
    )
    for name, residual in (("supar", "residual"), ("sp", "hidden")):
        llama = parameterized(ModelConfig(family="llama"), ParameterizationConfig(name=name))
        assert llama.role("model.layers.0.mlp.down_proj") == llama.role("model.layers.1.self_attn.o_proj") == residual
        assert llama.role("model.layers.0.self_attn.q_proj") == "hidden"
