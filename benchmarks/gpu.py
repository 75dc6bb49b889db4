"""The parts of benchmarks/gpu.sh that no command of sparsae has; each prints its rows and adds them to a JSONL file.

python benchmarks/gpu.py check DEVICE FILE      outputs and gradients against float64 on the CPU; fails where one is off
python benchmarks/gpu.py losses RUN FILE        validation losses of a run by tokens and seconds
python benchmarks/gpu.py largest DEVICE FILE    models of growing size, dense and at 90 %, until one does not fit
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsae.bench.rows import device_name
from sparsae.bench.step import configuration, dense_twin
from sparsae.core.randomness import generator
from sparsae.core.topology import Topology
from sparsae.kernels.backend import Layout
from sparsae.kernels.registry import BACKENDS
from sparsae.losses import language_model_loss
from sparsae.nn.linear import SparseLinear
from sparsae.optim import AdamW

# Largest error over the largest number: of the rounding of what goes in and comes out, not of the sums.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 2e-2}
UNITS = ((1, 1), (4, 4), (16, 16), (32, 32), (64, 64), (128, 128))
# (layers, width), heads of 64; how long the search may take.
SIZES = ((24, 1024), (24, 1536), (32, 2048), (32, 2560), (36, 3072), (40, 4096), (48, 5120), (64, 6144), (80, 8192))
TOYS = ((1, 64), (2, 128))
SEARCH_SECONDS = 160.0


def tell(row: dict[str, Any], file: Path) -> None:
    print(*(f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in row.items()))
    sys.stdout.flush()
    with file.open("a", encoding="utf-8") as out:
        out.write(json.dumps(row) + "\n")


def check(device: torch.device, file: Path) -> bool:
    """Whether every product is as exact as its dtype."""
    right, side, tokens = True, 512 if device.type == "cuda" else 128, 700 if device.type == "cuda" else 50
    for dtype in TOLERANCE if device.type == "cuda" else (torch.float32,):
        for unit in UNITS:
            for density in (0.1, 0.7):
                errors, backend = errors_of(device, dtype, unit, density, side, tokens)
                good = max(errors.values()) < TOLERANCE[dtype]
                right &= good
                row = {"part": "check", "device": device_name(device), "dtype": str(dtype), "unit": list(unit)}
                tell({**row, "density": density, "backend": backend, **errors, "right": good}, file)
        errors = {"loss": loss_error(device, dtype), "optimizer": optimizer_error(device)}
        good = max(errors.values()) < TOLERANCE[dtype]
        right &= good
        row = {"part": "check", "device": device_name(device), "dtype": str(dtype), **errors, "right": good}
        tell(row, file)
    return right


def loss_error(device: torch.device, dtype: torch.dtype) -> float:
    """Of the chunked loss with a teacher of some tokens, and of its gradients, against float64 on the CPU."""
    rng = generator(0, "loss")
    hidden, taught = torch.randn(60, 48, generator=rng).to(dtype), torch.randn(30, 48, generator=rng).to(dtype)
    weights = [(torch.randn(5000, 48, generator=rng) / 4).to(dtype) for _ in range(2)]
    targets = torch.randint(5000, (60,), generator=rng)
    found = []
    for place, kind in ((device, dtype), (torch.device("cpu"), torch.float64)):
        head, teacher = (torch.nn.Linear(48, 5000, bias=False, device=place, dtype=kind) for _ in range(2))
        for own, weight in ((head, weights[0]), (teacher, weights[1])):
            own.weight.data.copy_(weight)
        at = hidden.to(place, kind).requires_grad_()
        parts = language_model_loss(
            *(at, head, targets.to(place)), teacher_hidden_TD=taught.to(place, kind), teacher_head=teacher, alpha=0.5,
            chunk=25,
        )  # fmt: skip
        grads = torch.autograd.grad(parts.total, [at, head.weight])
        found.append([t.detach().cpu().double() for t in (*parts, *grads)])
    return max(float((got - want).abs().max() / want.abs().max()) for got, want in zip(*found, strict=True))


def optimizer_error(device: torch.device) -> float:
    """Of five steps of AdamW, by weight with a ramp and by parameter, against float64 on the CPU."""
    rng = generator(0, "adamw")
    shapes = ((3000,), (5, 16, 16), (7, 9), (1,))
    first = [torch.randn(shape, generator=rng) for shape in shapes]
    grads = [[torch.randn(shape, generator=rng) for shape in shapes] for _ in range(5)]
    found = []
    for place, kind in ((device, torch.float32), (torch.device("cpu"), torch.float64)):
        own = [torch.nn.Parameter(t.to(place, kind, copy=True)) for t in first]
        sparse = {"params": own[:2], "per_weight_step": True, "ramp": 3, "ramp_first": False, "weight_decay": 0.1}
        optimizer = AdamW([sparse, {"params": own[2:]}], lr=0.05)
        for step, given in enumerate(grads):
            for p, grad in zip(own, given, strict=True):
                p.grad = grad.to(place, kind)
            if step == 2:
                for p in own[:2]:
                    for key in ("step", "exp_avg", "exp_avg_sq"):
                        optimizer.state[p][key].view(-1)[::3] = 0
            optimizer.step()
        found.append([p.detach().cpu().double() for p in own])
    return max(float((got - want).abs().max() / want.abs().max()) for got, want in zip(*found, strict=True))


def errors_of(
    device: torch.device, dtype: torch.dtype, unit: tuple[int, int], density: float, side: int, tokens: int
) -> tuple[dict[str, float], str]:
    rng = generator(0, "check")
    shape = side, 2 * side
    count = max(1, round(density * (shape[0] // unit[0]) * (shape[1] // unit[1])))
    topology = Topology.random(shape, count, rng, unit)
    values, bias = torch.randn(topology.values_shape, generator=rng), torch.randn(shape[0], generator=rng)
    layer = SparseLinear(topology.to(device), values.to(device), bias.to(device))
    x, dy = (torch.randn(tokens, n, generator=rng).to(dtype) for n in (shape[1], shape[0]))
    at = x.to(device).requires_grad_()
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        y = layer(at)
    y.backward(dy.to(device))
    with torch.no_grad():
        return compared(layer, y, at, dy, x, values, bias, generator(0, "sampled")), layer.kernel


def compared(
    layer: SparseLinear,
    y: Tensor,
    at: Tensor,
    dy: Tensor,
    x: Tensor,
    values: Tensor,
    bias: Tensor,
    rng: torch.Generator,
) -> dict[str, float]:
    """The largest errors over the largest numbers. at: the layer's input, with its gradient."""
    topology, dtype, device = layer.topology.to("cpu"), x.dtype, at.device
    shape, unit = topology.shape, topology.unit
    sampled = topology.sample_inactive(min(1000, topology.units - topology.count), rng)
    some = BACKENDS[layer.kernel].sddmm(dy.to(device), x.to(device), Layout(shape, unit, sampled.to(device)))

    oracle = BACKENDS["reference"]
    layout = Layout(shape, unit, topology.indices)
    exact = values.to(dtype).double()
    wide_x, wide_dy = x.double(), dy.double()
    pairs = {
        "y": (y, oracle.spmm(exact, layout, wide_x, bias.to(dtype).double())),
        "dx": (at.grad, oracle.spmm_t(exact, layout, wide_dy)),
        "dvalues": (layer.values.grad, oracle.sddmm(wide_dy, wide_x, layout)),
        "sampled": (some, oracle.sddmm(wide_dy, wide_x, Layout(shape, unit, sampled))),
    }
    found = {}
    for name, (got, want) in pairs.items():
        assert got is not None
        found[name] = float((got.detach().cpu().double() - want).abs().max() / want.abs().max())
    return found


def losses(run: Path, file: Path) -> bool:
    """Every validation of a run, and what its last row of training says of speed."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    for row in rows:
        if row["kind"] == "validation":
            kept = ("step", "tokens", "loss", "flops", "seconds", "tokens_per_second")
            tell({"run": run.name, **{key: row[key] for key in kept if key in row}}, file)
    return True


def largest(device: torch.device, file: Path) -> bool:
    """Two steps of each size in a process of its own, sparse and dense in turns, until they do not fit."""
    began, fits = time.monotonic(), {"sparse": True, "dense": True}
    for layers, width in SIZES if device.type == "cuda" else TOYS:
        for model in [name for name, fit in fits.items() if fit]:
            left = SEARCH_SECONDS - (time.monotonic() - began)
            row = {"part": "largest", "device": device_name(device), "model": model, "layers": layers, "width": width}
            try:
                row |= trained(device, model, layers, width, max(left, 1.0))
            except subprocess.TimeoutExpired:
                tell({**row, "fits": None, "why": "the time of the search was over"}, file)
                return True
            fits[model] = row["fits"]
            tell(row, file)
    return True


def trained(device: torch.device, model: str, layers: int, width: int, seconds: float) -> dict[str, Any]:
    toy = device.type == "cpu"
    settings = [
        f"model.layers={layers}",
        f"model.width={width}",
        f"model.heads={width // 64}",
        "training.compile=false",
    ]
    settings += ["training.batch_size=2" if toy else "training.batch_size=8", "training.accumulation=1"]
    settings += ["model.context=16", "data.tokenizer_vocab=300"] if toy else []
    config = configuration("gpt2-small", "static", settings, 0.9, device)
    task = {"config": (config if model == "sparse" else dense_twin(config)).model_dump(mode="json"), "threads": 1}
    program = [sys.executable, "-m", "sparsae.bench.memory"]
    done = subprocess.run(program, input=json.dumps(task), capture_output=True, text=True, timeout=seconds, check=False)
    if done.returncode:
        return {"fits": False, "why": done.stderr.strip().splitlines()[-1]}
    found = json.loads(done.stdout)
    return {"fits": True, "parameters": found["weights"], "peak_bytes": found["peak_bytes"]}


if __name__ == "__main__":
    command, what, out = sys.argv[1:]
    if command == "losses":
        succeeded = losses(Path(what), Path(out))
    else:
        succeeded = {"check": check, "largest": largest}[command](torch.device(what), Path(out))
    sys.exit(0 if succeeded else 1)
