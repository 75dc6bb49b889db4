"""The planned contrasts that the results page and the README tell, made again from the rows that are kept."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from sparsae.experiments.statistics import Difference, holm, paired_difference

ROOT = Path(__file__).parents[2]
PAGE, ROWS = ROOT / "docs" / "results" / "books-2m.md", ROOT / "docs" / "results" / "books-2m"
# RigL at the rate that was best for it, and everything else, by the file that has it.
FILES = {
    "rigl": ("rates-0.0075", "tuned-95", "tuned-90", "tuned-90-2", "six-95", "six-90"),
    "static": ("results", "six-95", "six-90"),
    "sparsae": ("results", "six-95", "six-90"),
    "set": ("results", "set-95", "set-90"),
}
PLANNED = [("sparsae", "rigl"), ("sparsae", "static")]
CONTRASTS = [*PLANNED, ("rigl", "static"), ("sparsae", "set"), ("set", "static")]


def between(one: dict[int, float], other: dict[int, float]) -> Difference:
    """The paired difference over the seeds that both have."""
    found = paired_difference(one, other)
    assert found is not None
    return found


def losses(method: str, sparsity: float) -> dict[int, float]:
    """Test losses by seed."""
    rows = [row for name in FILES[method] for row in json.loads((ROWS / f"{name}.json").read_text())["rows"]]
    found = [(row["seed"], row["test_loss"]) for row in rows if (row["method"], row["sparsity"]) == (method, sparsity)]
    assert len(found) == len(dict(found)) == 6
    return dict(found)


def of_bytes(*files: tuple[int, str]) -> dict[int, float]:
    """Test losses by seed, of the variant in each file."""
    folder = ROOT / "docs" / "results" / "bytes"
    rows = [
        row
        for number, name in files
        for row in json.loads((folder / f"results-{number}.json").read_text())["rows"]
        if row["method"] == name
    ]
    assert len({row["seed"] for row in rows}) == len(rows) == 6
    return {row["seed"]: row["test_loss"] for row in rows}


def test_the_table_of_a_less_wide_model_is_that_of_its_rows() -> None:
    wide = of_bytes((7, "sparsae-0.016-4"), (8, "sparsae"), (9, "sparsae"))
    narrow = of_bytes((1, "dense-small-8"), (3, "dense-small-8"), (12, "dense-small"), (13, "dense-small"))
    found = between(wide, narrow)
    lower = of_bytes((14, "sparsae"), (15, "sparsae"))
    page = (ROOT / "docs" / "results" / "bytes.md").read_text("utf-8").replace("−", "-")
    for name, losses in (
        ("`sparsae`, 160 wide, 83 %", wide),
        ("`dense-small`, 72 wide", narrow),
        ("`sparsae`, half the rate", lower),
    ):
        spread = (mean(losses.values()), stdev(losses.values()))
        row = " | ".join(f"{value:.3f}" for value in (*(losses[seed] for seed in range(6)), *spread))
        assert f"| {name} | {row} |" in page
    for name, each in (("difference", wide), ("its difference", lower)):
        apart = between(each, narrow)
        pairs = " | ".join(f"{each[seed] - narrow[seed]:+.3f}" for seed in range(6))
        assert f"| {name} | {pairs} | {told(apart).replace('−', '-')} | |" in page
    assert f"level with it ({told(found).lstrip('−')} below it, six seeds)" in (ROOT / "README.md").read_text("utf-8")


def test_a_static_topology_of_that_width_is_told_as_it_was() -> None:
    folder = ROOT / "docs" / "results" / "bytes"
    rows = [row for n in (15, 16) for row in json.loads((folder / f"results-{n}.json").read_text())["rows"]]
    found = {(row["method"], row["seed"]): row["test_loss"] for row in rows}
    static, above = zip(*((found["static", n], found["static", n] - found["sparsae", n]) for n in (0, 1)), strict=True)
    told = "ends at {:.3f} and {:.3f} (seeds 0 and 1), {:.3f} and {:.3f} above `sparsae`".format(*static, *above)
    assert told in (folder.parent / "bytes.md").read_text("utf-8")


def test_bytes_after_four_times_the_training_are_told_as_they_were() -> None:
    folder = ROOT / "docs" / "results" / "bytes"

    def row_of(number: int, method: str, seed: int = 0) -> dict[str, Any]:
        rows = json.loads((folder / f"results-{number}.json").read_text())["rows"]
        return next(row for row in rows if (row["method"], row["seed"]) == (method, seed))

    wide, narrow = row_of(17, "sparsae"), row_of(4, "dense-small-8")
    assert wide["budget"] == narrow["budget"]
    page = " ".join((folder.parent / "bytes.md").read_text("utf-8").split())
    shorter = row_of(1, "dense-small-8")["test_loss"] - row_of(15, "sparsae")["test_loss"]
    assert f"which was {shorter:.3f} below the narrow dense model with this seed" in page
    assert f"ends at {wide['test_loss']:.3f} after as many FLOPs ({wide['steps']:,} steps)" in page
    assert f"{abs(wide['test_loss'] - narrow['test_loss']):.3f} between them" in page


def test_runs_at_98_percent_are_told_as_they_were() -> None:
    found: dict[str, dict[int, float]] = {}
    for row in json.loads((ROWS / "six-98.json").read_text())["rows"]:
        found.setdefault(row["method"], {})[row["seed"]] = row["test_loss"]
    page = PAGE.read_text("utf-8").split("## At 98 %")[1].split("\n## ")[0].replace("**", "", 2)
    for one, other in (("sparsae", "rigl"), ("sparsae", "static"), ("rigl", "static")):
        line = f"| `{one}` less `{other}` | {cells_of(found[one], found[other])} |"
        assert line in page
        difference = between(found[one], found[other])
        assert difference.p is not None
        p = page.split(line)[1].split("|")[0].strip()
        assert float(p) == round(difference.p, len(p) - 2)
    means = (f"{mean(found[method].values()):.3f}" for method in ("sparsae", "static", "rigl"))
    assert "Means are {} (`sparsae`), {} (`static`) and {} (`rigl`)".format(*means) in page
    below = cells_of(found["sparsae"], found["rigl"]).split(" |")[0].removeprefix("−")
    assert f"at 98 % {below} below RigL, and level" in (ROOT / "README.md").read_text("utf-8")


def test_longer_runs_are_told_as_they_were() -> None:
    rows = {
        (row["seed"], row["tokens"] > 20e6, row["method"]): row["test_loss"]
        for name in ("results", "longer-95")
        for row in json.loads((ROWS / f"{name}.json").read_text())["rows"]
        if row["sparsity"] == 0.95
    }
    page = PAGE.read_text("utf-8").replace("−", "-").replace("*", "")
    for seed in range(3):
        for longer in (False, True):
            static, moved = (rows[seed, longer, method] for method in ("static", "sparsae"))
            tokens = "28.1M" if longer else "5.1M"
            assert f"| {seed} | {tokens} | {static:.3f} | {moved:.3f} | {moved - static:+.3f} |" in page
    length = {
        longer: [{s: rows[s, longer, m] for s in range(3)} for m in ("sparsae", "static")] for longer in (False, True)
    }
    shorter, found = (between(*length[longer]) for longer in (False, True))
    assert found.p is not None
    below = told(found).lstrip("−")
    assert f"every seed again, by {below} in the mean (p = {found.p:.2f})" in page
    assert f"it was {told(shorter).lstrip('−')} with the same seeds after 5.1 million tokens" in page
    assert f"still {below} below a static\n  topology" in (ROOT / "README.md").read_text("utf-8")


def test_rigl_in_longer_runs_is_told_as_it_was() -> None:
    longer = {
        (row["method"], row["seed"]): row["test_loss"]
        for name in ("longer-95", "longer-rigl", "longer-rigl-2")
        for row in json.loads((ROWS / f"{name}.json").read_text())["rows"]
    }
    page, found = PAGE.read_text("utf-8").replace("−", "-").replace("*", ""), list[Difference]()
    for tokens in ("5.1M", "28.0M"):
        of = {method: losses(method, 0.95) for method in ("rigl", "static", "sparsae")}
        of = {m: {s: each[s] if tokens == "5.1M" else longer[m, s] for s in range(3)} for m, each in of.items()}
        for seed in range(3):
            rigl, behind = of["rigl"][seed], of["rigl"][seed] - of["static"][seed]
            less = of["sparsae"][seed] - rigl
            assert f"| {seed} | {tokens} | {rigl:.3f} | {less:+.3f} | {behind:+.3f} |" in page
        found += [between(of["sparsae"], of["rigl"]), between(of["rigl"], of["static"])]
    shorter, _, below, level = found
    assert below.p is not None
    words = " ".join(page.split())
    assert f"by {told(below).lstrip('−')} in the mean, which does not exclude zero (p = {below.p:.2f})" in words
    assert f"where it was {told(shorter).lstrip('−')} with the same seeds" in words
    assert f"level with it or ahead ({told(level).replace('−', '-')})" in words
    rows = json.loads((ROWS / "longer-rates.json").read_text())["rows"]
    moved, static = (next(row["test_loss"] for row in rows if row["method"] == m) for m in ("sparsae", "static"))
    assert f"ends at {moved:.3f} (seed 0), {moved - longer['sparsae', 0]:.3f} above itself at 0.015" in page
    assert f"at {static:.3f}, {longer['static', 0] - static:.3f} below itself" in page
    gains = (f"{static - longer['sparsae', 0]:.3f}", f"{longer['static', 0] - longer['sparsae', 0]:.3f}")
    assert "is {} below `static` with that seed in place of {}".format(*gains) in page
    assert f"and RigL {static - longer['rigl', 0]:.3f} below it" in page
    readme = " ".join((ROOT / "README.md").read_text("utf-8").split())
    assert f"and only {told(below).lstrip('−')} below RigL (three seeds), which catches up" in readme


def difference(method: str, reference: str, sparsity: float) -> Difference:
    return between(losses(method, sparsity), losses(reference, sparsity))


def told(found: Difference) -> str:
    interval = found.interval
    assert interval.low is not None
    assert interval.high is not None
    sign = "−" if interval.mean < 0 else "+"
    return f"{sign}{abs(interval.mean):.3f} ± {(interval.high - interval.low) / 2:.3f}"


def test_the_table_of_planned_contrasts_is_that_of_its_rows() -> None:
    section = PAGE.read_text("utf-8").split("## Planned contrasts, six seeds")[1].split("\n## ")[0]
    lines = [line.replace("*", "").replace("`", "") for line in section.splitlines()]
    for method, reference in CONTRASTS:
        (line,) = [line for line in lines if line.startswith(f"| {method} less {reference} |")]
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        for sparsity, (shown, seeds, p) in zip((0.95, 0.9), (cells[1:4], cells[4:7]), strict=True):
            found = difference(method, reference, sparsity)
            ours, theirs = losses(method, sparsity), losses(reference, sparsity)
            assert shown == told(found)
            assert [float(s.replace("−", "-")) for s in seeds.split(", ")] == [
                round(ours[seed] - theirs[seed], 3) for seed in range(6)
            ]
            assert found.p is not None
            assert float(p) == round(found.p, len(p) - 2)


def test_what_is_said_of_them_holds() -> None:
    planned = [(a, b, sparsity) for a, b in PLANNED for sparsity in (0.95, 0.9)]
    found = [difference(*contrast) for contrast in planned]
    assert all(one.interval.high is not None and one.interval.high < 0 for one in found)
    p_values = holm([one.p for one in found if one.p is not None])
    assert len(p_values) == 4
    assert round(max(p_values), 3) == 0.018
    pairs = [losses(a, s)[seed] - losses(b, s)[seed] for a, b, s in planned for seed in range(6)]
    assert sum(pair < 0 for pair in pairs) == 23
    readme = re.sub(r"\s+", " ", (ROOT / "README.md").read_text("utf-8"))
    (rigl_95, rigl_90, static_95, static_90) = (told(one).lstrip("−") for one in found)
    assert f"{rigl_95} below RigL and {static_95} below a static topology at 95 %" in readme
    assert f"{rigl_90} and {static_90} at 90 % (23 of 24 pairs)" in readme
    set_95, set_90 = (told(difference("sparsae", "set", sparsity)).lstrip("−") for sparsity in (0.95, 0.9))
    assert (
        f"not shown to be better than SET, which it extends by a ramp ({set_95} below it at 95 %, {set_90} at 90 %)"
        in readme
    )


def test_the_others_at_rates_of_their_own_are_told_as_they_were() -> None:
    found: dict[tuple[str, float], float] = {}
    for name in ("others", "others-rates"):
        for row in json.loads((ROWS / f"{name}.json").read_text())["rows"]:
            method, _, rate = row["method"].partition("-0.")
            found[method, float(f"0.{rate or '015'}")] = row["test_loss"]
    section = PAGE.read_text("utf-8").split("### At rates of their own")[1].split("\n#")[0].replace("*", "")
    lines = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    rates = [float(cell) for cell in lines[0][1:]]
    shown = {
        (line[0].strip(" `"), rate): cell.strip()
        for line in lines[2:]
        for rate, cell in zip(rates, line[1:], strict=True)
        if cell.strip()
    }
    methods = {method for method, _ in shown}
    assert shown == {key: f"{loss:.3f}" for key, loss in found.items() if key[0] in methods}
    assert methods == {"gse", "granet", "gmp"}
    best = {method: min(loss for (name, _), loss in found.items() if name == method) for method in methods}
    static, moved = losses("static", 0.95)[0], losses("sparsae", 0.95)[0]
    above = {method: f"{loss - static:.3f}" for method, loss in best.items()}
    assert f"level with `static` ({above['gse']} above it) and {best['gse'] - moved:.3f} above `sparsae`" in section
    assert f"`granet` ends {above['granet']} above `static`, `gmp` {above['gmp']}:" in section
    steps = {row["method"]: row["steps"] for row in json.loads((ROWS / "others.json").read_text())["rows"]}
    fewer = " and ".join(f"{100 * (1 - steps[method] / 2500):.0f}" for method in ("granet", "gmp"))
    assert f"cost them {fewer} % of the steps" in section
    assert max(best.values()) < found["dense", 0.015]
    assert f"`dense`, which makes {steps['dense']}" in section


def of_depth(method: str, sparsity: float) -> dict[int, float]:
    """Test losses by seed, of runs whose first block is denser."""
    files = ("depth-95", "parts-95", "density-95", "depth-90")
    rows = [row for name in files for row in json.loads((ROWS / f"{name}.json").read_text())["rows"]]
    named = {method, f"{method}-depth"}
    return {row["seed"]: row["test_loss"] for row in rows if row["method"] in named and row["sparsity"] == sparsity}


def in_order(losses: dict[int, float], form: str) -> str:
    return ", ".join(format(losses[seed], form) for seed in sorted(losses)).replace("-", "−")


def test_where_density_lies_is_told_as_it_was() -> None:
    page = PAGE.read_text("utf-8")
    for sparsity, methods in ((0.95, ("static", "rigl", "sparsae")), (0.9, ("static", "sparsae"))):
        for method in methods:
            denser = of_depth(method, sparsity)
            equal = {seed: losses(method, sparsity)[seed] for seed in denser}
            assert sorted(denser) == [0, 1, 2]
            found = between(denser, equal)
            cells = (
                f"{mean(equal.values()):.3f} | {in_order(equal, '.3f')} | {mean(denser.values()):.3f} | "
                f"{in_order(denser, '.3f')} | {told(found)} | {by_seed(denser, equal)}"
            )
            assert f"| {sparsity * 100:.0f} % | `{method}` | {cells} |" in page
    for reference, sparsities in (("static", (0.95, 0.9)), ("rigl", (0.95,))):
        cells = []
        for sparsity in sparsities:
            pair = of_depth("sparsae", sparsity), of_depth(reference, sparsity)
            found = between(*pair)
            cells += [told(found), by_seed(*pair)]
        line = " | ".join([*cells, *[""] * (4 - len(cells))]).replace("|  |", "| |")
        assert f"| `sparsae` less `{reference}` | {line.rstrip()} |" in page
    gains = [of_depth("sparsae", s)[seed] - losses("sparsae", s)[seed] for s in (0.95, 0.9) for seed in range(3)]
    assert max(gains) < 0
    assert f"({-mean(gains):.3f} in the mean of all six)" in page
    rows = [row for n in ("dense-small", "others") for row in json.loads((ROWS / f"{n}.json").read_text())["rows"]]
    narrow = {row["seed"]: row["test_loss"] for row in rows if row["method"] == "dense-small"}
    found = between(of_depth("sparsae", 0.95), narrow)
    assert f"{told(found)} ({by_seed(of_depth('sparsae', 0.95), narrow)})" in page
    assert f"level with that model ({told(found)}, three seeds)" in (ROOT / "README.md").read_text("utf-8")
    rows = [row for n in ("parts-95", "density-95") for row in json.loads((ROWS / f"{n}.json").read_text())["rows"]]
    equal = losses("sparsae", 0.95)[0]
    for name, factors in (
        ("sparsae-steep", "`depth: [2.0, 0.8, 0.2]`"),
        ("sparsae-depth-mlp", "`depth: [1.5, 1.0, 0.5], attention: 0.6, mlp: 1.2`"),
        ("sparsae-attention", "`attention: 1.6, mlp: 0.7`"),
        ("sparsae-mlp", "`attention: 0.6, mlp: 1.2`"),
    ):
        loss = next(row["test_loss"] for row in rows if row["method"] == name)
        assert f"| {factors} | {loss:.3f} | {loss - equal:+.3f} |".replace("-0", "−0") in page


def by_seed(one: dict[int, float], other: dict[int, float]) -> str:
    return in_order({seed: one[seed] - other[seed] for seed in one}, "+.3f")


DEEPER = ("deeper-95", "deeper-95-more", "deeper-erk")  # six blocks
OF_ERK = ("budgets-95", "erk-95", "erk-95-depth", "erk-95-rigl")  # three


def of_variant(name: str, files: Sequence[str]) -> dict[int, float]:
    """Test losses by seed, of a variant at 95 %."""
    rows = [row for file in files for row in json.loads((ROWS / f"{file}.json").read_text())["rows"]]
    found = {row["seed"]: row["test_loss"] for row in rows if (row["method"], row["sparsity"]) == (name, 0.95)}
    assert sorted(found) == [0, 1, 2]
    return found


def test_density_in_a_deeper_model_and_under_other_budgets_is_told_as_it_was() -> None:
    page, gains = PAGE.read_text("utf-8").replace("**", ""), list[float]()
    for blocks, budget, method, suffix, files in (
        (6, "uniform", "static", "", DEEPER),
        (6, "uniform", "sparsae", "", DEEPER),
        (6, "`erk`", "sparsae", "-erk", DEEPER),
        (3, "`erk`", "sparsae", "-erk", OF_ERK),
    ):
        equal = of_variant(f"{method}{suffix}", files)
        denser = of_variant(f"{method}{suffix}-depth", files)
        cells = (
            f"{mean(equal.values()):.3f} | {in_order(equal, '.3f')} | {mean(denser.values()):.3f} | "
            f"{in_order(denser, '.3f')} | {cells_of(denser, equal)}"
        )
        assert f"| {blocks} | {budget} | `{method}` | {cells} |" in page
        gains += [denser[seed] - equal[seed] for seed in equal if method == "sparsae"]
    gains += [of_depth("sparsae", s)[seed] - losses("sparsae", s)[seed] for s in (0.95, 0.9) for seed in range(3)]
    assert f"with {sum(gain < 0 for gain in gains)} of {len(gains)} pairs of `sparsae`" in page
    assert f"{-mean(gains):.3f} in the mean. With uniform" in page
    erk, erk_deep = of_variant("sparsae-erk", OF_ERK), of_variant("sparsae-erk", DEEPER)
    first, first_deep = of_depth("sparsae", 0.95), of_variant("sparsae-depth", DEEPER)
    for what, one, other in (
        ("`sparsae` less `static`, `erk`, 3 blocks", erk, of_variant("static-erk", OF_ERK)),
        ("`sparsae` less `rigl`, `erk`, 3 blocks", erk, of_variant("rigl-erk", OF_ERK)),
        ("`sparsae` less `static`, uniform, 6 blocks", of_variant("sparsae", DEEPER), of_variant("static", DEEPER)),
        (
            "`sparsae` less `static`, uniform and first block denser, 6 blocks",
            first_deep,
            of_variant("static-depth", DEEPER),
        ),
        ("`static`, `erk` less uniform, 3 blocks", of_variant("static-erk", OF_ERK), losses("static", 0.95)),
        ("`rigl`, `erk` less uniform, 3 blocks", of_variant("rigl-erk", OF_ERK), losses("rigl", 0.95)),
        ("`sparsae`, `erk` less uniform, 3 blocks", erk, losses("sparsae", 0.95)),
        ("`sparsae`, uniform and first block denser less `erk`, 3 blocks", first, erk),
        ("`sparsae`, uniform and first block denser less `erk`, 6 blocks", first_deep, erk_deep),
    ):
        assert f"| {what} | {cells_of(one, other)} |" in page
    below = [first[seed] - erk[seed] for seed in erk] + [first_deep[seed] - erk_deep[seed] for seed in erk_deep]
    assert max(below) < 0
    assert f"all six seeds of both models, by {-mean(below):.3f} in the mean" in page
    found = between(erk, of_variant("static-erk", OF_ERK))
    assert f"`sparsae` ends {told(found).removeprefix('−')} below a static" in (ROOT / "README.md").read_text("utf-8")


def test_a_denser_first_block_does_not_last() -> None:
    rows = json.loads((ROWS / "longer-density.json").read_text())["rows"]
    denser, erk = ({row["method"]: row["test_loss"] for row in rows}[f"sparsae-{name}"] for name in ("depth", "erk"))
    long = json.loads((ROWS / "longer-95.json").read_text())["rows"]
    uniform = next(row["test_loss"] for row in long if (row["method"], row["seed"]) == ("sparsae", 0))
    gained = losses("sparsae", 0.95)[0] - of_depth("sparsae", 0.95)[0]
    page = " ".join(PAGE.read_text("utf-8").split())
    assert f"denser first block ends at {denser:.3f}, with `erk` at {erk:.3f}, and with uniform densities at" in page
    assert f"with uniform densities at {uniform:.3f} (" in page
    assert (
        f"what had gained {gained:.3f} with that seed after 5.1 million tokens then loses {denser - uniform:.3f}"
        in page
    )
    assert f"(one seed: {denser - uniform:.3f} worse)" in (ROOT / "README.md").read_text("utf-8")


def cells_of(one: dict[int, float], other: dict[int, float]) -> str:
    """The cells of a paired difference."""
    found = between(one, other)
    return f"{told(found)} | {by_seed(one, other)}"


def test_other_searches_of_longer_runs_are_told_as_they_were() -> None:
    rows = json.loads((ROWS / "longer-search.json").read_text())["rows"]
    often, guided = ({r["method"]: r for r in rows}[name] for name in ("updates-200", "guided-half"))
    page = " ".join(PAGE.read_text("utf-8").split())
    assert f"(every 0.5 % of the run) at {often['test_loss']:.3f}" in page
    assert f"costs {often['steps'] - guided['steps']} of the steps) at {guided['test_loss']:.3f}" in page
