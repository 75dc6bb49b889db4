"""A Markdown table of finished runs, side by side: `python benchmarks/summaries.py RUN [RUN ...]`.

Each RUN is a run directory or a summary.json. Every number comes from the summaries; none is computed but ratios.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Summary = dict[str, Any]

ROWS: list[tuple[str, Callable[[Summary], str]]] = [
    ("steps", lambda s: f"{s['steps']:,}"),
    ("training tokens", lambda s: f"{s['tokens']:,}"),
    ("parameters that exist", lambda s: f"{s['parameters']:,}"),
    ("nnz of sparse layers (target)", lambda s: f"{s['nnz']:,} ({s['nnz_target']:,})"),
    ("validation loss, nats a token", lambda s: f"{s['validation_loss']:.4f}"),
    ("validation perplexity", lambda s: f"{s['validation_perplexity']:.1f}"),
    ("teacher's validation loss", lambda s: _or_dash(s["teacher_validation_loss"], "{:.4f}")),
    ("unigram perplexity", lambda s: f"{s['unigram_perplexity']:.1f}"),
    ("untrained perplexity", lambda s: f"{s['untrained_perplexity']:.1f}"),
    ("training FLOPs", lambda s: f"{s['train_flops']:.3e}"),
    ("- student", lambda s: f"{s['train_flops_by_part']['student']:.3e}"),
    ("- teacher", lambda s: f"{s['train_flops_by_part']['teacher']:.3e}"),
    ("- search", lambda s: f"{s['train_flops_by_part']['search']:.3e}"),
    ("- gradients at sampled positions", lambda s: f"{s['train_flops_by_part']['dense_gradients']:.3e}"),
    ("FLOPs over dense", lambda s: f"{s['train_flops'] / s['train_flops_dense_equivalent']:.3f}"),
    ("state of sparse layers, bytes", lambda s: f"{s['state_bytes_sparse_layers']:,}"),
    ("state over dense", lambda s: _state_ratio(s)),
    ("peak memory, bytes", lambda s: f"{s['peak_memory_bytes']:,}"),
    ("tokens a second", lambda s: f"{s['tokens_per_second']:,.0f}"),
    ("topology updates (accepted)", lambda s: f"{s['topology_updates']} ({s['topology_updates_accepted']})"),
]


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _state_ratio(summary: Summary) -> str:
    dense = summary["state_bytes_sparse_layers_dense_equivalent"]
    return f"{summary['state_bytes_sparse_layers'] / dense:.3f}" if dense else "-"


def table(summaries: list[Summary]) -> str:
    """One column a run, one row a number."""
    lines = [["", *(s["method"] for s in summaries)], ["---", *("---:" for _ in summaries)]]
    lines += [[name, *(show(s) for s in summaries)] for name, show in ROWS]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(arguments: list[str]) -> int:
    """Print the table; exit code 2 where there is nothing to read."""
    if not arguments:
        print("usage: python benchmarks/summaries.py RUN [RUN ...]", file=sys.stderr)
        return 2
    paths = [Path(a) / "summary.json" if Path(a).is_dir() else Path(a) for a in arguments]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        print(f"{missing[0]}: no such summary", file=sys.stderr)
        return 2
    print(table([json.loads(path.read_text()) for path in paths]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
