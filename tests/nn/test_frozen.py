"""Frozen layers take no part in the search; the names that a search writes are those of the plain model."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsae import AdamW, InputError, Sparsifier, SparsifierConfig, densify, parameter_groups, sparsify
from sparsae.config.teacher import TeacherConfig
from sparsae.core.heads import HeadLayout
from sparsae.nn.linear import sparse_layers
from sparsae.nn.names import modules_by_name
from sparsae.rules import EvolutionConfig, GmpConfig, GranetConfig, GseConfig, RiglConfig, SetConfig, StaticConfig

MOVING: dict[str, Any] = {
    "evolution": EvolutionConfig(every=2),
    "guided": EvolutionConfig(every=2, proposer="guided"),
    "layerwise": EvolutionConfig(every=2, proposer="layerwise"),
    "rigl": RiglConfig(every=2),
    "set": SetConfig(every=2),
    "gse": GseConfig(every=2),
}
PRUNING: dict[str, Any] = {
    "gmp": GmpConfig(every=2),
    "gmp global": GmpConfig(every=2, scope="global"),
    "granet": GranetConfig(every=2),
}


def chain(width: int = 16) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(width, width) for _ in range(3)]
    return nn.Sequential(layers[0], nn.GELU(), layers[1], nn.GELU(), layers[2])


def train(model: nn.Module, optimizer: torch.optim.Optimizer, sparsifier: Sparsifier, steps: int) -> list[Any]:
    updates = []
    for _ in range(steps):
        model(torch.randn(8, 16)).square().mean().backward()
        sparsifier.before_step()
        optimizer.step()
        updates.append(sparsifier.after_step())
        optimizer.zero_grad()
    return [update for update in updates if update is not None]


def held_out(model: nn.Module) -> Any:
    def score(step: int) -> Tensor:
        return model(torch.ones(4, 16)).square().mean()

    return score


@pytest.mark.parametrize("scored", [False, True], ids=["alone", "scored"])
@pytest.mark.parametrize("rule", MOVING)
def test_the_connections_of_a_frozen_layer_stay(rule: str, scored: bool) -> None:
    model = sparsify(chain(), 0.7)
    model[0].requires_grad_(False)
    frozen, trained = model[0].dense_weight(), model[2].indices.clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    config = SparsifierConfig(steps=40, topology=MOVING[rule], teacher=TeacherConfig(storage="union"))
    sparsifier = Sparsifier(model, optimizer, config, score=held_out(model) if scored else None)
    nnz = sparsifier.nnz
    updates = train(model, optimizer, sparsifier, 20)
    assert any(update.accepted for update in updates)
    assert torch.equal(model[0].dense_weight(), frozen)
    assert not torch.equal(model[2].indices, trained)
    assert sparsifier.nnz == nnz == sum(layer.topology.nnz for layer in sparse_layers(model).values())
    assert updates[-1].row["nnz"] == nnz
    assert all("0" not in update.changes for update in updates)


@pytest.mark.parametrize("rule", PRUNING)
def test_pruning_counts_on_the_layers_that_train(rule: str) -> None:
    model = sparsify(chain(), 0.0)
    model[2].requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    config = SparsifierConfig(steps=20, topology=PRUNING[rule], sparsity=0.75, budget="uniform")
    sparsifier = Sparsifier(model, optimizer, config)
    train(model, optimizer, sparsifier, 20)
    assert [model[i].topology.nnz for i in (0, 2, 4)][1] == 256
    assert model[0].topology.nnz + model[4].topology.nnz == 128
    assert sparsifier.nnz == 384
    model = sparsify(chain(), 0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sparsifier = Sparsifier(model, optimizer, config)
    train(model, optimizer, sparsifier, 5)
    model[4].requires_grad_(False)
    with pytest.raises(InputError, match="layer 4 was frozen or unfrozen since pruning began"):
        train(model, optimizer, sparsifier, 5)


@pytest.mark.parametrize("groups", [lambda m: m.parameters(), lambda m: parameter_groups(m, 0.1)])
def test_an_optimizer_need_not_have_what_is_frozen(groups: Any) -> None:
    model = sparsify(chain(), 0.7)
    model[0].requires_grad_(False)
    Sparsifier(model, AdamW(groups(model)), SparsifierConfig(steps=40))
    model[0].requires_grad_(True)
    model[2].requires_grad_(False)
    optimizer = AdamW(parameter_groups(model, 0.1))
    model[2].requires_grad_(True)
    with pytest.raises(InputError, match=r"values of 2: build it after sparsify.* or freeze the layer"):
        Sparsifier(model, optimizer, SparsifierConfig(steps=40))


def test_a_model_with_nothing_to_move_is_told() -> None:
    model = sparsify(chain(), 0.7).requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InputError, match="every sparse layer is frozen"):
        Sparsifier(model, optimizer, SparsifierConfig(steps=40))
    assert Sparsifier(model, optimizer, SparsifierConfig(steps=40, topology=StaticConfig())).nnz > 0


@pytest.mark.parametrize("rule", MOVING)
def test_layers_are_frozen_and_thawed_on_the_way(rule: str, caplog: pytest.LogCaptureFixture) -> None:
    """What trains when an update is prepared takes part in it: between updates, and in the step of one."""
    caplog.set_level(logging.WARNING)
    model = sparsify(chain(), 0.7)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sparsifier = Sparsifier(model, optimizer, SparsifierConfig(steps=200, topology=MOVING[rule]))
    nnz = sparsifier.nnz

    def moved(steps: int) -> set[str]:
        before = {name: layer.indices.clone() for name, layer in sparse_layers(model).items()}
        train(model, optimizer, sparsifier, steps)
        assert sparsifier.nnz == nnz
        return {name for name, layer in sparse_layers(model).items() if not torch.equal(layer.indices, before[name])}

    assert moved(11) == {"0", "2", "4"}  # the next step has an update, which is prepared
    model[0].requires_grad_(False)
    assert moved(10) == {"2", "4"}
    model[0].requires_grad_(True)
    assert moved(11) == {"0", "2", "4"}
    model.requires_grad_(False)
    model[4].bias.requires_grad_(True)
    assert moved(4) == set()
    assert "every sparse layer is frozen" in caplog.text
    model[4].requires_grad_(True)
    optimizer.param_groups[0]["params"] = [p for p in model.parameters() if p is not model[4].values]
    with pytest.raises(InputError, match="does not have the values of 4"):
        moved(4)


def test_heads_of_no_sparse_layer_are_told_by_name() -> None:
    model = sparsify(chain(), 0.5, exclude=["2"])
    optimizer = torch.optim.AdamW(model.parameters())
    for name in ("2", "nope"):
        with pytest.raises(InputError, match=f"heads: '{name}' is no sparse layer of the model, which are 0, 4"):
            Sparsifier(
                model,
                optimizer,
                SparsifierConfig(steps=40),
                heads={"0": HeadLayout("out", 4), name: HeadLayout("out", 4)},
            )
    with pytest.raises(InputError, match=r"head_min_density 0\.1 needs heads"):
        Sparsifier(model, optimizer, SparsifierConfig(steps=40, head_min_density=0.1))
    blocks = sparsify(chain(), 0.5, unit=(8, 8))
    optimizer = torch.optim.AdamW(blocks.parameters())
    heads = {"0": HeadLayout("out", 4)}
    Sparsifier(blocks, optimizer, SparsifierConfig(steps=40), heads=heads)
    with pytest.raises(InputError, match="crosses attention heads"):
        Sparsifier(blocks, optimizer, SparsifierConfig(steps=40, head_min_density=0.1), heads=heads)


class Outer(nn.Module):
    """A model with a compiled part, and with a part that is called as wrappers call theirs."""

    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.body = wrap(chain())
        self.module = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.module(self.body(x))


WRAPPERS: dict[str, Any] = {
    "plain": lambda m: m,
    "compiled": lambda m: torch.compile(m, backend="eager"),
    "data parallel": nn.DataParallel,
    "both": lambda m: torch.compile(nn.DataParallel(m), backend="eager"),
    "averaged": torch.optim.swa_utils.AveragedModel,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_names_are_those_of_the_plain_model(wrapper: str) -> None:
    wrap = WRAPPERS[wrapper]
    for model, plain in (
        (wrap(chain()), chain()),
        (Outer(wrap), Outer(lambda m: m)),
        (wrap(Outer(wrap)), Outer(lambda m: m)),
    ):
        named = dict(plain.named_modules())
        assert list(modules_by_name(model)) == list(named)
        assert [type(m) for m in modules_by_name(model).values()] == [type(m) for m in named.values()]
        # Patterns may have either name.
        full = next(name for name, m in model.named_modules() if isinstance(m, nn.Linear))
        linear = [name for name, m in named.items() if isinstance(m, nn.Linear)]
        sparsify(model, 0.5, exclude=[full, linear[1]])
        assert list(sparse_layers(model)) == linear[2:]


def test_the_names_of_a_distributed_model_are_the_plain_ones() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(sparsify(chain(), 0.5))
        assert list(sparse_layers(model)) == ["0", "2", "4"]
        assert list(sparse_layers(torch.compile(model, backend="eager"))) == ["0", "2", "4"]
        for storage in ("union", "masked", "dense"):
            config = SparsifierConfig(steps=9, topology=StaticConfig(), teacher=TeacherConfig(storage=storage))
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            sparsifier = Sparsifier(model, optimizer, config)
            assert sparsifier.teacher is not None
            before = sparsifier.teacher.model(torch.ones(1, 16))
            train(model, optimizer, sparsifier, 3)
            assert not torch.equal(sparsifier.teacher.model(torch.ones(1, 16)), before)
        for convert in (densify, lambda m: sparsify(m, 0.5)):
            with pytest.raises(InputError, match="convert the model first"):
                convert(model)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("there", WRAPPERS)
@pytest.mark.parametrize("here", WRAPPERS)
def test_a_state_goes_between_wrapped_and_plain_models(here: str, there: str) -> None:
    config = SparsifierConfig(steps=40, topology=RiglConfig(every=2), teacher=TeacherConfig(storage="union"))

    def made(wrapper: str) -> tuple[nn.Module, nn.Module, Any, Sparsifier]:
        plain = sparsify(chain(), 0.7)
        model = WRAPPERS[wrapper](plain)
        plain = modules_by_name(model)[""]
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        return plain, model, optimizer, Sparsifier(model, optimizer, config)

    plain, model, optimizer, sparsifier = made(here)
    train(model, optimizer, sparsifier, 7)
    state = sparsifier.state_dict()
    other_plain, other, other_optimizer, other_sparsifier = made(there)
    other_plain.load_state_dict(plain.state_dict())
    other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other_sparsifier.load_state_dict(copy.deepcopy(state))
    for each in (sparsifier, other_sparsifier):
        torch.manual_seed(1)
        train(*((model, optimizer) if each is sparsifier else (other, other_optimizer)), each, 6)
    assert str(sparsifier.state_dict()) == str(other_sparsifier.state_dict())
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, other_plain.state_dict()[name])


def test_the_state_of_other_layers_is_refused() -> None:
    model, other = sparsify(chain(), 0.5), sparsify(chain(), 0.5, exclude=["2"])
    state = Sparsifier(model, torch.optim.AdamW(model.parameters()), SparsifierConfig(steps=40)).state_dict()
    sparsifier = Sparsifier(other, torch.optim.AdamW(other.parameters()), SparsifierConfig(steps=40))
    with pytest.raises(InputError, match="other sparse layers: 2 is in only one"):
        sparsifier.load_state_dict(state)
