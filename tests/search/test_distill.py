"""The teacher: union storage is the dense average, masked storage is what is active."""

from __future__ import annotations

import copy
from typing import Literal

import pytest
import torch
from torch import nn

from sparsae.config.teacher import TeacherConfig
from sparsae.core.randomness import generator
from sparsae.core.swap import Swap
from sparsae.core.topology import sample_distinct
from sparsae.errors import InputError
from sparsae.nn.linear import SparseLinear, sparse_layers
from sparsae.nn.sparsify import sparsify
from sparsae.search.teacher import Teacher, WarmUp
from sparsae.surgery import prepare_swap


def small_model(unit: tuple[int, int] = (1, 1)) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16), nn.LayerNorm(16))
    return sparsify(model, 0.8, unit=unit, seed=3)


def random_swap(layers: dict[str, SparseLinear], seed: int) -> Swap:
    rng = generator(seed, "swap")
    drop, grow = {}, {}
    for name, layer in layers.items():
        topology = layer.topology
        n = max(1, topology.count // 5)
        drop[name] = topology.indices[sample_distinct(topology.count, n, rng)]
        grow[name] = topology.sample_inactive(n, rng)
    return Swap(drop, grow)


@pytest.mark.parametrize("unit", [(1, 1), (4, 4)])
def test_union_equals_dense_over_a_thousand_steps_with_ten_updates(unit: tuple[int, int]) -> None:
    # In float64, where rounding does not hide what the tolerance leaves out.
    model = small_model(unit).double()
    layers = sparse_layers(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    teachers = {
        storage: Teacher(model, TeacherConfig(storage=storage, beta=0.99, ramp=False))
        for storage in ("union", "dense", "masked")
    }
    tokens = torch.arange(11)
    rng = generator(0, "targets")
    masked_differed = False
    for step in range(1000):
        optimizer.zero_grad()
        target = torch.randn(11, 16, generator=rng, dtype=torch.float64)
        (model(tokens) - target).square().mean().backward()
        optimizer.step()
        for teacher in teachers.values():
            teacher.update(model, step)
        if step % 100 == 50:
            made = prepare_swap(layers, random_swap(layers, step), "kaiming_uniform", generator(step))
            made.commit(optimizer)
            for teacher in teachers.values():
                for name, change in made.changes.items():
                    teacher.layers[name].follow(change)
        if step % 25 == 0:
            with torch.no_grad():
                outputs = {storage: teacher.model(tokens) for storage, teacher in teachers.items()}
            assert float((outputs["union"] - outputs["dense"]).abs().max()) <= 1e-6
            masked_differed |= float((outputs["masked"] - outputs["dense"]).abs().max()) > 1e-3
    assert masked_differed
    for name, layer in layers.items():
        union = teachers["union"].layers[name].module
        assert isinstance(union, SparseLinear)
        assert union.topology.count > layer.topology.count
        assert bool(union.topology.contains(layer.topology.indices).all())


def test_a_fresh_teacher_costs_its_values_only() -> None:
    model = small_model()
    teacher = Teacher(model, TeacherConfig())
    for name, layer in sparse_layers(model).items():
        module = teacher.layers[name].module
        assert isinstance(module, SparseLinear)
        assert module.indices.data_ptr() == layer.indices.data_ptr()
        assert module.values.data_ptr() != layer.values.data_ptr()
        assert not module.values.requires_grad


def test_average_follows_its_formula_for_every_parameter() -> None:
    model = small_model()
    teacher = Teacher(model, TeacherConfig(beta=0.9, ramp=False))
    before = {name: p.detach().clone() for name, p in teacher.model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator(1)))
    teacher.update(model, 0)
    student = dict(model.named_parameters())
    for name, parameter in teacher.model.named_parameters():
        torch.testing.assert_close(parameter, 0.9 * before[name] + 0.1 * student[name].detach())


def test_a_dense_teacher_of_a_model_with_buffers_follows() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=None,
    )
    model = sparsify(LlamaForCausalLM(config), 0.5)
    teacher = Teacher(model, TeacherConfig(storage="dense", beta=0.5, ramp=False))
    for layer in sparse_layers(model).values():
        layer.values.data += 1.0
    teacher.update(model, 0)
    for name, layer in sparse_layers(model).items():
        weight = teacher.model.get_submodule(name).weight
        assert isinstance(weight, torch.Tensor)
        torch.testing.assert_close(weight, layer.dense_weight() - 0.5 * layer.topology.to_mask())


def test_ramp_lets_the_decay_grow() -> None:
    teacher = Teacher(small_model(), TeacherConfig(beta=0.99, ramp=True))
    assert [teacher.decay(step) for step in (0, 8, 10_000)] == [0.1, 0.5, 0.99]


def test_warm_up_by_fraction_and_by_validation() -> None:
    fraction = WarmUp(TeacherConfig(alpha=0.5, warmup_fraction=0.05), steps=100)
    assert [fraction.alpha(step) for step in (0, 4, 5, 99)] == [0.0, 0.0, 0.5, 0.5]
    config = TeacherConfig(alpha=0.5, warmup="validation", warmup_improvement=1.0)
    validation = WarmUp(config, steps=100)
    for loss, alpha in ((8.0, 0.0), (7.5, 0.0), (6.9, 0.5), (7.9, 0.5)):
        validation.observe(loss)
        assert validation.alpha(50) == alpha
    again = WarmUp(config, steps=100)
    again.load_state_dict(validation.state_dict())
    assert again.alpha(0) == 0.5


@pytest.mark.parametrize("storage", ["union", "masked"])
def test_a_student_that_was_loaded_without_its_teacher_is_told(storage: Literal["union", "masked"]) -> None:
    model = small_model()
    first = copy.deepcopy(model.state_dict())
    teacher = Teacher(model, TeacherConfig(storage=storage))
    layers = sparse_layers(model)
    prepare_swap(layers, random_swap(layers, 1), "zero", generator(1)).commit(None, teacher.layers)
    teacher.update(model, 0)
    both = copy.deepcopy(model.state_dict()), copy.deepcopy(teacher.model.state_dict())
    model.load_state_dict(first)
    with pytest.raises(InputError, match=r"does not have the student's topology.*reconnect"):
        teacher.update(model, 1)
    model.load_state_dict(both[0])
    teacher.model.load_state_dict(both[1])
    teacher.reconnect(model)
    teacher.update(model, 1)
    # Moving a model changes none of its topologies.
    teacher.update(model.double().float(), 2)


@pytest.mark.parametrize("storage", ["union", "masked"])
def test_states_that_do_not_belong_together_are_not_connected(storage: Literal["union", "masked"]) -> None:
    model = small_model()
    teacher = Teacher(model, TeacherConfig(storage=storage))
    layers = sparse_layers(model)
    prepare_swap(layers, random_swap(layers, 1), "zero", generator(1)).commit(None)
    with pytest.raises(InputError, match="load the states of both"):
        teacher.reconnect(model)


def test_a_teacher_computes_with_its_own_weights_whatever_the_students_forward_is() -> None:
    """Lightning sets the compiled forward on the module; a function is copied as it is, and is bound to the student."""
    model, x = small_model(), torch.arange(11)
    model.forward = torch.compile(model.forward, backend="eager")
    teacher = Teacher(model, TeacherConfig(beta=0.0, ramp=False))
    before = teacher.model(x)
    for parameter in model.parameters():
        parameter.data.mul_(2.0)
    assert torch.equal(teacher.model(x), before)
    model.forward = lambda x: type(model).forward(model, x)
    with pytest.raises(
        InputError, match=r"whose own forward was replaced by the function .*lambda.*, which computes with"
    ):
        Teacher(model, TeacherConfig())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("start", [0.0, 0.5])
def test_parameters_of_16_bits_have_no_average(dtype: torch.dtype, start: float) -> None:
    model = small_model().to(dtype)
    with pytest.raises(
        InputError, match=rf"cannot average .*: .* rounding of {str(dtype).removeprefix('torch.')}; keep"
    ):
        Teacher(model, TeacherConfig(start=start), steps=10)
    assert Teacher(model, TeacherConfig(beta=0.5)).begun
    assert Teacher(model.requires_grad_(False), TeacherConfig()).begun


def test_integers_are_left_as_they_are_and_complex_numbers_averaged() -> None:
    model = small_model()
    model.places = nn.Parameter(torch.arange(4), requires_grad=False)
    model.waves = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    teacher = Teacher(model, TeacherConfig(beta=0.5, ramp=False))
    model.waves.data.fill_(3j)
    teacher.update(model, 0)
    assert torch.equal(teacher.model.get_parameter("places"), torch.arange(4))
    assert torch.equal(teacher.model.get_parameter("waves"), torch.full((2,), 0.5 + 1.5j))
