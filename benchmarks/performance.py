"""Tables and plots of docs/performance.md from JSON files of measurements: `python benchmarks/performance.py`.

Reads docs/results/performance/*.json, of `sparsae bench` and of attention.py beside this, and what mlp.py measured;
writes each table between its markers on the page and each plot into docs/images; a file that is not there leaves them
as they are. `make performance` measures everything first, but for the MLPs.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from sparsae.bench import kernels, plots, roofline, step, topology
from sparsae.bench.rows import Column, Row, groups, markdown

DOCS = Path(__file__).parents[1] / "docs"
RESULTS, PAGE = DOCS / "results" / "performance", DOCS / "performance.md"
WHOLE = ("step", "decode", "update")
CASE = ("backend", "unit", "tokens", "dtype", "threads")


def by_sparsity(rows: Sequence[Row], which: str, key: str, form: str) -> str:
    """Geometric means over the layers of one pass: a line for each contender, a column for each sparsity."""
    means = [mean for mean in kernels.means(rows) if mean["pass"] == which]
    told = [name for name in CASE if name in ("backend", "unit") or len({mean[name] for mean in means}) > 1]
    sparsities = sorted({mean["sparsity"] for mean in means})
    lines: list[Row] = []
    for case, group in groups(means, told).items():
        cells = {mean["sparsity"]: mean.get(key) for mean in group}
        lines.append({**dict(zip(told, case, strict=True)), **{f"{s:g}": cells.get(s) for s in sparsities}})
    columns = [Column(name, name) for name in told]
    return markdown([*columns, *(Column(f"{100 * s:g} %", f"{s:g}", form) for s in sparsities)], lines)


def scaling(rows: Sequence[Row]) -> str:
    """The means of more threads than the fewest."""
    keys = ("backend", "unit", "sparsity", "threads", "pass", "ratio", "scaling", "dense's")
    columns = [column for column in kernels.MEANS if column.title in keys]
    return markdown(columns, [mean for mean in kernels.means(rows) if "scaling" in mean])


def attention(rows: Sequence[Row]) -> str:
    """A line for each shape, of its two passes: times as fast as torch's, GFLOP/s with backward."""
    lines = []
    for forward, both in zip(rows[::2], rows[1::2], strict=True):
        shared = f" ({both['groups']} of keys)" if both["groups"] < both["heads"] else ""
        shape = f"{both['batch']} x {both['heads']}{shared} x {both['tokens']:,} x {both['size']}"
        lines.append({**both, "shape": shape, "forward": forward["torch_cpu_ratio"]})
    columns = [
        Column("batch x heads x tokens x size", "shape"),
        Column("forward", "forward", ".2f"),
        Column("with backward", "torch_cpu_ratio", ".2f"),
        Column("GFLOP/s", "ours_gflops", ".0f"),
        Column("torch's", "torch_gflops", ".0f"),
        Column("kept probabilities", "kept_gflops", ".0f"),
    ]
    return markdown(columns, lines)


CASES_KEPT = ((False, 0.1), (False, 0.05), (True, 0.1), (True, 0.05))  # gated, density
# By whether the MLP is gated: how far a hidden layer rounded to bfloat16 puts gradients off, in terms of their norms,
# those of the input and of what leads to it at most, and those of what leads on. A test measures it.
OFF = {False: (0.0004, 0.0018), True: (0.0017, 0.0024)}
# bytes a token, layer and hidden feature of GPT-2's MLP and of a gated one, and what gradients are like
KEPT = {
    "nothing": (0, 0, "exact (the default)"),
    "bfloat16": (
        2,
        4,
        "off by {:g} (input, up) and {:g} (down) of their norms; gated {:g} and {:g}".format(*OFF[False], *OFF[True]),
    ),
    "float32": (4, 8, "the same bits as with `nothing`"),
}


def kept(rows: Sequence[Row]) -> str:
    """A line for each thing to keep of a hidden layer: times as fast as computing it again, MLPs 512 wide."""
    seconds = {
        (row["keeps"], row["gated"], row["density"]): row["cpu_seconds"]
        for row in rows
        if row["pass"] == kernels.BOTH and row["unit"] == "1x1" and row["width"] == 512
    }
    lines = []
    for keeps, (plain, gated, gradients) in KEPT.items():
        size = f"{plain} ({gated} where gated)" if plain else "0"
        line: Row = {"keeps": f"`{keeps}`", "bytes": size, "gradients": gradients}
        for case in CASES_KEPT:
            line[str(case)] = seconds["nothing", *case] / seconds[keeps, *case]
        lines.append(line)
    titles = [f"{'gated' if gated else 'GPT-2'}, {100 * (1 - density):.0f} %" for gated, density in CASES_KEPT]
    ratios = [Column(title, str(case), ".2f") for title, case in zip(titles, CASES_KEPT, strict=True)]
    first = [Column("`mlp_keeps`", "keeps"), Column("bytes a token, layer and hidden feature", "bytes")]
    return markdown([*first, *ratios, Column("gradients", "gradients")], lines)


# marker on the page: (file, from its rows to a table)
TABLES: dict[str, tuple[str, Callable[[Sequence[Row]], str]]] = {
    "roofline": ("roofline", lambda rows: markdown(roofline.COLUMNS, rows)),
    "both": ("kernels", lambda rows: by_sparsity(rows, kernels.BOTH, "ratio", ".2f")),
    "both-cpu": ("kernels", lambda rows: by_sparsity(rows, kernels.BOTH, "cpu_ratio", ".2f")),
    "forward": ("kernels", lambda rows: by_sparsity(rows, kernels.FORWARD, "ratio", ".2f")),
    "peak": ("kernels", lambda rows: by_sparsity(rows, kernels.BOTH, "peak_share", ".1%")),
    "threads": ("kernels-threads", scaling),
    "step": ("step", lambda rows: markdown(step.COLUMNS, rows)),
    "step-threads": ("step-threads", lambda rows: markdown(step.COLUMNS, rows)),
    "step-kept": ("step-kept", lambda rows: markdown(step.COLUMNS, rows)),
    "step-xeon": ("step-xeon", lambda rows: markdown(step.COLUMNS, [row for row in rows if row["what"] in WHOLE])),
    "attention": ("attention", attention),
    "kept": ("../kernels/mlp-avx512", kept),
    "topology": ("topology", lambda rows: markdown(topology.COLUMNS, rows)),
    "slopes": ("topology", lambda rows: markdown(topology.SLOPES, topology.slopes(rows))),
}


# file: how its rows are drawn
PLOTS = {"kernels": plots.kernels, "topology": plots.topology}


def filled(page: str, results: Path) -> str:
    """The page with the table of every file that is there. Raises KeyError where the page lacks a marker."""
    for marker, (name, table) in TABLES.items():
        begin, end = f"<!-- {marker} -->\n", f"<!-- end of {marker} -->"
        if begin not in page or end not in page:
            raise KeyError(marker)
        file = results / f"{name}.json"
        if file.is_file():
            text = begin + table(json.loads(file.read_text("utf-8"))) + "\n" + end
            page = re.sub(re.escape(begin) + r".*?" + re.escape(end), lambda _, text=text: text, page, flags=re.DOTALL)
    return page


def main() -> int:
    """Rewrite the page and its plots."""
    PAGE.write_text(filled(PAGE.read_text("utf-8"), RESULTS), "utf-8")
    for name, draw in PLOTS.items():
        file = RESULTS / f"{name}.json"
        if file.is_file():
            (DOCS / "images" / f"{name}.svg").write_text(draw(json.loads(file.read_text("utf-8"))), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
