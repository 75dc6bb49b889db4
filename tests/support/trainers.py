"""A training by the Trainer of transformers, by Lightning, or in a loop of accelerate's, on as many ranks as there are.

All of them read the same batches, in float64 and without dropout. What is given back is plain, for processes.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, TensorDataset
from transformers import TrainerCallback

from sparsae import AdamW, Sparsifier, SparsifierConfig, parameter_groups, sparsify
from sparsae.config.teacher import TeacherConfig
from sparsae.core.ranks import ranks
from sparsae.core.topology import digest
from sparsae.integrations.transformers import SparsaeCallback
from sparsae.losses import distillation_loss
from sparsae.rules import EvolutionConfig, GenerationsConfig, GmpConfig, RiglConfig, SetConfig
from sparsae.runs.lock import launched_ranks
from tests.support.hf import Counting, gpt2, trainer

# By step: the states of model, optimizer and Sparsifier. "end": when the training was over.
States = dict[int | str, Any]

TEACHER = TeacherConfig(alpha=0.5, warmup_fraction=0.2, share=0.5, beta=0.9, storage="union")
RULES: dict[str, dict[str, Any]] = {
    "rigl": {"topology": RiglConfig(every=3, window=2)},
    "rigl, taught": {"topology": RiglConfig(every=3, window=2), "teacher": TEACHER},
    "set, taught": {"topology": SetConfig(every=3), "teacher": TEACHER},
    "sparsae": {"topology": GenerationsConfig(every=3)},
    "gmp": {"topology": GmpConfig(every=3), "sparsity": 0.9},
    "evolution": {"topology": EvolutionConfig(every=3, candidates=2)},
}
BATCH = 8  # of all ranks together


def of_transformers(rule: str, folder: Path, *, steps: int = 9, resumed: int | None = None, passes: int = 1) -> States:
    """A checkpoint every third of the steps, of which the first is called the best: `end` is of that one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    held_out = {"held_out": Counting(16, 1000)} if rule == "evolution" else {}
    callback, states, every = SparsaeCallback(**RULES[rule], **held_out), {}, steps // 3
    arguments = {"ddp_backend": "gloo"} if launched_ranks() > 1 else {}
    trains = trainer(
        folder, callback, model=gpt2(_first_sparsity(rule), dropout=0.0).double(), eval_dataset=Counting(8, 500),
        max_steps=steps, per_device_train_batch_size=BATCH // launched_ranks(), per_device_eval_batch_size=4,
        gradient_accumulation_steps=passes, save_steps=every, eval_steps=every, eval_strategy="steps",
        load_best_model_at_end=True, metric_for_best_model="accuracy", greater_is_better=True, **arguments,
    )  # fmt: skip
    trains.compute_metrics = lambda _: {"accuracy": 1.0 / trains.state.global_step}

    class Kept(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            states[state.global_step] = _states(trains.model, trains.optimizer, callback.sparsifier)

    trains.add_callback(Kept())
    trains.train(resume_from_checkpoint=None if resumed is None else str(folder / f"checkpoint-{resumed}"))
    name = "sparsae/distillation"
    divergences = [torch.tensor(row[name]) for row in trains.state.log_history if name in row]
    end, swaps = _states(trains.model, None, callback.sparsifier), [row["swaps"] for row in callback.rows]
    return states | {"end": end, "swaps": swaps, "divergences": divergences}


def of_lightning(rule: str, folder: Path, *, epochs: int = 3, resumed: int | None = None, passes: int = 1) -> States:
    """A checkpoint after each epoch of eight batches, of which the first is called the best: `end` is of that one."""
    from lightning.pytorch import Callback

    from sparsae.integrations.lightning import SparsaeCallback as Search
    from tests.support.lit import Classifier, fit, loss_on, points

    def double(count: int, seed: int = 0) -> TensorDataset:
        return TensorDataset(points(count, seed).tensors[0].double(), points(count, seed).tensors[1])

    scored = {"held_out": double(16, 9), "loss": loss_on} if rule == "evolution" else {}
    callback, module = Search(module="net", **RULES[rule] | scored), Classifier(_first_sparsity(rule)).double()
    states: States = {}

    class Kept(Callback):
        def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            pl_module.log("earliness", 1.0 / (1 + trainer.current_epoch), sync_dist=True)

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            states[1 + trainer.current_epoch] = _states(pl_module, trainer.optimizers[0], callback.sparsifier)

    count = launched_ranks()
    trained = fit(
        folder, callback, module, data=double(64), validation=double(16, 5), callbacks=(Kept(),), monitor="earliness",
        batch_size=BATCH // count, max_epochs=epochs, accumulate_grad_batches=passes, devices=count,
        precision="64-true", strategy="auto" if count == 1 else "ddp", num_sanity_val_steps=0,
        use_distributed_sampler=False, sampler=_Share,
        ckpt_path=None if resumed is None else folder / f"epoch={resumed - 1}.ckpt",
    )  # fmt: skip
    trained.validate(module, DataLoader(double(16, 5), batch_size=8), ckpt_path="best", verbose=False)
    first = torch.tensor(callback.state_dict()["warm_up"]["first_loss"], dtype=torch.float64)
    end, swaps = {"model": module.state_dict()}, [row["swaps"] for row in callback.rows]
    return states | {"end": end, "swaps": swaps, "first loss": first}


class _Share(Sampler[int]):
    """This rank's part of each batch, in the order of the rows; Lightning's own sampler deals them out in another."""

    def __init__(self, data: TensorDataset) -> None:
        self.count, self.size = len(data), BATCH // launched_ranks()

    def __iter__(self) -> Iterator[int]:
        first = int(os.environ.get("RANK", "0")) * self.size
        for start in range(first, self.count, BATCH):
            yield from range(start, start + self.size)

    def __len__(self) -> int:
        return self.count // launched_ranks()


def of_accelerate(rule: str, folder: Path, *, epochs: int = 2, resumed: int | None = None, passes: int = 1) -> States:
    """A checkpoint after each epoch of eight batches."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 48), nn.GELU(), nn.Linear(48, 16)).double()
    sparsify(model, _first_sparsity(rule), seed=1)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=passes)
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    loader = DataLoader(TensorDataset(x, x.argmax(1)), batch_size=BATCH // launched_ranks())
    model, optimizer, loader = accelerator.prepare(model, AdamW(parameter_groups(model, 0.1), lr=1e-2), loader)
    config = SparsifierConfig(steps=epochs * 8 // passes, accumulation=passes, **RULES[rule])

    def score(step: int) -> Tensor:
        return nn.functional.cross_entropy(model(x[:8]), x[:8].argmax(1))

    sparsifier = Sparsifier(model, optimizer, config, score=score if rule == "evolution" else None)
    updates: list[Any] = []
    sparsifier.attach(updates.append, scaler=accelerator.scaler)
    accelerator.register_for_checkpointing(sparsifier)
    if resumed is not None:
        accelerator.load_state(str(folder / f"{resumed}"))
    states: States = {}
    for epoch in range(resumed or 0, epochs):
        for inputs, label in loader:
            with accelerator.accumulate(model):
                taught = None
                if sparsifier.teacher is not None:
                    with torch.no_grad():
                        taught = sparsifier.teacher.model(inputs)
                accelerator.backward(distillation_loss(model(inputs), taught, label, alpha=0.5).total)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        accelerator.save_state(str(folder / f"{epoch + 1}"))
        states[epoch + 1] = _states(accelerator.unwrap_model(model), optimizer, sparsifier)
    return states | {"swaps": [update.row["swaps"] for update in updates]}


def assert_close(one: Any, two: Any, tolerance: float = 0.0, where: str = "") -> None:
    """Two states: numbers within a tolerance, everything else equal."""
    if isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key in one:
            assert_close(one[key], two[key], tolerance, f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(two), where
        for index, pair in enumerate(zip(one, two, strict=True)):
            assert_close(*pair, tolerance, f"{where}.{index}")
    elif isinstance(one, Tensor):
        assert one.shape == two.shape, where
        assert bool(((one.double() - two.double()).abs() <= tolerance).all()), where
    elif isinstance(one, float):
        assert abs(one - two) <= tolerance or one == two, f"{where}: {one}, {two}"
    else:
        assert one == two, f"{where}: {one}, {two}"


def assert_same_on_all(states: States) -> None:
    """One topology, and the same numbers, bit for bit."""
    found: dict[str, bytes] = {}
    _digest(states, "", found)
    ranks().require_same(found)


def _digest(state: Any, where: str, found: dict[str, bytes]) -> None:
    if isinstance(state, dict):
        for key, each in state.items():
            _digest(each, f"{where}.{key}", found)
    elif isinstance(state, list):
        _digest(dict(enumerate(state)), where, found)
    elif isinstance(state, Tensor):
        found[where] = digest(state)


def _states(model: nn.Module, optimizer: Any, sparsifier: Sparsifier) -> Any:
    state = None if optimizer is None else optimizer.state_dict()["state"]
    return copy.deepcopy({"model": model.state_dict(), "optimizer": state, "sparsifier": sparsifier.state_dict()})


def _first_sparsity(rule: str) -> float:
    return 0.0 if rule == "gmp" else 0.8
