"""A teacher that costs a part: of the sequences, of the steps, of the run; and what it makes of grown connections."""

from __future__ import annotations

import itertools
import runpy
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparsae.config import Config, DataConfig
from sparsae.config.teacher import TeacherConfig
from sparsae.core.randomness import generator
from sparsae.data import prepare
from sparsae.errors import InputError
from sparsae.evaluate.loading import load_run
from sparsae.experiments.compare.plan import ComparisonPlan
from sparsae.experiments.plan import read_plan
from sparsae.nn.linear import SparseLinear, sparse_layers
from sparsae.search.teacher import Teacher, WarmUp
from sparsae.surgery import prepare_swap
from sparsae.train.forecast import count_flops, forecast, untrained
from sparsae.train.memory import state_bytes
from sparsae.train.objective import Objective
from sparsae.train.run import resume, start
from tests.search.test_distill import random_swap, small_model
from tests.support.loops import built
from tests.support.loops import config_of as small_config
from tests.support.runs import config_of, rows, stopped_at, weights, write_text

TAUGHT = ("teacher.enabled=true", "teacher.warmup_fraction=0.0", "teacher.alpha=0.5")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text")


@given(
    share=st.floats(0.01, 1.0),
    every=st.integers(1, 7),
    passes=st.integers(1, 3),
    batch=st.integers(1, 9),
    steps=st.integers(1, 60),
)
def test_a_share_of_the_sequences_is_taught_to_within_one(
    share: float, every: int, passes: int, batch: int, steps: int
) -> None:
    config = TeacherConfig(share=share, every=every, warmup_fraction=0.0)
    warmup = WarmUp(config, steps)
    taught_steps = [step for step in range(steps) if warmup.alpha(step) > 0]
    assert taught_steps == list(range(0, steps, every))
    counts = [warmup.taught(step, i, passes, batch) for step in taught_steps for i in range(passes)]
    assert all(0 <= count <= batch for count in counts)
    assert abs(sum(counts) - share * batch * passes * len(taught_steps)) <= 1.0 + 1e-6
    if share == 1.0:
        assert set(counts) == {batch}


@given(
    share=st.floats(0.01, 1.0),
    every=st.integers(1, 7),
    starts=st.tuples(st.floats(0.0, 1.0), st.floats(0.0, 1.0)),
    alpha=st.sampled_from([0.0, 0.5]),
    batch=st.integers(1, 9),
    ends=st.lists(st.integers(0, 60), max_size=4).map(sorted),
)
def test_what_is_taught_over_stretches_is_what_their_steps_are_taught(
    share: float, every: int, starts: tuple[float, float], alpha: float, batch: int, ends: list[int]
) -> None:
    start, fraction = starts
    warmup = WarmUp(TeacherConfig(share=share, every=every, start=start, warmup_fraction=fraction, alpha=alpha), 60)
    for first, last in itertools.pairwise([0, *ends, 60]):
        taught = [n for n in range(first, last) if warmup.alpha(n) > 0]
        expected = sum(warmup.taught(n, i, 2, batch) for n in taught for i in range(2))
        assert warmup.taught_over(range(first, last), 2, batch) == expected


def test_the_start_and_the_warm_up_both_have_to_be_over() -> None:
    late = WarmUp(TeacherConfig(alpha=0.5, start=0.5, warmup_fraction=0.25), steps=10)
    assert [step for step in range(10) if late.alpha(step)] == [5, 6, 7, 8, 9]
    later = WarmUp(TeacherConfig(alpha=0.5, start=0.25, warmup_fraction=0.5, every=3), steps=10)
    assert [step for step in range(10) if later.alpha(step)] == [6, 9]


def objective_of(config: Config) -> Objective:
    model = built(config)
    teacher = Teacher(model, config.teacher, config.training.steps)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator(1, str(parameter.shape)))
    return Objective(model, config.training, torch.device("cpu"), teacher=teacher)


def test_the_taught_sequences_stand_for_all() -> None:
    """Taught one after the other, with the weight that a share of a quarter gives each, they make the whole term."""
    objective = objective_of(small_config(*TAUGHT, "teacher.share=0.25", "training.loss_chunk=17"))
    batch, alpha = torch.randint(300, (4, 25), generator=generator(0, "tokens")), 0.7
    whole = objective.loss(batch, alpha)
    parts = [objective.loss(batch.roll(-row, 0), alpha, 1) for row in range(4)]
    assert len({float(part.distillation) for part in parts}) == 4
    for of_parts, of_whole in (
        (sum(part.distillation for part in parts) / 4, whole.distillation),
        (sum(part.total for part in parts) / 4, whole.total),
    ):
        torch.testing.assert_close(of_parts, of_whole)
    untaught = objective.loss(batch, alpha, 0)
    assert float(untaught.distillation) == 0.0
    assert float(untaught.total.detach()) == float(untaught.cross_entropy)
    # Steps that teach two of four when one is the share count twice.
    two = objective.loss(batch, alpha, 2)
    assert float((two.total - two.cross_entropy).detach()) == pytest.approx(
        2 * alpha * float(two.distillation), rel=1e-4
    )


SHARES = {
    "quarter": ("teacher.share=0.25",),
    "accumulated": ("teacher.share=0.25", "training.accumulation=2", "training.batch_size=2"),
    "odd": ("teacher.share=0.3", "training.batch_size=3"),
    "every third": ("teacher.every=3",),
    "every third, half": ("teacher.every=3", "teacher.share=0.5"),
    "late": ("teacher.start=0.5",),
    "late, dense": ("teacher.start=0.5", "teacher.storage=dense", "teacher.share=0.5"),
}


@pytest.mark.parametrize("case", SHARES)
def test_what_is_planned_is_counted(text: Path, tmp_path: Path, case: str) -> None:
    config = config_of(text, tmp_path / "cache", *TAUGHT, "training.batch_size=4", *SHARES[case], method="static")
    expected, _ = count_flops(config, untrained(config, 300))
    counted = start(config, tmp_path / "run", quiet=True)["train_flops_by_part"]
    assert counted == expected.parts
    all_taught = config_of(
        text, tmp_path / "cache", *TAUGHT, f"training.batch_size={config.training.batch_size}",
        f"training.accumulation={config.training.accumulation}", f"teacher.storage={config.teacher.storage}",
        method="static",
    )  # fmt: skip
    whole, _ = count_flops(all_taught, untrained(config, 300))
    teacher = config.teacher
    steps = len(range(0, 12, teacher.every)) if not teacher.start else 6
    sequences = steps * config.training.batch_size * config.training.accumulation
    every_sequence = 12 * config.training.batch_size * config.training.accumulation
    assert counted["teacher"] * every_sequence == whole.parts["teacher"] * int(teacher.share * sequences)
    assert counted["student"] == whole.parts["student"]


def test_a_share_is_cheaper_and_trains_otherwise(text: Path, tmp_path: Path) -> None:
    losses = {}
    for case in ("quarter", "every third", "late"):
        config = config_of(text, tmp_path / "cache", *TAUGHT, "training.batch_size=4", *SHARES[case], method="static")
        start(config, tmp_path / case, quiet=True)
        losses[case] = [row["loss"] for row in rows(tmp_path / case) if row["kind"] == "train"]
    assert len({tuple(found) for found in losses.values()}) == 3
    # Rows tell the divergence of what was taught: none before the late teacher, which begins as its student.
    told = [row["distillation"] for row in rows(tmp_path / "late") if row["kind"] == "train"]
    assert told[:2] == [None, None]
    assert all(value > 0 for value in told[2:])


def test_a_late_teacher_begins_as_its_student_and_is_nothing_before() -> None:
    model = small_model()
    teacher = Teacher(model, TeacherConfig(beta=0.9, start=0.3), steps=10)
    watched = teacher.layers
    for step in range(3):
        assert not teacher.begun
        assert teacher.state_dict()["model"] is None
        assert state_bytes(sparse_layers(model), torch.optim.SGD(model.parameters()), teacher.layers)["teacher"] == 0
        with pytest.raises(InputError, match=r"begins after 3 steps \(teacher\.start\)"):
            _ = teacher.model
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator(step, str(parameter.shape))))
        teacher.update(model, step)
    assert teacher.begun
    assert teacher.layers is watched
    assert watched
    for name, parameter in teacher.model.named_parameters():
        assert torch.equal(parameter, dict(model.named_parameters())[name])
        assert not parameter.requires_grad
    # Its ramp counts from its beginning.
    assert [teacher.decay(step) for step in (3, 11)] == [0.1, 0.5]
    with pytest.raises(InputError, match=r"teacher\.start 0\.3 is a share of the steps"):
        Teacher(model, TeacherConfig(start=0.3))


def test_a_state_says_whether_it_had_begun() -> None:
    model = small_model()
    config = TeacherConfig(start=0.5, grown="student")
    early, late = Teacher(model, config, steps=4), Teacher(model, config, steps=4)
    before = early.state_dict()
    for step in range(3):
        late.update(model, step)
    early.load_state_dict(late.state_dict())
    assert early.begun
    early.reconnect(model)
    assert early.since == 2
    early.update(model, 3)
    late.update(model, 3)
    for mine, other in zip(early.model.state_dict().values(), late.model.state_dict().values(), strict=True):
        assert torch.equal(mine, other)
    late.load_state_dict(before)
    assert not late.begun
    with pytest.raises(InputError, match="which had begun"):
        Teacher(model, TeacherConfig()).load_state_dict(before)
    with pytest.raises(InputError, match="has no ages"):
        early.load_state_dict({**early.state_dict(), "ages": {}})


@pytest.mark.parametrize("storage", ["union", "masked"])
@pytest.mark.parametrize("unit", [(1, 1), (4, 4)])
@pytest.mark.parametrize("ramp", [True, False])
def test_a_grown_connection_begins_with_the_student(storage: str, unit: tuple[int, int], ramp: bool) -> None:
    """Against averages of every position of the dense matrix, each with an age of its own."""
    model = small_model(unit).double()
    config = TeacherConfig.model_validate({"storage": storage, "beta": 0.8, "ramp": ramp, "grown": "student"})
    teacher = Teacher(model, config)
    layers = sparse_layers(model)
    average = {name: layer.dense_weight().detach().clone() for name, layer in layers.items()}
    age = {name: torch.zeros_like(weight) for name, weight in average.items()}
    for step in range(24):
        with torch.no_grad():
            for name, layer in layers.items():
                layer.values += torch.randn(layer.values.shape, generator=generator(step, name), dtype=torch.float64)
        teacher.update(model, step)
        for name, layer in layers.items():
            active = layer.topology.to_mask()
            decay = torch.full_like(age[name], 0.8)
            inactive = min(0.8, (1 + step) / (10 + step)) if ramp else 0.8
            own = torch.minimum(decay, (1 + age[name]) / (10 + age[name])) if ramp else decay
            average[name] = torch.where(
                active, average[name].lerp(layer.dense_weight().detach(), 1 - own), average[name] * inactive
            )
            age[name] += active
        if step % 6 == 5:
            swap = prepare_swap(layers, random_swap(layers, step), "kaiming_uniform", generator(step))
            before = {name: layer.topology.to_mask() for name, layer in layers.items()}
            swap.commit(None, teacher.layers)
            for name, layer in layers.items():
                grown = layer.topology.to_mask() & ~before[name]
                assert bool(grown.any())
                average[name][grown] = layer.dense_weight().detach()[grown]
                age[name][grown] = 0
                if storage == "masked":
                    average[name][~layer.topology.to_mask()] = 0
    for name in layers:
        module = teacher.layers[name].module
        assert isinstance(module, SparseLinear)
        torch.testing.assert_close(module.dense_weight(), average[name], rtol=1e-9, atol=1e-7)


def test_ages_are_counted_among_the_bytes_and_planned(text: Path, tmp_path: Path) -> None:
    found = {}
    for grown in ("zero", "student"):
        config = config_of(text, tmp_path / "cache", *TAUGHT, f"teacher.grown={grown}", "sparsity.backend=reference")
        found[grown] = start(config, tmp_path / grown, quiet=True)["state_bytes_by_part"]["teacher"]
        assert forecast(config)["state_bytes"]["teacher"] == found[grown]
    assert found["student"] == 2 * found["zero"]  # 4 bytes a value, and 4 an age


@pytest.mark.parametrize("stop", [3, 6, 9])
@pytest.mark.parametrize(
    "settings",
    [
        ("teacher.start=0.5", "teacher.grown=student", "teacher.storage=union", "topology.mutation_rate=0.5"),
        ("teacher.share=0.3", "teacher.every=2", "training.accumulation=2", "training.log_every=5"),
    ],
    ids=["late", "share"],
)  # fmt: skip
def test_a_run_that_was_stopped_goes_on_to_the_same_numbers(
    text: Path, tmp_path: Path, settings: tuple[str, ...], stop: int
) -> None:
    config = config_of(text, tmp_path / "cache", *TAUGHT, *settings)
    start(config, tmp_path / "whole", quiet=True)
    with stopped_at(stop):
        start(config, tmp_path / "broken", quiet=True)
    if config.teacher.start and stop == 3:
        assert not list((tmp_path / "broken" / "checkpoints").glob("*/teacher.safetensors"))
        with pytest.raises(InputError, match=r"teacher has not begun \(teacher\.start\)"):
            load_run(tmp_path / "broken", teacher=True)
        assert next(row["teacher_loss"] for row in rows(tmp_path / "broken") if row["kind"] == "validation") is None
    resume(tmp_path / "broken", quiet=True)
    assert rows(tmp_path / "broken") == rows(tmp_path / "whole")
    assert weights(tmp_path / "broken") == weights(tmp_path / "whole")
    # And it is more than what a run without the settings does.
    start(config_of(text, tmp_path / "cache", *TAUGHT), tmp_path / "plain", quiet=True)
    assert weights(tmp_path / "plain") != weights(tmp_path / "whole")


def test_a_dense_model_may_have_a_late_teacher(text: Path, tmp_path: Path) -> None:
    config = config_of(text, tmp_path / "cache", *TAUGHT, "sparsity.sparsity=0", "teacher.start=0.5", method="dense")
    start(config, tmp_path / "whole", quiet=True)
    for stop in (4, 8):
        with stopped_at(stop):
            start(config, tmp_path / str(stop), quiet=True)
        resume(tmp_path / str(stop), quiet=True)
        assert rows(tmp_path / str(stop)) == rows(tmp_path / "whole")
        assert weights(tmp_path / str(stop)) == weights(tmp_path / "whole")


def test_old_states_of_a_teacher_can_be_read() -> None:
    model = small_model()
    teacher = Teacher(model, TeacherConfig())
    state: dict[str, dict[str, Tensor]] = {"model": teacher.state_dict()["model"]}
    teacher.load_state_dict(state)
    assert teacher.since == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["teacher.share=0"], r"teacher\.share"),
        (["teacher.share=1.5"], r"teacher\.share"),
        (["teacher.every=0"], r"teacher\.every"),
        (["teacher.start=1"], r"teacher\.start"),
        (["teacher.grown=student", "teacher.storage=dense"], "a dense one keeps every position"),
    ],
)
def test_wrong_settings_are_one_line(settings: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        small_config(*settings)
    assert "\n" not in str(caught.value)


def test_the_benchmark_reads_a_text_as_often_as_it_says(text: Path, tmp_path: Path) -> None:
    """Its plan names settings that there are, and its texts are the shorter the more passes."""
    script = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "teacher.py"))
    plan = read_plan(script["PLAN"], {}, [], ComparisonPlan)
    teachers = {name: plan.config(name, 0.9, 0).teacher for name in plan.all_variants}
    assert {name: teacher.share for name, teacher in teachers.items() if teacher.enabled}["quarter"] == 0.25
    assert plan.held_against == "none"
    assert not teachers["none"].enabled
    tokenizer, texts = script["cut"](str(text), 4000, [1, 8], tmp_path / "out")
    sizes = {}
    for passes, path in texts.items():
        data = DataConfig(source=str(path), validation_source=str(text), tokenizer=str(tokenizer), cache=str(tmp_path))
        sizes[passes] = len(prepare(data).train)
    assert sizes[1] == pytest.approx(4000, rel=0.05)
    assert sizes[8] == pytest.approx(4000 / 8, rel=0.1)
    with pytest.raises(SystemExit, match="too little text"):
        script["cut"](str(text), 10**6, [1], tmp_path / "more")
