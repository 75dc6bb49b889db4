"""What a checkpoint of somebody else's holds of a search: one mapping, from which it continues bit for bit."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparsae.config import RuleConfig
from sparsae.config.sparsifier import SparsifierConfig
from sparsae.config.teacher import TeacherConfig
from sparsae.errors import InputError
from sparsae.nn.linear import sparse_layers
from sparsae.nn.sparsify import sparsify
from sparsae.nn.tensors import model_tensors
from sparsae.rules import EvolutionConfig, RiglConfig, SetConfig
from sparsae.runs.checkpoint import joined, split
from sparsae.search.sparsifier import Sparsifier
from sparsae.search.teacher import Teacher
from tests.support.loops import OPTIMIZERS, mlp, run_steps, score_of

# After 17 steps: an update was accepted at 16, burn-in runs, counts of layers have changed, a teacher remembers.
MOVING = EvolutionConfig.model_validate(
    {
        "every": 4,
        "burn_in": {"steps": 3},
        "proposer": "shift",
        "reset": {"probability": 0.3},
        "adaptation": {"enabled": True},
    }
)
Parts = tuple[nn.Module, torch.optim.Optimizer, Sparsifier]


def made(topology: RuleConfig = MOVING, teacher: str | None = "union", name: str = "ours") -> Parts:
    model = mlp()
    optimizer = OPTIMIZERS[name](model)
    kept = TeacherConfig(enabled=False) if teacher is None else TeacherConfig(storage=teacher)  # type: ignore[arg-type]
    config = SparsifierConfig(steps=40, topology=topology, teacher=kept)
    return model, optimizer, Sparsifier(model, optimizer, config, score=score_of(model))  # type: ignore[arg-type]


def by_copies(parts: Parts, others: Parts, tmp_path: Path) -> None:
    for part, other in zip(parts, others, strict=True):
        other.load_state_dict(copy.deepcopy(part.state_dict()))


def by_torch(parts: Parts, others: Parts, tmp_path: Path) -> None:
    """Lightning's way: one file of everything."""
    torch.save([part.state_dict() for part in parts], tmp_path / "all.ckpt")
    for other, state in zip(others, torch.load(tmp_path / "all.ckpt", weights_only=True), strict=True):
        other.load_state_dict(state)


def by_accelerate(parts: Parts, others: Parts, tmp_path: Path) -> None:
    """What `register_for_checkpointing` asks for, and what `save_state` and `load_state` do: custom objects last."""
    for i, part in enumerate(parts):
        assert hasattr(part, "state_dict")
        assert hasattr(part, "load_state_dict")
        torch.save(part.state_dict(), tmp_path / f"custom_checkpoint_{i}.pkl")
    for i, other in enumerate(others):
        state = torch.load(tmp_path / f"custom_checkpoint_{i}.pkl", map_location="cpu", weights_only=True)
        other.load_state_dict(state)


def by_safetensors(parts: Parts, others: Parts, tmp_path: Path) -> None:
    """The project's own way: no pickle."""
    by_copies(parts[:2], others[:2], tmp_path)  # type: ignore[arg-type]
    plain, tensors = split(parts[2].state_dict())
    (tmp_path / "state.json").write_text(json.dumps(plain))
    save_file({name: t.clone() for name, t in tensors.items()}, tmp_path / "search.safetensors")
    state = joined(json.loads((tmp_path / "state.json").read_text()), load_file(tmp_path / "search.safetensors"))
    others[2].load_state_dict(state)


def by_distributed_checkpoint(parts: Parts, others: Parts, tmp_path: Path) -> None:
    """torch's own; it fills what it finds, of the same sizes, so that it is read as a whole."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.checkpoint.stateful import Stateful

    assert isinstance(parts[2], Stateful)
    model, optimizer = get_state_dict(*parts[:2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process only
        saved = {"model": model, "optimizer": optimizer, "sparsifier": parts[2]}
        checkpoint.save(saved, checkpoint_id=tmp_path / "step-17")
        dcp_to_torch_save(tmp_path / "step-17", tmp_path / "step-17.pt")
    state = torch.load(tmp_path / "step-17.pt", weights_only=True)
    set_state_dict(*others[:2], model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    others[2].load_state_dict(state["sparsifier"])


ROUTES = [by_copies, by_torch, by_accelerate, by_safetensors, by_distributed_checkpoint]


@pytest.mark.parametrize(
    ("route", "name"), [*((route, "ours") for route in ROUTES), *((by_torch, name) for name in OPTIMIZERS)]
)
@pytest.mark.parametrize("topology", [MOVING, SetConfig(every=4)], ids=["moving", "set"])
def test_a_run_goes_on_as_if_it_had_not_stopped(
    topology: RuleConfig, route: Callable[[Parts, Parts, Path], None], name: str, tmp_path: Path
) -> None:
    parts, others = made(topology, name=name), made(topology, name=name)
    run_steps(*parts, 17)
    assert parts[2].burning_in == (topology is MOVING)
    route(parts, others, tmp_path)
    assert run_steps(*others, 23) == run_steps(*parts, 23)
    for name, tensor in model_tensors(parts[0]).items():
        assert torch.equal(tensor, model_tensors(others[0])[name])
    assert_same(parts[2].state_dict(), others[2].state_dict())


@pytest.mark.parametrize("storage", ["union", "masked", "dense"])
def test_every_teacher_goes_on(storage: str, tmp_path: Path) -> None:
    parts, others = made(teacher=storage), made(teacher=storage)
    run_steps(*parts, 17)
    by_torch(parts, others, tmp_path)
    for each in (parts, others):
        run_steps(*each, 9)
    assert_same(parts[2].state_dict(), others[2].state_dict())


def test_a_teacher_alone_goes_on() -> None:
    """In a loop without a Sparsifier: nothing has to be called after loading."""
    model = mlp()
    teacher, other = Teacher(model, TeacherConfig()), Teacher(model, TeacherConfig())
    for step in range(3):
        for p in model.parameters():
            p.data += 1.0
        teacher.update(model, step)
    other.load_state_dict(copy.deepcopy(teacher.state_dict()))
    for each in (teacher, other):
        each.update(model, 3)
    assert_same(teacher.state_dict(), other.state_dict())
    with pytest.raises(InputError, match=r"no 'model': give what Teacher.state_dict\(\)"):
        other.load_state_dict({})
    with pytest.raises(InputError, match=r"the teacher's state does not fit the model: 0\.bias"):
        other.load_state_dict({"model": {k: t for k, t in teacher.state_dict()["model"].items() if k != "0.bias"}})


@pytest.mark.parametrize("teacher", ["union", None])
def test_a_state_is_plain_values_and_tensors(teacher: str | None) -> None:
    parts = made(teacher=teacher)
    run_steps(*parts, 17)

    def check(value: object, key: object = "") -> None:
        assert type(key) is str
        if type(value) is dict:
            for inner, item in value.items():
                check(item, inner)
        elif type(value) is list:
            for item in value:
                check(item)
        else:
            assert value is None or type(value) in (int, float, str, bool, Tensor)
            assert not isinstance(value, Tensor) or not value.requires_grad

    check(parts[2].state_dict())


def test_splitting_and_joining_any_names() -> None:
    state = {"a/b": {"~1": torch.ones(2), "": 1, "empty": {}}, "a": {"b": {"~0/": torch.zeros(1)}}, "t": torch.ones(1)}
    plain, tensors = split(state)
    assert plain == {"a/b": {"": 1, "empty": {}}, "a": {"b": {}}}
    assert_same(joined(json.loads(json.dumps(plain)), tensors), state)
    assert plain == {"a/b": {"": 1, "empty": {}}, "a": {"b": {}}}


def test_what_is_no_state_is_refused_and_changes_nothing() -> None:
    parts = made()
    run_steps(*parts, 17)
    sparsifier = parts[2]
    before = copy.deepcopy(sparsifier.state_dict())

    def refused(match: str, **changed: Any) -> None:
        with pytest.raises(InputError, match=match) as caught:
            sparsifier.load_state_dict(copy.deepcopy(before) | changed)
        assert "\n" not in str(caught.value)
        assert_same(sparsifier.state_dict(), before)

    for state in ({}, None, [1]):
        with pytest.raises(InputError, match=r"no 'step': give what Sparsifier.state_dict\(\) returned"):
            sparsifier.load_state_dict(state)  # type: ignore[arg-type]
    refused("only one of the state and this Sparsifier has a teacher", teacher=None)
    refused("the state is of rule 'set', not of 'evolution'", rule="set")
    refused("other sparse layers: 1 is in only one", topologies=before["topologies"] | {"1": ""})
    refused("other connections of 2: load the model's state", topologies=before["topologies"] | {"2": ""})
    refused("no 'waiting': give what TopologySearch", search={k: v for k, v in before["search"].items() if k[0] != "w"})
    refused("no 'steps_left': give what BurnIn", burn_in={})
    birth = before["search"]["telemetry"] | {"birth": {}}
    refused("no 'birth' of 0", search=before["search"] | {"telemetry": birth})


def test_a_state_before_the_models_is_told() -> None:
    """With equal counts in all layers nothing but the connections themselves shows it."""
    parts, others = made(SetConfig(every=2), None), made(SetConfig(every=2), None)
    run_steps(*parts, 9)
    with pytest.raises(InputError, match="other connections of 0: load the model's state of the same step first"):
        others[2].load_state_dict(parts[2].state_dict())
    others[0].load_state_dict(parts[0].state_dict())
    others[2].load_state_dict(parts[2].state_dict())


def test_another_rules_state_is_refused() -> None:
    parts, others = made(SetConfig()), made(RiglConfig())
    with pytest.raises(InputError, match="of rule 'set', not of 'rigl': make the Sparsifier with the rule"):
        others[2].load_state_dict(parts[2].state_dict())


def test_a_state_of_other_layers_is_refused() -> None:
    model = nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24), nn.Linear(24, 24))
    sparsify(model, 0.8)
    other = Sparsifier(model, OPTIMIZERS["sgd"](model), SparsifierConfig(steps=40, topology=EvolutionConfig()))
    with pytest.raises(InputError, match="other sparse layers: 3 is in only one of state and model"):
        other.load_state_dict(made(EvolutionConfig(), None)[2].state_dict())
    assert set(sparse_layers(model)) == {"0", "2", "3"}


def assert_same(one: Any, two: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for key, value in one.items():
            assert_same(value, two[key])
    elif isinstance(one, Tensor):
        assert one.dtype == two.dtype
        assert torch.equal(one, two)
    else:
        assert one == two


@pytest.mark.parametrize("count", [0, 31, 33])
def test_values_that_do_not_fit_their_indices_are_told(count: int) -> None:
    model = sparsify(nn.Sequential(nn.Linear(8, 8)), 0.5)
    with pytest.raises(InputError, match=rf"^0\.values: has shape \({count},\), and 0\.indices wants \(32,\)"):
        model.load_state_dict(model.state_dict() | {"0.values": torch.zeros(count)})
