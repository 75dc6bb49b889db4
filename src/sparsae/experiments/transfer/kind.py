"""A transfer experiment as a kind of experiment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsae.experiments.kind import Kind, Results, Study
from sparsae.experiments.transfer.plan import TransferPlan

if TYPE_CHECKING:
    from sparsae.experiments.tables import Table
    from sparsae.experiments.units import Unit


class TransferKind(Kind):
    """Where the best settings lie at every width and sparsity."""

    plan = TransferPlan

    def study(self, plan: TransferPlan, out: Path, quiet: bool, admit: Callable[[Unit], None] | None = None) -> Study:
        from sparsae.experiments.transfer.study import Transfer

        return Transfer(plan, out, quiet, admit)

    def of_now(self, results: dict[str, Any]) -> dict[str, Any]:
        results["plan"].setdefault("embedding_multipliers", [])  # before there were any, none were swept
        return results

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
