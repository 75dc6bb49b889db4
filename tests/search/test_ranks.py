"""Several ranks are one run: one topology, one search, and what one rank with all of the batches gets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch import nn

from sparsae.config.sparsifier import SparsifierConfig
from sparsae.core.ranks import ranks
from sparsae.core.topology import digest
from sparsae.errors import RanksError
from sparsae.nn.linear import sparse_layers
from sparsae.search.sparsifier import Sparsifier
from tests.support.loops import mlp
from tests.support.ranks import assert_same, joined, on_ranks, train

# What ranks have to tell each other: samples that a backward pass draws; dense gradients; scores; and numbers
# of connections that change.
SECTIONS = ["gse, graest", "rigl", "gmp", "evolution, elitist"]


def _checks(rank: int, count: int, store: str) -> None:
    torch.set_num_threads(1)
    alone = {section: train(section, 50, teacher=True) for section in SECTIONS}
    with joined(rank, count, store):
        for section, expected in alone.items():
            _told(section, lambda s=section, e=expected: assert_same(train(s, 50, teacher=True), e))
        for settings in ({"gradient_as_bucket_view": True}, {"static_graph": True}):
            _told(settings, lambda s=settings: assert_same(train("gmp", 50, teacher=True, **s), alone["gmp"]))
        for check in (
            _scores_that_are_no_numbers,
            _active_weights_travel,
            _dense_gradients_are_counted,
            _settings_are_compared,
            _a_bit_is_caught,
        ):
            _told(check.__name__, check)


def _told(what: object, check: Callable[[], None]) -> None:
    try:
        check()
    except Exception as error:
        raise AssertionError(f"{what}, rank {ranks().rank}: {error!r}") from error


def _scores_that_are_no_numbers() -> None:
    """NaN scores of one rank: its candidates are not chosen, on any rank."""
    trained = train("evolution, elitist", 30, scores_nan=ranks().rank == 1)
    scores = [row["score"] for update in trained.updates for row in update.row["candidates"]]
    assert None in scores
    assert any(score is not None for score in scores)
    topologies = b"".join(digest(indices) for indices in trained.topologies().values())
    ranks().require_same({"the topologies": topologies})
    chosen = [update.row["candidates"][update.row["chosen"]]["score"] for update in trained.updates if update.accepted]
    assert chosen
    assert None not in chosen


def _active_weights_travel() -> None:
    """At 90 % sparsity at most 0.15 of the bytes of dense gradients are sent, topologies and agreements included."""
    sent = 0

    def counted(bucket: Any) -> Any:
        nonlocal sent
        sent += bucket.buffer().nbytes
        total = dist.all_reduce(bucket.buffer().div_(ranks().count), async_op=True).get_future()
        return total.then(lambda future: future.value()[0])

    model = mlp(96, sparsity=0.9)
    parallel = nn.parallel.DistributedDataParallel(model)
    parallel.register_comm_hook(None, lambda state, bucket: counted(bucket))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    config = SparsifierConfig.model_validate({"steps": 20, "topology": {"rule": "set", "every": 2}})
    sparsifier, before = Sparsifier(parallel, optimizer, config), ranks().sent.total()
    for _ in range(20):
        optimizer.zero_grad()
        parallel(torch.randn(8, 96)).square().mean().backward()
        sparsifier.before_step()
        optimizer.step()
        sparsifier.after_step()
    layers = sparse_layers(model).values()
    biases = sum(layer.bias.nbytes for layer in layers if layer.bias is not None)
    dense = sum(layer.in_features * layer.out_features * layer.values.element_size() for layer in layers)
    assert not parallel.modules_buffers
    assert 0.1 * dense <= (sent + ranks().sent.total() - before) / 20 - biases <= 0.15 * dense


def _dense_gradients_are_counted() -> None:
    before = ranks().sent["dense gradients"]
    trained = train("rigl", 9)
    dense = sum(layer.in_features * layer.out_features * 8 for layer in sparse_layers(trained.model).values())
    assert ranks().sent["dense gradients"] - before == len(trained.updates) * dense


def _settings_are_compared() -> None:
    model = mlp()
    config = SparsifierConfig(steps=4, seed=ranks().rank)
    with pytest.raises(RanksError, match=r"^the settings of Sparsifier are not the same on rank 1 as on rank 0"):
        Sparsifier(model, torch.optim.SGD(model.parameters(), lr=0.1), config)


def _a_bit_is_caught() -> None:
    """One bit of one connection's number, in the memory of one rank, before the fourth step; steps 2, 4, ... update."""

    def flip(step: int, sparsifier: Sparsifier) -> None:
        steps.append(step)
        if step == 2 and ranks().rank == 1:
            layer = sparse_layers(sparsifier._model)["2"]
            # Of which torch knows nothing; in one of the two alone the layer itself would see it.
            for indices in (layer.topology.indices, layer.indices):
                indices.numpy()[5] ^= 1

    steps: list[int] = []
    with pytest.raises(RanksError, match=r"^the connections of 2 are not the same on rank 1 as on rank 0"):
        train("set", 20, look=flip)
    assert steps[-1] == 3


@pytest.mark.parametrize("section", SECTIONS)
def test_a_group_of_one_rank_is_wrapped_too(section: str, tmp_path: Path) -> None:
    alone = train(section, 50, teacher=True)
    with joined(0, 1, str(tmp_path / "store")):
        assert_same(train(section, 50, teacher=True), alone)


@pytest.mark.slow
def test_two_ranks_are_one_run(tmp_path: Path) -> None:
    on_ranks(_checks, tmp_path)
