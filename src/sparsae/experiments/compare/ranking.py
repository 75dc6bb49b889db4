"""How far a micro-batch orders candidates as the whole validation set does."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from sparsae.core.intervals import mean_interval

Row = Mapping[str, Any]


def rank_agreement(rows: Sequence[Row]) -> dict[str, Any]:
    """Of one run's topology rows: updates that were studied, mean Kendall's tau-b of them, and a correlation.

    tau is between the candidates' scores (the current topology's among them) and their losses on the whole validation
    set, within each update; the correlation is Pearson's between the cross entropies on micro-batch and whole set, both
    less their means in the update, over all updates that have both. None where nothing varies.
    """
    taus, micro, whole, updates = [], [], [], 0
    for row in rows:
        studied = [c for c in [*row.get("candidates", ()), row.get("current")] if c and _studied(c)]
        if len(studied) < 2:
            continue
        updates += 1
        losses = np.array([c["validation_cross_entropy"] for c in studied])
        scores = np.array([c["score"] for c in studied])
        if np.ptp(losses) > 0 and np.ptp(scores) > 0:
            taus.append(float(stats.kendalltau(scores, losses).statistic))
        if all(c.get("cross_entropy") is not None for c in studied):
            entropies = np.array([c["cross_entropy"] for c in studied])
            micro += list(entropies - entropies.mean())
            whole += list(losses - losses.mean())
    varies = len(micro) > 2 and np.ptp(micro) > 0 and np.ptp(whole) > 0
    return {
        "updates": updates,
        "kendall_tau": math.fsum(taus) / len(taus) if taus else None,
        "correlation": float(stats.pearsonr(micro, whole).statistic) if varies else None,
    }


def summarize_rankings(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """An entry a sparsity and method, with intervals over seeds, of compared runs that were studied."""
    groups: dict[tuple[float, str], list[Row]] = {}
    for row in rows:
        if row.get("ranking") and row["ranking"]["updates"]:
            groups.setdefault((row["sparsity"], row["method"]), []).append(row)
    found = []
    for (sparsity, method), mine in groups.items():
        entry: dict[str, Any] = {"sparsity": sparsity, "method": method}
        entry["updates"] = sum(row["ranking"]["updates"] for row in mine)
        entry["study_flops"] = sum(row["study_flops"] for row in mine)
        for key in ("kendall_tau", "correlation"):
            known = [row["ranking"][key] for row in mine if row["ranking"][key] is not None]
            interval = mean_interval(known) if known else None
            entry[key] = interval and {
                "n": interval.n, "mean": interval.mean, "low": interval.low, "high": interval.high,
            }  # fmt: skip
        found.append(entry)
    return found


def _studied(candidate: Row) -> bool:
    return all(candidate.get(key) is not None for key in ("score", "validation_cross_entropy"))
