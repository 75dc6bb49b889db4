"""The examples as executed notebooks: `python website/gallery.py examples/own_loop.py build/gallery`.

Writes own_loop.ipynb, own_loop.md and its figures; `python website/gallery.py build/gallery`, the list of all that are
there. The scripts are the only source: cells begin at `# %%`, and what is written between them is a markdown cell.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

INTRODUCTION = """# Gallery

The scripts of `examples/`, run as notebooks: what they print, and what they draw. Each page has its notebook as a file
to download; `python examples/NAME.py` does the same without one.
"""
# Figures as drawings, which are sharp at every width.
DRAWN = "--InlineBackend.figure_formats={'svg'}"


def execute(script: Path, out: Path) -> None:
    """Run a script as a notebook, and write it with its outputs, and as a page; raises what a cell raises."""
    import jupytext
    import nbformat
    from nbclient import NotebookClient
    from nbconvert import MarkdownExporter
    from nbconvert.preprocessors import CoalesceStreamsPreprocessor

    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "SPARSAE_CACHE": str((out.parent / "gallery-cache").resolve()),
    }
    notebook = jupytext.read(script)
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", extra_arguments=[DRAWN])
    client.execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times, which differ whenever it runs
        if cell.cell_type == "code":
            cell.outputs = [as_printed(output) for output in cell.outputs if output.get("name") != "stderr"]
    notebook, _ = CoalesceStreamsPreprocessor().preprocess(notebook, {})  # else a line is an output of its own
    nbformat.write(notebook, out / f"{script.stem}.ipynb")
    page, files = MarkdownExporter().from_notebook_node(
        notebook, {"unique_key": script.stem, "output_files_dir": f"{script.stem}_files"}
    )
    for name, content in files["outputs"].items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(content)
    title, _, rest = page.strip().partition("\n")
    links = f"[Notebook]({script.stem}.ipynb), with its outputs, of `examples/{script.name}`"
    (out / f"{script.stem}.md").write_text(f"{title}\n\n{links}\n{rest}\n", encoding="utf-8")


def as_printed(output: Any) -> Any:
    """A line that rich shows as HTML in a notebook, as the text that it is elsewhere; all else as it is."""
    from nbformat.v4 import new_output

    data = output.get("data", {})
    return new_output("stream", text=f"{data['text/plain'].strip()}\n") if "text/html" in data else output


def index(out: Path) -> None:
    """Write the list of what lies in a gallery: each title, first sentence and first figure."""
    told = [INTRODUCTION]
    for page in sorted(out.glob("*.md")):
        if page.name != "index.md":
            title, _, text = page.read_text("utf-8").partition("\n")
            sentence = text.split("\n\n")[1].replace("\n", " ").partition(": `python")[0]
            told.append(f"## [{title.removeprefix('# ')}]({page.name})\n\n{sentence.rstrip('.')}.\n")
            if figure := re.search(r"^!\[.*\]\((.+)\)", text, re.MULTILINE):
                told.append(f"[![{title.removeprefix('# ')}]({figure[1]})]({page.name})\n")
    (out / "index.md").write_text("\n".join(told), encoding="utf-8")


def main() -> None:
    *scripts, out = map(Path, sys.argv[1:])
    out.mkdir(parents=True, exist_ok=True)
    for script in scripts:
        execute(script, out)
    if not scripts:
        index(out)


if __name__ == "__main__":
    main()
