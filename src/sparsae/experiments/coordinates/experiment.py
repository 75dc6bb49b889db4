"""A check of coordinates from its plan to its results."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sparsae import __version__
from sparsae.core.record import encode
from sparsae.data import prepare
from sparsae.experiments.coordinates.measure import Scale, scales
from sparsae.experiments.coordinates.plan import Case, CoordinatesPlan
from sparsae.experiments.coordinates.record import Results, Short
from sparsae.experiments.coordinates.slopes import TOLERANCE, slopes, summary, without_slope
from sparsae.experiments.matching import Cost
from sparsae.experiments.page import write_page_of
from sparsae.experiments.registry import KINDS
from sparsae.files import to_json, write_atomically
from sparsae.report.readable import duration
from sparsae.train.machine import require_machine
from sparsae.train.model import require_fit
from sparsae.train.progress import Display


class Coordinates:
    """A plan, in a directory where there is one. Raises InputError, before anything is run, for whatever is wrong."""

    def __init__(self, plan: CoordinatesPlan, out: Path | None, quiet: bool = False) -> None:
        self.plan, self.out, self._quiet = plan, out, quiet
        self._configs = dict(plan.configs())
        plan.require_effect()
        for config in {(case.width, case.sparsity): config for case, config in self._configs.items()}.values():
            require_fit(config)
            require_machine(config)

    def run(self, executor: object = None) -> Results:
        """Run every case; the slopes and their summary, which the directory gets as coordinates.json and report.html.

        No executor is made: what is measured lies inside of the runs. OSError where the directory cannot be made.
        """
        plan, out, configs = self.plan, self.out, self._configs
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
        display = Display(self._quiet)
        corpus = prepare(next(iter(configs.values())).data, display.stage)
        display.close()
        costs: dict[tuple[int, float], int] = {}
        for case, config in configs.items():
            if (case.width, case.sparsity) not in costs:
                costs[case.width, case.sparsity] = Cost(config, corpus.vocab_size).flops(1)
        found: dict[Case, list[Scale]] = {}
        total = plan.steps * sum(costs[case.width, case.sparsity] for case in configs)
        with _Progress(self._quiet, total, len(configs)) as progress:
            for case, config in configs.items():
                with progress.of(case):
                    cost = costs[case.width, case.sparsity]
                    found[case] = list(scales(config, corpus, lambda cost=cost: progress.add(cost)))  # type: ignore[misc]
        rows = slopes(found, plan.least_fan_in)
        short = {case: len({scale.step for scale in mine}) for case, mine in found.items()}
        results = Results(
            kind=plan.kind,
            sparsae=__version__,
            plan=plan.model_dump(mode="json"),
            tolerance=TOLERANCE,
            summary=summary(rows),
            rows=rows,
            without_slope=without_slope(found, rows),
            diverged=tuple(Short(**vars(case), steps=steps) for case, steps in short.items() if steps < plan.steps),
        )
        if out is not None:
            write_atomically(out / "coordinates.json", to_json(encode(results), indent=1) + "\n")
            write_page_of(KINDS[plan.kind], results, out)
        return results


class _Progress:
    """How far the measurements are, by counted operations: a bar on a terminal, a line for each case elsewhere."""

    def __init__(self, quiet: bool, total: int, cases: int) -> None:
        self._console = Console(stderr=True, quiet=quiet, highlight=False)
        self._total, self._cases, self._done, self._ended = total, cases, 0, 0
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            expand=True,
            disable=quiet or not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> _Progress:
        self._began = time.monotonic()
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    @contextmanager
    def of(self, case: Case) -> Iterator[None]:
        """A case is measured."""
        name = f"{case.parameterization}, width {case.width}, sparsity {case.sparsity:g}, seed {case.seed}"
        self._bar.update(self._task, description=name)
        yield
        self._ended += 1
        if self._bar.disable:
            left = (time.monotonic() - self._began) * (self._total - self._done) / max(1, self._done)
            said = f"[{self._ended}/{self._cases}] {name} · {duration(round(left))} left"
            self._console.print(said, markup=False, soft_wrap=True)

    def add(self, cost: int) -> None:
        """A step of so many operations is done."""
        self._done += cost
        self._bar.advance(self._task, cost)
