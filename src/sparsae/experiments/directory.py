"""The directory of an experiment, which one process at a time may work in.

plan.yaml  runs/  tuning/  results.json  table.md  table.tex  report.html
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from sparsae.config.difference import differences
from sparsae.config.load import read_settings
from sparsae.core.record import encode
from sparsae.errors import InputError
from sparsae.experiments.plan import BasePlan, parse_plan
from sparsae.experiments.registry import kind_in
from sparsae.files import to_json, write_atomically
from sparsae.report.tables import Table
from sparsae.runs.claim import refuse_occupied
from sparsae.runs.lock import locked

RESULTS = "results.json"
_PATIENCE = 30.0  # seconds in which the workers of a killed experiment save and end


def is_experiment(path: Path) -> bool:
    """Whether a directory is that of an experiment."""
    return (path / "plan.yaml").is_file()


def saved_plan(out: Path) -> BasePlan:
    """The plan of an experiment. InputError where there is none or it is damaged."""
    file = out / "plan.yaml"
    if not file.is_file():
        raise InputError(f"{out}: not the directory of an experiment: it has no plan.yaml")
    tree = read_settings(file)
    return parse_plan(tree, str(file), kind_in(tree, str(file)).plan)


def write_all(results: object, tables: Sequence[Table], out: Path, notes: str = "") -> None:
    """results.json, table.md with the notes beneath, and table.tex, each whole or not at all; results: a record."""
    write_atomically(out / RESULTS, to_json(encode(results), indent=1) + "\n")
    write_atomically(out / "table.md", "\n".join(table.markdown() for table in tables) + notes)
    write_atomically(out / "table.tex", "\n".join(table.latex() for table in tables))


def require_place(out: Path, plan: BasePlan) -> None:
    """InputError where the directory holds anything but an experiment of this very plan."""
    if not is_experiment(out):
        refuse_occupied(out)
        return
    for name, there, here in differences(saved_plan(out).model_dump(mode="json"), plan.model_dump(mode="json")):
        raise InputError(
            f"{out}: holds an experiment whose {name} differ ({there} there, {here} here): give a new --out, or the "
            "plan that it was begun with"
        )


@contextmanager
def claimed(out: Path, plan: BasePlan) -> Iterator[int]:
    """The directory, made if it is new and locked against others; gives the descriptor that holds the lock.

    Raises InputError where it cannot be written or another process works in it.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror}; choose another directory") from None
    with locked(out, "this experiment", _PATIENCE) as lock:
        if not is_experiment(out):
            write_atomically(out / "plan.yaml", plan.dump())
        yield lock
