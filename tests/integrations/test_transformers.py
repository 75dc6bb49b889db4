"""The callback for the Trainer of transformers, and the Trainer that listens to the teacher."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from sparsae.config.teacher import TeacherConfig
from sparsae.errors import InputError
from sparsae.integrations.transformers import SparsaeCallback, SparsaeTrainer
from sparsae.losses import distillation_loss
from sparsae.nn.linear import sparse_layers
from sparsae.nn.sparsify import densify
from sparsae.optimizer_state import parts_of
from sparsae.rules import EvolutionConfig, GmpConfig, RiglConfig, SetConfig
from tests.support.hf import Counting, gpt2, trainer

TEACHER = TeacherConfig(alpha=0.5, warmup_fraction=0.25, share=0.5, beta=0.9, storage="union")
KINDS: dict[str, dict[str, Any]] = {
    "rigl": {"topology": RiglConfig(every=3, window=2)},
    "gmp": {"topology": GmpConfig(every=3), "sparsity": 0.9},
    "evolution": {"topology": EvolutionConfig(every=3, candidates=2), "held_out": Counting(16, 1000)},
    "taught": {"topology": SetConfig(every=3), "teacher": TEACHER},
}


def same(one: Any, two: Any) -> bool:
    """Whether two states are equal, bit for bit."""
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two


def assert_same(one: Trainer, two: Trainer, mine: SparsaeCallback, other: SparsaeCallback) -> None:
    assert same(one.model.state_dict(), two.model.state_dict())
    assert same(one.optimizer.state_dict(), two.optimizer.state_dict())
    assert same(mine.sparsifier.state_dict(), other.sparsifier.state_dict())
    assert [row["step"] for row in mine.rows] == [row["step"] for row in other.rows]


@pytest.mark.parametrize("name", KINDS)
def test_what_is_resumed_ends_as_what_was_not_interrupted(name: str, tmp_path: Path) -> None:
    callbacks = [SparsaeCallback(**KINDS[name]) for _ in range(2)]
    sparsity = 0.0 if name == "gmp" else 0.8
    kind = SparsaeTrainer if name == "taught" else Trainer
    # Batches that the accumulation does not divide, so that an epoch ends with a step of fewer passes.
    whole, resumed = (
        trainer(
            tmp_path, each, model=gpt2(sparsity), kind=kind, gradient_accumulation_steps=2, train_dataset=Counting(36)
        )
        for each in callbacks
    )
    whole.train()
    assert len(callbacks[0].rows) > 2
    assert callbacks[0].rows[-1]["itop_rate"] > callbacks[0].rows[0]["itop_rate"] or name == "gmp"
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert_same(whole, resumed, *callbacks)


class Checked(SparsaeTrainer):
    """Compares every loss with one that is put together by hand."""

    compared = 0

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        callback = next(each for each in self.callback_handler.callbacks if isinstance(each, SparsaeCallback))
        found = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        labels = torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100).flatten()
        logits = model(input_ids=inputs["input_ids"]).logits.flatten(0, 1)
        with torch.no_grad():
            taught = callback.sparsifier.teacher.model(input_ids=inputs["input_ids"]).logits.flatten(0, 1)
        parts = distillation_loss(logits, taught, labels, alpha=0.5)
        # A mean over the tokens of all passes.
        expected = parts.total * (labels != -100).sum() / num_items_in_batch
        torch.testing.assert_close(found, expected)
        assert parts.distillation > 0 or callback.sparsifier.step == 0
        self.compared += 1
        return found


def test_the_teachers_part_is_a_mean_over_the_tokens_of_a_step(tmp_path: Path) -> None:
    teacher = TeacherConfig(alpha=0.5, warmup_fraction=0.0, beta=0.9)
    callback = SparsaeCallback(teacher=teacher)
    trains = trainer(
        tmp_path, callback, model=gpt2(dropout=0.0), kind=Checked, gradient_accumulation_steps=2, max_steps=4
    )
    trains.train()
    assert trains.compared == 8
    assert "sparsae/distillation" in trains.state.log_history[0]


class Logger(TrainerCallback):
    """As TensorBoard's: it comes before the callbacks that a user adds."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.rows.append(dict(logs))


@pytest.mark.parametrize("kind", [SparsaeTrainer, Trainer])
def test_metrics_go_where_the_trainers_go(kind: type[Trainer], tmp_path: Path) -> None:
    logger, callback = Logger(), SparsaeCallback(topology=SetConfig(every=3))
    trains = trainer(tmp_path, callback, kind=kind, callbacks=(logger,), save_strategy="no")
    trains.train()
    rows = [row for row in trains.state.log_history if "loss" in row]
    assert [row["sparsae/updates"] for row in rows] == [0, 1, 2, 2, 2, 2]
    assert rows[-1]["sparsae/nnz"] == callback.sparsifier.nnz
    assert all("sparsae/nnz" in row for row in logger.rows if "loss" in row) == (kind is SparsaeTrainer)
    page = (tmp_path / "topology.html").read_text("utf-8")
    assert "Density through time" in page
    assert page.count("<figure>") >= 5


def test_the_best_model_is_loaded_across_a_change_of_topology(tmp_path: Path) -> None:
    """Of three checkpoints the first is called the best."""
    callback = SparsaeCallback(topology=SetConfig(every=3), teacher=TEACHER)
    every = {"save_steps": 4, "eval_steps": 4, "eval_strategy": "steps"}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "accuracy", "greater_is_better": True}
    trains = trainer(tmp_path, callback, eval_dataset=Counting(8, 500), **every, **best)
    trains.compute_metrics = lambda _: {"accuracy": 1.0 / trains.state.global_step}
    ends: dict[int, Any] = {}

    class Kept(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            ends[state.global_step] = copy.deepcopy((trains.model.state_dict(), callback.sparsifier.state_dict()))

    trains.add_callback(Kept())
    trains.train()
    assert trains.state.best_global_step == 4
    model, sparsifier = ends[4]
    assert not same(model["transformer.h.0.mlp.c_fc.indices"], ends[12][0]["transformer.h.0.mlp.c_fc.indices"])
    assert same(trains.model.state_dict(), model)
    assert same(callback.sparsifier.state_dict(), sparsifier)
    assert callback.rows[-1]["step"] > 4  # the page is of the whole training
    # Moments of the last connections are none of the best ones'.
    values = [layer.values for layer in sparse_layers(trains.model).values()]
    assert not any(own in part.state for part in parts_of(trains.optimizer) for own in values)
    assert any(part.state for part in parts_of(trains.optimizer))


WAITS = TeacherConfig(warmup="validation", warmup_improvement=1e-6)


def test_a_warm_up_that_no_validation_can_end_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    several = {"a": Counting(8, 500), "b": Counting(8, 600)}

    def told(monitor: str = "eval_loss", teacher: TeacherConfig = WAITS, **more: Any) -> tuple[list[str], bool]:
        caplog.clear()
        callback = SparsaeCallback(topology=SetConfig(every=3), teacher=teacher, monitor=monitor)
        every = {"eval_steps": 2, "eval_strategy": "steps"} if "eval_dataset" in more else {}
        trainer(tmp_path, callback, kind=SparsaeTrainer, **every, **more).train()
        lines = [each.getMessage() for each in caplog.records if "warm-up" in each.getMessage()]
        return lines, callback._companion._warm_up.over_by_validation

    assert told() == (
        ["eval_loss, which ends the teacher's warm-up: nothing is evaluated (eval_strategy); name one as monitor, or "
         "let teacher.warmup be fraction"], False,
    )  # fmt: skip
    lines, _ = told(eval_dataset=several)
    assert len(lines) == 1
    assert "no evaluation has it (there are: eval_a_loss, " in lines[0]
    assert told("eval_b_loss", eval_dataset=several) == ([], True)
    assert told(teacher=TEACHER) == ([], False)


class Scaled(SparsaeTrainer):
    """In float16 with a gradient scaler, which accelerate has for accelerators alone; its first factors overflow."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_interval=5)
        self.accelerator.native_amp = True
        self.accelerator.state._mixed_precision = "fp16"


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_steps_that_a_scaler_skips_are_none(max_grad_norm: float, tmp_path: Path, caplog: Any) -> None:
    """Gradients at inactive connections are those of float32, whatever the factor was when they were taken."""
    seen: dict[type[Trainer], list[Any]] = {}
    for kind in (Scaled, SparsaeTrainer):
        sums: list[Any] = []
        callback = SparsaeCallback(topology=RiglConfig(every=6, window=4), teacher=TEACHER)

        class Sums(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                windows = callback.sparsifier.search.gradients.windows.sums  # noqa: B023
                sums.append((callback.sparsifier.step, {name: s.mean() for name, s in windows.items()}))  # noqa: B023

        # With the same sequences in each step, and weights that hardly move, gradients are those of any step.
        model, data = gpt2(dropout=0.0), [Counting()[0]] * 96
        given = {"max_grad_norm": max_grad_norm, "max_steps": 18, "save_strategy": "no", "train_dataset": data}
        trains = trainer(tmp_path / kind.__name__, callback, model=model, kind=kind, callbacks=(Sums(),), **given)
        for group in trains.optimizer.param_groups:
            group["lr"] = 1e-6
        trains.train()
        seen[kind] = sums
    scaled = seen[Scaled]
    skipped = [i for i, (step, _) in enumerate(scaled) if step == (scaled[i - 1][0] if i else 0)]
    assert len(skipped) > 2
    assert scaled[-1][0] == 18 - len(skipped)
    assert "not finite" not in caplog.text
    plain = dict(seen[SparsaeTrainer])
    compared = 0
    for step, means in scaled:
        for name, mean in means.items():
            if step in plain and name in plain[step] and mean is not None and step < 6:
                torch.testing.assert_close(mean, plain[step][name], rtol=0.1, atol=1e-3)
                compared += 1
    assert compared >= 12  # four layers in the steps of the first window, before it is used


@pytest.mark.usefixtures("fresh_accelerate")
def test_float16_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    callbacks = [SparsaeCallback(topology=RiglConfig(every=4, window=3), teacher=TEACHER) for _ in range(2)]
    whole, resumed = (trainer(tmp_path, each, kind=Scaled, max_steps=32, save_steps=16) for each in callbacks)
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-16"))
    assert 12 < callbacks[0].sparsifier.step < 32
    assert_same(whole, resumed, *callbacks)


@pytest.mark.usefixtures("fresh_accelerate")
def test_bfloat16_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    topology = EvolutionConfig(every=3, candidates=2)
    callbacks = [SparsaeCallback(topology=topology, held_out=Counting(16, 1000), teacher=TEACHER) for _ in range(2)]
    whole, resumed = (trainer(tmp_path, each, bf16=True) for each in callbacks)
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert any(row["accepted"] for row in callbacks[0].rows)
    assert_same(whole, resumed, *callbacks)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # of dynamo, which hides it
@pytest.mark.usefixtures("fresh_accelerate")
def test_the_compiled_model_is_searched_and_taught(tmp_path: Path) -> None:
    ends = []
    for settings in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        callback = SparsaeCallback(topology=RiglConfig(every=2), teacher=TeacherConfig(warmup_fraction=0.0, beta=0.9))
        trains = trainer(tmp_path, callback, model=gpt2(dropout=0.0), max_steps=4, save_strategy="no", **settings)
        trains.train()
        assert trains.state.log_history[-2]["sparsae/distillation"] > 0
        ends.append((callback.rows[-1]["itop_rate"], trains.state.log_history[-2]["loss"]))
    assert ends[0][0] == ends[1][0] > 0.2
    assert ends[0][1] == pytest.approx(ends[1][1], rel=1e-3)


def test_a_checkpoint_may_lie_elsewhere(tmp_path: Path) -> None:
    trainer(tmp_path / "one", SparsaeCallback()).train()
    (tmp_path / "one" / "checkpoint-6").rename(tmp_path / "moved")
    resumed = SparsaeCallback()
    trainer(tmp_path / "two", resumed).train(resume_from_checkpoint=str(tmp_path / "moved"))
    assert resumed.sparsifier.step == 12
    with pytest.raises(
        InputError, match="a callback is not told of another place: resume from a checkpoint in output_dir"
    ):
        trainer(tmp_path / "three", SparsaeCallback(), kind=Trainer).train(
            resume_from_checkpoint=str(tmp_path / "moved")
        )


def test_a_state_of_another_model_is_refused(tmp_path: Path) -> None:
    for folder, seed in (("one", 1), ("two", 2)):
        trainer(tmp_path / folder, SparsaeCallback(), seed=seed).train()
    shutil.rmtree(tmp_path / "one" / "checkpoint-6" / "sparsae")
    resumed = trainer(tmp_path / "one", SparsaeCallback())
    with pytest.raises(InputError, match="checkpoint-6 has no folder sparsae: it was written without SparsaeCallback"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-6"))
    shutil.copytree(tmp_path / "two" / "checkpoint-6" / "sparsae", tmp_path / "one" / "checkpoint-6" / "sparsae")
    with pytest.raises(
        InputError, match=r"of another model: the values of transformer\.h\.0\.attn\.c_attn are not those"
    ):
        resumed.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-6"))
    file = tmp_path / "two" / "checkpoint-6" / "sparsae" / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-8] + bytes(8))
    with pytest.raises(InputError, match=r"state\.safetensors is missing or was changed"):
        trainer(tmp_path / "two", SparsaeCallback()).train(
            resume_from_checkpoint=str(tmp_path / "two" / "checkpoint-6")
        )


def test_a_teacher_that_nobody_listens_to_is_told_after_the_first_step(tmp_path: Path) -> None:
    trains = trainer(tmp_path, SparsaeCallback(teacher=TeacherConfig()), kind=Trainer)
    with pytest.raises(
        InputError, match="the teacher has no part in the loss, which a callback cannot change: use Spars"
    ):
        trains.train()
    assert trains.state.global_step == 1


def test_bad_use_is_one_line(tmp_path: Path) -> None:
    evolution = EvolutionConfig(every=5)
    for given, message in [
        ({"steps": 4}, "SparsaeCallback: steps: the trainer knows it: leave it out"),
        ({"topolgy": 4}, "SparsaeCallback: topolgy: no such setting; did you mean topology?"),
        ({"seed": -1}, "SparsaeCallback: seed: must be at least 0, not -1"),
        ({"topology": "rigl"}, r"topology: must be the settings of a rule, such as RiglConfig\(\), not 'rigl'"),
        (
            {"topology": evolution},
            r"compares candidates by their loss on held-out data: give SparsaeCallback\(held_out=\.\.\.\)",
        ),
        (
            {"topology": evolution, "held_out": iter([])},
            "held_out: must be a data set with a length and samples by number",
        ),
        ({"topology": evolution, "held_out": []}, "held_out: is empty"),
        ({"held_out": Counting()}, "held_out: rule 'generations' scores no candidates: leave it out"),
    ]:
        with pytest.raises(InputError, match=message):
            SparsaeCallback(**given)
    with pytest.raises(InputError, match="no Sparsifier yet: the trainer makes it when training begins"):
        SparsaeCallback().sparsifier  # noqa: B018
    with pytest.raises(InputError, match=r"no sparse layer: call sparsify\(model, \.\.\.\) before the trainer"):
        trainer(tmp_path, SparsaeCallback(), model=densify(gpt2()))
    with pytest.raises(InputError, match="another Sparsifier is attached to this optimizer"):
        trainer(tmp_path, SparsaeCallback(), callbacks=(SparsaeCallback(),)).train()
    unlabelled = [{"input_ids": torch.arange(12)}]
    with pytest.raises(
        InputError, match="held_out: the model returns no loss for a batch of it: give samples with labels"
    ):
        trainer(tmp_path, SparsaeCallback(topology=evolution, held_out=unlabelled)).train()


def test_a_second_training_begins_anew(tmp_path: Path) -> None:
    """As the Trainer does; the Sparsifier of the first is off the optimizer."""
    callback = SparsaeCallback()
    trains = trainer(tmp_path, callback, save_strategy="no")
    trains.train()
    first = callback.sparsifier
    trains.train()
    assert callback.sparsifier is not first
    assert (first.step, callback.sparsifier.step) == (12, 12)


def test_the_trainers_own_optimizer_decays_values(tmp_path: Path) -> None:
    model, callback = gpt2(), SparsaeCallback(topology=SetConfig(every=2))
    arguments = TrainingArguments(str(tmp_path), max_steps=6, report_to="none", weight_decay=0.1, use_cpu=True,
                                  disable_tqdm=True, save_strategy="no", dataloader_pin_memory=False)  # fmt: skip
    trains = Trainer(model, arguments, train_dataset=Counting(), callbacks=[callback])
    trains.train()
    assert callback.rows[-1]["itop_rate"] > callback.rows[0]["itop_rate"]
    decayed = {id(p) for group in trains.optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert all(id(layer.values) in decayed for layer in sparse_layers(model).values())


def test_what_the_trainer_saves_stays_sparse_and_trains_on(tmp_path: Path) -> None:
    trains = trainer(tmp_path, SparsaeCallback(topology=SetConfig(every=2)), max_steps=4, save_strategy="no")
    trains.train()
    trains.save_model(str(tmp_path / "saved"))
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path / "saved")
    assert same(loaded.state_dict(), trains.model.state_dict())
    callback = SparsaeCallback(topology=SetConfig(every=2))
    trainer(tmp_path, callback, model=loaded, max_steps=4, save_strategy="no").train()
    assert callback.rows[-1]["itop_rate"] > callback.rows[0]["itop_rate"]
