"""What a comparison says of strategy evolution."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparsae.experiments.compare.record import Loss, Results
from sparsae.experiments.compare.strategy import strategy_section, verdicts
from tests.support.records import topology_row
from tests.support.results import compare_results, compare_row


def results_of(losses: dict[str, list[float | None]], judged_by: Loss = "validation_loss") -> Results:
    rows = [
        compare_row(method, seed, 0.0, diverged=True)
        if loss is None
        else compare_row(method, seed, loss, test_loss=10.0 - loss)
        for method, each in losses.items()
        for seed, loss in enumerate(each)
    ]
    return compare_results(rows, judged_by=judged_by)


@pytest.mark.parametrize(
    ("evolved", "placebo", "said"),
    [
        ([4.0, 4.1, 4.2], [4.1, 4.2, 4.31], "evolution beats its placebo: sparsae-evolved less sparsae-placebo is -0."),
        ([4.0, 4.3, 4.2], [4.1, 4.2, 4.3], "evolution does not beat its placebo"),
        ([4.1, 4.2, 4.31], [4.0, 4.1, 4.2], "evolution is worse than its placebo"),
        ([4.0], [4.9], "evolution is not shown to beat its placebo: sparsae-evolved less sparsae-placebo is -0.9"),
        ([4.0, None], [None, 4.0], "nothing says whether evolution beats its placebo"),
        ([4.0, 4.1], [], "nothing says whether evolution beats its placebo"),
    ],
)  # fmt: skip
def test_it_says_plainly_whether_evolution_beats_its_placebo(
    evolved: list[float | None], placebo: list[float | None], said: str
) -> None:
    results = results_of({"sparsae-evolved": evolved, "sparsae-placebo": placebo})
    sentences = [sentence for sentence, _ in verdicts(results)]
    assert len(sentences) == 1
    assert sentences[0].startswith(f"90 % sparsity: {said}")
    assert sentences[0].partition("sparsity: ")[2] in strategy_section(results, {})


def test_nothing_is_said_of_what_is_left_where_a_run_diverged() -> None:
    """Neither of evolution's own nor of the other's: the contrasts of the same page say nothing either."""
    three: list[float | None] = [4.0, 4.1, 4.2]
    for evolved, placebo in (([*three, None], [4.1, 4.2, 4.31, 4.4]), ([*three, 4.3], [4.1, 4.2, 4.31, None])):
        ((sentence, difference),) = verdicts(results_of({"sparsae-evolved": evolved, "sparsae-placebo": placebo}))
        assert sentence == "90 % sparsity: evolution is not shown to beat its placebo: a run diverged."
        assert difference is None


def test_fixed_numbers_are_held_against_it_by_the_loss_that_is_compared() -> None:
    losses: dict[str, list[float | None]] = {
        "sparsae-evolved": [4.0, 4.1, 4.2],
        "sparsae-placebo": [4.1, 4.2, 4.31],
        "sparsae": [3.9, 4.0, 4.09],
    }
    found = dict(verdicts(results_of(losses)))
    assert [text.split(": ")[1] for text in found] == [
        "evolution beats its placebo",
        "evolution is worse than fixed numbers",
    ]
    turned = dict(verdicts(results_of(losses, judged_by="test_loss")))
    assert [text.split(": ")[1] for text in turned] == [
        "evolution is worse than its placebo",
        "evolution beats fixed numbers",
    ]


def test_the_section_shows_where_genomes_went_and_is_no_section_of_others(tmp_path: Path) -> None:
    genes = [{"gene.drop_fraction": x, "gene.density.depth": 1.0} for x in (0.3, 0.2, 0.2, 0.1, 0.1, 0.1, 0.12, 0.14)]
    rows = [topology_row(2 * i + 2, numbers=genome) for i, genome in enumerate(genes)]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(row.to_dict()) + "\n" for row in [topology_row(0), *rows])
    )
    results = results_of({"sparsae-evolved": [4.0, 4.1], "sparsae-placebo": [4.0, 4.1]})
    page = strategy_section(results, {("sparsae-evolved", 0.9): tmp_path, ("sparsae", 0.9): tmp_path / "none"})
    assert "0.3 → 0.13" in page
    assert "density.depth" in page
    assert strategy_section(results_of({"sparsae": [4.0], "rigl": [4.1]}), {}) == ""
