"""How often a step and an update wait for a GPU: not once more for each layer, or as often more as the pages say."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from sparsae import Sparsifier, SparsifierConfig, sparsify
from sparsae.cli import main
from sparsae.config.load import resolve
from sparsae.optim import AdamW
from sparsae.train import run
from sparsae.train.model import model_of
from sparsae.train.objective import Objective
from tests.golden import COMMON, TAUGHT
from tests.gpu import simulated
from tests.support.runs import write_text

pytestmark = pytest.mark.skipif(simulated.absence() is not None, reason=f"not simulated: {simulated.absence()}")

Stepping = Callable[[Any], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Stepping] = {
    "ours": lambda own: AdamW(own, per_weight_step=True),
    "adamw": torch.optim.AdamW,
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
}
RULES = ["generations", "set", "gse", "mest", "evolution"]


def last_update(layers: int, steps: Stepping, topology: dict[str, Any]) -> Counter[str]:
    """What waited in the last update of a model of so many sparse layers."""
    torch.manual_seed(0)
    model = sparsify(nn.Sequential(*(nn.Linear(48, 48) for _ in range(layers))), 0.8, budget="uniform").to("cuda")
    optimizer, held_out = steps(model.parameters()), torch.ones(8, 48, device="cuda")

    def score(step: int) -> Tensor:
        return model(held_out).square().mean()

    config = SparsifierConfig(steps=100, topology={"every": 2, **topology})
    sparsifier = Sparsifier(model, optimizer, config, score=score if topology["rule"] == "evolution" else None)
    for _ in range(6):
        model(torch.randn(8, 48, device="cuda")).square().mean().backward()
        with simulated.waits() as found:
            sparsifier.before_step()
            optimizer.step()
            update = sparsifier.after_step()
        optimizer.zero_grad()
    assert update is not None
    # Over all layers together, a rule may leave some of them as they are.
    assert len(update.changes) == layers or (topology["rule"] == "gse" and len(update.changes) > layers // 2)
    sparsifier.close()
    return found


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("rule", RULES)
def test_an_update_waits_as_often_however_many_layers_there_are(rule: str, optimizer: str) -> None:
    few, many = (last_update(layers, OPTIMIZERS[optimizer], {"rule": rule}) for layers in (2, 5))
    assert few == many
    assert 3 <= few.total() <= 20


@pytest.mark.parametrize(
    ("topology", "times"), [({"rule": "generations", "random_share": 0.5, "window": 2}, 1), ({"rule": "rigl"}, 2)]
)
def test_what_is_grown_in_part_waits_once_or_twice_more_a_layer(topology: dict[str, Any], times: int) -> None:
    few, many = (last_update(layers, OPTIMIZERS["ours"], topology) for layers in (2, 5))
    assert {line: (few[line], many[line]) for line in many if few[line] != many[line]} == {
        max(many, key=lambda line: many[line]): (2 * times, 5 * times)
    }


def run_of(steps: int, folder: Path, *settings: str, method: str = "sparsae") -> Counter[str]:
    """What waited in a whole run, which validates and logs at its ends alone."""
    if not (folder / "text").exists():
        write_text(folder / "text")
    rare = [f"training.{key}=1000" for key in ("validate_every", "log_every")]
    data = [f"data.source={folder / 'text'}", f"data.cache={folder / 'cache'}", "training.device=cuda"]
    given = [*COMMON, *data, *rare, *settings, f"training.steps={steps}"]
    with simulated.waits() as found:
        run.start(resolve(None, "demo", method, given), folder / "-".join([method, str(steps), *settings]), quiet=True)
    return found


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("training.accumulation=4",),
        ("training.precision=bfloat16",),
        ("model.family=llama", "model.kv_heads=2"),
        TAUGHT,
    ],
    ids=["plain", "accumulated", "bfloat16", "llama", "taught"],
)
def test_a_step_waits_for_its_losses_and_for_its_gradients_norm(settings: tuple[str, ...], tmp_path: Path) -> None:
    rare = (*settings, "topology.every=1000")
    more = run_of(50, tmp_path, *rare) - run_of(20, tmp_path, *rare)
    assert sorted(more.values()) == [30, 30]
    assert all("train/loop.py" in line or "train/passes.py" in line for line in more)


@pytest.mark.parametrize("method", ["sparsae", "set", "gse", "sparsae-guided"])
def test_updates_of_a_run_wait_as_often_however_many_layers_there_are(method: str, tmp_path: Path) -> None:
    often = ("topology.every=4", "topology.stop=1.0")
    few, many = (
        run_of(40, tmp_path, f"model.layers={layers}", *often, method=method)
        - run_of(20, tmp_path, f"model.layers={layers}", *often, method=method)
        for layers in (1, 3)
    )
    assert few == many
    assert few.total() > 60


def test_a_mean_over_many_batches_waits_once() -> None:
    config = resolve(None, "demo", "static", [*COMMON, "training.device=cuda"])
    device = torch.device("cuda")
    objective = Objective(model_of(config, 257, 0, device).to(device), config.training, device)
    rows = torch.arange(20 * 17).view(20, 17) % 257
    with simulated.waits() as found:
        objective.mean(rows)
    assert found.total() == 1
    assert objective.mean(rows) == pytest.approx(
        sum(float(objective.cross_entropy(batch)) for batch in rows.split(config.training.batch_size)) / 10
    )


def test_a_step_of_a_stack_waits_as_often_as_that_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "text")
    common = [setting for setting in COMMON if not setting.startswith("sparsity.")]
    plan = {
        "kind": "comparison", "preset": "demo", "methods": ["static", "static-erk"], "seeds": 2, "sparsities": [0.8],
        "match": "steps",
    }  # fmt: skip
    data = [f"data.source={tmp_path / 'text'}", f"data.cache={tmp_path / 'cache'}", "training.device=cuda"]
    rare = [f"training.{key}=1000" for key in ("validate_every", "log_every")]
    found = []
    for steps in (20, 50):
        (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
        settings = [f"--set={setting}" for setting in (*common, *data, *rare, f"training.steps={steps}")]
        given = ["compare", str(tmp_path / "plan.yaml"), "--stack", "--out", str(tmp_path / str(steps)), *settings]
        monkeypatch.setattr(sys, "argv", ["sparsae", *given])
        with simulated.waits() as waits:
            assert not main()
        found.append(waits)
    saving = "train/saving.py", "runs/checkpoint.py", "core/topology.py"
    more = {line: times for line, times in (found[1] - found[0]).items() if not any(part in line for part in saving)}
    assert sorted(more.values()) == [30, 30]
