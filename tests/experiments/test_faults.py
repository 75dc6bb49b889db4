"""What goes wrong around the runs of an experiment must not pass for results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sparsae.config.text import dump
from sparsae.core.record import encode
from sparsae.errors import InputError
from sparsae.experiments import workers
from sparsae.experiments.compare.plan import ComparisonPlan
from sparsae.experiments.jobs import require_same_settings
from sparsae.experiments.matching import with_steps
from sparsae.files import to_json
from tests.support.records import summary_of


class Named:
    def __init__(self, name: str) -> None:
        self.name = name


class Idle:
    """A worker process that answers at once."""

    def poll(self) -> int:
        return 0


def test_a_full_disk_while_workers_run_ends_the_experiment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(workers, "_worker", lambda *_: Idle())
    monkeypatch.setattr(workers, "_answers", lambda _, jobs, *__: [{"ended": jobs[0].name}, {"finished": True}])

    def ended(job: Any) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        workers.Workers(2, 0).run([Named(f"job {k}") for k in range(6)], tmp_path, ended, ended)  # type: ignore[misc]


def test_a_finished_trial_of_other_settings_is_refused(tmp_path: Path) -> None:
    config = ComparisonPlan(methods=["static"], preset="tiny").config("static", 0.9, 0)
    (tmp_path / "config.yaml").write_text(dump(config))
    (tmp_path / "summary.json").write_text(to_json(encode(summary_of())))
    require_same_settings(tmp_path, config)
    with pytest.raises(InputError, match="other settings"):
        require_same_settings(tmp_path, with_steps(config, 7))
