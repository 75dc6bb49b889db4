"""What a person sees during a run: a live line on a terminal, plain lines elsewhere, nothing when quiet."""

from __future__ import annotations

import time
from dataclasses import replace

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from sparsae.observers import Observer, Standing
from sparsae.runs.rows import Row, SkippedRow, TopologyRow, TrainRow, ValidationRow

_STAGES = {  # name of a stage -> (what it does, what it counts)
    "read": ("reading", "bytes"),
    "tokenizer": ("training the tokenizer", "bytes"),
    "tokenize": ("tokenizing", "documents"),
    "evaluate": ("evaluating", "tokens"),
    "prune": ("pruning and evaluating", "tokens"),
    "finetune": ("fine-tuning", "steps"),
}
_SILENCE = 10.0  # seconds after which a line without a terminal says that a stage is still at work


class Display(Observer):
    """Messages, stages with a known or unknown length, and the training line."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet, highlight=False)
        self._live = self.console.is_terminal and not quiet
        self._bar: Progress | None = None
        self._line = Text()
        self._view: Live | None = None
        self._stage: str | None = None
        self._started = (time.monotonic(), 0)
        self._told = time.monotonic()
        self._standing = Standing(0, 0)
        self._validation = ""

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(text, markup=False, soft_wrap=True)

    def stage(self, name: str, done: int, total: int | None) -> None:
        """Progress of a preparation stage."""
        title, counted = _STAGES[name]
        now = time.monotonic()
        if name != self._stage:
            self.close()
            self._stage, self._started, self._told = name, (now, done), now
            if self._live:
                self._open(title, total)
            else:
                self.say(f"{title} ...")
        elif not self._live and now - self._told >= _SILENCE:
            self._told = now
            of = f" of {total:,}" if total else ""
            left = f" · ETA {self._eta(done, total)}" if total else ""
            self.say(f"{title} ... {done:,}{of} {counted}, {now - self._started[0]:.0f} s{left}")
        self._advance(done, total)

    def begin(self, standing: Standing) -> None:
        """Training starts, or continues."""
        self.close()
        self._standing = standing
        self._started = (time.monotonic(), standing.step)
        if self._live:
            self._open("training", standing.steps)

    def observe(self, row: Row) -> None:
        """A line for what was trained or validated; updates of the topology are counted in it."""
        match row:
            case TrainRow():
                self._train(row)
            case ValidationRow():
                self._validate(row)
            case SkippedRow():
                self.say(f"step {row.step} was skipped: {row.reason}")
            case TopologyRow() if row.step:
                now = self._standing
                self._standing = replace(now, updates=now.updates + 1, accepted=now.accepted + row.accepted)

    def end(self) -> None:
        """Leave the terminal as it was."""
        self.close()

    def _train(self, row: TrainRow) -> None:
        steps = self._standing.steps
        parts = [
            f"loss {row.cross_entropy:.3f}",
            f"KL {row.distillation:.3f}" if row.distillation is not None else "",
            # Without a terminal a validation has a line of its own, which follows that of its step.
            self._validation if self._live else "",
            f"{row.tokens_per_second:,.0f} tokens/s",
            f"MFU {row.mfu:.1%}" if row.mfu is not None else "",
            f"density {row.density:.4g}",
            self._updates(),
            "burn-in" if row.burn_in else "",
        ]
        text = " · ".join(part for part in parts if part)
        if self._bar is not None:
            self._line.plain = text
            self._advance(row.step, steps)
        else:
            self.say(f"step {row.step}/{steps} · {text} · ETA {self._eta(row.step, steps)}")

    def _validate(self, row: ValidationRow) -> None:
        perplexity = readable_perplexity(row.perplexity)
        self._validation = f"validation ppl {perplexity}"
        teacher = "" if row.teacher_loss is None else f", teacher's loss {row.teacher_loss:.4f}"
        self.say(f"step {row.step} · validation loss {row.loss:.4f}, perplexity {perplexity}{teacher}")

    def _updates(self) -> str:
        """How many updates there were, and how many of them were accepted where that is not all."""
        updates, accepted = self._standing.updates, self._standing.accepted
        if not updates:
            return ""
        return f"updates {updates}" if accepted == updates else f"updates {accepted}/{updates}"

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._view is not None:
            self._view.stop()
        self._view = self._bar = self._stage = None

    def _open(self, title: str, total: int | None) -> None:
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f}" if total else "{task.completed:,.0f}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            expand=True,
        )
        self._bar.add_task(title, total=total)
        # The numbers have a line of their own, so that a narrow terminal cuts neither them nor the bar.
        self._line = Text()
        self._view = Live(Group(self._bar, self._line), console=self.console, transient=True)
        self._view.start()

    def _advance(self, done: int, total: int | None) -> None:
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, total=total)

    def _eta(self, step: int, steps: int) -> str:
        began, first = self._started
        done = max(1, step - first)
        seconds = round((time.monotonic() - began) / done * (steps - step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def readable_perplexity(value: float) -> str:
    """With two decimals, and as a power of ten where it would have more digits than anybody reads."""
    return f"{value:.2f}" if value < 1e6 else f"{value:.2e}"
