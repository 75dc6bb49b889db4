"""A process that trains two steps and tells what they held: the task on its input, the answer on its output."""

from __future__ import annotations

import json
import sys

from sparsae.bench.rows import Row
from sparsae.bench.step import trainer
from sparsae.config.schema import Config
from sparsae.kernels.processor import set_up_processor
from sparsae.train.memory import forget_peak, model_bytes, peak_bytes
from sparsae.train.model import choose_device


def held(config: Config, threads: int) -> Row:
    """What this process holds after two steps, by parts, without their gradients; its peak, and that before."""
    set_up_processor(threads)
    device = choose_device(config.training.device)
    forget_peak(device)
    base = peak_bytes(device)
    loop = trainer(config)
    loop.train_step()
    loop.train_step()
    return {
        "peak_bytes": peak_bytes(device),
        "base_bytes": base,
        "weights": sum(parameter.numel() for parameter in loop.model.parameters()),
        "state": model_bytes(loop.model, loop.optimizer, loop.teacher),
    }


def main() -> None:
    task = json.load(sys.stdin)
    print(json.dumps(held(Config.model_validate_json(json.dumps(task["config"])), task["threads"])))


if __name__ == "__main__":
    main()
