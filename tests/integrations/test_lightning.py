"""The callback for Lightning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sparsae.config.teacher import TeacherConfig
from sparsae.errors import InputError
from sparsae.rules import EvolutionConfig, GmpConfig, RiglConfig, SetConfig
from tests.integrations.test_transformers import same

pytest.importorskip("lightning")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # advice of Lightning's

from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging  # noqa: E402
from lightning.pytorch.loggers import CSVLogger  # noqa: E402
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402

from sparsae.integrations.lightning import SparsaeCallback  # noqa: E402
from tests.support.lit import Classifier, fit, loss_on, points  # noqa: E402

TEACHER = TeacherConfig(alpha=0.5, warmup_fraction=0.25, share=0.5, beta=0.9, storage="union")
SCORED = {"topology": EvolutionConfig(every=5, candidates=2), "held_out": points(16, 9), "loss": loss_on}
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rigl, accumulation, clipping": (
        {"topology": RiglConfig(every=4, window=3)},
        {"accumulate_grad_batches": 3, "max_epochs": 6, "gradient_clip_val": 0.1},
    ),
    "gmp": ({"topology": GmpConfig(every=4), "sparsity": 0.9}, {}),
    "scored, bfloat16": (SCORED, {"precision": "bf16-mixed"}),
    "taught": ({"topology": SetConfig(every=5), "teacher": TEACHER}, {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_resumed_ends_as_what_was_not_interrupted(kind: str, tmp_path: Path) -> None:
    settings, arguments = KINDS[kind]
    callbacks = [SparsaeCallback(module="net", **settings) for _ in range(2)]
    modules = [Classifier(0.0 if kind == "gmp" else 0.8) for _ in range(2)]
    half = arguments.get("max_epochs", 4) // 2 - 1
    whole = fit(tmp_path, callbacks[0], modules[0], **arguments)
    resumed = fit(tmp_path / "two", callbacks[1], modules[1], ckpt_path=tmp_path / f"epoch={half}.ckpt", **arguments)
    assert callbacks[0].rows[-1]["itop_rate"] > callbacks[0].rows[0]["itop_rate"] or kind == "gmp"
    assert callbacks[0].sparsifier.step == whole.global_step == resumed.global_step
    assert same(modules[0].state_dict(), modules[1].state_dict())
    assert same(whole.optimizers[0].state_dict(), resumed.optimizers[0].state_dict())
    assert same(callbacks[0].sparsifier.state_dict(), callbacks[1].sparsifier.state_dict())
    assert [row["step"] for row in callbacks[0].rows] == [row["step"] for row in callbacks[1].rows]


def test_steps_that_a_scaler_skips_are_none(tmp_path: Path) -> None:
    callback = SparsaeCallback(module="net", topology=RiglConfig(every=4, window=3), teacher=TEACHER)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=5)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    trainer = fit(tmp_path, callback, Classifier(), plugins=[plugin], max_epochs=6)
    assert 8 < callback.sparsifier.step < trainer.global_step == 48
    assert callback.rows[-1]["swaps"] > 0
    gradients = [layer["gradient_activity"] for row in callback.rows[1:] for layer in row["layers"].values()]
    assert all(0 < norm < 100 for norm in gradients)  # they are without the factor


def test_metrics_go_to_the_trainers_logger(tmp_path: Path) -> None:
    callback = SparsaeCallback(module="net", topology=SetConfig(every=6), teacher=TEACHER)
    trainer = fit(tmp_path, callback, Classifier(), logger=CSVLogger(tmp_path, name="logs"))
    header, *rows = (Path(trainer.log_dir) / "metrics.csv").read_text().splitlines()
    last = dict(zip(header.split(","), rows[-1].split(","), strict=True))
    assert float(last["sparsae/nnz"]) == callback.sparsifier.nnz
    assert float(last["sparsae/updates"]) == 3
    assert float(last["sparsae/distillation"]) > 0
    assert "Density through time" in (Path(trainer.log_dir) / "topology.html").read_text("utf-8")


def test_the_compiled_module_has_a_teacher_of_its_own(tmp_path: Path) -> None:
    class Whole(Classifier):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            logits = self(batch[0])
            return nn.functional.cross_entropy(logits, batch[1]) + SparsaeCallback.of(self.trainer).distillation(
                logits, batch[0]
            )

    callback = SparsaeCallback(topology=SetConfig(every=6), teacher=TeacherConfig(warmup_fraction=0.0))
    module = Whole()
    trainer = fit(tmp_path, callback, torch.compile(module, backend="eager"), max_steps=3, log_every_n_steps=1)
    assert callback.sparsifier.teacher.model is not module
    assert trainer.logged_metrics["sparsae/distillation"] > 0


def test_validation_ends_the_warm_up(tmp_path: Path) -> None:
    teacher = TeacherConfig(warmup="validation", warmup_improvement=0.01)
    callback = SparsaeCallback(module="net", topology=SetConfig(every=6), teacher=teacher)
    fit(tmp_path, callback, Classifier(), validation=points())
    state = callback.state_dict()["warm_up"]
    assert state["over_by_validation"]
    assert state["first_loss"] > 0


def test_a_metric_that_nobody_logs_ends_no_warm_up_in_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    teacher = TeacherConfig(warmup="validation", warmup_improvement=0.01)

    def told(monitor: str, **more: Any) -> list[str]:
        caplog.clear()
        callback = SparsaeCallback(module="net", topology=SetConfig(every=6), teacher=teacher, monitor=monitor)
        fit(tmp_path, callback, Classifier(), validation=points(), **more)
        return [each.getMessage() for each in caplog.records if "warm-up" in each.getMessage()]

    assert told("val_loss") == []
    (line,) = told("other")
    assert line.startswith("other, which ends the teacher's warm-up: no validation has it (there are: ")
    assert "val_loss" in line
    (line,) = told("val_loss", limit_val_batches=0)
    assert "nothing is validated" in line


def test_a_trainer_that_has_ended_does_not_go_on_without_a_checkpoint(tmp_path: Path) -> None:
    module, callback = Classifier(), SparsaeCallback(module="net", topology=SetConfig(every=6))
    trainer = fit(tmp_path, callback, module, max_epochs=1)
    trainer.fit_loop.max_epochs = 2
    with pytest.raises(InputError, match=r"has made \d+ steps, and its schedules with it: go on by fit"):
        trainer.fit(module, trainer.train_dataloader)


def test_the_part_that_was_named_is_searched(tmp_path: Path) -> None:
    callback = SparsaeCallback(module="net")
    fit(tmp_path, callback, Classifier(), max_epochs=1)
    assert set(callback.rows[0]["layers"]) == {"0", "2"}


def test_bad_use_is_one_line(tmp_path: Path) -> None:
    evolution = EvolutionConfig(every=5)
    with pytest.raises(
        InputError, match=r"give SparsaeCallback\(loss=\.\.\.\), a function of the model and a held-out"
    ):
        SparsaeCallback(topology=evolution, held_out=points())
    with pytest.raises(InputError, match="SparsaeCallback: steps: the trainer knows it"):
        SparsaeCallback(steps=5)
    with pytest.raises(InputError, match="no sparse layer"):
        fit(tmp_path, SparsaeCallback(), Classifier(sparsity=None))
    with pytest.raises(InputError, match="SparsaeCallback: Classifier has no module 'nut'"):
        fit(tmp_path, SparsaeCallback(module="nut"), Classifier())
    with pytest.raises(InputError, match="the trainer has no SparsaeCallback: give Trainer"):
        fit(tmp_path, None, Classifier())
    with pytest.raises(
        InputError, match=r"no part in the loss.*let training_step add SparsaeCallback\.of\(self\.trainer\)"
    ):
        fit(tmp_path, SparsaeCallback(teacher=TeacherConfig()), Classifier(listens=False))
    with pytest.raises(InputError, match="a training without an end has no schedule: give Trainer max_steps"):
        fit(tmp_path, SparsaeCallback(), Classifier(), max_epochs=-1)

    for averaging in (StochasticWeightAveraging(1e-2), EMAWeightAveraging(), WeightAveraging()):
        with pytest.raises(InputError, match=f"{type(averaging).__name__} averages values by their place"):
            fit(tmp_path, SparsaeCallback(), Classifier(), callbacks=(averaging,))

    class Two(Classifier):
        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.net[0], self.net[2])]

    module = Two()
    module.automatic_optimization = False
    with pytest.raises(InputError, match="2 optimizers have values of sparse layers"):
        fit(tmp_path, SparsaeCallback(), module)


def test_a_checkpoint_without_a_state_is_refused(tmp_path: Path) -> None:
    fit(tmp_path, None, Classifier(listens=False), max_epochs=1)
    with pytest.raises(InputError, match=r"epoch=0\.ckpt was written without SparsaeCallback"):
        fit(tmp_path / "two", SparsaeCallback(), Classifier(), ckpt_path=tmp_path / "epoch=0.ckpt")


def test_an_exception_lets_go_of_the_optimizer(tmp_path: Path) -> None:
    class Breaks(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise RuntimeError("broken")

    callback, module = SparsaeCallback(), Classifier()
    with pytest.raises(RuntimeError, match="broken"):
        fit(tmp_path, callback, module, callbacks=(Breaks(),))
    with pytest.raises(InputError, match="closed"):
        callback.sparsifier.attach()
