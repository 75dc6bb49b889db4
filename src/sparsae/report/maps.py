"""Heatmaps of layers, and of attention heads, through time: what was in force at each step, one row a layer or head."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from sparsae.report.data import Layer, RunData, Topology
from sparsae.report.readable import compact, percent, short_names, tick
from sparsae.report.svg import Array, Panel, panel

_COLUMNS: Final = 160
_LABELS: Final = 48  # rows that still have a name each
# Orange for less, blue for more, and the paper itself for no change: legible on light and dark.
_CHANGE: Final = LinearSegmentedColormap.from_list(
    "change", [(0.84, 0.42, 0.0, 1.0), (0.84, 0.42, 0.0, 0.0), (0.13, 0.5, 0.8, 0.0), (0.13, 0.5, 0.8, 1.0)]
)
