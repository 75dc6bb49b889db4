"""The page and the table of an essential-sparsity curve."""

from __future__ import annotations

import math
from html import escape
from pathlib import Path

from matplotlib.figure import Figure

from sparsae import __version__
from sparsae.core.record import encode
from sparsae.evaluate.essential import ALLOCATIONS, Essential
from sparsae.files import to_json, write_atomically
from sparsae.report import markup
from sparsae.report.page import document
from sparsae.report.readable import compact, count, decimal, percent
from sparsae.report.svg import COLOURS, Key, Panel, axes, curve, numbered, panel
from sparsae.report.tables import Table

_LOOKS = {"uniform": Key("uniform over layers", "accent"), "global": Key("global", "warm", "dash")}


def write_essential(directory: Path, found: Essential) -> None:
    """Write sparsity.json and report.html into a new directory. OSError where that cannot be made."""
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / "sparsity.json", to_json(encode(found), indent=2) + "\n")
    write_atomically(directory / "report.html", document(f"Essential sparsity · {found.model}", body(found)))


def essential_table(found: Essential) -> Table:
    """Loss at each sparsity, by allocation."""
    rows = [
        [row.allocation, percent(row.sparsity, 4), f"{row.loss:.4f}", decimal(row.perplexity), _rise(row.loss, found)]
        for row in found.rows
    ]
    heading = (
        f"{found.model} pruned in one shot ({count(found.layers)} layers, {percent(found.own_sparsity, 4)} zero "
        f"before, loss {found.unpruned_loss:.4f}), on {count(found.tokens)} tokens of {found.data}"
    )
    return Table(heading, ["allocation", "sparsity", "loss", "perplexity", "against unpruned"], rows, 1)


def verdict(found: Essential) -> str:
    """What the curve says, with its rule."""
    said = " and ".join(f"{percent(value, 4)} ({name})" for name, value in found.essential.items())
    ends = [max(row.sparsity for row in found.rows if row.allocation == name) for name in found.essential]
    if list(found.essential.values()) == ends:
        return (
            f"Essential sparsity: at least {said}: at no measured sparsity is the loss more than "
            f"{percent(found.tolerance)} above that of the unpruned model."
        )
    return (
        f"Essential sparsity: {said}, the largest measured sparsity before the loss is more than "
        f"{percent(found.tolerance)} above that of the unpruned model."
    )


def remark(found: Essential) -> str | None:
    """What was asked for and is not in the table; None where there is nothing."""
    if not found.left_out:
        return None
    shares = ", ".join(percent(share, 4) for share in found.left_out)
    return f"Left out: {shares}, since {percent(found.own_sparsity, 4)} are zero before any pruning."


def body(found: Essential) -> str:
    """The page, but for its frame."""
    table = essential_table(found)
    lead = (
        "The smallest weights become zero, once, without any training afterwards: the same share of every layer, or "
        "the smallest of all layers together. The dotted line is the loss up to which pruning is said to be free."
    )
    return "\n".join(
        [
            "<header>\n<h1>Essential sparsity</h1>",
            f'<p class="lead">{escape(found.model)}, on {escape(found.data)}</p>\n</header>\n<main>',
            markup.paragraph(verdict(found)),
            markup.section(
                "curve",
                "Loss against sparsity",
                lead,
                markup.figures([essential_curve(found), essential_curve(found, near=True)]),
                markup.table(table.title, table.columns, table.rows),
                markup.notes([line] if (line := remark(found)) else []),
            ),
            f"</main>\n<footer>Written by sparsae {escape(__version__)} from its own measurements.</footer>",
        ]
    )


def essential_curve(found: Essential, near: bool = False) -> Panel | None:
    """Loss against sparsity; near: where it is at most a tenth above the unpruned model's."""
    limit = found.unpruned_loss * (1 + found.tolerance)
    highest = found.unpruned_loss * (1 + max(0.1, 3 * found.tolerance)) if near else math.inf
    lines = {
        name: [
            (found.own_sparsity, found.unpruned_loss),
            *((row.sparsity, row.loss) for row in found.rows if row.allocation == name),
        ]
        for name in ALLOCATIONS
    }
    # One point more, so that the line leaves the picture.
    shown = {name: points[: 1 + sum(loss <= highest for _, loss in points)] for name, points in lines.items()}
    if near and shown == lines:
        return None

    def draw(figure: Figure) -> None:
        ax = axes(figure, "nats per token", x="sparsity")
        for name, points in shown.items():
            key = _LOOKS[name]
            xs, ys = zip(*points, strict=True)
            curve(ax, xs, ys, key.colour, linestyle="--" if key.mark == "dash" else "-")
        ax.axhline(limit, color=COLOURS["ink"], linewidth=0.8, linestyle=":")
        numbered(ax.xaxis, percent=True)
        if near:
            ax.set_ylim(min(loss for points in lines.values() for _, loss in points), highest)

    text = "; ".join(
        f"{_LOOKS[name].label} " + ", ".join(f"{compact(y)} at {percent(x)}" for x, y in points)
        for name, points in shown.items()
    )
    title = "Where it bends" if near else "Loss of the pruned model"
    return panel(f"essential{'-near' if near else ''}", title, f"{title}: {text}.", draw, list(_LOOKS.values()), 3.0)


def _rise(loss: float, found: Essential) -> str:
    rise = round((loss / found.unpruned_loss - 1) * 100, 2) + 0.0  # a zero has no minus
    return f"{rise:+.2f} %".replace("-", "−")
