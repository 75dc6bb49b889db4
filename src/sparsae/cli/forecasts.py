"""What a run, or an experiment, would be, in a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import typer

from sparsae.cli.output import output, readable, show_table, show_values
from sparsae.experiments.plan import BasePlan
from sparsae.experiments.registry import KINDS
from sparsae.report.readable import duration


def show_run(found: Mapping[str, Any]) -> None:
    """Layers, then what the run costs beside the dense model (by part where the forecast has parts), then the rest."""
    layers, columns = [], ["layer", "out", "in", "nnz", "density"]
    has_factors = any(layer["density_factor"] != 1.0 for layer in found["layers"])
    for layer in found["layers"]:
        row = [layer["name"], layer["out"], layer["in"], readable(layer["nnz"]), f"{layer['density']:.4f}"]
        at_bound = " (at a bound)" if layer["density_cut"] else ""
        layers.append([*row, f"{layer['density_factor']:g}{at_bound}"] if has_factors else row)
    if layers:
        show_table("Sparsified layers", [*columns, "factor"] if has_factors else columns, layers)
    if found["density_steps"]:
        rows = [[each["step"], readable(each["nnz"]), f"{each['density']:.4f}"] for each in found["density_steps"]]
        show_table("Density over the run", ["after step", "nnz", "density"], rows)
    costs = []
    for name, here, dense in (
        ("parameters", "parameters", "parameters_dense"),
        ("training FLOPs", "train_flops", "train_flops_dense_equivalent"),
        ("state of sparse layers, bytes", "state_bytes", "state_bytes_dense_equivalent"),
        ("model state, bytes", "model_state_bytes", "model_state_bytes_dense_equivalent"),
    ):
        if here == "state_bytes" and not found["layers"]:
            continue
        ours, theirs = _by_part(found[here]), _by_part(found[dense])
        for part in dict.fromkeys((*ours, *theirs)):
            a, b = ours.get(part, 0), theirs.get(part)
            ratio = f"{a / b:.3f}" if b else "-"
            costs.append((f"{name}: {part}" if part else name, readable(a), readable(b), ratio))
    show_table("Cost", ("", "here", "dense", "ratio"), costs)
    shown = ("steps", "tokens", "train_flops_per_step", "expected_seconds")
    show_values("Run", {key: found[key] for key in shown})
    _show_uncounted(found["uncounted"])


def _by_part(amount: Any) -> dict[str, Any]:
    """{"": total} and, where the amount is given by part, each part after it."""
    return {"": sum(amount.values()), **amount} if isinstance(amount, Mapping) else {"": amount}


def show_experiment(plan: BasePlan, json_file: str | None) -> None:
    """The runs of a plan by what they are called, then all of them together. InputError for what is wrong with it."""
    with output(json_file) as found:
        from sparsae.experiments.forecast import foresee
        from sparsae.train.forecast import expected_vocabulary

        found.update(foresee(KINDS[plan.kind].planned(plan, expected_vocabulary)), uncounted=plan.uncounted())
    if json_file == "-":
        return
    rows = [
        [
            each["what"],
            f"{each['sparsity']:g}",
            *(readable(each[key]) for key in ("runs", "steps", "tokens", "train_flops")),
            duration(each["expected_seconds"]),
        ]
        for each in found["rows"]
    ]
    show_table("Runs", ["", "sparsity", "runs", "steps", "tokens", "FLOPs each", "time each"], rows)
    total = {key: found[key] for key in ("runs", "train_flops")}
    show_values("Altogether", {**total, "one after another": duration(found["expected_seconds"])})
    _show_uncounted(found["uncounted"])


def _show_uncounted(uncounted: Sequence[str]) -> None:
    for what in uncounted:
        typer.echo(f"not counted: {what}")
    typer.echo(
        "Times are of the products alone, done densely at this machine's rate: sparse kernels need less, and small "
        "models, whose time goes elsewhere, a multiple."
    )
