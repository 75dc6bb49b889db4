"""TensorBoard, trackio and Weights & Biases behind one call: numbers of the metrics rows, under the same names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from sparsae.config.schema import TrackingConfig
from sparsae.errors import InputError
from sparsae.runs.rows import Row
from sparsae.train.observers import Observer

Sink = Callable[[dict[str, float], int], None]


class Trackers(Observer):
    """Every tracker that was asked for; each gets the rows of the metrics, and `close` ends them."""

    def __init__(self, config: TrackingConfig, run: Path, settings: Mapping[str, Any]) -> None:
        """Starts them. Raises InputError where a tracker's package is not installed."""
        self._sinks: list[Sink] = []
        self._closers: list[Callable[[], Any]] = []
        if config.tensorboard:
            writer = _package("torch.utils.tensorboard", "tensorboard").SummaryWriter(str(run / "tensorboard"))

            def write(numbers: dict[str, float], step: int) -> None:
                for name, number in numbers.items():
                    writer.add_scalar(name, number, step)

            self._sinks.append(write)
            self._closers.append(writer.close)
        # W&B keeps its files with the run; trackio has one database of its own for all runs.
        for name, wanted, places in (("trackio", config.trackio, {}), ("wandb", config.wandb, {"dir": str(run)})):
            if wanted:
                tracker = _package(name, name)
                failures: tuple[type[Exception], ...] = (OSError, RuntimeError, *_own_errors(tracker))
                try:
                    tracker.init(project=config.project, name=run.name, config=dict(settings), **places)
                except failures as error:
                    reason = str(error).strip().split("\n")[0]
                    raise InputError(f"tracking.{name} cannot start: {reason}") from None
                self._sinks.append(_logger(tracker))
                self._closers.append(tracker.finish)

    def observe(self, row: Row) -> None:
        """The numbers of a row as "kind/name"; nested ones as "kind/name/inner"."""
        numbers = dict(_numbers(row.to_dict(), row.kind))
        for sink in self._sinks:
            sink(numbers, row.step)

    def close(self) -> None:
        """Flush and end."""
        for close in self._closers:
            close()


def check_installed(config: TrackingConfig) -> None:
    """Raises InputError where a tracker that was asked for is not installed, before anything is written."""
    if config.tensorboard:
        _package("torch.utils.tensorboard", "tensorboard")
    for name, wanted in (("trackio", config.trackio), ("wandb", config.wandb)):
        if wanted:
            _package(name, name)


def _own_errors(tracker: ModuleType) -> tuple[type[Exception], ...]:
    """The base of W&B's own exceptions; trackio has none."""
    base = getattr(getattr(tracker, "errors", None), "Error", None)
    return (base,) if isinstance(base, type) and issubclass(base, Exception) else ()


def _logger(tracker: ModuleType) -> Sink:
    return lambda numbers, step: tracker.log(numbers, step=step)


def _numbers(row: Mapping[str, Any], prefix: str) -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for key, value in row.items():
        name = f"{prefix}/{key}"
        if isinstance(value, Mapping):
            found += _numbers(value, name)
        elif isinstance(value, int | float) and key not in ("step", "kind"):
            found.append((name, float(value)))
    return found


def _package(module: str, extra: str) -> ModuleType:
    try:
        return import_module(module)
    except ImportError:
        raise InputError(
            f"tracking.{extra} needs a package that is not installed: pip install 'sparsae[{extra}]'"
        ) from None
