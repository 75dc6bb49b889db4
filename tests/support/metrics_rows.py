"""Rows of a made-up run, such as metrics.jsonl has."""

from __future__ import annotations

from typing import Any

import numpy as np

Rows = list[dict[str, Any]]
STEPS = 240
PROMPT = "def f(x):\n    return <script>alert('x')</script> & x\n"


def candidate(proposer: str, score: float | None) -> dict[str, Any]:
    scored = score is not None
    return {
        "proposer": proposer,
        "swaps": 1500,
        "cross_entropy": score + 0.001 if score is not None else None,
        "diversity": 0.03 if scored else None,
        "activity": 0.3 if scored else None,
        "score": score,
        "rejected": None if scored else "bounds",
    }


def layer_rows(rng: np.random.Generator, progress: float) -> dict[str, Any]:
    rows = {}
    for block in range(4):
        for index, (kind, heads) in enumerate(
            {"attn.c_attn": 12, "attn.c_proj": 4, "mlp.c_fc": 0, "mlp.c_proj": 0}.items()
        ):
            density = 0.08 + 0.02 * index + progress * 0.015 * (block - 1.5)
            rows[f"transformer.h.{block}.{kind}"] = {
                "nnz": round(density * 65536),
                "units": 65536,
                "density": density,
                "swaps": 100,
                "gradient_activity": float(rng.uniform(0.01, 0.5)) if progress else None,
                "dead_outputs": int(4 * progress * index),
                "dead_inputs": 0,
                "head_densities": [float(d) for d in rng.normal(density, 0.01, heads).round(6)] if heads else None,
            }
    return rows


def topology_rows(rng: np.random.Generator) -> Rows:
    rows: Rows = []
    for number, step in enumerate(range(0, 216, 12)):
        progress = step / STEPS
        base = 8 * float(np.exp(-step / 200)) + 2
        candidates = [candidate("uniform", float(base + rng.normal(0.01, 0.02))) for _ in range(3)]
        candidates.append(candidate("reshuffle" if number % 4 else "redraw", float(base + 0.5) if number % 3 else None))
        best = min(range(3), key=lambda i: candidates[i]["score"])
        accepted = step > 0 and candidates[best]["score"] < base
        rows.append(
            {
                "kind": "topology",
                "step": step,
                "accepted": accepted,
                "chosen": best if accepted else None,
                "candidates": candidates if step else [],
                "current": candidate("current", float(base)) | {"swaps": 0} if step else None,
                "candidates_count": 2 + number % 4,
                "mutation_rate": 0.005 * 1.1 ** (number % 5),
                "reset_probability": 0.1 if number % 6 == 5 else 0.02,
                "nnz": 70_000,
                "swaps": 1500 if accepted else 0,
                "hamming_start": 0.4 * progress,
                "hamming_last": 0.02 if accepted else 0.0,
                "itop_rate": 0.1 + 0.2 * progress,
                "age": {"mean": 0.8 * step, "median": 0.9 * step, "max": step},
                "layers": layer_rows(rng, progress),
                "skipped": None,
                "seconds": 0.4,
            }
        )
    return rows


def metric_rows() -> Rows:
    """Rows of a run of `sparsae-written` with every kind of gap."""
    rng = np.random.default_rng(3)
    rows = topology_rows(rng)
    for step in range(0, STEPS + 1, 24):
        loss = 6 * float(np.exp(-step / 60)) + 2.4
        rows.append(
            {"kind": "validation", "step": step, "tokens": 2048 * step, "loss": loss, "perplexity": float(np.exp(loss))}
            | {"teacher_loss": loss + 0.05 if step else None, "train_flops": step * 10**10, "seconds": 0.5 * step}
        )
    for step in range(10, STEPS + 1, 10):
        loss = 6 * float(np.exp(-step / 60)) + 2.4 + float(rng.normal(0, 0.05))
        rows.append(
            {"kind": "train", "step": step, "tokens": 2048 * step, "loss": loss, "cross_entropy": loss}
            | {"distillation": 0.3 * float(np.exp(-step / 100)) if step > 60 else None}
            | {"learning_rate": 2e-3 * (1 - step / 300), "gradient_norm": None if step == 50 else 1 + step / 500}
            | {"nnz": 70_000, "density": 0.1, "burn_in": step % 50 == 0, "train_flops": step * 10**10}
            | {"seconds": 0.5 * step, "tokens_per_second": 4000 + step, "peak_memory_bytes": 10**9}
        )
    return sorted(rows, key=lambda row: row["step"])


SUMMARY = {
    "preset": "demo",
    "method": "sparsae-written",
    "seed": 0,
    "steps": STEPS,
    "tokens": 2048 * STEPS,
    "parameters_dense": 2_000_000,
    "parameters": 1_000_000,
    "sparsity": 0.9,
    "nnz": 70_000,
    "nnz_target": 70_000,
    "validation_loss": 2.5,
    "validation_perplexity": 12.2,
    "test_loss": None,
    "teacher_validation_loss": 2.55,
    "unigram_perplexity": 730.0,
    "untrained_perplexity": 4447.0,
    "train_flops": 240 * 10**10,
    "train_flops_by_part": {"student": 18 * 10**11, "teacher": 4 * 10**11, "search": 2 * 10**11, "dense_gradients": 0},
    "train_flops_dense_equivalent": 8 * 10**12,
    "state_bytes_sparse_layers": 2_000_000,
    "state_bytes_by_part": {"values": 280_000, "gradients": 280_000, "optimizer": 840_000, "indices": 280_000},
    "state_bytes_sparse_layers_dense_equivalent": 14_000_000,
    "telemetry_bytes": 100_000,
    "peak_memory_bytes": 10**9,
    "tokens_per_second": 4096.5,
    "topology_updates": 17,
    "topology_updates_accepted": 9,
    "seconds": 131.0,
    "seconds_by_part": {"train": 100.0, "topology": 20.0, "validation": 10.9, "checkpoint": 0.1},
    "finished": True,
    "device": "cpu",
    "torch": "2.13.0",
}
