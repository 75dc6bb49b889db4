"""What a run leaves, and what it has to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sparsae.runs.rows import TIMES

ISSUE_KEYS = {
    "preset", "method", "seed", "steps", "tokens", "parameters_dense", "sparsity", "nnz",
    "nnz_target", "validation_loss", "validation_perplexity", "unigram_perplexity", "untrained_perplexity",
    "train_flops", "train_flops_by_part", "train_flops_dense_equivalent", "state_bytes_sparse_layers",
    "state_bytes_sparse_layers_dense_equivalent", "peak_memory_bytes", "tokens_per_second",
    "topology_updates", "topology_updates_accepted", "seconds",
}  # fmt: skip


def metrics(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]
