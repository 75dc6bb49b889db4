"""Factors on the budget's densities: what they concern, what they come to, and the total that stays."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sparsae import AdamW, Sparsifier, SparsifierConfig, parameter_groups, sparse_layers, sparsify, summary
from sparsae.config.density import DensityFactors, by_pattern
from sparsae.config.load import resolve
from sparsae.core.budgets import BUDGETS, density_factors
from sparsae.errors import InputError
from sparsae.families import FAMILIES
from sparsae.nn.sparsify import layer_counts
from sparsae.rules import GmpConfig, SetConfig
from sparsae.train.forecast import forecast
from sparsae.train.model import model_of

LAYERS = [f"model.h.{block}.{name}" for block in range(3) for name in ("attn.q", "mlp.up")] + ["out"]


@given(
    st.dictionaries(
        st.sampled_from(["*.attn.*", "*.mlp.*", "*.1.*", "out", "*"]), st.floats(1e-3, 1e3), min_size=1, max_size=4
    ),
    st.lists(st.floats(1e-3, 1e3), max_size=4),
    st.sampled_from(BUDGETS),
    st.floats(0.05, 0.95),
    st.floats(0.0, 1.0),
)
def test_the_total_is_exact_whatever_the_factors(
    density: dict[str, float], depth: list[float], budget: str, sparsity: float, tightness: float
) -> None:
    shapes = {name: (8 * (1 + i), 24) for i, name in enumerate(LAYERS)}
    units = {name: rows * columns for name, (rows, columns) in shapes.items()}
    factors = density_factors({**density, **({"depth": depth} if depth else {})}, LAYERS)
    mean = 1 - sparsity
    bounds = (tightness * mean * 0.9, mean + (1 - tightness) * (1 - mean))
    counts = layer_counts(shapes, sparsity, budget, (1, 1), bounds, factors)
    assert sum(counts.values()) == round(mean * sum(units.values()))
    assert all(bounds[0] * units[name] - 1 < counts[name] < bounds[1] * units[name] + 1 for name in LAYERS)


def test_densities_are_in_the_ratio_of_their_factors() -> None:
    shapes = dict.fromkeys(LAYERS, (100, 1000))
    factors = density_factors({"*.attn.*": 2.0, "depth": [1.5, 1.0, 0.5], "out": 0.25}, LAYERS)
    counts = layer_counts(shapes, 0.9, "uniform", (1, 1), (0.0, 1.0), factors)
    for name, factor in {"h.0.attn.q": 3, "h.0.mlp.up": 1.5, "h.1.attn.q": 2, "h.2.mlp.up": 0.5}.items():
        assert counts[f"model.{name}"] / counts["out"] == pytest.approx(factor / 0.25, rel=1e-3)


@pytest.mark.parametrize(
    ("depth", "factors"), [([3.0], [3, 3, 3]), ([1.0, 2.0], [1, 1.5, 2]), ([4.0, 1.0, 0.0625, 2.0], [4, 0.53125, 2])]
)
def test_depth_goes_from_the_first_block_to_the_last(depth: list[float], factors: list[float]) -> None:
    # The first number of a name is its block; numbering may begin anywhere, and what has none has no factor.
    found = density_factors({"depth": depth}, ["h.5.w.9", "h.6.w.9", "h.7.w.9", "out"])
    assert list(found.values()) == pytest.approx([*factors, 1.0])
    assert density_factors({"depth": depth}, ["only.3.block"]) == {"only.3.block": depth[0]}


def test_a_factor_for_nothing_is_refused_and_so_is_what_is_none() -> None:
    wrong: list[tuple[DensityFactors, str]] = [
        ({"*.gate": 2.0}, r"no sparse layer matches '\*.gate'; their names are model.h.0.attn.q, model.h.0.mlp.up, "),
        ({"*": 0.0}, r"\*: a factor must be a number from 1e-06 to 1e\+06, not 0.0"),
        ({"*": -1.0}, "a factor must be a number"),
        ({"*": float("nan")}, "a factor must be a number"),
        ({"*": True}, "a factor must be a number"),
        ({"*": "2"}, "must be a number"),  # type: ignore[dict-item]
        ({"depth": 2.0}, "depth must be a list of factors"),
        ({"depth": []}, "depth must be a list of factors"),
        ({"*": [1.0]}, r"\* must be one factor"),
        (0.5, "must map patterns to factors"),  # type: ignore[list-item]
    ]
    for density, message in wrong:
        with pytest.raises(InputError, match=message):
            density_factors(density, LAYERS)
    with pytest.raises(InputError, match="no layer has a number in its name"):
        density_factors({"depth": [1.0]}, ["out"])


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))


def test_sparsify_gives_layers_their_factors_and_the_summary_shows_them() -> None:
    model = sparsify(network(), 0.9, budget="uniform", density={"0": 2.0, "4": 0.5})
    densities = [layer.topology.density for layer in sparse_layers(model).values()]
    assert densities == pytest.approx([6 / 35, 3 / 35, 1.5 / 35], abs=1e-3)
    assert sum(layer.topology.count for layer in sparse_layers(model).values()) == round(0.1 * 3 * 64 * 64)
    assert [row.factor for row in summary(model).sparse] == [2.0, 1.0, 0.5]
    assert "factor" in str(summary(model))
    assert "factor" not in str(summary(sparsify(network(), 0.9)))


def test_where_bounds_cut_a_factor_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        sparsify(network(), 0.9, budget="uniform", density={"0": 2.0})
        assert not caplog.messages
        sparsify(network(), 0.9, budget="uniform", density={"0": 9.0}, max_density=0.2)
    assert caplog.messages == [
        "density: min_density and max_density cut factors short in 1 layers, such as 0, which has density 0.2"
    ]


def test_rules_that_prune_end_at_the_factors_and_others_take_none() -> None:
    model = sparsify(network(), 0.0)
    optimizer = AdamW(parameter_groups(model, weight_decay=0.0), lr=1e-3)
    density: dict[str, float | list[float]] = {"0": 2.0, "4": 0.5}
    config = SparsifierConfig(
        steps=4, topology=GmpConfig(every=1, start=0.0, stop=0.9), sparsity=0.9, budget="uniform", density=density
    )
    sparsifier = Sparsifier(model, optimizer, config)
    for _ in range(4):
        loss = model(torch.randn(8, 64)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        sparsifier.before_step()
        optimizer.step()
        sparsifier.after_step()
    densities = [layer.topology.density for layer in sparse_layers(model).values()]
    assert densities == pytest.approx([6 / 35, 3 / 35, 1.5 / 35], abs=1e-3)
    with pytest.raises(InputError, match="rule 'set' keeps the layers' densities: give density to sparsify"):
        Sparsifier(model, optimizer, SparsifierConfig(steps=4, topology=SetConfig(), density=density))


@pytest.mark.parametrize("family", FAMILIES.names())
def test_every_role_names_layers_of_its_family(family: str) -> None:
    sizes = ["model.layers=2", "model.width=32", "model.heads=2", "model.tie_embeddings=false"]
    overrides = [*sizes, f"model.family={family}", "sparsity.sparsify_head=true", "sparsity.density={mlp: 1.5}"]
    config = resolve(method="static", overrides=overrides)
    layers = sparse_layers(model_of(config, 512, 0, torch.device("meta")))
    named = {
        role: {
            name
            for name, factor in density_factors(by_pattern({role: 2.0}, family), list(layers)).items()
            if factor > 1
        }
        for role in FAMILIES[family].densities
    }
    assert named["attention"] | named["mlp"] | named["head"] == set(layers)
    finer = [names for role, names in named.items() if role not in ("attention", "mlp", "head")]
    assert all(names < named["attention"] or names < named["mlp"] for names in finer)
    rows = {row["name"]: row["density_factor"] for row in forecast(config)["layers"]}
    assert rows == {name: 1.5 if name in named["mlp"] else 1.0 for name in layers}


def test_an_unknown_role_names_those_that_there_are() -> None:
    with pytest.raises(ValueError, match=r"gate is no role of gpt2 \(attention, output, mlp, up, down, head\)"):
        by_pattern({"gate": 2.0}, "gpt2")
    assert by_pattern({"mlp": 2.0, "*.mlp.*": 1.5, "depth": [1.0, 2.0]}, "llama") == {
        "*.mlp.*": 3.0,
        "depth": [1.0, 2.0],
    }
    for value, message in {
        "{attention: 2, mpl: 1}": "sparsity.density: mpl is no role of gpt2",
        "{mlp: 0}": "sparsity.density: mlp: a factor must be a number",
        "2": "sparsity.density: must map patterns to factors",
    }.items():
        with pytest.raises(InputError, match=message):
            resolve(overrides=[f"sparsity.density={value}"])
