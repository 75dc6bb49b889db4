"""The progress of all runs of an experiment in one display, with the time that is left."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from sparsae.experiments.jobs import Failure, Job, outcome, progress
from sparsae.runs.summary import Summary


class Board:
    """A bar for the whole and one for each run in progress on a terminal; a line for each run that ended elsewhere."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet, highlight=False)
        self._live = self.console.is_terminal and not quiet
        self._jobs: Sequence[Job] = ()
        self._running: dict[str, Job] = {}
        self._view: Progress | None = None
        self._ended = threading.Event()
        self._clock: Callable[[], float] = time.monotonic

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def watching(self, jobs: Sequence[Job], out: Path) -> Iterator[None]:
        """Follow these jobs, of which some may be done already, from their metrics."""
        self._jobs, self._out, self._running = jobs, out, {}
        self._began, self._before = self._clock(), self._done()
        self._ended.clear()
        ticker = threading.Thread(target=self._tick, daemon=True)
        if self._live:
            self._view = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[note]}", markup=False),
                console=self.console,
                transient=True,
                expand=True,
            )
            self._view.start()
            ticker.start()
        try:
            yield
        finally:
            self._ended.set()
            if self._view is not None:
                ticker.join()
                self._view.stop()
                self._view = None

    def begin(self, job: Job) -> None:
        """A job is being run."""
        self._running[job.name] = job

    def end(self, job: Job) -> None:
        """A job reached its end."""
        self._running.pop(job.name, None)
        match outcome(self._out / job.name):
            case Summary() as summary:
                what = f"validation loss {summary.validation_loss:.4f} in {summary.seconds:.0f} s"
            case Failure():
                what = "diverged"
            case None:
                what = "ended"
        count = sum(outcome(self._out / each.name) is not None for each in self._jobs)
        left = f" · {self._left(self._done())} left" if count < len(self._jobs) else ""
        self.say(f"[{count}/{len(self._jobs)}] {job.name}: {what}{left}")

    def _done(self) -> float:
        """Operations done so far, of all jobs together."""
        done = 0.0
        for job in self._jobs:
            if outcome(self._out / job.name) is not None:
                done += job.flops
            else:
                done += job.flops * self._share(job)
        return done

    def _share(self, job: Job) -> float:
        return min(1.0, progress(self._out / job.name) / job.config.training.steps)

    def _left(self, done: float) -> str:
        spent, gained = self._clock() - self._began, done - self._before
        if gained <= 0:
            return "?"
        seconds = round(spent / gained * (sum(job.flops for job in self._jobs) - done))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"

    def _tick(self) -> None:
        view = self._view
        assert view is not None
        whole = view.add_task("all runs", total=1.0, note="")
        tasks: dict[str, TaskID] = {}
        while not self._ended.wait(1.0):
            done = self._done()
            share = done / max(1, sum(job.flops for job in self._jobs))
            view.update(whole, completed=share, note=f"{share:.0%} · {self._left(done)} left")
            running = dict(self._running)
            for name in [name for name in tasks if name not in running]:
                view.remove_task(tasks.pop(name))
            for name, job in running.items():
                if name not in tasks:
                    tasks[name] = view.add_task(name, total=1.0, note="")
                steps = job.config.training.steps
                at = self._share(job)
                view.update(tasks[name], completed=at, note=f"step {round(at * steps)}/{steps}")
