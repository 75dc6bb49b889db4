"""Rules that move connections are refused on several ranks; what stays trains there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sparsae.config import RuleConfig
from sparsae.config.sparsifier import SparsifierConfig
from sparsae.core.randomness import generator
from sparsae.errors import InputError
from sparsae.nn.sparsify import sparsify
from sparsae.rules import EvolutionConfig, GmpConfig, RiglConfig, SetConfig, StaticConfig
from sparsae.search.sparsifier import Sparsifier
from tests.support.sections import backward, made

# Every registered rule that moves connections, from the first steps on, and some with other settings.

RULES_THAT_MOVE: list[RuleConfig] = [EvolutionConfig(every=1), SetConfig(every=1), RiglConfig(every=1)]


@pytest.mark.parametrize("topology", RULES_THAT_MOVE, ids=lambda topology: topology.rule)
def test_ranks_are_refused_whenever_they_appear(topology: RuleConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, sparsifier = made("rigl")
    backward(model, 0)
    pretend_ranks(monkeypatch, 2)
    with pytest.raises(InputError, match="rule 'rigl' would move other connections on each of 2 ranks"):
        sparsifier.before_step()
    with pytest.raises(InputError, match="on each of 2 ranks"):
        sparsifier.after_step()
    with pytest.raises(InputError, match=f"rule '{topology.rule}' would move"):
        Sparsifier(model, optimizer, SparsifierConfig(steps=4, topology=topology))
    with pytest.raises(InputError, match="rule 'gmp' would move"):
        Sparsifier(model, optimizer, SparsifierConfig(steps=4, topology=GmpConfig(), sparsity=0.9))
    still = Sparsifier(model, optimizer, SparsifierConfig(steps=4, topology=StaticConfig()))
    still.before_step()
    still.after_step()
    pretend_ranks(monkeypatch, 1)
    Sparsifier(model, optimizer, SparsifierConfig(steps=4, topology=topology))


def pretend_ranks(monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: ranks)


def _static_rank(rank: int, store: str, results: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = sparsify(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)), 0.8, seed=3)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator(p.numel())))
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=0.01)
    sparsifier = Sparsifier(model, optimizer, SparsifierConfig(steps=10, topology=StaticConfig()))
    for step in range(5):
        x = torch.randn(8, 16, generator=generator(step, "x", rank))
        (parallel(x) - x).square().mean().backward()
        sparsifier.before_step()
        optimizer.step()
        optimizer.zero_grad()
        sparsifier.after_step()
    torch.save(model.state_dict(), f"{results}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_a_static_topology_trains_on_two_ranks(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_static_rank, (str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    states: list[dict[str, Tensor]] = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name])
