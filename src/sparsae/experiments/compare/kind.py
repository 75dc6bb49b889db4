"""A comparison as a kind of experiment; ablations and sensitivity are comparisons of variants known by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsae.experiments.compare.plan import ComparisonPlan
from sparsae.experiments.kind import Experiment, Kind

if TYPE_CHECKING:
    from sparsae.config import DataConfig
    from sparsae.experiments.compare.record import Results
    from sparsae.experiments.forecast import Planned
    from sparsae.experiments.jobs import Job
    from sparsae.report.tables import Table


class Compare(Kind):
    """Methods at the same cost."""

    plan = ComparisonPlan

    def experiment(
        self, plan: ComparisonPlan, out: Path, quiet: bool, admit: Sequence[Callable[[Job], None]] = ()
    ) -> Experiment:
        from sparsae.experiments.compare.experiment import Comparison

        return Comparison(plan, out, quiet, admit)

    def planned(self, plan: ComparisonPlan, vocabulary: Callable[[DataConfig], int]) -> Sequence[Planned]:
        from sparsae.experiments.compare.lengths import RunLengths
        from sparsae.tasks.study import read_tasks, require_length

        planned = RunLengths(plan, vocabulary).planned()
        if plan.tasks is not None:
            read_tasks(plan.tasks)  # which refuses what is not there
            require_length(plan.tasks, min(each.config.model.context for each in planned))
        return planned

    def read(self, content: dict[str, Any], origin: str) -> Results:
        from sparsae.experiments.compare.earlier import of_now
        from sparsae.experiments.compare.record import Results

        return Results.read(of_now(content, origin), origin)

    def title(self, results: Results) -> str:
        from sparsae.experiments.compare import page

        return page.title(results)

    def body(self, results: Results, out: Path) -> str:
        from sparsae.experiments.compare import page

        return page.body(results, out)

    def tables(self, results: Results) -> Sequence[Table]:
        from sparsae.experiments.compare.tables import contrast_table, rank_table, results_table
        from sparsae.experiments.compare.tasks import tasks_table

        tables = [results_table(results).brief()]
        tables += [contrast_table(results)] if results.contrasts else []
        tables += [tasks_table(results)] if results.tasks else []
        return [*tables, rank_table(results)] if results.ranking else tables

    def conclusions(self, results: Results) -> Sequence[str]:
        return [
            f"sparsity {entry.sparsity:g}: {entry.winner or 'no method'} is better than every other"
            for entry in results.conclusions
        ]


KIND = Compare()
