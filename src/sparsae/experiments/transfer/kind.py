"""A transfer experiment as a kind of experiment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsae.experiments.kind import Experiment, Kind
from sparsae.experiments.transfer.plan import TransferPlan

if TYPE_CHECKING:
    from sparsae.config import DataConfig
    from sparsae.experiments.forecast import Planned
    from sparsae.experiments.jobs import Job
    from sparsae.experiments.transfer.record import Results
    from sparsae.report.tables import Table


class TransferKind(Kind):
    """Where the best settings lie at every width and sparsity."""

    plan = TransferPlan

    def experiment(
        self, plan: TransferPlan, out: Path, quiet: bool, admit: Sequence[Callable[[Job], None]] = ()
    ) -> Experiment:
        from sparsae.experiments.transfer.experiment import Transfer

        return Transfer(plan, out, quiet, admit)

    def planned(self, plan: TransferPlan, vocabulary: Callable[[DataConfig], int]) -> Sequence[Planned]:
        from sparsae.experiments.transfer.sweep import Sweep

        return Sweep(plan, vocabulary).planned()

    def read(self, content: dict[str, Any], origin: str) -> Results:
        from sparsae.experiments.transfer.record import Results

        return Results.read(content, origin)

    def title(self, results: Results) -> str:
        from sparsae.experiments.transfer import page

        return page.title(results)

    def body(self, results: Results, out: Path) -> str:
        from sparsae.experiments.transfer import page

        return page.body(results)

    def tables(self, results: Results) -> Sequence[Table]:
        from sparsae.experiments.transfer.results import tables

        return tables(results)


KIND = TransferKind()
