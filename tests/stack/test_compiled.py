"""A compiled stack: the same runs, by few graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsae.models import decoder_and_head
from sparsae.stack.drive import together
from sparsae.stack.program import StackedDecoder
from sparsae.train.stopping import StopRequest
from tests.support.loops import LLAMA
from tests.support.stacks import Run, assert_equal, run_of

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning")


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of runs of each graph that the compiler makes; it is carried out as it is, no code is generated."""
    seen: list[int] = []
    compile_, carried_out = torch.compile, torch._dynamo.lookup_backend("aot_eager")

    def counted(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        seen.append(inputs[0].shape[0])
        made: Callable[..., Any] = carried_out(graph, inputs)
        return made

    def traced(function: Callable[..., Any], *, mode: str, **options: Any) -> Any:
        assert mode == "default"
        return compile_(function, backend=counted, **options)

    monkeypatch.setattr("sparsae.stack.program.torch.compile", traced)
    return seen


def trained(*overrides: str) -> list[Run]:
    """Five runs of three lengths, one of which looks into backward passes."""
    moving = [run_of(rule, rule, "topology.every=3", "training.steps=8", *overrides) for rule in ("rigl", "set")]
    lengths = (6, 6, 4)
    runs = moving + [
        run_of(f"static {n}", "static", f"seed={n}", f"training.steps={steps}", *overrides)
        for n, steps in enumerate(lengths)
    ]
    stop = StopRequest()
    assert len(dict(together((run.trainer.running(stop, lambda: None) for run in runs), 9))) == 5
    return runs


@pytest.mark.parametrize("family", [(), LLAMA], ids=["gpt2", "llama"])
def test_runs_of_a_compiled_stack_are_those_of_any(graphs: list[int], family: tuple[str, ...]) -> None:
    """While connections move, and as runs end: a graph for five runs, which four have too, and one for two."""
    expected = trained(*family)
    assert not graphs
    for one, other in zip(trained(*family, "training.compile=true"), expected, strict=True):
        assert_equal(one, other, 1e-9)
    assert expected[0].trainer.account.accepted
    assert graphs == [5, 2]


@pytest.mark.parametrize(("most", "room"), [(5, [1, 2, 3, 5, 5]), (8, [1, 2, 4, 4, 8, 8, 8, 8]), (1, [1])])
def test_there_are_few_numbers_of_runs_that_a_graph_is_made_for(most: int, room: list[int]) -> None:
    decoder, tokens = decoder_and_head(run_of("static", "static").trainer.model)[0], torch.arange(8)[None]
    program = StackedDecoder(decoder, tokens)
    assert program._room(most) == most
    assert [program._room(count) for count in range(1, most + 1)] == room
