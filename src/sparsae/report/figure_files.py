"""The figures of a page as files for papers and slides: SVG and PDF, on white paper, each with its legend."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Final

from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from sparsae.files import named, temporary_name
from sparsae.report.svg import COLOURS, STAND_INS, Key, Panel, looking

_DASHES: Final = {"line": "-", "dash": "--", "dot": ":"}
# Letters of the PDF stay letters, which can be searched and copied.
_SETTINGS: Final = {"pdf.fonttype": 42}


def write_figures(directory: Path, panels: Iterable[Panel]) -> list[Path]:
    """Write NAME.svg and NAME.pdf of each panel, over older ones; returns their paths.

    The same panels are the same files, byte for byte. OSError where they cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    palette, written = _light(), []
    for panel in panels:
        with looking(palette, panel.name, **_SETTINGS):
            figure = panel.figure()
            _add_legend(figure, panel)
            for path, content in {
                directory / f"{panel.name}.svg": _svg(figure, panel),
                directory / f"{panel.name}.pdf": _pdf(figure, panel),
            }.items():
                _write(path, content)
                written.append(path)
    return written


def _light() -> dict[str, str]:
    """The page's colours on light paper, by their names in style.css, the first of which are these."""
    style = resources.files("sparsae.report").joinpath("style.css").read_text(encoding="utf-8")
    first = style.partition("}")[0]
    found = dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", first))
    return {name: found[name] for name in STAND_INS}


def _add_legend(figure: Figure, panel: Panel) -> None:
    """Above the figure, where the page has it too."""
    if panel.keys:
        figure.legend(
            handles=[_handle(key) for key in panel.keys],
            labels=[key.label if key.mark in (*_DASHES, "band") else f"{key.mark} {key.label}" for key in panel.keys],
            labelcolor=[
                COLOURS["ink"] if key.mark in (*_DASHES, "band") else COLOURS[key.colour] for key in panel.keys
            ],
            loc="lower left",
            bbox_to_anchor=(0.0, 1.0),
            ncols=min(4, len(panel.keys)),
            frameon=False,
            handlelength=1.4,
        )


def _handle(key: Key) -> Line2D | Patch:
    if key.mark in _DASHES:
        return Line2D([], [], color=COLOURS[key.colour], linestyle=_DASHES[key.mark])  # type: ignore[arg-type]
    if key.mark == "band":
        return Patch(facecolor=COLOURS[key.colour], alpha=0.3, linewidth=0)
    return Line2D([], [], linestyle="none")


def _svg(figure: Figure, panel: Panel) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasSVG(figure).print_figure(
        buffer,
        format="svg",
        bbox_inches="tight",
        metadata={"Date": None, "Title": panel.title, "Description": panel.description},
    )
    return buffer.getvalue()


def _pdf(figure: Figure, panel: Panel) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasPdf(figure).print_figure(
        buffer,
        format="pdf",
        bbox_inches="tight",
        metadata={"CreationDate": None, "Title": panel.title, "Subject": panel.description},
    )
    return buffer.getvalue()


def _write(path: Path, content: bytes) -> None:
    temporary = temporary_name(path)
    with named(path):
        try:
            temporary.write_bytes(content)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
