"""The tables of docs/results/parameterization.md from files beside it: `python benchmarks/parameterization.py`.

With directories that `sparsae check coordinates --out` wrote, their slopes are summarized into coordinates.json first:
`python benchmarks/parameterization.py runs/uniform runs/erk runs/rigl runs/guided runs/sparsae`.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from sparsae.core.intervals import Interval, mean_interval
from sparsae.experiments.coordinates.slopes import TOLERANCE, slope
from sparsae.experiments.transfer.basins import Basin, Cell, Over, movement

DOCS = Path(__file__).parents[1] / "docs" / "results"
PAGE, RESULTS = DOCS / "parameterization.md", DOCS / "parameterization"
QUANTITIES = ("activation", "update", "gradient")
FEW, MANY = 0, 64  # least weights that an output sums
SIGNS = {"lowest": "≤ ", "highest": "≥ ", "divergence": "≥ ", None: ""}  # of an optimum at an edge
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


def coordinates(cases: Sequence[tuple[str, Row]], least: int, head: str, file: str = "coordinates.json") -> str:
    """Cells of width; a line a case (its label and what its summaries have) and quantity."""
    rows = _read(file)
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


def base() -> str:
    """What the combinations of settings led to at the base, the best in bold."""
    found = _read("base.json")
    losses = {
        (row["initial_scale"], row["embedding_multiplier"], row["learning_rate"]): row["validation_loss"]
        for row in found["rows"]
    }
    scales, multipliers, rates = (sorted(set(values)) for values in zip(*losses, strict=True))
    least = min(losses.values())
    lines = [
        [f"{scale:g}", f"{multiplier:g}", *(_bold(losses[scale, multiplier, r], least) for r in rates)]
        for scale in scales
        for multiplier in multipliers
    ]
    return _table(["initial scale", "embedding multiplier", *(f"{rate:.4f}" for rate in rates)], lines, 2)


def more() -> str:
    """The best of the rates that were tried with other combinations."""
    best: dict[tuple[float, ...], tuple[float, float]] = {}
    for row in _read("base-more.json")["rows"]:
        key = (row["initial_scale"], row["embedding_multiplier"], row["output_multiplier"])
        best[key] = min(best.get(key, (math.inf, 0.0)), (row["validation_loss"], row["learning_rate"]))
    lines = [
        [*(f"{value:g}" for value in key), f"{rate:.4f}", f"{loss:.3f}"] for key, (loss, rate) in sorted(best.items())
    ]
    return _table(["initial scale", "embedding multiplier", "output multiplier", "best rate", "loss"], lines, 3)


def _bold(loss: float, least: float) -> str:
    return f"**{loss:.3f}**" if loss == least else f"{loss:.3f}"


def movements(cases: Mapping[str, Sequence[tuple[str, str]]]) -> str:
    """The best rate at each width and sparsity, and the highest over the lowest: (file, parameterization) by name."""
    optima = {name: _basins_of(sources) for name, sources in cases.items()}
    cells = sorted({cell for found in optima.values() for cell in found})
    lines = [
        [f"{width}, {_sparsity(sparsity)}"]
        + [
            f"{SIGNS[at.edge]}{at.value:.4f} ({at.loss:.2f})" if (at := found.get((width, sparsity))) else "–"
            for found in optima.values()
        ]
        for width, sparsity in cells
    ]
    for over in get_args(Over):
        moved = [movement(found, over) for found in optima.values()]
        factors = ["–" if m is None else f"{'≥ ' if m.at_least else ''}{m.factor:.1f}" for m in moved]
        lines.append([f"highest over lowest, over {over}", *factors])
    return _table(["width, sparsity", *optima], lines, 1)


def _basins_of(sources: Sequence[tuple[str, str]]) -> dict[Cell, Basin]:
    return {
        (e["width"], e["sparsity"]): Basin(math.log2(e["optimum"]), e["loss"], e["edge"])
        for file, name in sources
        for e in _read(file)["optima"]
        if e["parameterization"] == name
    }


def basins(cases: Sequence[tuple[str, str, str]], head: str) -> str:
    """A line for each width and sparsity of each case (label, file, parameterization): what each rate led to.

    Mean losses over seeds and half widths of their 95 % intervals, the best in bold; the best rate with its own.
    """
    found: list[tuple[str, Row, dict[float, Interval]]] = []
    for label, file, name in cases:
        results = _read(file)
        for best in (entry for entry in results["optima"] if entry["parameterization"] == name):
            losses: dict[float, list[float]] = {}
            for row in results["rows"]:
                if all(row[key] == best[key] for key in ("parameterization", "width", "sparsity")):
                    losses.setdefault(row["learning_rate"], []).append(row["validation_loss"])
            found.append((label, best, {rate: mean_interval(of) for rate, of in losses.items()}))
    rates = sorted({rate for _, _, means in found for rate in means})
    lines = []
    for label, best, means in found:
        least = min(means, key=lambda rate: means[rate].mean)
        cells = [_mean(means[rate], bold=rate == least) if rate in means else "–" for rate in rates]
        lines.append([label, f"{best['width']}, {_sparsity(best['sparsity'])}", *cells, _optimum(best)])
    return _table([head, "width, sparsity", *(f"{rate:.4f}" for rate in rates), "best rate"], lines, 2)


def _sparsity(value: float) -> str:
    return f"{100 * value:g} %" if value else "dense"


def _mean(interval: Interval, bold: bool) -> str:
    mean = f"**{interval.mean:.3f}**" if bold else f"{interval.mean:.3f}"
    return mean if interval.high is None else f"{mean} ± {interval.high - interval.mean:.2f}"


def _optimum(best: Row) -> str:
    found = best["interval"]
    return f"{SIGNS[best['edge']]}{best['optimum']:.4f}" + (
        "" if found is None else f" [{found['low']:.4f}, {found['high']:.4f}]"
    )


def headline() -> str:
    """Losses at the dense base's rates, and the paired relative improvement by SµPar with its 95 % interval."""
    rows = _read("headline.json")["rows"]
    lines = []
    for sparsity, rate in sorted({(row["sparsity"], row["learning_rate"]) for row in rows}):
        mine = {name: _by_seed(rows, name, sparsity, rate) for name in ("sp", "mup", "supar")}
        losses = [_mean(mean_interval(list(of.values())), bold=False) for of in mine.values()]
        gains = [_gain(mine["supar"], mine[name]) for name in ("sp", "mup")]
        lines.append([_sparsity(sparsity), f"{rate:.4f}", *losses, *gains])
    return _table(["sparsity", "rate", "sp", "mup", "supar", "supar against sp", "against mup"], lines, 1)


def standard() -> str:
    """The same against SP with the usual initial values, at its own dense base's rates."""
    rows, usual = _read("headline.json")["rows"], _read("standard.json")["rows"]
    first = min(row["learning_rate"] for row in rows)
    lines = []
    for sparsity, rate in sorted({(row["sparsity"], row["learning_rate"]) for row in usual}):
        losses, ours = _by_seed(usual, "sp", sparsity, rate), _by_seed(rows, "supar", sparsity, first)
        cells = [_mean(mean_interval(list(of.values())), bold=False) for of in (losses, ours)]
        lines.append([_sparsity(sparsity), f"{rate:.4f}", *cells, _gain(ours, losses)])
    return _table(["sparsity", "rate of sp", "sp", f"supar at {first:.4f}", "supar against sp"], lines, 1)


def _by_seed(rows: Sequence[Row], name: str, sparsity: float, rate: float) -> dict[int, float]:
    wanted = {"parameterization": name, "sparsity": sparsity, "learning_rate": rate}
    return {row["seed"]: row["validation_loss"] for row in rows if wanted.items() <= row.items()}


def _gain(ours: Mapping[int, float], theirs: Mapping[int, float]) -> str:
    """How much lower our losses are, paired by seed."""
    gain = mean_interval([100 * (1 - ours[seed] / loss) for seed, loss in theirs.items()])
    assert gain.high is not None
    return _minus(f"{gain.mean:+.1f} ± {gain.high - gain.mean:.1f} %")


def _read(file: str) -> Any:
    return json.loads((RESULTS / file).read_text("utf-8"))


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
    moving = [(method, {**supar, "method": method}) for method in ("rigl", "sparsae-guided", "sparsae")]
    transfer = [("supar", "transfer.json", "supar"), ("sp", "sp-dense.json", "sp"), ("sp", "sp-wide.json", "sp")]
    transfer += [(name, "others.json", name) for name in ("sp", "mup")]
    # At the base's density µP and SµPar are the same.
    dense = ("transfer.json", "supar")
    sources = {
        "sp": [("sp-dense.json", "sp"), ("sp-wide.json", "sp"), ("others.json", "sp")],
        "mup": [dense, ("others.json", "mup")],
        "supar": [dense],
    }
    live = [("rigl", "moving-rigl.json", "supar")]
    for method, label in (("gmp", "gmp"), ("sparsae", "sparsae-guided, shifts")):
        live += [
            (label, f"moving-{method}.json", "supar"),
            ("the same, dynamic", f"moving-{method}.json", "supar-dynamic"),
        ]
    return {
        "base": base(),
        "more": more(),
        "all": coordinates(named, FEW, "parameterization"),
        "many": coordinates(budgets, MANY, "parameterization"),
        "moving": coordinates(moving, MANY, "method"),
        "transfer": basins(transfer, "parameterization"),
        "fine": basins([("supar", "fine.json", "supar")], "parameterization"),
        "movements": movements(sources),
        "headline": headline(),
        "standard": standard(),
        "moving-rates": basins(live, "method"),
        "default": basins(
            [("sparsae", "default.json", "supar"), ("sparsae, three seeds", "default-seeds.json", "supar")], "method"
        ),
        "untuned-scales": coordinates(named[-1:], FEW, "parameterization", "coordinates-untuned.json"),
        "untuned": basins([("supar", "untuned.json", "supar")], "parameterization"),
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
