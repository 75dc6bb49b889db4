"""The report of a run: its structure, its partial runs, and what a browser makes of it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from sparsae.config.load import resolve
from sparsae.config.text import dump
from sparsae.errors import InputError
from sparsae.report.page import write_report
from tests.support.metrics_rows import PROMPT, STEPS, SUMMARY, Rows, candidate, layer_rows, metric_rows, topology_rows
from tests.support.records import train_row

VOID = {"meta", "link", "br", "hr", "img", "input"}
SECTIONS = ["training", "density", "search", "movement", "cost", "layers", "sample", "settings"]


class Page(HTMLParser):
    """Tags that never close, every attribute that could fetch something, and the text by section."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.plots: list[str] = []
        self.text: dict[str, str] = {}
        self.rows: list[list[str]] = []
        self._section = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags[tag] += 1
        self.ids += [given["id"] or ""] if "id" in given else []
        self.links += [given[name] or "" for name in ("src", "href", "xlink:href", "srcset", "data") if name in given]
        if given.get("role") == "img":
            self.plots.append(given["aria-label"] or "")
        if tag == "section":
            self._section = given["id"] or ""
        if tag == "tr":
            self.rows.append([])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag
        if tag == "section":
            self._section = ""

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in {"th", "td"}:
            self.rows[-1].append(data)
        self.text[self._section] = self.text.get(self._section, "") + data


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Writes a run directory of the given rows, method, summary and sample."""

    def write(
        rows: Rows,
        method: str = "sparsae-written",
        summary: dict[str, Any] | None = SUMMARY,
        sample: bool = True,
    ) -> Path:
        run = tmp_path / "run"
        run.mkdir()
        sparsity = ["sparsity.sparsity=0"] if method == "dense" else []
        config = resolve(None, "demo", method, [f"training.steps={STEPS}", *sparsity])
        (run / "config.yaml").write_text(dump(config), encoding="utf-8")
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        if summary is not None:
            (run / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
        if sample:
            text = {"prompt": PROMPT, "text": "    # <b>bold</b>", "teacher_text": "    # & calm"}
            (run / "sample.json").write_text(json.dumps(text), encoding="utf-8")
        return run

    return write


def report(run: Path) -> tuple[str, Page]:
    text = write_report(run).read_text("utf-8")
    return text, Page(text)


def test_every_section_and_figure_of_a_whole_run(make_run: Callable[..., Path]) -> None:
    text, page = report(make_run(metric_rows()))
    assert page.open == []
    assert [name for name in page.text if name] == SECTIONS
    assert page.tags["svg"] == len(page.plots) == 25
    assert all(len(plot) > 20 for plot in page.plots)
    assert [name for name, times in Counter(page.ids).items() if times > 1] == []
    assert max(len(svg) for svg in text.split("<svg")[1:]) < 40_000
    assert text.count("<h1>demo · sparsae-written · 90 % sparse</h1>") == 1


def test_the_page_fetches_nothing_and_runs_nothing(make_run: Callable[..., Path]) -> None:
    text, page = report(make_run(metric_rows()))
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    assert page.tags["script"] == 0
    assert "http://" not in text
    assert "https://" not in text
    assert "@import" not in text


def test_headline_numbers(make_run: Callable[..., Path]) -> None:
    _, page = report(make_run(metric_rows()))
    head = "".join(page.text[""].split())
    perplexity = metric_rows()[-1 - (metric_rows()[-1]["kind"] == "train")]["perplexity"]
    for expected in (
        f"Validationperplexity{perplexity:.2f}unigram730.0,atthestart4,447teacher",
        "Activeconnections70,000exactlythetarget",
        "TrainingFLOPs2.4T0.300ofdense,8T",
        "Stateofsparselayers,atmost2MB0.143ofdense,14MB",
        "Tokenspersecond4,096492ktokens",
    ):
        assert expected in head
    accepted = sum(row["accepted"] for row in metric_rows() if row["kind"] == "topology")
    assert f"Updatesaccepted{accepted}of17" in head


def test_text_of_the_run_is_escaped(make_run: Callable[..., Path]) -> None:
    text, page = report(make_run(metric_rows()))
    assert "<b>bold</b>" not in text
    assert PROMPT in page.text["sample"]
    assert "    # <b>bold</b>" in page.text["sample"]
    assert "    # & calm" in page.text["sample"]


def test_the_sample_names_its_prompt_its_text_and_its_tokenizer(make_run: Callable[..., Path]) -> None:
    _, page = report(make_run(metric_rows()))
    shown = " ".join(page.text["sample"].split())
    for name, value in (
        ("Prompt", "the start of a document of the held-out text"),
        ("Training text", "stdlib"),
        ("Tokenizer", "trained on it, 4,096 entries at most"),
    ):
        assert f"{name} {value}" in shown or f"{name}{value}" in shown, name


def test_search_counts_candidates_by_proposer(make_run: Callable[..., Path]) -> None:
    _, page = report(make_run(metric_rows()))
    accepted = sum(row["accepted"] for row in metric_rows() if row["kind"] == "topology")
    rows = {cells[0]: cells[1:5] for cells in page.rows if len(cells) == 6}
    assert rows["uniform"] == ["51", "0", "51", str(accepted)]
    assert rows["reshuffle"] == ["13", "4", "9", "0"]
    assert rows["redraw"] == ["4", "1", "3", "0"]
    description = next(plot for plot in page.plots if plot.startswith("Score of each candidate"))
    assert "17 updates" in description


def test_figures_take_the_colours_of_the_page(make_run: Callable[..., Path]) -> None:
    text, _ = report(make_run(metric_rows()))
    for svg in text.split("<svg")[1:]:
        drawing = svg.split("</svg>")[0].split("base64,")[0]
        assert "#0" not in drawing.replace('href="#', "").replace("url(#", "")
        assert "font-family" not in drawing


def test_figures_of_a_long_run_stay_small(make_run: Callable[..., Path]) -> None:
    rng, updates = np.random.default_rng(5), topology_rows(np.random.default_rng(4))
    rows: Rows = []
    for step in range(0, 8000, 20):
        rows.append(
            updates[step // 20 % 17] | {"step": step, "accepted": step > 0, "layers": layer_rows(rng, step / 8000)}
        )
        rows.append(train_row(step + 20, cross_entropy=float(rng.normal(3))).to_dict())
    text, _ = report(make_run(rows, summary=None))
    assert max(len(svg) for svg in text.split("<svg")[1:]) < 80_000
    assert "burn-in, 1 in 3 shown" in text


def test_the_same_run_gives_the_same_page(make_run: Callable[..., Path]) -> None:
    run = make_run(metric_rows())
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first
    assert not list(run.glob(".*"))


def test_settings_are_all_there(make_run: Callable[..., Path]) -> None:
    run = make_run(metric_rows())
    _, page = report(run)
    for line in (run / "config.yaml").read_text().splitlines():
        assert line.split(":")[0].strip(" -") in page.text["settings"]


@pytest.mark.parametrize("method", ["static", "dense"])
def test_a_run_without_updates(make_run: Callable[..., Path], method: str) -> None:
    kept = [row for row in metric_rows() if row["kind"] != "topology" or (method == "static" and row["step"] == 0)]
    for row in kept:
        if row["kind"] == "topology":
            for key in ("candidates_count", "mutation_rate", "reset_probability"):
                del row[key]
    _, page = report(make_run(kept, method))
    assert "never updated" in page.text["search"]
    assert ("16 sparse layers" if method == "static" else "no sparse layers") in page.text["layers"]


def test_a_stopped_run_without_summary_and_sample(make_run: Callable[..., Path]) -> None:
    rows = [row for row in metric_rows() if row["step"] <= 60]
    _, page = report(make_run(rows, summary=None, sample=False))
    assert "Shown up to step 60 of 240" in page.text[""]
    assert "no sample" in page.text["sample"]
    assert "once the run has its summary" in page.text["cost"]


def test_a_summary_that_the_run_has_outgrown_gives_no_totals(make_run: Callable[..., Path]) -> None:
    _, page = report(make_run(metric_rows(), summary=SUMMARY | {"steps": 100, "finished": False}))
    assert "no summary" in page.text[""]
    assert "unigram 730.0" in page.text[""]


def test_a_stopped_run_says_so(make_run: Callable[..., Path]) -> None:
    rows = [row for row in metric_rows() if row["step"] <= 100]
    _, page = report(make_run(rows, summary=SUMMARY | {"steps": 100, "finished": False}))
    assert "stopped at step 100 of 240" in page.text[""]


@pytest.mark.parametrize("kind", ["train", "validation", "topology"])
def test_a_single_row(make_run: Callable[..., Path], kind: str) -> None:
    row = next(row for row in metric_rows() if row["kind"] == kind)
    _, page = report(make_run([row], summary=None, sample=False))
    assert [name for name in page.text if name] == SECTIONS


def test_rows_whose_numbers_are_null(make_run: Callable[..., Path]) -> None:
    def nulled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: nulled(entry) for key, entry in value.items()}
        return None if isinstance(value, float) else value

    _, page = report(make_run([nulled(row) for row in metric_rows()], summary=None))
    assert [name for name in page.text if name] == SECTIONS


def test_unscored_candidates(make_run: Callable[..., Path]) -> None:
    rows = metric_rows()
    for row in rows:
        if row["kind"] == "topology":
            row["current"] = row["chosen"] = None
            row["candidates"] = [candidate("guided", None) | {"rejected": None}] if row["step"] else []
    _, page = report(make_run(rows))
    assert "No candidate was scored" in page.text["search"]


@pytest.mark.parametrize("content", ["", "{torn"], ids=["empty", "torn"])
def test_no_metrics_yet(make_run: Callable[..., Path], content: str) -> None:
    run = make_run([])
    (run / "metrics.jsonl").write_text(content)
    with pytest.raises(InputError, match=r"metrics\.jsonl: no metrics to report"):
        write_report(run)
    (run / "metrics.jsonl").unlink()
    with pytest.raises(InputError, match=r"metrics\.jsonl: no metrics to report"):
        write_report(run)
    assert not (run / "report.html").exists()


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such directory"):
        write_report(tmp_path / "nowhere")


def test_a_page_that_cannot_be_written(make_run: Callable[..., Path]) -> None:
    run = make_run(metric_rows()[:1])
    (run / "report.html").mkdir()
    with pytest.raises(InputError, match=r"report\.html: cannot be written"):
        write_report(run)


def test_torch_is_not_imported(make_run: Callable[..., Path]) -> None:
    run = make_run(metric_rows()[:3])
    code = (
        "import sys; from pathlib import Path; from sparsae.report.page import write_report;"
        "assert 'matplotlib' not in sys.modules; write_report(Path(sys.argv[1]));"
        "print([m for m in ('torch', 'matplotlib.pyplot') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code, run], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 400])
def test_what_a_browser_shows(make_run: Callable[..., Path], tmp_path: Path, width: int) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium to look at the page with")
    page, picture, height = write_report(make_run(metric_rows())), tmp_path / "page.png", 3600
    flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    flags += " disable-component-update disable-sync hide-scrollbars enable-logging=stderr"
    done = subprocess.run(
        [
            chromium,
            *(f"--{flag}" for flag in flags.split()),
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--screenshot={picture}",
            f"--window-size={width},{height}",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert ":CONSOLE" not in done.stderr
    pixels = imread(picture)[..., :3]
    assert pixels.shape[:2] == (height, width)
    painted = (np.abs(pixels - pixels[0, 0]) > 0.05).any(axis=2)
    assert 0.02 < painted.mean() < 0.6
    assert len(np.unique((pixels * 255).astype(np.uint8).reshape(-1, 3), axis=0)) > 200
    # Every stretch of the page has something on it, and nothing runs over its right edge.
    assert painted.reshape(12, -1).any(axis=1).all()
    assert not painted[:, -8:].any()


def test_a_dense_run_is_not_called_dense_twice(make_run: Callable[..., Path]) -> None:
    rows = [row for row in metric_rows() if row["kind"] != "topology"]
    text, _ = report(make_run(rows, method="dense"))
    assert "<h1>demo · dense</h1>" in text


def test_updates_are_not_called_accepted_where_each_is(make_run: Callable[..., Path]) -> None:
    rows = [row | {"accepted": row["step"] > 0} if row["kind"] == "topology" else row for row in metric_rows()]
    _, page = report(make_run(rows, method="sparsae"))
    assert "Topologyupdates17each" in "".join(page.text[""].split())


def test_an_empty_sample_is_explained(make_run: Callable[..., Path]) -> None:
    run = make_run(metric_rows())
    sample = {"prompt": PROMPT, "text": "", "teacher_text": "goes on"}
    (run / "sample.json").write_text(json.dumps(sample), encoding="utf-8")
    _, page = report(run)
    assert page.text["sample"].count("ended the text at once") == 1
