"""Density schedules, and the rules that keep the number of connections, which they go with."""

from __future__ import annotations

import pytest

from sparsae.config.schedule import ScheduleConfig
from sparsae.registry import RULES

KEEPING = [name for name in RULES.names() if RULES[name].settings().first_sparsity is None]
KINDS = {"bump": ScheduleConfig(kind="bump"), "restore": ScheduleConfig(kind="restore", factor=0.5)}
every_rule = pytest.mark.parametrize("name", KEEPING)
every_kind = pytest.mark.parametrize("kind", KINDS)
