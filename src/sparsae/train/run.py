"""A run from its configuration to its directory: `start` and `resume`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsae.config.complaints import telling_places
from sparsae.config.load import resolve, with_absolute_paths
from sparsae.config.schema import Config
from sparsae.core.ranks import ranks
from sparsae.core.record import encode
from sparsae.data import Corpus, prepare, refuse_unread, unigram_perplexity
from sparsae.errors import DivergedError, InputError
from sparsae.kernels.processor import set_up_processor
from sparsae.observers import OBSERVERS, Observer
from sparsae.optim import AdamW
from sparsae.runs.claim import Claim, claimed, refuse_occupied
from sparsae.runs.directory import RunDirectory
from sparsae.runs.lock import refuse_ranks
from sparsae.runs.manifest import Manifest
from sparsae.runs.metrics import MetricsWriter
from sparsae.runs.recognized import is_pretrained
from sparsae.runs.rows import Row
from sparsae.runs.summary import Summary
from sparsae.train.assemble import optimizer_of, trainer_of
from sparsae.train.data import TrainData
from sparsae.train.held_out import HeldOut
from sparsae.train.joining import joined
from sparsae.train.machine import require_machine
from sparsae.train.memory import forget_peak, keep_freed_memory, out_of_memory_is_told
from sparsae.train.model import choose_device, model_of, require_fit
from sparsae.train.objective import failed_compilation_is_told
from sparsae.train.passes import Passes, alone
from sparsae.train.pretrained import Pretrained, at_best, read_pretrained
from sparsae.train.progress import Display
from sparsae.train.saving import SavedRun, Saver, read_saved
from sparsae.train.source import Source, read_source
from sparsae.train.stopping import StopRequest
from sparsae.train.summary import closing, headline, summarize


@dataclass(frozen=True, eq=False)
class _Parts:
    """Everything of a run that exists before its directory does."""

    device: torch.device
    corpus: Corpus
    model: nn.Module
    optimizer: AdamW
    data: TrainData


class _Recorder(Observer):
    """Writes the rows down."""

    def __init__(self, metrics: MetricsWriter) -> None:
        self._metrics = metrics

    def observe(self, row: Row) -> None:
        self._metrics.write(row)


@telling_places
def start(
    config: Config, out: Path, quiet: bool = False, source: Path | None = None, best: bool = False
) -> dict[str, Any]:
    """Train a new run into the directory `out`; returns its summary, also when it was stopped by a signal.

    source: another run, whose weights and topology this one starts from, or a directory of transformers'. best: from
    its checkpoint of the best validation, not from the newest. Raises InputError for anything wrong with the
    configuration, the data, the source or the directory; then nothing is left but what was measured, which is why a run
    that diverged keeps its directory (DivergedError).

    Where a launcher (torchrun) started this process as one of several, they train the run together, and the first one
    writes; RanksError: another one has ended.
    """
    with joined():
        return encode(alone(starting(config, out, quiet, source, best)))


def starting(
    config: Config,
    out: Path,
    quiet: bool = False,
    source: Path | None = None,
    best: bool = False,
    stop: StopRequest | None = None,
) -> Passes[Summary]:
    """As `start`, by whoever answers its passes; stop: by which it may be asked to stop, beside other runs."""
    here = ranks()
    if here.count == 1:
        refuse_ranks("one of several runs")
    require_machine(config)
    out = Path(here.from_first(str(out)))
    if here.is_first:
        refuse_occupied(out, config)
    if source is not None and best:
        source, best = at_best(source)
    if source is not None and config.data.tokenizer == "train":
        tokenizer = source if is_pretrained(source) else RunDirectory.open(source).tokenizer
        config = config.model_copy(update={"data": config.data.model_copy(update={"tokenizer": str(tokenizer)})})
    config = with_absolute_paths(config)
    taken: Source | Pretrained | None = None
    own: Path | None = None
    if source is None:
        refuse_unread(config.data)
    else:
        pretrained = is_pretrained(source)
        if not pretrained and RunDirectory.open(source).config().data.tokenizer == config.data.tokenizer:
            own = RunDirectory(source).tokenizer
        taken = read_pretrained(source, config) if pretrained else read_source(source, config, best)
    with _entered(out) as claim:
        if claim:
            refuse_occupied(out, config)
        run, display = RunDirectory(out), Display(quiet or not here.is_first)
        try:
            parts = _prepare(config, display, taken, own)
            manifest = Manifest(config, started_from=taken.record if taken else None)
            if here.is_first:
                manifest = _begin(run, manifest, parts)
            return (yield from _train(parts, run, manifest, display, None, stop))
        except BaseException:
            if claim:
                claim.undo()
            raise


def resume(path: Path, quiet: bool = False, steps: int | None = None, allowed: Collection[str] = ()) -> dict[str, Any]:
    """Resume the run in `path` from its newest checkpoint, as if it had never stopped; returns its summary.

    A run that was stopped before its first checkpoint begins again. steps: train so many steps altogether, more than
    the run was to have: schedules are drawn anew over all of them, and the learning rate rises again over one in a
    hundred of those that were added. allowed: keys of settings that were changed in config.yaml, and count from now on;
    the run is then not what an unbroken one would be, and says so.

    Raises InputError where there is no run, where a file of it is damaged or was changed, or where the run is finished.
    """
    with joined():
        return encode(alone(resuming(path, quiet, steps, allowed=allowed)))


def resuming(
    path: Path,
    quiet: bool = False,
    steps: int | None = None,
    stop: StopRequest | None = None,
    allowed: Collection[str] = (),
) -> Passes[Summary]:
    """As `resume`, by whoever answers its passes; stop: as `starting` has it."""
    here = ranks()
    if here.count == 1:
        refuse_ranks("one of several runs")
    run = RunDirectory.open(path)
    _require_steps(run, run.config(allowed), steps)
    with _entered(path):
        run, display = RunDirectory.open(path), Display(quiet or not here.is_first)
        config, manifest = run.config(allowed), run.manifest()
        _require_steps(run, config, steps)
        saved = None
        if run.saved_steps():
            assert manifest is not None
            saved = read_saved(run, manifest, extending=steps is not None and steps > config.training.steps)
            if config.training.threads is None:
                # The order of sums, and so the last bit, can depend on the number of threads.
                set_up_processor(saved.state["threads"])
        elif manifest is not None and (manifest.started_from or manifest.extensions):
            raise InputError(f"{path}: this run's checkpoint is missing: restore it, or start a new run")
        parts = _prepare(config, display, own=run.tokenizer if saved else None)
        if saved is None:
            manifest = Manifest(config)
            if here.is_first:
                manifest = _begin(run, manifest, parts)
        elif parts.corpus.digest != saved.state["corpus"]:
            raise InputError(
                f"{path}: the text of data.source has changed since the run began; restore it, or start a new run"
            )
        assert manifest is not None
        if config != manifest.config:
            manifest = manifest.changed(saved.step if saved else 0, config)
        if steps is not None and steps > config.training.steps:
            manifest = manifest.extended(saved.step if saved else 0, steps)
        return (yield from _train(parts, run, manifest, display, saved, stop))


def _require_steps(run: RunDirectory, config: Config, steps: int | None) -> None:
    planned = config.training.steps
    if steps is not None and steps < planned:
        raise InputError(f"{run.path}: --steps {steps} is fewer than the {planned} of this run, which can only grow")
    summary = run.read_summary()
    # One whose newest checkpoint was lost is trained again from the one before.
    is_there = run.saved_steps()[-1:] in ([], [planned])
    if summary and summary.finished and summary.steps == planned == (steps or planned) and is_there:
        raise InputError(
            f"{run.path}: this run is finished: all {planned} steps are done (train it longer: --steps N with N above "
            f"{planned})"
        )


def _prepare(
    config: Config, display: Display, source: Source | Pretrained | None = None, own: Path | None = None
) -> _Parts:
    require_machine(config)
    set_up_processor(config.training.threads)
    device = choose_device(config.training.device)
    require_fit(config)
    here = ranks()
    if not here.is_first:
        here.wait()  # for the cache
    corpus = prepare(config.data, display.stage, own)
    if here.is_first:
        here.wait()
    here.require_same({"the texts of data.source": corpus.digest.encode()})
    display.close()
    display.say(corpus.held_out)
    held_out = HeldOut.of(corpus.validation, config)
    data = TrainData.of(config, corpus.train, held_out.validation, held_out.scoring, device, held_out.test)
    for warning in held_out.warnings(scores=data.micro_batches is not None):
        display.say(f"warning: {warning}")
    with out_of_memory_is_told("the model"):
        if source is None:
            model = model_of(config, corpus.vocab_size, corpus.tokenizer.eos_id, device)
        else:
            model = source.model(config, corpus.tokenizer, device)
    keep_freed_memory(device)
    forget_peak(device)
    return _Parts(device, corpus, model, optimizer_of(model, config), data)


@contextlib.contextmanager
def _entered(path: Path) -> Iterator[Claim | None]:
    """Work in the directory of a run while inside: the first rank claims it, and the others come in when it has."""
    if not ranks().is_first:
        ranks().wait()
        yield None
        return
    with claimed(path) as claim:
        ranks().wait()
        yield claim


def _begin(run: RunDirectory, manifest: Manifest, parts: _Parts) -> Manifest:
    """Write what a run has before it is trained, the manifest first: without it nothing here is known to be a run."""
    manifest.write(run.path)
    manifest.write_config(run.config_file)
    parts.corpus.tokenizer.save(run.tokenizer)
    manifest = manifest.with_tokenizer(run.tokenizer)
    manifest.write(run.path)
    return manifest


def _go_on(run: RunDirectory, manifest: Manifest, metrics: MetricsWriter, saved: SavedRun | None) -> None:
    """Nothing is wrong with what was read: from here on the directory is that of a run that has begun."""
    if resolve(run.config_file) != manifest.config:
        manifest.write_config(run.config_file)
    for outcome in (run.summary, run.sample):
        outcome.unlink(missing_ok=True)
    metrics.cut(saved.metrics if saved else None)


def _train(
    parts: _Parts,
    run: RunDirectory,
    manifest: Manifest,
    display: Display,
    saved: SavedRun | None,
    stop: StopRequest | None,
) -> Passes[Summary]:
    config, began, here = manifest.config, time.perf_counter(), ranks()
    unigram = unigram_perplexity(parts.corpus.train_counts, parts.data.validation[:, 1:])
    if saved is not None:
        saved.load_into(parts.model, parts.optimizer)
        run.require_metrics(saved.metrics)
    here.wait()  # until all have read what the first one may now change
    observers: list[Observer] = []
    metrics: MetricsWriter | None = None
    diverged: DivergedError | None = None
    with contextlib.ExitStack() as not_begun, contextlib.ExitStack() as opened:
        trainer = trainer_of(
            config,
            parts.model,
            parts.optimizer,
            parts.data,
            parts.device,
            observers=observers,
            extension=manifest.extensions[-1] if manifest.extensions else None,
        )
        if saved is not None:
            saved.restore(trainer)
        if here.is_first:
            if manifest != run.manifest():  # it was extended, or its settings were changed
                manifest.write(run.path)
            metrics = opened.enter_context(MetricsWriter(run.metrics))
            observers.append(_Recorder(metrics))
            for name in config.tracking.named:
                observers.append(OBSERVERS[name](run.path))
                not_begun.callback(observers[-1].end)
            observers.append(display)
            _go_on(run, manifest, metrics, saved)
        display.say(headline(config, parts.model, len(parts.corpus.train), unigram))
        previous = float(saved.state["elapsed"]) if saved else 0.0

        def elapsed() -> float:
            return previous + time.perf_counter() - began

        saver = None
        if metrics is not None:
            saver = Saver(trainer, run, manifest.run, parts.corpus.digest, metrics, elapsed)
            opened.callback(saver.close)

        def save() -> None:
            with trainer.account.watch.of("checkpoint"):
                if saver is not None:
                    saver.save()
                here.wait()

        if saved is None and manifest.started_from:
            save()  # from here on the run needs the other one no more
        not_begun.pop_all()  # from here on the loop ends them
        try:
            with (
                (stop or StopRequest()).listening() as request,
                out_of_memory_is_told("training"),
                failed_compilation_is_told(),
            ):
                yield from trainer.running(request, save)
                if saver is not None:
                    saver.finish()
                here.wait()  # no rank has done its part before the last checkpoint is whole
        except DivergedError as error:
            diverged = error
        summary = summarize(manifest, trainer, unigram, elapsed(), metrics.position() if metrics else None, diverged)
    if here.is_first:
        run.write_summary(summary)
    if diverged is not None:
        raise diverged
    display.say(closing(summary, run))
    return summary
