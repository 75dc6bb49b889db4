"""Look at a built site: what a page loads lies in the site, and is there: `python website/check.py build/site`.

A page may link to other places; scripts, styles, fonts and pictures of other places would tell them who reads it, and
are missing without a network.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {("script", "src"), ("img", "src"), ("iframe", "src"), ("source", "src"), ("object", "data"), ("link", "href")}
# Links of a head that nothing is loaded by.
TOLD = {"canonical", "prev", "next", "alternate", "edit"}
OF_STYLE = re.compile(r"url\(\s*[\"']?([^\"')]+)|@import\s+[\"']([^\"']+)")


class Page(HTMLParser):
    """Collects what a page loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self._in_style = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self._in_style = tag == "style"
        if tag == "link" and TOLD & set(given.get("rel", "").split()):
            return
        self.loads += [value for name, value in given.items() if (tag, name) in LOADED]
        self.loads += addresses(given.get("style", ""))

    def handle_data(self, data: str) -> None:
        if self._in_style:
            self.loads += addresses(data)


def addresses(style: str) -> Iterator[str]:
    return (found[1] or found[2] for found in OF_STYLE.finditer(style))


def complaints(site: Path) -> list[str]:
    """What is wrong, one line for each thing that a file of the site loads from elsewhere, or that is missing."""
    found = []
    for file in sorted(site.rglob("*")):
        if file.suffix not in (".html", ".css"):
            continue
        text = file.read_text("utf-8")
        for address in sorted(set(Page(text).loads if file.suffix == ".html" else addresses(text))):
            parts = urlsplit(address)
            if parts.scheme == "data" or not (parts.netloc or parts.path):
                continue
            base = site if parts.path.startswith("/") else file.parent
            if parts.scheme or parts.netloc:
                found.append(f"{file}: loads {address}, which is another place's")
            elif not (base / unquote(parts.path).lstrip("/")).exists():
                found.append(f"{file}: loads {address}, which is not there")
    return found


def main() -> None:
    site = Path(sys.argv[1])
    pages = sum(1 for _ in site.rglob("*.html"))
    if not pages:
        sys.exit(f"{site} has no page")
    if found := complaints(site):
        sys.exit("\n".join(found))
    print(f"{pages} pages: nothing is loaded from another place, and nothing is missing")


if __name__ == "__main__":
    main()
