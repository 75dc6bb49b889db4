"""Rows of results.json, made up, with what a test says of them."""

from __future__ import annotations

import dataclasses
from typing import Any

from sparsae.experiments.compare.record import Results, Row


def compare_row(method: str, seed: int, loss: float, diverged: bool = False, **more: Any) -> Row:
    """A compared run at 90 % sparsity."""
    counts: dict[str, Any] = dict.fromkeys(
        ("train_flops", "tokens", "steps", "seconds", "parameters", "state_bytes", "accepted_updates", "updates"), 1
    )
    row = Row(
        method=method, seed=seed, sparsity=0.9, match="steps", budget=1, budget_deviation=None if diverged else 0.0,
        learning_rate=1e-3, diverged=diverged, validation_loss=None if diverged else loss, validation_perplexity=None,
        teacher_validation_loss=None, train_flops_by_part=None, train_flops_dense_equivalent=None, nnz=None,
        seconds_by_part=None, tokens_per_second=None, peak_memory_bytes=None, study_flops=None, device=None, torch=None,
        base_method=method, run=f"runs/{method}-0.9-{seed}", curve=(), **counts,
    )  # fmt: skip
    return dataclasses.replace(row, **more)


def compare_results(rows: list[Row], **more: Any) -> Results:
    """A comparison of these runs, of which nothing has been said yet."""
    tuning = {"share": 1.0, "budget": None, "seed": 1000, "grid": {}}
    plan = {"preset": "demo", "match": "steps", "seeds": [0], "sparsities": [0.9], "tuning": tuning}
    results = Results(
        kind="comparison", complete=True, sparsae="0", reference="static", judged_by="test_loss", plan=plan,
        rows=tuple(rows), trial_share=1.0, tuning=(), summary=(), contrasts=(), conclusions=(), warnings=(),
    )  # fmt: skip
    return dataclasses.replace(results, **more)
