"""Settings of a rule that somebody else wrote: shown, read back and refused as well as this package's own."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, Field

from sparsae.config.load import resolve
from sparsae.config.rules import RuleConfig
from sparsae.config.section import Counts
from sparsae.config.text import annotated, dump
from sparsae.errors import InputError
from sparsae.registry import RULES


def write(directory: Path, text: str) -> Path:
    path = directory / "run.yaml"
    path.write_text(text, "utf-8")
    return path


def refusal(
    file: Path | None, preset: str | None = None, method: str | None = None, overrides: tuple[str, ...] = ()
) -> str:
    with pytest.raises(InputError) as caught:
        resolve(file, preset, method, overrides)
    return str(caught.value)


class Pace(Enum):
    SLOW = "slow"
    FAST = "fast"


class Bare(BaseModel):
    depth: int = 2


class Empty(BaseModel):
    pass


class GuestConfig(RuleConfig):
    """
    Things of a guest move.
    """

    needed: int
    silent: float = 0.5
    long: int = Field(default=1, description="two\nlines")
    pace: Annotated[Pace, Field(strict=False)] = Pace.SLOW
    powers: Literal[1, 2] = 1
    place: Annotated[Path, Field(strict=False)] = Path("a/b")
    bare: Bare = Bare()
    empty: Empty = Empty()
    several: dict[str, Bare] = Field(default={"yes": Bare(), "b": Bare(depth=3)})
    numbers: dict[str, int] = Field(default={"x": 1})
    pair: Counts = (1, 1)


@pytest.fixture
def guest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RULES, "_entries", {**RULES._entries, **{name: RULES[name] for name in RULES.own_names()}})
    RULES.register("guest", GuestConfig)(lambda config: config)


@pytest.mark.usefixtures("guest")
class TestGuests:
    def test_settings_of_every_kind_are_shown_and_read_back(self, tmp_path: Path) -> None:
        config = resolve(None, None, "guest", ["topology.needed=3", "topology.pace=fast"])
        text = annotated(config)
        assert resolve(write(tmp_path, text)) == resolve(write(tmp_path, dump(config))) == config
        lines = text.splitlines()
        shown = lines[
            lines.index("topology:  # Things of a guest move.") : [line[:6] for line in lines].index("rules:")
        ]
        assert "None" not in "\n".join(shown)
        for line in (
            "  silent: 0.5",
            "  long: 1  # two lines",
            "  pace: fast  # one of slow, fast",
            "  powers: 1  # one of 1, 2",
            "  place: a/b",
            "  bare:",
            "    depth: 2",
            "  empty: {}",
            "  several:",
            "    'yes':",
            "      depth: 3",
            "    x: 1",
        ):
            assert line in shown

    def test_a_required_setting_must_be_given(self, tmp_path: Path) -> None:
        assert refusal(None, None, "guest") == "method guest: topology.needed: must be given"
        file = write(tmp_path, 'rules: {"*.mlp.*": {rule: guest}}')
        assert refusal(file) == f"{file}: rules.*.mlp.*.needed: must be given"
        message = refusal(None, None, "guest", ("topology.needed=1", "topology.pair=[1]"))
        assert message == "--set: topology.pair: must have exactly two entries, not [1]"


@pytest.mark.parametrize("rule", ["{rule: rigl}", "{every: 3}", "{}"])
def test_an_empty_pattern_is_told_where_it_was_given(rule: str, tmp_path: Path) -> None:
    assert refusal(None, None, None, (f'rules={{"": {rule}}}',)) == "--set: rules: key '' must not be empty"
    file = write(tmp_path, f'rules: {{"": {rule}}}')
    assert refusal(file) == f"{file}: rules: key '' must not be empty"
