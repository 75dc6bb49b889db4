"""A compiled stack: the same runs, by few graphs."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from sparsae.models import decoder_and_head
from sparsae.nn.linear import sparse_layers
from sparsae.stack.drive import together
from sparsae.stack.program import StackedDecoder
from sparsae.train.stopping import StopRequest
from tests.support.loops import LLAMA, SUPAR
from tests.support.stacks import Run, assert_equal, noted_graphs, run_of

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning")
OFTEN = "topology.every=3"
BLOCKS = ("sparsity.unit=[4,4]", "sparsity.sparsity=0.8")


def trained(runs: list[Run], most: int) -> list[Run]:
    stop = StopRequest()
    ended = dict(together((run.trainer.running(stop, lambda: None) for run in runs), most))
    assert ended == dict.fromkeys(range(len(runs)), True)
    return runs


def of_three_lengths(*overrides: str) -> list[Run]:
    """Five runs, one of which looks into backward passes."""
    moving = [run_of(rule, rule, OFTEN, "training.steps=8", *overrides) for rule in ("rigl", "set")]
    return moving + [
        run_of(f"static {n}", "static", f"seed={n}", f"training.steps={steps}", *overrides)
        for n, steps in enumerate((6, 6, 4))
    ]


@pytest.mark.parametrize("family", [(), LLAMA], ids=["gpt2", "llama"])
def test_runs_of_a_compiled_stack_are_those_of_any(monkeypatch: pytest.MonkeyPatch, family: tuple[str, ...]) -> None:
    """While connections move, and as runs end: a graph for five runs, which four have too, and one for two."""
    graphs = noted_graphs(monkeypatch)
    expected = trained(of_three_lengths(*family), 9)
    assert not graphs
    for one, other in zip(trained(of_three_lengths(*family, "training.compile=true"), 9), expected, strict=True):
        assert_equal(one, other, 1e-9)
    assert expected[0].trainer.account.accepted
    assert graphs == [5, 2]


def of_several_shapes(*overrides: str) -> list[Run]:
    """Whose programs are not wanted at every step, and are traced while others are looked into."""
    return [
        run_of("rigl", "rigl", "topology.every=1", "training.steps=7", *BLOCKS, *overrides),
        run_of("long", "static", "training.steps=6", *overrides),
        run_of("short", "static", "training.steps=3", *overrides),
        run_of("guided", "sparsae-guided", OFTEN, "training.accumulation=2", "training.steps=5", *overrides),
        run_of("dense", "dense", "sparsity.sparsity=0", "training.steps=4", *overrides),
        run_of("taught", "set", OFTEN, "teacher.enabled=true", "training.steps=5", *overrides),
    ]


def test_every_shape_has_its_graphs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And scores, which are each run's own, have none."""
    graphs = noted_graphs(monkeypatch)
    expected = trained(of_several_shapes(), 4)
    for one, other in zip(trained(of_several_shapes("training.compile=true"), 4), expected, strict=True):
        assert_equal(one, other, 1e-9)
    # Three for single weights, whose runs end; one for the dense run; one for blocks, once nothing looks at its passes.
    assert sorted(graphs) == [1, 1, 1, 2, 3]


def test_programs_of_equal_tensors_have_graphs_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here they differ in the factor on the products of queries and keys."""

    def pair(*overrides: str) -> list[Run]:
        return trained([run_of("one", "static", *own, "training.steps=3", *overrides) for own in ((), SUPAR)], 2)

    graphs = noted_graphs(monkeypatch)
    for one, other in zip(pair(), pair("training.compile=true"), strict=True):
        assert_equal(one, other, 1e-9)
    assert graphs == [1, 1]


def test_nothing_of_the_runs_outlives_them(monkeypatch: pytest.MonkeyPatch) -> None:
    noted_graphs(monkeypatch)
    runs = trained([run_of("rigl", "rigl", OFTEN, "training.steps=4", "training.compile=true")], 1)
    layers = sparse_layers(runs[0].trainer.model).values()
    left = [weakref.ref(part) for layer in layers for part in (layer, layer.values, layer.indices)]
    assert left
    runs.clear()
    del layers
    gc.collect()
    assert not [ref for ref in left if ref() is not None]


@pytest.mark.parametrize(("most", "room"), [(5, [1, 2, 3, 5, 5]), (8, [1, 2, 4, 4, 8, 8, 8, 8]), (1, [1])])
def test_there_are_few_numbers_of_runs_that_a_graph_is_made_for(most: int, room: list[int]) -> None:
    decoder, tokens = decoder_and_head(run_of("static", "static").trainer.model)[0], torch.arange(8)[None]
    program = StackedDecoder(decoder, tokens)
    assert program._room(most) == most
    assert [program._room(count) for count in range(1, most + 1)] == room
