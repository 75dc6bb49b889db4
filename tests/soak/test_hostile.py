"""Two hundred hostile strings in every text of a run: its page shows them, runs no script and fetches nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from sparsae.config.load import resolve
from sparsae.config.text import dump
from sparsae.report.page import write_report
from tests.support.metrics_rows import STEPS, SUMMARY, metric_rows

pytestmark = pytest.mark.soak

# {x}: what a script would do; {u}: an address that answers.
MARKUP = [
    "<script>{x}</script>", "<script src={u}></script>", "<img src=x onerror={x}>", "<img src={u}>", "<svg onload={x}>",
    "<svg><script>{x}</script></svg>", "<iframe src={u}></iframe>", "<iframe srcdoc='<script>{x}</script>'></iframe>",
    "<object data={u}></object>", "<embed src={u}>", "<link rel=stylesheet href={u}>", "<style>@import '{u}'</style>",
    "<style>body{{background:url({u})}}</style>", "<base href={u}>", "<meta http-equiv=refresh content='0;url={u}'>",
    "<body onload={x}>", "<video src={u} autoplay></video>", "<audio src={u} autoplay></audio>",
    "<input autofocus onfocus={x}>", "<details open ontoggle={x}>", "<math><mi xlink:href={u}>", "<form action={u}>",
    "<svg><image href={u} /></svg>", "<svg><use href='{u}#a'/></svg>", "<svg><foreignObject><img src={u}>",
    "<a href='javascript:{x}'>a</a>", "<p style='background:url({u})'>", "<marquee onstart={x}>",
    "<template><img src={u}>",
    "<noscript><img src={u}></noscript>", "<table background={u}>", "<picture><source srcset={u}><img></picture>",
]  # fmt: skip
BREAKS = ["", "'\">", "-->", "]]>", "</style>", "</title></svg></section>", "&lt;", "\u2028\\"]
STRINGS = [f"{before}{markup}" for before in BREAKS for markup in MARKUP][:240]


class Asked(BaseHTTPRequestHandler):
    paths: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.paths.append(self.path)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"document.title='pwned'")

    def log_message(self, *given: object) -> None: ...


def run_with(folder: Path, strings: list[str]) -> Path:
    """A run directory that has these strings wherever a text can be."""
    text = iter(strings * 20)
    rows = metric_rows()
    for row in rows:
        if row["kind"] == "topology":
            row["layers"] = {
                f"{name}{strings[i % len(strings)]}": of for i, (name, of) in enumerate(row["layers"].items())
            }
            for candidate in row["candidates"]:
                candidate["proposer"] = next(text)
                if candidate["rejected"]:
                    candidate["rejected"] = next(text)
            text = iter(strings * 20)
    run = folder / "run"
    run.mkdir()
    config = resolve(None, "demo", "sparsae-written", [f"training.steps={STEPS}"])
    config = config.model_copy(
        update={
            "tracking": config.tracking.model_copy(update={"project": strings[1], "sample_prompt": strings[2]}),
            "data": config.data.model_copy(update={"source": strings[3]}),
        }
    )
    summary: dict[str, Any] = {
        **SUMMARY,
        "preset": strings[4],
        "method": strings[5],
        "device": strings[6],
        "torch": strings[7],
        "diverged": {"step": STEPS, "reason": strings[8]},
        "started_from": {"path": strings[9], "run": strings[0], "step": 3},
        "changes": [{"step": 3, "key": each, "before": each, "after": each} for each in strings],
    }
    sample = {"prompt": strings[0], "text": " ".join(strings), "teacher_text": " ".join(strings)}
    (run / "config.yaml").write_text(dump(config), encoding="utf-8")
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (run / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    (run / "sample.json").write_text(json.dumps(sample), encoding="utf-8")
    return run


def dom(page: Path, profile: Path) -> str:
    """The page as the browser has it after its scripts, if it has any."""
    flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking dump-dom"
    flags += " disable-component-update disable-sync virtual-time-budget=2000"
    done = subprocess.run(
        [
            shutil.which("chromium") or "",
            *(f"--{flag}" for flag in flags.split()),
            f"--user-data-dir={profile}",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout


def test_no_script_runs_and_no_request_leaves(tmp_path: Path) -> None:
    if shutil.which("chromium") is None:
        pytest.skip("no chromium to look at the page with")
    server = HTTPServer(("127.0.0.1", 0), Asked)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/asked"
    # The traps work: a page that does not escape them falls into them.
    trap = tmp_path / "trap.html"
    trap.write_text(f"<title>a</title><script>document.title='pwned'</script><img src={address}>")
    assert "<title>pwned" in dom(trap, tmp_path / "profile")
    assert Asked.paths
    Asked.paths.clear()
    filled = [string.format(x="document.title='pwned'", u=address) for string in STRINGS]
    assert len(set(filled)) == len(filled) >= 200
    for start in range(0, len(filled), 10):
        folder = tmp_path / str(start)
        folder.mkdir()
        page = write_report(run_with(folder, filled[start : start + 10]))
        text = page.read_text("utf-8")
        for string in filled[start : start + 10]:
            assert string not in text or "<" not in string
        seen = dom(page, tmp_path / "profile")
        assert "<title>pwned" not in seen, filled[start : start + 10]
        assert "</main>" in seen
        assert not Asked.paths, filled[start : start + 10]
    server.shutdown()
    server.server_close()
    print(f"{len(filled)} hostile strings, {len(filled) // 10} pages, {len(Asked.paths)} requests")
