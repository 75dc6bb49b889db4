"""Every rule in a stack for long: 200 steps, equal to the runs that train alone to 1e-9 in float64."""

from __future__ import annotations

import pytest
import torch

from tests.support.stacks import cases, compared


@pytest.mark.soak
@pytest.mark.parametrize("name", sorted(cases(steps=200, every=20)))
def test_two_hundred_steps(name: str) -> None:
    """Beside another run of the same shape, which is some steps shorter."""
    method, *settings = cases(steps=200, every=20)[name]
    other = [setting for setting in settings if not setting.startswith("training.steps")]
    compared(
        {name: (method, *settings), "other": (method, *other, "seed=7", "training.steps=190")},
        most=2,
        dtype=torch.float64,
        tolerance=1e-9,
    )
