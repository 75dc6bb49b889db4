"""What a reader of a run's page has to know before all else: what is not as usual about it."""

from __future__ import annotations

from html import escape

from sparsae.report.data import RunData
from sparsae.report.readable import count


def state(run: RunData) -> str:
    """What is not as usual: how far the run came, where it started from, and whether it got more steps."""
    planned, totals = count(run.config.training.steps), run.totals
    said = []
    if totals is None:
        said.append(
            f"This run has no summary: it is going on or was cut off. Shown up to step {count(run.last_step)} of "
            f"{planned}; totals are known at its end."
        )
    elif totals.diverged:
        ended = totals.diverged
        said.append(f"This run diverged after step {count(ended.step)} of {planned}: {ended.reason}.")
    elif not totals.finished:
        said.append(f"This run was stopped at step {count(totals.steps)} of {planned}.")
    if totals and totals.finished and totals.nnz != totals.nnz_target:
        said.append(
            f"It ended with {count(totals.nnz)} connections where its sparsity has {count(totals.nnz_target)}: "
            "its rule did not bring it there."
        )
    if totals and totals.steps_skipped:
        said.append(f"Steps skipped because a loss or a gradient was not finite: {count(totals.steps_skipped)}.")
    if totals and (source := totals.started_from):
        what = f"step {count(source.step)} of the run" if source.run else "the model"
        said.append(f"It started from {what} in {source.path}.")
    for entry in totals.extensions if totals else ():
        before, after = count(entry.previous_steps), count(entry.steps)
        said.append(f"At step {count(entry.step)} it was extended from {before} steps to {after}.")
    for change in totals.changes if totals else ():
        said.append(f"At step {count(change.step)} {change.key} was changed from {change.before} to {change.after}.")
    return f'<p class="state">{escape(" ".join(said))}</p>' if said else ""
