"""A process that trains two steps and tells its peak memory: the task on its input, the answer on its output."""

from __future__ import annotations

import json
import sys

import torch

from sparsae.bench.step import trainer
from sparsae.config.schema import Config
from sparsae.train.memory import forget_peak, peak_bytes


def main() -> None:
    task = json.load(sys.stdin)
    torch.set_num_threads(task["threads"])
    config = Config.model_validate_json(json.dumps(task["config"]))
    device = torch.device("cpu")
    forget_peak(device)
    base = peak_bytes(device)
    loop = trainer(config)
    loop.train_step()
    loop.train_step()
    # base_bytes is the interpreter with torch, before there is a model.
    print(json.dumps({"peak_bytes": peak_bytes(device), "base_bytes": base}))


if __name__ == "__main__":
    main()
