"""How far a micro-batch orders candidates as the whole validation set does."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from sparsae.core.intervals import Interval, mean_interval
from sparsae.experiments.compare.record import Agreement, RankingRow, Row
from sparsae.runs.rows import TopologyRow


def rank_agreement(rows: Sequence[TopologyRow]) -> Agreement:
    """Of one run's topology rows: updates that were studied, mean Kendall's tau-b of them, and a correlation.

    tau is between the candidates' scores (the current topology's among them) and their losses on the whole validation
    set, within each update; the correlation is Pearson's between the cross entropies on micro-batch and whole set, both
    less their means in the update, over all updates that have both. None where nothing varies.
    """
    taus, micro, whole, updates = [], [], [], 0
    for row in rows:
        studied = [
            c for c in (*row.candidates, row.current) if c and c.is_scored and c.validation_cross_entropy is not None
        ]
        if len(studied) < 2:
            continue
        updates += 1
        losses = np.array([c.validation_cross_entropy for c in studied])
        scores = np.array([c.score for c in studied])
        if np.ptp(losses) > 0 and np.ptp(scores) > 0:
            taus.append(float(stats.kendalltau(scores, losses).statistic))
        entropies = np.array([c.terms.get("cross_entropy", math.nan) for c in studied])
        if np.isfinite(entropies).all():
            micro += list(entropies - entropies.mean())
            whole += list(losses - losses.mean())
    varies = len(micro) > 2 and np.ptp(micro) > 0 and np.ptp(whole) > 0
    return Agreement(
        updates=updates,
        kendall_tau=math.fsum(taus) / len(taus) if taus else None,
        correlation=float(stats.pearsonr(micro, whole).statistic) if varies else None,
    )


def summarize_rankings(rows: Sequence[Row]) -> tuple[RankingRow, ...]:
    """An entry a sparsity and method, with intervals over seeds, of compared runs that were studied."""
    groups: dict[tuple[float, str], list[tuple[Row, Agreement]]] = {}
    for row in rows:
        if row.ranking and row.ranking.updates:
            groups.setdefault((row.sparsity, row.method), []).append((row, row.ranking))
    return tuple(
        RankingRow(
            sparsity=sparsity,
            method=method,
            updates=sum(ranking.updates for _, ranking in mine),
            study_flops=sum(row.study_flops or 0 for row, _ in mine),
            kendall_tau=_interval([ranking.kendall_tau for _, ranking in mine]),
            correlation=_interval([ranking.correlation for _, ranking in mine]),
        )
        for (sparsity, method), mine in groups.items()
    )


def _interval(values: Sequence[float | None]) -> Interval | None:
    known = [value for value in values if value is not None]
    return mean_interval(known) if known else None
