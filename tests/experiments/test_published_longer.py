"""The comparison of 28 million tokens, as its page and the README tell it."""

from __future__ import annotations

from sparsae.experiments.statistics import Difference
from tests.support.published import (
    PAGE,
    README,
    between,
    bumped,
    by_seed,
    by_seed_of,
    longer,
    losses,
    of_depth,
    rows_of,
    told,
    words_of,
)


def test_longer_runs_are_told_as_they_were() -> None:
    page, seeds = words_of(PAGE), list(longer("sparsae"))
    length = {
        "28.1M": {method: longer(method) for method in ("sparsae", "static")},
        "5.1M": {method: {s: losses(method, 0.95)[s] for s in seeds} for method in ("sparsae", "static")},
    }
    for tokens, of in length.items():
        for seed in seeds:
            moved, static = of["sparsae"][seed], of["static"][seed]
            assert f"| {seed} | {tokens} | {static:.3f} | {moved:.3f} | {moved - static:+.3f} |" in page
    found, shorter = (between(of["sparsae"], of["static"]) for of in length.values())
    assert found.p is not None
    below = told(found).lstrip("−")
    assert f"every seed again, by {below} in the mean (p = {found.p:.2f})" in page
    assert f"it was {told(shorter).lstrip('−')} with the same seeds after 5.1 million tokens" in page


def test_rigl_in_longer_runs_is_told_as_it_was() -> None:
    words, seeds, found = words_of(PAGE), list(longer("rigl")), list[Difference]()
    for tokens, of in (("5.1M", lambda method: losses(method, 0.95)), ("28.0M", longer)):
        rigl, static, moved = ({seed: of(method)[seed] for seed in seeds} for method in ("rigl", "static", "sparsae"))
        for seed, loss in rigl.items():
            row = f"| {seed} | {tokens} | {loss:.3f} | {moved[seed] - loss:+.3f} | {loss - static[seed]:+.3f} |"
            assert row in words
        found += [between(moved, rigl), between(rigl, static)]
    shorter, _, below, level = found
    assert below.p is not None
    assert f"by {told(below).lstrip('−')} in the mean, which does not exclude zero (p = {below.p:.2f})" in words
    assert f"where it was {told(shorter).lstrip('−')} with the same seeds" in words
    assert f"level with it or ahead ({told(level).replace('−', '-')})" in words
    moved_0, static_0 = longer("sparsae")[0], longer("static")[0]
    rows = rows_of("longer-rates")
    moved, static = (next(row["test_loss"] for row in rows if row["method"] == m) for m in ("sparsae", "static"))
    assert f"ends at {moved:.3f} (seed 0), {moved - moved_0:.3f} above itself at 0.015" in words
    assert f"at {static:.3f}, {static_0 - static:.3f} below itself" in words
    gains = (f"{static - moved_0:.3f}", f"{static_0 - moved_0:.3f}")
    assert "is {} below `static` with that seed in place of {}".format(*gains) in words
    assert f"and RigL {static - longer('rigl')[0]:.3f} below it" in words


def test_a_denser_first_block_does_not_last() -> None:
    rows = rows_of("longer-density")
    denser, erk = ({row["method"]: row["test_loss"] for row in rows}[f"sparsae-{name}"] for name in ("depth", "erk"))
    uniform = longer("sparsae")[0]
    gained = losses("sparsae", 0.95)[0] - of_depth("sparsae", 0.95)[0]
    page = words_of(PAGE)
    assert f"denser first block ends at {denser:.3f}, with `erk` at {erk:.3f}, and with uniform densities at" in page
    assert f"with uniform densities at {uniform:.3f} (" in page
    assert (
        f"what had gained {gained:.3f} with that seed after 5.1 million tokens then loses {denser - uniform:.3f}"
        in page
    )
    assert f"(one seed: {denser - uniform:.3f} worse)" in README.read_text("utf-8")


def test_a_bump_is_told_as_it_was() -> None:
    page, plain, bump = words_of(PAGE), longer("sparsae"), bumped("sparsae")
    for seed, loss in bump.items():
        less = " | ".join(f"{loss - longer(other)[seed]:+.3f}" for other in ("static", "rigl"))
        assert f"| {seed} | {plain[seed]:.3f} | {loss:.3f} | {loss - plain[seed]:+.3f} | {less} |" in page
    gained, static, rigl = (between(bump, longer(other)) for other in ("sparsae", "static", "rigl"))
    assert gained.p is not None
    assert static.p is not None
    assert rigl.p is not None
    assert f"with every seed: {told(gained).lstrip('−')} (p = {gained.p:.2f})" in page
    assert f"one density by {told(static).lstrip('−')} (p = {static.p:.3f})" in page
    assert f"below RigL by {told(rigl).lstrip('−')} (p = {rigl.p:.2f}), with every seed" in page
    assert max(bump[seed] - longer(other)[seed] for other in ("sparsae", "static", "rigl") for seed in bump) < 0
    rows = rows_of("longer-bump")
    still = by_seed_of(rows_of("longer-bump", "longer-bump-3"), "static-bump")
    ends = "{:.3f}, {:.3f} and {:.3f}".format(*still.values())
    without = told(between(still, longer("static"))).lstrip("−")
    assert f"ends at {ends}, by {without} below itself without it" in page
    level = f"{told(between(bump, still))}: {by_seed(bump, still)}".replace("−", "-")
    assert f"level with it ({level})" in page
    (bytes_,) = {row["state_bytes"] for row in rows}
    plain_bytes = rows_of("longer-95")[0]["state_bytes"]
    assert f"is {bytes_ / plain_bytes:.2f} times" in page
    assert f"for {bytes_ / plain_bytes:.1f} times the model's state while" in words_of(README)
    assert f"({bytes_ / 1e6:.1f} MB in place of {plain_bytes / 1e6:.1f}, embeddings included)" in page
    assert f"which are {rows[0]['steps']:,} steps with it" in page


def test_other_searches_of_longer_runs_are_told_as_they_were() -> None:
    rows = rows_of("longer-search")
    often, guided = ({r["method"]: r for r in rows}[name] for name in ("updates-200", "guided-half"))
    page = words_of(PAGE)
    assert f"(every 0.5 % of the run) at {often['test_loss']:.3f}" in page
    assert f"costs {often['steps'] - guided['steps']} of the steps) at {guided['test_loss']:.3f}" in page
