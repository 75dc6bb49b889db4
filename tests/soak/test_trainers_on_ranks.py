"""The trainers of others on two ranks, by rules of any kind, train as on one, which goes on from their checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.ranks import by_launcher
from tests.support.trainers import (
    RULES,
    States,
    assert_close,
    assert_same_on_all,
    of_accelerate,
    of_lightning,
    of_transformers,
)

pytest.importorskip("lightning")
pytestmark = [
    pytest.mark.soak,
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"),
]

# Of each: what trains, what it takes for twenty-four steps, a checkpoint on the way, and the last one.
PROGRAMS: dict[str, tuple[Callable[..., States], Callable[[int], dict[str, int]], int, int]] = {
    "transformers": (of_transformers, lambda passes: {"steps": 24}, 16, 24),
    "lightning": (of_lightning, lambda passes: {"epochs": 3 * passes}, 2, 3),
    "accelerate": (of_accelerate, lambda passes: {"epochs": 3 * passes}, 2, 3),
}


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("program", PROGRAMS)
def test_two_ranks_train_as_one(program: str, rule: str, passes: int, tmp_path: Path) -> None:
    train, length, middle, last = PROGRAMS[program]
    middle, last = (middle, last) if program == "transformers" else (middle * passes, last * passes)
    given = {"passes": passes, **length(passes)}
    alone = train(rule, tmp_path / "one", **given)
    assert alone["swaps"][-1] or rule == "gmp"
    by_launcher(_two, train, rule, tmp_path / "two", given, alone, middle, last)
    handed_over = train(rule, tmp_path / "two", resumed=middle, **given)
    assert_close(handed_over[last], alone[last], 1e-9)


def _two(
    train: Callable[..., States], rule: str, folder: Path, given: dict[str, int], alone: States, middle: int, last: int
) -> None:
    found = train(rule, folder, **given)
    assert_same_on_all(found)
    assert_close(found, alone, 1e-9)
    assert_close(train(rule, folder, resumed=middle, **given)[last], found[last])
