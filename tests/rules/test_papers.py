"""SET, RigL and GSE against their papers, on a two-layer network worked by hand."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch import nn

from sparsae.config import RuleConfig
from sparsae.config.sparsifier import SparsifierConfig
from sparsae.core.budgets import allocate, relative_density
from sparsae.core.randomness import generator
from sparsae.core.topology import Topology
from sparsae.kernels.probe import SampledGradients
from sparsae.nn.linear import SparseLinear, sparse_layers
from sparsae.rules import GmpConfig, GranetConfig, GseConfig, MagnitudeConfig, RiglConfig, SetConfig
from sparsae.rules.gse import build_gse
from sparsae.rules.mest import MestConfig
from sparsae.rules.parts.rule import NoState
from sparsae.search.sparsifier import Sparsifier

# Loss y1 - y2 of y = W2 W1 x with x = (1, 2, 3): dy = (1, -1). Unit numbers run down the columns: 2 * column + row.
#
#   W1 = [ 0.5  .  -0.1 ]     h = W1 x = (0.2, 4)
#        [  .   2    .  ]
#
#   W2 = [ 1    .  ]   dW2 = dy h' = [  0.2  4 ]   dh = W2' dy = (0.8, 3)   dW1 = dh x' = [ 0.8  1.6  2.4 ]
#        [ 0.2 -3  ]                 [ -0.2 -4 ]                                          [ 3    6    9   ]
#
# With the second W2 the dropped weight of the first layer is where the gradient is largest:
#
#   W2 = [ 2.8  .  ]                               dh = (3, 0.8)            dW1 = [ 3    6    9   ]
#        [-0.2 -0.8]                                                              [ 0.8  1.6  2.4 ]
W1 = {0: 0.5, 3: 2.0, 4: -0.1}
SECOND = ({0: 1.0, 1: 0.2, 3: -3.0}, {0: 2.8, 1: -0.2, 3: -0.8})


def network(which: int) -> nn.Module:
    layers = [
        SparseLinear(Topology.from_indices(shape, torch.tensor(list(weights))), torch.tensor(list(weights.values())))
        for shape, weights in (((2, 3), W1), ((2, 2), SECOND[which]))
    ]
    return nn.Sequential(*layers)


def after_update(which: int, topology: RuleConfig, seed: int = 0, **settings: float) -> list[dict[int, float]]:
    """The weights of both layers after one update; the optimizer's steps move nothing."""
    model = network(which)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    config = SparsifierConfig(steps=1000, topology=topology, seed=seed, min_density=0.0, max_density=1.0, **settings)  # type: ignore[arg-type]
    sparsifier = Sparsifier(model, optimizer, config)
    y = model(torch.tensor([[1.0, 2.0, 3.0]]))
    (y[0, 0] - y[0, 1]).backward()
    sparsifier.before_step()
    optimizer.step()
    sparsifier.after_step()
    return [
        dict(zip(layer.indices.tolist(), [round(v, 6) for v in layer.values.tolist()], strict=True))
        for layer in sparse_layers(model).values()
    ]


@pytest.mark.parametrize("alpha", [0.4, 0.7])
def test_set_drops_the_smallest_and_grows_at_random(alpha: float) -> None:
    # floor(alpha 3): one or two of three. Layer 2 has only one inactive unit, so one moves there.
    n = int(alpha * 3)
    kept = {0: 0.5, 3: 2.0} if n == 1 else {3: 2.0}
    grown: Counter[int] = Counter()
    for seed in range(300):
        first, second = after_update(0, SetConfig(every=1, drop_fraction=alpha), seed)
        assert kept.items() <= first.items()
        new = first.keys() - kept.keys()
        assert len(new) == n
        assert new <= {1, 2, 5}
        assert all(first[unit] == 0 for unit in new)
        assert second == {0: 1.0, 2: 0.0, 3: -3.0}
        grown.update(new)
    assert all(abs(count / (300 * n) - 1 / 3) < 0.09 for count in grown.values())


def test_rigl_drops_the_smallest_and_grows_the_largest_gradients() -> None:
    assert after_update(0, RiglConfig(every=1, drop_fraction=0.4)) == [
        {0: 0.5, 3: 2.0, 5: 0.0},  # drops -0.1, grows the gradient 9
        {0: 1.0, 2: 0.0, 3: -3.0},  # drops 0.2, grows the gradient 4
    ]
    assert after_update(0, RiglConfig(every=1, drop_fraction=0.7)) == [
        {1: 0.0, 3: 2.0, 5: 0.0},  # drops -0.1 and 0.5, grows the gradients 9 and 3
        # Drops 0.2 and 1; of the gradients 4 (inactive), 0.2 and 0.2 (dropped) the first of the equal ones is grown.
        {0: 1.0, 2: 0.0, 3: -3.0},
    ]


def test_in_rigl_a_dropped_weight_with_the_largest_gradient_never_leaves() -> None:
    assert after_update(1, RiglConfig(every=1, drop_fraction=0.4)) == [
        W1,  # drops -0.1, which has the gradient 9: it is grown again, and still -0.1
        {0: 2.8, 2: 0.0, 3: -0.8},
    ]
    assert after_update(1, RiglConfig(every=1, drop_fraction=0.7)) == [
        {2: 0.0, 3: 2.0, 4: -0.1},  # drops -0.1 and 0.5, grows the gradients 9 (-0.1 itself) and 6
        {0: 2.8, 2: 0.0, 3: -0.8},  # drops -0.2 and -0.8, grows the gradients 4 and -4 (-0.8 itself)
    ]


def test_gse_grows_first_and_protects_what_has_grown() -> None:
    # gamma = 1 samples every inactive unit of this small network.
    assert after_update(0, GseConfig(every=1, drop_fraction=0.4, scope="local")) == [
        {0: 0.5, 3: 2.0, 5: 0.0},
        {0: 1.0, 2: 0.0, 3: -3.0},
    ]
    # Unlike in RigL, what is dropped cannot be grown again: the largest gradient among the inactive is 6.
    assert after_update(1, GseConfig(every=1, drop_fraction=0.4, scope="local"))[0] == {0: 0.5, 2: 0.0, 3: 2.0}


def test_gse_compares_all_layers() -> None:
    # floor(0.7 6) = 4: all inactive units are grown, and the smallest of all weights dropped: 0.1, 0.2, 0.5, 1.
    assert after_update(0, GseConfig(every=1, drop_fraction=0.7)) == [
        {1: 0.0, 2: 0.0, 3: 2.0, 5: 0.0},
        {2: 0.0, 3: -3.0},
    ]
    # floor(0.4 6) = 2: of the gradients 1.6, 3, 9 and 4 the latter two; of the weights 0.1 and 0.2.
    assert after_update(0, GseConfig(every=1, drop_fraction=0.4)) == [
        {0: 0.5, 3: 2.0, 5: 0.0},
        {0: 1.0, 2: 0.0, 3: -3.0},
    ]


def test_gse_looks_only_at_its_sample() -> None:
    # round(0.4 3) = 1 inactive unit of the first layer is seen, whichever its gradient, and only it can come.
    seen = Counter()
    for seed in range(60):
        first, _ = after_update(0, GseConfig(every=1, drop_fraction=0.4, scope="local", sample_ratio=0.4), seed)
        seen.update(first.keys() - {0, 3})
    assert set(seen) == {1, 2, 5}
    assert min(seen.values()) > 8


def frequencies(sampling: str, x_TI: torch.Tensor, dy_TO: torch.Tensor, draws: int = 4000) -> torch.Tensor:
    """How often each (output, input) pair is drawn, one at a time, from a layer whose active unit is elsewhere."""
    shape = (dy_TO.shape[1], x_TI.shape[1])
    topology = Topology.from_indices(shape, torch.tensor([shape[0] * shape[1] - 1]))
    rule = build_gse(GseConfig(sampling=sampling))  # type: ignore[arg-type]
    counts = torch.zeros(shape[1] * shape[0])
    for seed in range(draws):
        draw = rule.sample({"a": topology}, NoState(), generator(seed))["a"]
        assert callable(draw)
        units = draw(dy_TO, x_TI)
        assert units.numel() <= 1
        counts[units.long()] += 1
    return counts.view(shape[1], shape[0]).T / draws


def outer(q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    return torch.outer(q / q.sum(), p / p.sum())


X = torch.tensor([[1.0, -2.0, 0.0], [3.0, 1.0, 0.0]])
DY = torch.tensor([[2.0, -1.0], [-1.0, 1.0]])


def test_grabo_draws_by_the_size_of_inputs_and_output_gradients() -> None:
    expected = outer(torch.tensor([3.0, 2.0]), torch.tensor([4.0, 3.0, 0.0]))
    torch.testing.assert_close(frequencies("grabo", X, DY), expected, atol=0.03, rtol=0)


def test_graest_draws_by_random_sums() -> None:
    # The signs (+, +) and (-, -) give |x1 + x2| = (4, 1, 0) and |dy1 + dy2| = (1, 0); the others their differences.
    expected = outer(torch.tensor([1.0, 0.0]), torch.tensor([4.0, 1.0, 0.0]))
    expected = (expected + outer(torch.tensor([3.0, 2.0]), torch.tensor([2.0, 3.0, 0.0]))) / 2
    torch.testing.assert_close(frequencies("graest", X, DY), expected, atol=0.03, rtol=0)


def test_nothing_to_go_by_is_an_even_draw() -> None:
    drawn = frequencies("grabo", torch.zeros(2, 2), torch.zeros(2, 2), 1000)
    torch.testing.assert_close(drawn, torch.tensor([[0.25, 0.25], [0.25, 0.0]]), atol=0.05, rtol=0)


@pytest.mark.parametrize("sampling", ["grabo", "graest"])
def test_a_drawn_sample_has_distinct_inactive_units_and_their_gradients(sampling: str) -> None:
    topology = Topology.random((12, 20), 20, generator(1), (2, 2))
    layer = SparseLinear(topology, torch.randn(topology.values_shape, generator=generator(2)))
    draws = build_gse(GseConfig(sampling=sampling, sample_ratio=2.0)).sample({"a": topology}, NoState(), generator(3))  # type: ignore[arg-type]
    probe = SampledGradients(layer.key, draws["a"])
    for seed in (4, 5):
        x = torch.randn(5, 20, generator=generator(seed, "x"))
        (layer(x) * torch.randn(5, 12, generator=generator(seed, "dy"))).sum().backward()
    probe.close()
    assert probe.units is not None
    assert probe.gradient is not None
    assert 0 < probe.units.numel() <= 40
    assert probe.tokens == 10
    assert torch.equal(probe.units, probe.units.unique())
    assert not bool(topology.contains(probe.units).any())
    dense = sum(
        torch.randn(5, 12, generator=generator(seed, "dy")).T @ torch.randn(5, 20, generator=generator(seed, "x"))
        for seed in (4, 5)
    )
    assert isinstance(dense, torch.Tensor)
    blocks = dense.view(6, 2, 10, 2).permute(2, 0, 1, 3).reshape(60, 2, 2)
    torch.testing.assert_close(probe.gradient, blocks[probe.units.long()])


def test_pruning_by_hand() -> None:
    # One shot at step 1, over the model: the three largest of 0.5, 0.1, 2, 1, 0.2, 3.
    once = MagnitudeConfig(at=1e-6)
    assert after_update(0, once, sparsity=0.7) == [{3: 2.0}, {0: 1.0, 3: -3.0}]
    # The schedule's end at step 1, each layer to its own budget: round(0.3 10) = 3, of which 2 and 1.
    at_once = GmpConfig(start=0.0, stop=1e-6, every=1)
    assert after_update(0, at_once, sparsity=0.7, budget="uniform") == [{0: 0.5, 3: 2.0}, {3: -3.0}]  # type: ignore[arg-type]


def test_granet_prunes_and_then_regenerates() -> None:
    # Pruned over the model to 4 of 6: -0.1 and 0.2 are dropped. Regenerated with r = 1/2: one of two in each layer.
    rule = GranetConfig(start=0.0, stop=1e-6, every=1, regeneration=0.51)
    assert after_update(0, rule, sparsity=0.6) == [
        {3: 2.0, 5: 0.0},  # then drops 0.5 too, and grows the gradient 9
        {2: 0.0, 3: -3.0},  # then drops 1 too, and grows the gradient 4
    ]
    # In the second network what was just pruned from the first layer has the largest gradient, and stays.
    assert after_update(1, rule, sparsity=0.6)[0] == {3: 2.0, 4: -0.1}


GPT2 = [(2304, 768), (768, 768), (3072, 768), (768, 3072)]
LLAMA = [(768, 768)] * 4 + [(2048, 768), (2048, 768), (768, 2048)]


@pytest.mark.parametrize("shapes", [GPT2 * 12, LLAMA * 12], ids=["gpt2", "llama"])
@pytest.mark.parametrize("sparsity", [0.8, 0.9, 0.95, 0.99])
def test_erk_densities_have_their_closed_form(shapes: list[tuple[int, int]], sparsity: float) -> None:
    """d_l = epsilon (in + out) / (in out), epsilon = (1 - s) sum(in out) / sum(in + out), where no d_l exceeds 1."""
    units = [rows * columns for rows, columns in shapes]
    k = round((1 - sparsity) * sum(units))
    epsilon = k / sum(rows + columns for rows, columns in shapes)
    expected = [epsilon * (rows + columns) for rows, columns in shapes]
    assert max(e / n for e, n in zip(expected, units, strict=True)) < 1
    counts = allocate([relative_density("erk", shape) for shape in shapes], [(1, n) for n in units], units, k)
    assert sum(counts) == k
    assert all(abs(count - e) < 1 for count, e in zip(counts, expected, strict=True))


def test_erk_leaves_dense_what_would_be_more_than_dense() -> None:
    # A small layer saturates: d = 1, and the others share the rest by the same form.
    shapes = [(8, 8), *GPT2]
    units = [rows * columns for rows, columns in shapes]
    k = round(0.1 * sum(units))
    counts = allocate([relative_density("erk", shape) for shape in shapes], [(1, n) for n in units], units, k)
    epsilon = (k - 64) / sum(rows + columns for rows, columns in GPT2)
    assert epsilon * 16 / 64 > 1
    assert counts[0] == 64
    expected = [epsilon * (rows + columns) for rows, columns in GPT2]
    assert all(math.isclose(count, e, abs_tol=1) for count, e in zip(counts[1:], expected, strict=True))


def test_mest_keeps_a_small_weight_with_a_large_gradient() -> None:
    # |w| + lambda |dW1| of units 0, 3 and 4 is 0.5 + 0.8 lambda, 2 + 6 lambda and 0.1 + 2.4 lambda.
    for weight, dropped in ((0.0, 4), (0.2, 4), (0.5, 0), (10.0, 0)):
        first, _ = after_update(0, MestConfig(every=1, drop_fraction=0.4, gradient_weight=weight))
        assert set(W1) - first.keys() == {dropped}, weight
