"""What goes wrong around the runs of an experiment must not pass for results."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from sparsae.cli import main
from sparsae.config.text import dump
from sparsae.core.record import encode
from sparsae.errors import InputError
from sparsae.experiments import workers
from sparsae.experiments.compare.plan import ComparisonPlan
from sparsae.experiments.directory import claimed, require_place
from sparsae.experiments.jobs import require_same_settings
from sparsae.experiments.matching import with_steps
from sparsae.files import to_json
from tests.support.records import summary_of
from tests.support.runs import write_text


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


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"match": "steps"}, "match differ ('flops' there, 'steps' here)"),
        ({"settings": {"training": {"steps": 60, "clip": 1.0}}}, "settings.training.steps differ (40 there, 60 here)"),
        ({"settings": {"training": {"steps": 40}}}, "settings.training.clip differ (1.0 there, null here)"),
        ({"variants": {"a": {"method": "rigl"}}}, "variants.a.method differ ('set' there, 'rigl' here)"),
    ],
)
def test_a_changed_plan_is_refused_by_what_differs(changed: dict[str, Any], says: str, tmp_path: Path) -> None:
    begun = {"settings": {"training": {"steps": 40, "clip": 1.0}}, "variants": {"a": {"method": "set"}}}
    plan = ComparisonPlan.model_validate(begun)
    require_place(tmp_path, plan)
    with claimed(tmp_path, plan):
        require_place(tmp_path, plan)
    with pytest.raises(InputError, match=re.escape(says)):
        require_place(tmp_path, ComparisonPlan.model_validate({**begun, **changed}))


COMPARE, TRANSFER = "compare --methods static,set", "transfer --widths 128 --learning-rates 1e-3,2e-3"


@pytest.mark.parametrize(
    "command", [COMPARE, f"{COMPARE} --dry-run", TRANSFER, f"{TRANSFER} --dry-run", "check coordinates --widths 64,128"]
)
@pytest.mark.parametrize("wrong", ["training.device=cuda:99", "training.threads=100000"])
def test_what_this_machine_has_not_is_told_before_anything_is_trained(
    command: str, wrong: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"data.source={write_text(tmp_path / 'text')}", f"data.cache={tmp_path / 'cache'}"]
    place = [] if "--dry-run" in command else ["--out", str(tmp_path / "out")]
    assert main([*command.split(), "--sparsities", "0.9", *given, wrong, *place]) == 2
    assert wrong.partition("=")[2] in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_of_one_variant_among_others_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = {"source": str(write_text(tmp_path / "text")), "cache": str(tmp_path / "cache")}
    variants = {"set": {"method": "set"}, "wide": {"method": "set", "settings": {"training": {"threads": 100_000}}}}
    plan = {"variants": variants, "seeds": [0], "settings": {"data": data, "training": {"steps": 20}}}
    (tmp_path / "plan.yaml").write_text(to_json(plan))
    for place in (["--dry-run"], ["--out", str(tmp_path / "out")]):
        assert main(["compare", str(tmp_path / "plan.yaml"), *place]) == 2
        assert "training.threads 100000" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
