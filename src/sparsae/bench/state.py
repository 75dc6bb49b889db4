"""What training holds: parameters, index tensors, optimizer and teacher of a model, sparse beside dense, and the peak.

Each model trains two steps in a process of its own. Where the settings have a teacher, the dense one has an average of
its weights too, so that both have the same parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from sparsae.bench.clock import CPU
from sparsae.bench.rows import Column, Row, device_name
from sparsae.bench.step import configuration, dense_twin, in_a_process, require_one_density
from sparsae.config.schema import Config
from sparsae.train.model import require_fit

PARTS = ("parameters", "indices", "optimizer", "teacher")


def _megabytes(part: str) -> Callable[[Row], float]:
    return lambda row: row[f"{part}_bytes"] / 1e6


COLUMNS = (
    Column("model", "model"),
    Column("sparsity", "sparsity", "g"),
    Column("weights", "weights", ",", 13),
    *(Column(f"{part} MB", _megabytes(part), ",.1f", 13) for part in PARTS),
    Column("state MB", _megabytes("state"), ",.1f", 9),
    Column("of dense", "state_ratio", ".3f"),
    Column("peak MB", _megabytes("peak"), ",.1f", 9),
    Column("of dense", "peak_ratio", ".3f"),
)


@dataclass(frozen=True)
class States:
    """What is measured. threads: None for torch's choice."""

    preset: str
    method: str
    settings: Sequence[str]
    sparsities: Sequence[float]
    threads: int | None
    device: torch.device = CPU

    def __post_init__(self) -> None:
        for config in self._configs():
            require_fit(config)
            require_one_density(config)

    def __len__(self) -> int:
        return 1 + len(self.sparsities)

    def measure(self) -> Iterator[list[Row]]:
        """The dense model's row, then that of each sparsity."""
        first, *_ = self._configs()
        dense = self._row("dense", dense_twin(first))
        yield [dense]
        for config in self._configs():
            row = self._row("sparse", config)
            row["state_ratio"] = row["state_bytes"] / dense["state_bytes"]
            row["peak_ratio"] = row["peak_bytes"] / dense["peak_bytes"]
            yield [row]

    def _configs(self) -> Iterator[Config]:
        """A teacher, where the settings have one, from the first step on."""
        for sparsity in self.sparsities:
            config = configuration(self.preset, self.method, self.settings, sparsity, self.device)
            yield config.model_copy(update={"teacher": config.teacher.model_copy(update={"start": 0.0})})

    def _row(self, model: str, config: Config) -> Row:
        threads = self.threads or config.training.threads or torch.get_num_threads()
        found = in_a_process(config, threads)
        state = {f"{part}_bytes": found["state"][part] for part in PARTS}
        return {
            "model": model,
            "preset": self.preset,
            "sparsity": config.sparsity.sparsity,
            "device": device_name(self.device),
            "weights": found["weights"],
            **state,
            "state_bytes": sum(state.values()),
            "peak_bytes": found["peak_bytes"],
            "base_bytes": found["base_bytes"],
        }
