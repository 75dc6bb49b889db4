"""Whole training steps of a model, dense beside sparse: the run's own loop over random tokens.

A step is a step of the project's `Trainer`: loss, backward pass, clipping, AdamW, and on an update's step all that the
update does. The models take turns in one process; the peak memory of each is measured in a process of its own.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch

from sparsae.bench import parts
from sparsae.bench.clock import CPU, synchronize, using_threads
from sparsae.bench.rows import Column, Row, device_name
from sparsae.bench.runtimes import Decoding, require_runtimes
from sparsae.bench.stock import Stock
from sparsae.config.load import resolve
from sparsae.config.schema import Config, SparsityConfig
from sparsae.core.randomness import generator
from sparsae.errors import InputError
from sparsae.evaluate.generation import next_tokens
from sparsae.kernels.backend import Layout
from sparsae.kernels.registry import choose_backend
from sparsae.nn.linear import sparse_layers
from sparsae.rules import StaticConfig
from sparsae.train.assemble import optimizer_of, trainer_of
from sparsae.train.data import TrainData
from sparsae.train.loop import Trainer
from sparsae.train.memory import keep_freed_memory
from sparsae.train.model import choose_device, model_of, require_fit

STEP, UPDATE, DECODE, PART = "step", "update", "decode", "part"
_EVERY = 4  # steps from one measured update to the next

COLUMNS = (
    Column("what", lambda row: row.get("part", row["what"]), width=9),
    Column("backend", "backend", width=17),
    Column("unit", "unit", width=5),
    Column("sparsity", "sparsity", "g"),
    Column("threads", "threads", width=7),
    Column("ms", lambda row: 1e3 * row["seconds"], ",.1f", 10),
    Column("dense ms", lambda row: _milli(row.get("dense_seconds")), ",.1f", 10),
    Column("tokens/s", "tokens_per_second", ",.0f", 9),
    Column("dense", "dense_tokens_per_second", ",.0f", 9),
    Column("ratio", "ratio", ".2f", 6),
    Column("stock ms", lambda row: _milli(row.get("stock_seconds")), ",.1f", 10),
    Column("to stock", "stock_ratio", ".2f", 8),
    Column("in steps", "steps", ".2f"),
    Column("peak MB", lambda row: _mega(row.get("peak_bytes")), ",.0f"),
    Column("dense MB", lambda row: _mega(row.get("dense_peak_bytes")), ",.0f"),
)
# Of a GPU, by the count of operations: utilization where its peak is known.
UTILIZATION = (
    Column("TFLOP/s", lambda row: _tera(row.get("flops_per_second")), ".2f"),
    Column("dense TFLOP/s", lambda row: _tera(row.get("dense_flops_per_second")), ".2f", 13),
    Column("dense MFU", "dense_mfu", ".1%", 9),
)

_PROFILED = 3  # steps; of one alone, something else on the machine may take a part's time


@dataclass(eq=False)
class _Model:
    """A model in training, and the seconds that its steps took."""

    backend: str
    config: Config
    trainer: Trainer
    seconds: dict[str, list[float]] = field(default_factory=lambda: {STEP: [], UPDATE: [], DECODE: []})

    @property
    def searches(self) -> bool:
        return self.trainer.sparsifier is not None and self.trainer.sparsifier.search.rule.moves

    def step(self, counts: bool) -> None:
        due = self.trainer.sparsifier is not None and self.trainer.sparsifier.update_due
        start = time.perf_counter()
        self.trainer.train_step()
        synchronize(self.trainer.objective.device)
        if counts:
            self.seconds[UPDATE if due else STEP].append(time.perf_counter() - start)

    def parts(self) -> dict[str, float]:
        """Seconds of a step without an update, by `parts.NAMES`: the median of each over some more steps."""
        watch, found = self.trainer.account.watch, []
        for _ in range(_PROFILED):
            while self.trainer.sparsifier is not None and self.trainer.sparsifier.update_due:
                self.trainer.train_step()
            found.append(parts.seconds_by_part(self.trainer.train_step, lambda: watch.seconds.get("topology", 0.0)))
        return {part: statistics.median(each[part] for each in found) for part in parts.NAMES}

    def decode(self, tokens: int, counts: bool) -> None:
        """One token at a time after a prompt of one, the seconds of one token."""
        self.trainer.model.eval()
        settings = self.config.model
        made = next_tokens(
            self.trainer.model,
            [0],
            context=settings.context,
            vocabulary=self.config.data.tokenizer_vocab,
            temperature=0.0,
            top_k=0,
            rng=generator(0, "decode"),
        )
        next(made)  # reads the prompt, and prepares the weights once
        start = time.perf_counter()
        for _ in islice(made, tokens):
            pass
        if counts:
            self.seconds[DECODE].append((time.perf_counter() - start) / tokens)

    def median(self, what: str) -> float | None:
        return statistics.median(self.seconds[what]) if self.seconds[what] else None


@dataclass(frozen=True)
class Steps:
    """What is measured. decode: tokens to decode a round, 0: none. memory: measure peak memory too.

    runtimes: other programs that decode the dense model.

    threads: None for what the settings say, or else torch's choice. teacher: with one, where the settings have it.
    stock: train the dense model with transformers and torch as they come, too (see `Stock`).
    """

    preset: str
    method: str
    settings: Sequence[str]
    sparsities: Sequence[float]
    backends: Sequence[str]
    steps: int
    decode: int
    threads: int | None
    memory: bool
    device: torch.device = CPU
    teacher: bool = False
    runtimes: Sequence[str] = ()
    stock: bool = True

    def __post_init__(self) -> None:
        if self.runtimes and not self.decode:
            raise InputError("--runtimes: decode: give --decode N too")
        if self.runtimes and self.device.type != "cpu":
            raise InputError("--runtimes: are measured on the CPU: leave out --device")
        require_runtimes(self.runtimes)
        for config in self.configs():
            if config.sparsity.sparsity == 0:
                raise InputError("--sparsity: 0 is the dense model, which is measured anyway: give more than 0")
            require_fit(config)
            require_one_density(config)
            if self.runtimes and self.decode + 1 > config.model.context:
                raise InputError(
                    f"--decode: {self.decode} tokens and the first do not fit model.context {config.model.context}, "
                    "beyond which --runtimes do not decode: give fewer"
                )
            unit = config.sparsity.block
            for backend in self.backends:
                one = torch.zeros(1, dtype=torch.int32, device=self.device)
                choose_backend(backend, Layout(unit, unit, one), torch.float32)

    def __len__(self) -> int:
        return len(self.sparsities)

    def configs(self) -> Iterator[Config]:
        """The sparse configuration of each sparsity, with updates where the rule has any."""
        for sparsity in self.sparsities:
            config = configuration(self.preset, self.method, self.settings, sparsity, self.device)
            # One that there is teaches from the first step on.
            taught = {"start": 0.0, "warmup": "fraction", "warmup_fraction": 0.0}
            config = _with(config, "teacher", **(taught if self.teacher else {"enabled": False}))
            # Long enough that the last update counted is within the part of the run that has updates.
            config = _with(config, "training", steps=20 * (self.steps + 2))
            if hasattr(config.topology, "every"):
                config = _with(config, "topology", every=_EVERY, start=0.0, stop=1.0)
            yield config

    def measure(self) -> Iterator[list[Row]]:
        """The rows of one sparsity after the other."""
        keep_freed_memory(self.device)  # as a training run does
        for config in self.configs():
            threads = self.threads or config.training.threads or torch.get_num_threads()
            with using_threads(threads):
                rows = self._rows(config, threads)
            yield rows

    def _rows(self, config: Config, threads: int) -> list[Row]:
        dense = _Model("dense", dense_twin(config), trainer(dense_twin(config)))
        sparse = []
        for backend in self.backends:
            own = _with(config, "sparsity", backend=backend)
            sparse.append(_Model(backend, own, trainer(own)))
        models = [dense, *sparse]
        stock = Stock(config) if self.stock else None
        rounds = 0
        while rounds <= self.steps or any(m.searches and not m.seconds[UPDATE] for m in models):
            for model in models:
                model.step(counts=rounds > 0)
            if stock:
                stock.step(counts=rounds > 0)
            rounds += 1
        # What the processor does while a GPU computes is no part of the step's time.
        on_cpu = dense.trainer.objective.device.type == "cpu"
        spent = {model.backend: model.parts() if on_cpu else {} for model in models}
        others = {name: Decoding(dense.trainer.model, name, config.model.context, threads) for name in self.runtimes}
        seconds: dict[str, list[float]] = {name: [] for name in others}
        for round_ in range(4 if self.decode else 0):
            for model in models:
                model.decode(self.decode, counts=round_ > 0)
            for name, other in others.items():
                seconds[name] += [_timed(other, self.decode)] if round_ else []
        memory = {m.backend: in_a_process(m.config, threads) for m in models} if self.memory else {}
        rows = [row for model in sparse for row in self._compare(model, dense, stock, memory, spent, threads)]
        first = next((row for row in rows if row["what"] == DECODE), None)
        for name, times in seconds.items():
            assert first is not None
            mine = statistics.median(times)
            changed = {"seconds": mine, "tokens_per_second": 1 / mine, "ratio": first["dense_seconds"] / mine}
            rows.append(first | changed | {"backend": f"dense {name}", "nnz": 0, "unit": "-", "sparsity": 0.0})
        return rows

    def _compare(
        self,
        model: _Model,
        dense: _Model,
        stock: Stock | None,
        memory: Mapping[str, Row],
        spent: Mapping[str, Mapping[str, float]],
        threads: int,
    ) -> Iterator[Row]:
        config, trainer_ = model.config, model.trainer
        common: Row = {
            "backend": model.backend,
            "preset": self.preset,
            "method": self.method,
            "unit": config.sparsity.unit_name,
            "sparsity": config.sparsity.sparsity,
            "precision": config.training.precision,
            "threads": threads,
            "device": device_name(self.device),
            "compiled": config.training.compile,
            "compile_mode": config.training.compile_mode if config.training.compile else None,
            "parameters": sum(p.numel() for p in trainer_.model.parameters()),
            "dense_parameters": sum(p.numel() for p in dense.trainer.model.parameters()),
            "nnz": sum(layer.topology.nnz for layer in sparse_layers(trainer_.model).values()),
        }
        for what, tokens in ((STEP, trainer_.account.tokens_per_step), (DECODE, 1)):
            seconds, theirs = model.median(what), dense.median(what)
            if seconds is None or theirs is None:
                continue
            yield {
                "what": what,
                **common,
                "tokens": tokens,
                "seconds": seconds,
                "dense_seconds": theirs,
                "ratio": theirs / seconds,
                "tokens_per_second": tokens / seconds,
                "dense_tokens_per_second": tokens / theirs,
                **(_memory_of(memory, model.backend) if what == STEP else {}),
                **(_flops_of(model, dense, seconds, theirs) if what == STEP else {}),
                **(_stock_of(stock, seconds) if what == STEP and stock else {}),
            }
            if what == STEP:
                for part, seconds in spent[model.backend].items():
                    theirs = spent[dense.backend][part]
                    ratio = theirs / seconds if seconds and theirs else None
                    found = {"part": part, "seconds": seconds, "dense_seconds": theirs, "ratio": ratio}
                    yield {"what": PART, **common, **found}
        step, update = model.median(STEP), model.median(UPDATE)
        if step is not None and update is not None:
            # What an update adds to the step that it follows, the gradients at sampled units included; below zero: less
            # than these steps differ by.
            extra = update - step
            yield {"what": UPDATE, **common, "seconds": extra, "step_seconds": step, "steps": extra / step}


def configuration(preset: str, method: str, settings: Sequence[str], sparsity: float, device: torch.device) -> Config:
    """A preset's, on a device; on a GPU compiled and in bfloat16, where the settings do not say otherwise.

    Raises InputError as `resolve`, and where the settings name another device.
    """
    usual = ["training.compile=true", "training.precision=bfloat16"] if device.type == "cuda" else []
    options = {"--sparsity": ("sparsity.sparsity", sparsity)}
    config = resolve(None, preset, method, [*usual, *settings], options=options)
    if config.training.device not in ("auto", str(device)):
        raise InputError(f"training.device '{config.training.device}': this is measured on {device} (--device)")
    return _with(config, "training", device=str(device))


def require_one_density(config: Config) -> None:
    """Raises InputError where the steps that are measured, a run's first, have another sparsity than its last."""
    first, last = config.initial_sparsity, config.sparsity.sparsity
    if first != last:
        raise InputError(
            f"method {config.method} begins with sparsity {first:g}, not {last:g}, and what is measured are first "
            "steps: take a method that keeps its sparsity, and no sparsity.schedule"
        )


def _timed(other: Decoding, tokens: int) -> float:
    """Seconds of a token, after one that is not counted."""
    made = other.logits()
    next(made)
    start = time.perf_counter()
    for _ in islice(made, tokens):
        pass
    return (time.perf_counter() - start) / tokens


def dense_twin(config: Config) -> Config:
    """The same model with every connection, trained in the same way."""
    nothing = {"sparsity": SparsityConfig(sparsity=0.0), "topology": StaticConfig(), "rules": {}, "method": "dense"}
    return config.model_copy(update=nothing)


def trainer(config: Config) -> Trainer:
    """The loop of a run with new weights, over random tokens."""
    device = choose_device(config.training.device)
    context, vocabulary = config.model.context, config.data.tokenizer_vocab
    model = model_of(config, vocabulary, 0, device)
    windows = max(8, config.training.batch_size)
    rng = generator(config.seed, "bench tokens")
    tokens = torch.randint(vocabulary, (windows * context + 1,), generator=rng, device="cpu").numpy()
    nothing = torch.zeros(0, context + 1, dtype=torch.int64, device="cpu")
    return trainer_of(
        config, model, optimizer_of(model, config), TrainData.of(config, tokens, nothing, tokens, device), device
    )


def in_a_process(config: Config, threads: int) -> Row:
    """What a process that trains this configuration for two steps held: see `sparsae.bench.memory`."""
    task = json.dumps({"config": config.model_dump(mode="json"), "threads": threads})
    done = subprocess.run(
        [sys.executable, "-m", "sparsae.bench.memory"], input=task, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"the process that measures memory failed: {done.stderr.strip()}")
    return dict(json.loads(done.stdout))


def _memory_of(memory: Mapping[str, Row], backend: str) -> Row:
    if not memory:
        return {}
    own = {key: memory[backend][key] for key in ("peak_bytes", "base_bytes")}
    return own | {"dense_peak_bytes": memory["dense"]["peak_bytes"]}


def _stock_of(stock: Stock, seconds: float) -> Row:
    theirs = statistics.median(stock.seconds)
    return {"stock_seconds": theirs, "stock_ratio": theirs / seconds}


def _flops_of(model: _Model, dense: _Model, seconds: float, theirs: float) -> Row:
    """Operations a second by the analytic count of a step; dense's over the peak are model FLOPs utilization."""

    def counted(one: _Model) -> float:
        account = one.trainer.account
        return account.costs.cost.training(account.costs.met, account.tokens_per_step)

    flops, dense_flops = counted(model) / seconds, counted(dense) / theirs
    mfu = dense.trainer.account.utilization(dense_flops)
    return {"flops_per_second": flops, "dense_flops_per_second": dense_flops, "dense_mfu": mfu}


def _with(config: Config, section: str, **values: Any) -> Config:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def _tera(count: float | None) -> float | None:
    return None if count is None else count / 1e12


def _milli(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


def _mega(count: float | None) -> float | None:
    return None if count is None else count / 1e6
