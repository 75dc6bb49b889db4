"""One page of several runs, and figures as files."""

from __future__ import annotations

import errno
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from sparsae.cli import main
from sparsae.report.data import read_run
from sparsae.report.figure_files import write_figures
from sparsae.report.page import render, write_report
from sparsae.report.several import body, comparable, read_runs
from sparsae.report.svg import STAND_INS, collected
from sparsae.train.run import start
from tests.report.test_page import Page
from tests.support.runs import config_of, contents, write_text


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("several")
    text, cache = write_text(folder / "text"), folder / "cache"
    start(config_of(text, cache, method="sparsae"), folder / "one" / "run", quiet=True)
    start(config_of(text, cache, "seed=1", method="static"), folder / "two" / "run", quiet=True)
    start(config_of(text, cache, "model.context=8", method="dense"), folder / "short", quiet=True)
    return folder


def told(runs: list[Path], out: Path, *more: str) -> Page:
    assert main(["report", *map(str, runs), "--out", str(out), *more]) == 0
    page = Page(out.read_text("utf-8"))
    assert page.open == []
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert len(page.ids) == len(set(page.ids))
    return page


def test_runs_lie_over_each_other_and_side_by_side(runs: Path, tmp_path: Path) -> None:
    page = told([runs / "one" / "run", runs / "two" / "run"], tmp_path / "page.html")
    table = {row[0]: row[1:] for row in page.rows if row}
    assert [row for row in page.rows if "one/run" in row]  # two directories of one name, told apart by those above
    assert table["method"] == ["sparsae", "static"]
    losses = [read_run(runs / name / "run").validation[-1].loss for name in ("one", "two")]
    assert table["validation loss"] == [f"{loss:.4f}" for loss in losses]
    assert table["seed"] == ["0", "1"]  # a setting that differs; those that do not are left out
    assert "training.batch_size" not in table
    assert "held-out text" not in table
    assert all(
        f"one/run ends at {losses[0]:.3g}" in plot and "two/run ends at" in plot
        for plot in page.plots
        if plot.startswith("Validation loss")
    )
    assert sum(plot.startswith("Validation loss") for plot in page.plots) == 3
    assert "cannot be compared" not in "".join(page.text.values())


def test_losses_on_other_texts_are_not_put_together(runs: Path, tmp_path: Path) -> None:
    page = told([runs / "one" / "run", runs / "short"], tmp_path / "page.html")
    assert "Losses cannot be compared, those of short with those of run: validation or test read" in page.text[""]
    assert {row[0]: row[1:] for row in page.rows if row}["held-out text"] == ["A", "B"]
    for plot in page.plots:
        if plot.startswith("Validation loss"):
            assert ("run ends" in plot) != ("short ends" in plot)
    both = read_runs([runs / "one" / "run", runs / "two" / "run"])
    (first, one), (second, two) = both.items()
    assert len(comparable(both)) == 1
    training = two.config.training.model_copy(update={"test_sequences": two.config.training.tested_sequences + 1})
    tested = replace(two, config=two.config.model_copy(update={"training": training}))
    assert [list(group) for group in comparable({first: one, second: tested})] == [[first], [second]]
    shutil.copytree(runs / "two" / "run", tmp_path / "bare")
    shutil.rmtree(tmp_path / "bare" / "checkpoints")  # which alone know what a run has read
    unknown = read_runs([runs / "one" / "run", tmp_path / "bare"])
    assert [list(group) for group in comparable(unknown)] == [["run"], ["bare"]]
    page = told([tmp_path / "bare", runs / "short"], tmp_path / "page.html")
    assert "those of short with those of bare: no checkpoint tells what validation read" in page.text[""]
    assert {row[0]: row[1:] for row in page.rows if row}["held-out text"] == ["unknown (bare)", "A"]
    page = told([runs / "short", tmp_path / "bare"], tmp_path / "page.html")
    assert "no checkpoint tells what validation read" in page.text[""]
    assert {row[0]: row[1:] for row in page.rows if row}["held-out text"] == ["A", "unknown (bare)"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["one/run", "two/run"], "--out"),
        (["one/run", "one/run", "--out", "p.html"], "given twice"),
        (["one/run", "--out", "p.html"], "that of one lies in its directory"),
        (["one/run", "text", "--out", "p.html"], "text"),
    ],
)
def test_what_is_no_page_of_several_runs_is_refused(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(runs)
    before = contents(runs)
    assert main(["report", *arguments]) == 2
    assert said in capsys.readouterr().err
    assert contents(runs) == before


def test_every_figure_of_a_page_is_a_file(runs: Path, tmp_path: Path) -> None:
    run = runs / "short"
    write_report(run, tmp_path / "figures")
    files = contents(tmp_path / "figures")
    with collected() as panels:
        assert (run / "report.html").read_text("utf-8") == render(read_run(run))  # which is as it is without files
    assert sorted(files) == sorted(f"{panel.name}.{form}" for panel in panels for form in ("svg", "pdf"))
    for name, content in files.items():
        if name.endswith(".pdf"):
            assert content.startswith(b"%PDF-")
            assert b"/FontFile2" in content  # letters, not outlines
        else:
            text = content.decode()
            assert "<text" in text
            assert not [colour for colour in STAND_INS.values() if colour in text]
            assert "var(--" not in text
    assert "training" in files["loss-step.svg"].decode()  # the legend
    first = next(panel for panel in panels if panel.name == "loss-step")
    write_figures(tmp_path / "again", [first])
    assert contents(tmp_path / "again").items() <= files.items()
    drawn = files["loss-step.svg"].decode()
    light = {"accent": "#0b62a8", "muted": "#59636e", "grid": "#e2e5e9", "ink": "#1a1e23"}  # of the page, by day
    for name in set(re.findall(r"stroke: var\(--(\w+)\)", first.svg)):
        assert f"stroke: {light[name]}" in drawn


def test_a_page_of_several_runs_has_its_figures_too(runs: Path, tmp_path: Path) -> None:
    told([runs / "short", runs / "two" / "run"], tmp_path / "page.html", "--figures", str(tmp_path / "figures"))
    assert {"loss-train-flops-1.pdf", "throughput.svg"} <= set(contents(tmp_path / "figures"))


def test_places_of_a_page_and_its_figures_are_looked_at_first(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (file := tmp_path / "file").write_text("mine")
    both = [str(runs / "short"), str(runs / "two" / "run")]
    for options, said in (
        (
            ["--out", str(tmp_path / "page.html"), "--figures", str(file)],
            f"--figures: {file} is a file; give a directory",
        ),
        (["--out", str(tmp_path)], f"--out: {tmp_path} is a directory; give a file"),
        (["--out", str(tmp_path / "none" / "page.html")], "--out: no directory"),
    ):
        assert main(["report", *both, *options]) == 2
        assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_sparsity_near_all_is_not_told_as_all(runs: Path) -> None:
    data = read_run(runs / "one" / "run")
    sparsity = data.config.sparsity.model_copy(update={"sparsity": 0.9995})
    nearly = replace(data, config=data.config.model_copy(update={"sparsity": sparsity}))
    for page in (render(nearly), body({"a": nearly, "b": nearly})):
        assert "99.95 %" in page
        assert ">100 %" not in page
        assert "· 100 % sparse" not in page


def test_a_figure_that_cannot_be_written_is_named(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, content: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert main(["report", str(runs / "one" / "run"), "--figures", str(tmp_path / "figures")]) == 2
    assert re.search(rf"{tmp_path}/figures/\S+: cannot be written: No space left", capsys.readouterr().err)
