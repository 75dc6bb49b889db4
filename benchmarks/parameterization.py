"""The tables of docs/results/parameterization.md from files beside it: `python benchmarks/parameterization.py`.

With directories that `sparsae check coordinates --out` wrote, their slopes are summarized into coordinates.json first:
`python benchmarks/parameterization.py runs/uniform runs/erk runs/rigl runs/sparsae`.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsae.experiments.coordinates.slopes import TOLERANCE, slope
from sparsae.experiments.statistics import Interval, mean_interval

DOCS = Path(__file__).parents[1] / "docs" / "results"
PAGE, RESULTS = DOCS / "parameterization.md", DOCS / "parameterization"
QUANTITIES = ("activation", "update", "gradient")
FEW, MANY = 0, 64  # least weights that an output sums
Row = Mapping[str, Any]


def summaries(folder: Path) -> Iterator[dict[str, Any]]:
    """Of one check: the slopes over density at each width, over the sparsified GPT-2 layers and the steps.

    Under a rule that moves connections the dense model, which has no updates, is left out.
    """
    results = json.loads((folder / "coordinates.json").read_text("utf-8"))
    plan, static = results["plan"], results["plan"]["method"] == "static"
    rows = [r for r in results["rows"] if r["axis"] == "density" and r["layer"] not in ("embedding", "logits")]
    for name in plan["parameterizations"]:
        for quantity in QUANTITIES:
            for width in plan["widths"]:
                mine = [
                    r for r in rows if (r["parameterization"], r["quantity"], r["width"]) == (name, quantity, width)
                ]
                for least in (FEW, MANY):
                    fitted = [_slope(row, least, static) for row in mine]
                    found = [value for value in fitted if value is not None]
                    if found:
                        yield {
                            "method": plan["method"],
                            "budget": plan["settings"].get("sparsity", {}).get("budget", "erk"),
                            "parameterization": name,
                            "quantity": quantity,
                            "width": width,
                            "least_fan_in": least,
                            "slopes": len(found),
                            "smallest": min(found),
                            "median": statistics.median(found),
                            "largest": max(found),
                            "share_within": sum(abs(value) <= TOLERANCE for value in found) / len(found),
                        }


def _slope(row: Row, least: int, static: bool) -> float | None:
    """None where fewer than three densities are left."""
    inputs = row["width"] * (4 if row["layer"].endswith("mlp.c_proj") else 1)
    kept = [p for p in row["points"] if p["density"] * inputs >= least and (static or p["sparsity"] > 0)]
    return slope((p["density"], p["scale"]) for p in kept) if len(kept) > 2 else None


def coordinates(cases: Sequence[tuple[str, Row]], least: int, head: str) -> str:
    """Cells of width; a line a case (its label and what its summaries have) and quantity."""
    rows = json.loads((RESULTS / "coordinates.json").read_text("utf-8"))
    chosen = [
        (label, [r for r in rows if r["least_fan_in"] == least and case.items() <= r.items()]) for label, case in cases
    ]
    widths = sorted({row["width"] for _, mine in chosen for row in mine})
    lines = [[label, quantity] for label, _ in cases for quantity in QUANTITIES]
    for line, (mine, quantity) in zip(lines, [(m, q) for _, m in chosen for q in QUANTITIES], strict=True):
        cells = {row["width"]: row for row in mine if row["quantity"] == quantity}
        line += [_cell(cells[width]) if width in cells else "–" for width in widths]
    return _table([head, "scale of", *(f"width {width:,}" for width in widths)], lines, 2)


def _cell(row: Row) -> str:
    return _minus(f"{row['share_within']:.0%} [{row['smallest']:+.2f}, {row['largest']:+.2f}]".replace("%", " %"))


def optima() -> str:
    """The best learning rates of the transfer, and how far they move."""
    found = json.loads((RESULTS / "transfer.json").read_text("utf-8"))
    names = ["sp", "mup", "supar"]
    cells = {(e["width"], e["sparsity"], e["parameterization"]): e for e in found["optima"]}
    sign = {"lowest": "≤ ", "highest": "≥ ", None: ""}
    lines = []
    for width, sparsity in dict.fromkeys((width, sparsity) for width, sparsity, _ in cells):
        mine = [cells[width, sparsity, name] for name in names]
        where = f"width {width}, {f'{100 * sparsity:g} %' if sparsity else 'dense'}"
        lines.append([where, *(f"{sign[e['edge']]}{e['optimum']:.2g} ({e['loss']:.2f})" for e in mine)])
    for over in ("sparsity", "width"):
        moved = {e["parameterization"]: e for e in found["movements"] if e["over"] == over}
        factors = [f"{'≥ ' if moved[name]['at_least'] else ''}{moved[name]['factor']:.1f}" for name in names]
        lines.append([f"highest over lowest, over {over}", *factors])
    return _table(["", *names], lines, 1)


def basins(cases: Sequence[tuple[str, str, str]], head: str) -> str:
    """A line for each width and sparsity of each case (label, file, parameterization): what each rate led to.

    Mean losses over seeds and half widths of their 95 % intervals, the best in bold; the best rate with its own.
    """
    lines: list[list[str]] = []
    rates: list[float] = []
    for label, file, name in cases:
        found = json.loads((RESULTS / file).read_text("utf-8"))
        losses: dict[tuple[int, float], dict[float, list[float]]] = {}
        for row in found["rows"]:
            if row["parameterization"] == name:
                at = losses.setdefault((row["width"], row["sparsity"]), {})
                at.setdefault(row["learning_rate"], []).append(row["validation_loss"])
        rates = rates or sorted(next(iter(losses.values())))
        best = {(e["width"], e["sparsity"]): e for e in found["optima"] if e["parameterization"] == name}
        for (width, sparsity), at in losses.items():
            where = f"{width}, {f'{100 * sparsity:g} %' if sparsity else 'dense'}"
            means = {rate: mean_interval(at[rate]) for rate in rates}
            least = min(means, key=lambda rate: means[rate].mean)
            cells = [_mean(means[rate], bold=rate == least) for rate in rates]
            lines.append([label, where, *cells, _optimum(best[width, sparsity])])
    return _table([head, "width, sparsity", *(f"{rate:.4f}" for rate in rates), "best rate"], lines, 2)


def _mean(interval: Interval, bold: bool) -> str:
    mean = f"**{interval.mean:.3f}**" if bold else f"{interval.mean:.3f}"
    return mean if interval.high is None else f"{mean} ± {interval.high - interval.mean:.2f}"


def _optimum(best: Row) -> str:
    sign = {"lowest": "≤ ", "highest": "≥ ", None: ""}[best["edge"]]
    found = best["interval"]
    return f"{sign}{best['optimum']:.4f}" + ("" if found is None else f" [{found['low']:.4f}, {found['high']:.4f}]")


def tuned() -> str:
    """Losses at the dense base's rates, and the paired relative improvement by SµPar with its 95 % interval."""
    losses: dict[tuple[float, float, str], dict[int, float]] = {}
    for row in json.loads((RESULTS / "tuned.json").read_text("utf-8"))["rows"]:
        key = (row["sparsity"], row["learning_rate"], row["parameterization"])
        losses.setdefault(key, {})[row["seed"]] = row["validation_loss"]
    lines = []
    for sparsity, rate in sorted({key[:2] for key in losses}):
        mine = {name: losses[sparsity, rate, name] for name in ("sp", "mup", "supar")}
        line = [
            f"{100 * sparsity:g} %",
            f"{rate:.4f}",
            *(f"{statistics.mean(of.values()):.4f}" for of in mine.values()),
        ]
        for name in ("sp", "mup"):
            gain = mean_interval([100 * (1 - mine["supar"][seed] / loss) for seed, loss in mine[name].items()])
            assert gain.high is not None
            line.append(_minus(f"{gain.mean:+.1f} ± {gain.high - gain.mean:.1f} %"))
        lines.append(line)
    return _table(["sparsity", "rate", "sp", "mup", "supar", "supar against sp", "against mup"], lines, 1)


def _table(head: Sequence[str], lines: Sequence[Sequence[str]], names: int) -> str:
    rule = ["---"] * names + ["---:"] * (len(head) - names)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *lines))


def _minus(text: str) -> str:
    return text.replace("-", "−")


def tables() -> dict[str, str]:
    """The tables of the page by their markers."""
    uniform = {"method": "static", "budget": "uniform"}
    named = [(name, {**uniform, "parameterization": name}) for name in ("sp", "mup", "supar")]
    supar = {"parameterization": "supar"}
    budgets = [(f"supar, {b}", {**supar, "method": "static", "budget": b}) for b in ("uniform", "erk")]
    shifts = [("sparsae, shifts", "supar"), ("the same, dynamic", "supar-dynamic")]
    live = [("rigl", "moving-rigl.json", "supar"), *((label, "moving-sparsae.json", name) for label, name in shifts)]
    moving = [(method, {**supar, "method": method}) for method in ("rigl", "sparsae")]
    return {
        "all": coordinates(named, FEW, "parameterization"),
        "many": coordinates(budgets, MANY, "parameterization"),
        "moving": coordinates(moving, MANY, "method"),
        "optima": optima(),
        "tuned": tuned(),
        "seeds": basins([("supar", "seeds.json", "supar")], "parameterization"),
        "moving-rates": basins(live, "method"),
    }


def main(folders: Sequence[str]) -> int:
    """Summarize the checks in `folders`, if any, and rewrite the page's tables."""
    if folders:
        found = [summary for folder in folders for summary in summaries(Path(folder))]
        (RESULTS / "coordinates.json").write_text(json.dumps(found, indent=0) + "\n", "utf-8")
    page = PAGE.read_text("utf-8")
    for marker, table in tables().items():
        begin, end = f"<!-- {marker} -->\n", f"\n<!-- end of {marker} -->"
        if begin not in page or end not in page:
            raise KeyError(marker)
        page = re.sub(
            re.escape(begin) + r".*?" + re.escape(end), lambda _, t=begin + table + end: t, page, flags=re.DOTALL
        )
    PAGE.write_text(page, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
