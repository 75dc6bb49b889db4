"""The comparison on bytes, as its page and the README tell it."""

from __future__ import annotations

from statistics import mean, stdev
from typing import Any

from tests.support.published import (
    README,
    RESULTS,
    between,
    by_seed_of,
    rows_of,
    told,
)

BYTES = RESULTS / "bytes.md"


def of_bytes(*files: tuple[int, str]) -> dict[int, float]:
    """Test losses by seed, of the variant in each file."""
    found = [by_seed_of(rows_of(f"results-{n}", folder="bytes"), name, sparsity=None) for n, name in files]
    seeds = {seed: loss for each in found for seed, loss in each.items()}
    assert len(seeds) == sum(map(len, found)) == 6
    return seeds


def test_the_table_of_a_less_wide_model_is_that_of_its_rows() -> None:
    wide = of_bytes((7, "sparsae-0.016-4"), (8, "sparsae"), (9, "sparsae"))
    narrow = of_bytes((1, "dense-small-8"), (3, "dense-small-8"), (12, "dense-small"), (13, "dense-small"))
    found = between(wide, narrow)
    lower = of_bytes((14, "sparsae"), (15, "sparsae"))
    page = BYTES.read_text("utf-8").replace("−", "-")
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
    assert f"level with it ({told(found).lstrip('−')} below it, six seeds)" in README.read_text("utf-8")


def test_a_static_topology_of_that_width_is_told_as_it_was() -> None:
    rows = rows_of("results-15", "results-16", folder="bytes")
    found = {(row["method"], row["seed"]): row["test_loss"] for row in rows}
    static, above = zip(*((found["static", n], found["static", n] - found["sparsae", n]) for n in (0, 1)), strict=True)
    told = "ends at {:.3f} and {:.3f} (seeds 0 and 1), {:.3f} and {:.3f} above `sparsae`".format(*static, *above)
    assert told in BYTES.read_text("utf-8")


def test_bytes_after_four_times_the_training_are_told_as_they_were() -> None:
    def row_of(number: int, method: str, seed: int = 0) -> dict[str, Any]:
        rows = rows_of(f"results-{number}", folder="bytes")
        return next(row for row in rows if (row["method"], row["seed"]) == (method, seed))

    wide, narrow = row_of(17, "sparsae"), row_of(4, "dense-small-8")
    assert wide["budget"] == narrow["budget"]
    page = " ".join(BYTES.read_text("utf-8").split())
    shorter = row_of(1, "dense-small-8")["test_loss"] - row_of(15, "sparsae")["test_loss"]
    assert f"which was {shorter:.3f} below the narrow dense model with this seed" in page
    assert f"ends at {wide['test_loss']:.3f} after as many FLOPs ({wide['steps']:,} steps)" in page
    assert f"{abs(wide['test_loss'] - narrow['test_loss']):.3f} between them" in page
