"""A check of coordinates as a kind of experiment: short runs, measured in this process from within."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsae.experiments.coordinates.plan import CoordinatesPlan
from sparsae.experiments.kind import Experiment, Kind

if TYPE_CHECKING:
    from sparsae.experiments.coordinates.record import Results
    from sparsae.experiments.jobs import Job
    from sparsae.report.tables import Table


class CoordinatesKind(Kind):
    """Scales of activations, gradients and updates in the first steps."""

    plan = CoordinatesPlan

    def experiment(
        self, plan: CoordinatesPlan, out: Path, quiet: bool, admit: Sequence[Callable[[Job], None]] = ()
    ) -> Experiment:
        from sparsae.experiments.coordinates.experiment import Coordinates

        return Coordinates(plan, out, quiet)

    def read(self, content: dict[str, Any], origin: str) -> Results:
        from sparsae.experiments.coordinates.record import Results

        return Results.read(content, origin)

    def title(self, results: Results) -> str:
        from sparsae.experiments.coordinates import page

        return page.title(results)

    def body(self, results: Results, out: Path) -> str:
        from sparsae.experiments.coordinates import page

        return page.body(results)

    def tables(self, results: Results) -> Sequence[Table]:
        from sparsae.experiments.coordinates.page import slope_table

        return [slope_table(results)]


KIND = CoordinatesKind()
