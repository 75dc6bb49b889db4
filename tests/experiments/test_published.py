"""The comparison of 5 million tokens, as its page and the README tell it."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from sparsae.experiments.statistics import Difference, holm
from tests.support.published import (
    PAGE,
    README,
    between,
    bumped,
    by_seed,
    by_seed_of,
    cells_of,
    in_order,
    longer,
    losses,
    of_depth,
    rows_of,
    told,
)

BUMP = "docs/results/books-2m.md#with-twice-the-density-at-first"
PLANNED = [("sparsae", "rigl"), ("sparsae", "static")]
CONTRASTS = [*PLANNED, ("rigl", "static"), ("sparsae", "set"), ("set", "static")]


def test_runs_at_98_percent_are_told_as_they_were() -> None:
    found: dict[str, dict[int, float]] = {}
    for row in rows_of("six-98"):
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


def difference(method: str, reference: str, sparsity: float) -> Difference:
    return between(losses(method, sparsity), losses(reference, sparsity))


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


def test_the_table_of_the_readme_is_that_of_the_rows() -> None:
    lines = [line.replace("*", "") for line in README.read_text("utf-8").splitlines()]
    for tokens, sparsity, of, others in (
        ("5M", 0.9, lambda method: losses(method, 0.9), ("rigl", "static", "set")),
        ("5M", 0.95, lambda method: losses(method, 0.95), ("rigl", "static", "set")),
        ("5M", 0.98, lambda method: by_seed_of(rows_of("six-98"), method, 0.98), ("rigl", "static")),
        ("28M", 0.95, longer, ("rigl", "static")),
        (f"28M, `sparsae` alone with [twice the density at first]({BUMP})", 0.95, bumped, ("rigl", "static")),
    ):
        own, others_of = of("sparsae"), [of(other) for other in others]
        cells = [told(between(own, other)) for other in others_of] + [""] * (3 - len(others))
        row = f"| {tokens} | {sparsity * 100:.0f} % | {' | '.join(cells)} | {len(own)} |".replace("|  |", "| |")
        assert row in lines
        assert all(other.keys() == own.keys() for other in others_of)


def test_the_others_at_rates_of_their_own_are_told_as_they_were() -> None:
    found: dict[tuple[str, float], float] = {}
    for row in rows_of("others", "others-rates"):
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
    steps = {row["method"]: row["steps"] for row in rows_of("others")}
    fewer = " and ".join(f"{100 * (1 - steps[method] / 2500):.0f}" for method in ("granet", "gmp"))
    assert f"cost them {fewer} % of the steps" in section
    assert max(best.values()) < found["dense", 0.015]
    assert f"`dense`, which makes {steps['dense']}" in section


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
    narrow = by_seed_of(rows_of("dense-small", "others"), "dense-small")
    found = between(of_depth("sparsae", 0.95), narrow)
    assert f"{told(found)} ({by_seed(of_depth('sparsae', 0.95), narrow)})" in page
    assert f"level with that model ({told(found)}, three seeds)" in README.read_text("utf-8")
    rows = rows_of("parts-95", "density-95")
    equal = losses("sparsae", 0.95)[0]
    for name, factors in (
        ("sparsae-steep", "`depth: [2.0, 0.8, 0.2]`"),
        ("sparsae-depth-mlp", "`depth: [1.5, 1.0, 0.5], attention: 0.6, mlp: 1.2`"),
        ("sparsae-attention", "`attention: 1.6, mlp: 0.7`"),
        ("sparsae-mlp", "`attention: 0.6, mlp: 1.2`"),
    ):
        loss = next(row["test_loss"] for row in rows if row["method"] == name)
        assert f"| {factors} | {loss:.3f} | {loss - equal:+.3f} |".replace("-0", "−0") in page


DEEPER = ("deeper-95", "deeper-95-more", "deeper-erk")  # six blocks
OF_ERK = ("budgets-95", "erk-95", "erk-95-depth", "erk-95-rigl")  # three


def of_variant(name: str, files: Sequence[str]) -> dict[int, float]:
    """Test losses by seed, of a variant at 95 %."""
    found = by_seed_of(rows_of(*files), name)
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
    assert f"`sparsae` ends {told(found).removeprefix('−')} below a static" in README.read_text("utf-8")
