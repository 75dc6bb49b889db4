"""How every figure looks, and how a matplotlib figure becomes SVG that belongs to the page.

Colours are drawn as stand-ins and written as CSS variables, so that one figure is legible on light and on dark paper;
text stays text, in the page's own typeface. No figure is larger than a few tens of kilobytes: curves are thinned and
maps are embedded as one small image. A panel can be drawn again, in colours of its own (see figure_files.py).
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final, final

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import Formatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from sparsae.report.readable import ticks

Array = NDArray[np.float64]

# By the CSS variable (style.css) that takes their place; the values only have to differ.
STAND_INS: Final = {
    "ink": "#010101",
    "muted": "#010102",
    "grid": "#010103",
    "paper": "#010104",
    "accent": "#010105",
    "warm": "#010106",
    # Of things compared with each other, in order.
    **{f"series{n}": f"#0102{n:02d}" for n in range(8)},
}
_PALETTE: ContextVar[Mapping[str, str]] = ContextVar("palette", default=STAND_INS)
_DRAWN: ContextVar[list[Panel] | None] = ContextVar("drawn", default=None)


@final
class _Colours(Mapping[str, str]):
    """Colours by name, stand-ins unless a figure is drawn in others."""

    def __getitem__(self, name: str) -> str:
        return _PALETTE.get()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(_PALETTE.get())

    def __len__(self) -> int:
        return len(_PALETTE.get())


COLOURS: Final = _Colours()
WIDTH: Final = 4.5  # inches; two such figures stand side by side on a desktop, one fills a phone
POINTS: Final = 400  # of a curve; more than a screen can show


@dataclass(frozen=True)
class Key:
    """An entry of a figure's legend; `mark` is "line", "dash", "dot", "band", or a character."""

    label: str
    colour: str
    mark: str = "line"


@dataclass(frozen=True)
class Panel:
    """One figure: its title, what it shows in words (for those who cannot see it), its SVG and its legend.

    `name` is unique on the page; `figure` draws it anew.
    """

    name: str
    title: str
    description: str
    svg: str
    keys: Sequence[Key]
    figure: Callable[[], Figure]


def panel(
    name: str,
    title: str,
    description: str,
    draw: Callable[[Figure], None],
    keys: Sequence[Key] = (),
    height: float = 2.5,
) -> Panel:
    """Draw on a new figure of `height` inches; `name` is unique on the page."""

    def drawn() -> Figure:
        figure = Figure(figsize=(WIDTH, height))
        draw(figure)
        return figure

    with looking(STAND_INS, name):
        made = Panel(name, title, description, _inline(drawn(), name), keys, drawn)
    if (all_of_them := _DRAWN.get()) is not None:
        all_of_them.append(made)
    return made


@contextmanager
def looking(palette: Mapping[str, str], name: str, **settings: Any) -> Iterator[None]:
    """Figures that are drawn and written inside have these colours; settings: matplotlib's, beside those of ours."""
    before = _PALETTE.set(palette)
    try:
        with rc_context({**_style(), "svg.hashsalt": name, **settings}):  # type: ignore[dict-item]
            yield
    finally:
        _PALETTE.reset(before)


@contextmanager
def collected() -> Iterator[list[Panel]]:
    """The panels that are made inside, whoever makes them."""
    panels: list[Panel] = []
    before = _DRAWN.set(panels)
    try:
        yield panels
    finally:
        _DRAWN.reset(before)


def axes(
    figure: Figure, unit: str, *, x: str = "step", left: float = 0.5, bottom: float = 0.42, right: float = 0.12
) -> Axes:
    """Axes for curves, margins in inches; `unit` of the y axis stands above it, where it reads without turning."""
    width, height = figure.get_size_inches()
    top = 0.24
    ax = figure.add_axes(
        (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
    )
    ax.set_title(unit, loc="left", x=(0.02 - left) / (width - left - right), pad=7)
    ax.set_xlabel(x)
    ax.grid(axis="y")
    numbered(ax.xaxis, 6)
    numbered(ax.yaxis, 5)
    return ax


def numbered(
    axis: Axis, most: int | None = None, *, signed: bool = False, percent: bool = False, linear: bool = True
) -> None:
    """Labels as people read them, at so many round numbers; most None: at those that there are.

    percent: of shares of one. linear: whether the axis is.
    """
    axis.set_major_formatter(_Ticks(signed, percent, linear))
    if most is not None:
        axis.set_major_locator(MaxNLocator(most, steps=[1, 2, 2.5, 5, 10]))


def logarithmic(axis: Axis) -> None:
    """Labels at 1, 2 and 5 of each power of ten, or, over more than two, at the powers; set once all is drawn."""
    low, high = axis.get_view_interval()
    subs = (1.0, 2.0, 5.0) if high <= 100 * low else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_minor_formatter(NullFormatter())
    numbered(axis, linear=False)


def thinned(x: Sequence[float], y: Sequence[float]) -> tuple[Array, Array]:
    """A curve as at most POINTS points, each the mean of as many neighbours; NaN where there is no number in them."""
    xs, ys = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    size = -(-len(xs) // POINTS)
    if size <= 1:
        return xs, ys
    starts = np.arange(0, len(xs), size)
    known = np.isfinite(ys)
    counts = np.add.reduceat(known.astype(np.float64), starts)
    sums = np.add.reduceat(np.where(known, ys, 0.0), starts)
    means = np.divide(sums, counts, out=np.full(len(starts), np.nan), where=counts > 0)
    return np.add.reduceat(xs, starts) / np.diff([*starts, len(xs)]), means


def curve(ax: Axes, x: Sequence[float], y: Sequence[float], colour: str, **options: Any) -> None:
    """A line; points are marked where they are few or have no neighbour to be joined to, so that each is seen."""
    xs, ys = thinned(x, y)
    known = np.isfinite(ys)
    joined = np.pad(known, 1)
    alone = known & ~joined[:-2] & ~joined[2:]
    marks: dict[str, Any] = {"marker": "o" if known.sum() <= 30 or alone.any() else None}
    if known.sum() > 30 and alone.any():
        marks["markevery"] = alone
    ax.plot(xs, ys, **{"color": COLOURS[colour], **marks, "markeredgewidth": 0.0, **options})


@final
class _Ticks(Formatter):
    """All labels of an axis at once, since how many digits one wants depends on the others."""

    def __init__(self, signed: bool, percent: bool, linear: bool) -> None:
        self._signed, self._percent, self._linear = signed, percent, linear

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        """See matplotlib's."""
        labels = ticks(
            [float(value) * (100.0 if self._percent else 1.0) for value in values],
            signed=self._signed,
            linear=self._linear,
        )
        return [f"{label}%" for label in labels] if self._percent else labels

    def __call__(self, x: float, pos: int | None = None) -> str:
        """See matplotlib's."""
        return self.format_ticks([x])[0]


def _style() -> dict[str, Any]:
    return {
        "svg.fonttype": "none",
        "text.usetex": False,
        "text.parse_math": False,
        "font.family": ["DejaVu Sans"],
        "font.size": 8.5,
        "text.color": COLOURS["muted"],
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "axes.edgecolor": COLOURS["muted"],
        "axes.linewidth": 0.7,
        "axes.labelcolor": COLOURS["muted"],
        "axes.labelsize": 8.5,
        "axes.titlesize": 8.5,
        "axes.titlecolor": COLOURS["muted"],
        "axes.grid": False,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "xtick.color": COLOURS["muted"],
        "ytick.color": COLOURS["muted"],
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "xtick.major.size": 3,
        "ytick.major.size": 0,
        "xtick.minor.size": 0,
        "ytick.minor.size": 0,
        "grid.color": COLOURS["grid"],
        "grid.linewidth": 0.7,
        "lines.linewidth": 1.5,
        "lines.markersize": 3,
        "image.interpolation": "none",
    }


def _inline(figure: Figure, name: str) -> str:
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    for pattern, replacement in (
        (r"<metadata>.*?</metadata>", ""),
        (r"<style.*?</style>", ""),
        (r"<defs>\s*</defs>", ""),
        (r"<!--.*?-->", ""),
        (r'\sxmlns(:\w+)?="[^"]*"', ""),
        (r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" focusable="false" aria-hidden="true">'),
        (r'<g id="[^"]*"', "<g"),
        (r'\bid="', f'id="{name}-'),
        (r"url\(#", f"url(#{name}-"),
        (r'xlink:href="#', f'href="#{name}-'),
        (r'xlink:href="', 'href="'),
        (r"base64,\s+", "base64,"),
        (r"font-family: [^;\"]*;? ?", ""),
        (r"font: ([\d.]+px)[^;\"]*", r"font-size: \1"),
        (r"\s*\n\s*", "\n"),
    ):
        svg = re.sub(pattern, replacement, svg, flags=re.DOTALL)
    for variable, stand_in in STAND_INS.items():
        svg = svg.replace(stand_in, f"var(--{variable})")
    return svg.strip()
