"""How long the updates of `sparsae-written` take on one rank and on several of one machine, one thread each.

    python benchmarks/ranks.py [RANKS]

An update scores five candidates and the present topology, which the ranks divide among them. Prints the seconds of the
median update by number of ranks, their ratio, and what making data parallelism's reducer again takes of it. The machine
has to be idle, with a core for each rank.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

SETTINGS = ["model.layers=4", "model.width=256", "model.heads=4", "model.context=128", "training.batch_size=4",
            "training.steps=40", "training.threads=1", "training.validation_sequences=4", "training.device=cpu",
            "training.validate_every=40", "topology.every=4", "topology.candidates=5",
            "topology.micro_batch.sequences=4", "topology.adaptation.enabled=false",
            "sparsity.sparsity=0.9", "tracking.sample_tokens=1",
            "teacher.enabled=false"]  # fmt: skip


def seconds(ranks: int, folder: Path) -> float:
    """Of the median update."""
    out = folder / str(ranks)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    train = ["-m", "sparsae", "train", "--preset", "demo", "--method", "sparsae-written", "--out", str(out)]
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    subprocess.run([*launch, *train, *settings], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return median(row["seconds"] for row in rows if row["kind"] == "topology" and row["candidates"])


def reducer_seconds() -> float:
    """To cut the buckets of a model of 64 layers anew."""
    import torch
    from torch import distributed as dist
    from torch import nn

    from sparsae.nn.sparsify import sparsify
    from sparsae.search.parallel import _cut_anew

    with tempfile.NamedTemporaryFile() as store:
        dist.init_process_group("gloo", init_method=f"file://{store.name}-group", rank=0, world_size=1)
        model = sparsify(nn.Sequential(*(nn.Linear(512, 512) for _ in range(64))), 0.9)
        parallel = nn.parallel.DistributedDataParallel(model)
        parallel(torch.randn(4, 512)).sum().backward()
        times = []
        for _ in range(20):
            began = time.perf_counter()
            _cut_anew(parallel)
            times.append(time.perf_counter() - began)
        dist.destroy_process_group()
    return median(times)


def main() -> None:
    most = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    with tempfile.TemporaryDirectory() as folder:
        found = {ranks: seconds(ranks, Path(folder)) for ranks in (1, most)}
    for ranks, each in found.items():
        print(f"{ranks} ranks: {each:.3f} s for each update, {each / found[1]:.2f} of one rank's")
    print(f"reducer of 64 layers: {1000 * reducer_seconds():.2f} ms")


if __name__ == "__main__":
    main()
