"""The size of recent weight changes as a term of the score."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from sparsae.core.observation import LayerView
from sparsae.core.randomness import generator
from sparsae.core.swap import Swap
from sparsae.core.topology import Topology
from sparsae.nn.linear import SparseLinear
from sparsae.registry import TERMS
from sparsae.score import Trial
from sparsae.surgery import prepare_swap
from sparsae.train.run import resume, start
from tests.support.runs import config_of, rows, stopped_at, weights, write_text


def test_it_is_the_mean_over_layers_of_the_change_of_what_stays() -> None:
    topology = Topology.from_indices((1, 8), torch.tensor([0, 2, 4]))
    values = {"a": torch.tensor([1.0, 2.0, 5.0]), "b": torch.tensor([1.0, 1.0, 1.0])}
    past = {"a": torch.tensor([1.0, 1.0, 2.0]), "b": torch.tensor([1.0, 1.0, 3.0])}
    views = {name: LayerView(topology, values[name], (1, 8), past={7: past[name]}) for name in values}
    term = TERMS["weight_change"].build(TERMS["weight_change"].settings(window=7))
    assert term.value(Trial(views)) == pytest.approx((math.sqrt(1 + 9) + 2) / 2)
    layers = {name: SparseLinear(topology, values[name]) for name in values}
    swap = Swap({"a": torch.tensor([4])}, {"a": torch.tensor([1])})
    changes = prepare_swap(layers, swap, "kaiming_uniform", generator(0)).changes
    assert term.value(Trial(views, changes)) == pytest.approx((1 + 2) / 2)


def test_a_run_that_stops_within_the_window_goes_on_bit_for_bit(tmp_path: Path) -> None:
    settings = ("topology.every=5", "topology.proxy.terms.weight_change={weight: 10.0, window: 3}")
    config = config_of(write_text(tmp_path / "text"), tmp_path / "cache", *settings)
    start(config, tmp_path / "whole", quiet=True)
    with stopped_at(8):
        assert start(config, tmp_path / "stopped", quiet=True)["steps"] == 8
    resume(tmp_path / "stopped", quiet=True)
    assert rows(tmp_path / "stopped") == rows(tmp_path / "whole")
    assert weights(tmp_path / "stopped") == weights(tmp_path / "whole")
    updates = [row for row in rows(tmp_path / "whole") if row["kind"] == "topology" and row["current"]]
    assert [row["step"] for row in updates] == [5, 10]
    assert all(row["current"]["weight_change"] > max(c["weight_change"] for c in row["candidates"]) for row in updates)
