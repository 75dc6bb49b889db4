"""Pieces of the page: whatever is text is escaped here, so that nothing in a run can become markup."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from sparsae.report.svg import Key, Panel


@dataclass(frozen=True)
class Tile:
    """A headline number, what it is and what to hold it against."""

    label: str
    value: str
    notes: Sequence[str] = ()


def section(name: str, title: str, lead: str, *blocks: str) -> str:
    """A section with its heading, a sentence on how to read it (or none), and blocks; nothing without a block."""
    if not any(blocks):
        return ""
    how = f'<p class="lead">{escape(lead)}</p>\n' if lead else ""
    return (
        f'<section id="{escape(name)}" aria-labelledby="{escape(name)}-title">\n'
        f'<h2 id="{escape(name)}-title">{escape(title)}</h2>\n{how}'
        + "\n".join(block for block in blocks if block)
        + "\n</section>"
    )


def figures(panels: Iterable[Panel | None]) -> str:
    """The figures that there are, side by side where there is room; nothing where there are none."""
    there = [figure(panel) for panel in panels if panel is not None]
    if not there:
        return ""
    return f'<div class="figures">\n{"".join(there)}</div>'


def figure(panel: Panel) -> str:
    """One figure with its title and legend; its description stands in for it where it cannot be seen."""
    keys = "".join(f"<li>{_swatch(key)}{escape(key.label)}</li>" for key in panel.keys)
    legend = f'<ul class="keys">{keys}</ul>' if keys else ""
    return (
        f"<figure>\n<figcaption>{escape(panel.title)}</figcaption>{legend}\n"
        f'<div class="plot" role="img" aria-label="{escape(panel.description)}">\n{panel.svg}\n</div>\n</figure>\n'
    )


def tiles(entries: Iterable[Tile]) -> str:
    """The headline numbers."""
    return '<dl class="tiles">\n' + "\n".join(_tile(tile) for tile in entries) + "\n</dl>"


def facts(entries: Sequence[tuple[str, str]]) -> str:
    """Small facts in a row; nothing where there are none."""
    if not entries:
        return ""
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in entries)
    return f'<dl class="facts">{items}</dl>'


def notes(entries: Sequence[str]) -> str:
    """A list of remarks; nothing where there are none."""
    if not entries:
        return ""
    return '<ul class="notes">' + "".join(f"<li>{escape(entry)}</li>" for entry in entries) + "</ul>"


def table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column names the rows and whose others are numbers."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "\n".join(
        f'<tr><th scope="row">{escape(row[0])}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll" role="region" aria-label="{escape(caption)}" tabindex="0"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def paragraph(text: str) -> str:
    """Plain text."""
    return f"<p>{escape(text)}</p>"


def _tile(tile: Tile) -> str:
    notes = "".join(f'<dd class="note">{escape(note)}</dd>' for note in tile.notes)
    return f"<div><dt>{escape(tile.label)}</dt><dd>{escape(tile.value)}</dd>{notes}</div>"


def _swatch(key: Key) -> str:
    style = f'style="color: var(--{escape(key.colour)})" aria-hidden="true"'
    if key.mark in {"line", "dash", "dot", "band"}:
        return f'<i class="{key.mark}" {style}></i>'
    return f'<i class="mark" {style}>{escape(key.mark)}</i>'
