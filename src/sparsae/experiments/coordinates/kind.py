"""A check of coordinates as a kind of experiment: short runs, measured in this process from within."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sparsae.experiments.coordinates.plan import CoordinatesPlan
from sparsae.experiments.kind import Kind, Results, Study

if TYPE_CHECKING:
    from sparsae.experiments.tables import Table
    from sparsae.experiments.units import Unit


class CoordinatesKind(Kind):
    """Scales of activations, gradients and updates in the first steps."""

    plan = CoordinatesPlan

    def study(
        self, plan: CoordinatesPlan, out: Path, quiet: bool, admit: Callable[[Unit], None] | None = None
    ) -> Study:
        from sparsae.experiments.coordinates.study import Coordinates

        return Coordinates(plan, out, quiet)

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
