"""`sparsae cache`: the prepared texts that are kept, their sizes, and how they go."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsae.cli.output import JsonFile, output, readable, show_table
from sparsae.errors import InputError
from sparsae.report.readable import in_bytes

if TYPE_CHECKING:
    from sparsae.data.entry import Kept


def cache(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME ...]", help="Entries, by the beginning of their names.")
    ] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Remove these entries; nothing goes without --yes.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="All entries, with --remove.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="They may go.")] = False,
    folder: Annotated[
        Path | None, typer.Option("--cache", metavar="DIR", help="As data.cache.  (default: $SPARSAE_CACHE)")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """List the prepared texts of the cache, or remove some."""
    from sparsae.data.entry import cache_root, kept, remove_entry

    root = cache_root(None if folder is None else str(folder))
    every = kept(root)
    chosen = [one for name in names for one in [_named(name, every, root)]] if names else every
    chosen = list(dict.fromkeys(chosen))
    if (yes or everything) and not remove:
        raise InputError("--yes, --all: are for --remove")
    if remove:
        if everything == bool(names):
            raise InputError("--remove: name entries of the cache (sparsae cache lists them), or give --all")
        if not yes:
            size = in_bytes(sum(one.size for one in chosen))
            raise InputError(f"--remove: this would remove {_counted(chosen)} of {size} from {root}: add --yes")

    def row(one: Kept) -> dict[str, Any]:
        return {"text": list(one.texts), "tokens": one.tokens, "bytes": one.size, "made": one.made}

    with output(json_file) as result:
        result |= {one.path.name: row(one) for one in chosen}
        if remove:
            for one in chosen:
                remove_entry(one)
        if json_file != "-":
            total = in_bytes(sum(one.size for one in chosen))
            title = f"{'Removed from' if remove else 'Cache'} {root}: {_counted(chosen)}, {total}"
            rows = [(one.path.name, *_told(one)) for one in chosen]
            show_table(title, ("entry", "text", "tokens", "size", "made"), rows, names=2)


def _told(one: Kept) -> tuple[str, str, str, str]:
    made = datetime.fromtimestamp(one.made).strftime("%Y-%m-%d %H:%M")
    return ", ".join(one.texts) or "damaged, or of another version", readable(one.tokens), in_bytes(one.size), made


def _counted(chosen: list[Kept]) -> str:
    return f"{len(chosen)} entr{'y' if len(chosen) == 1 else 'ies'}"


def _named(name: str, every: list[Kept], root: Path) -> Kept:
    found = [one for one in every if one.path.name.startswith(name)]
    if len(found) != 1:
        what = "no entry has this name" if not found else f"{len(found)} entries begin so"
        raise InputError(f"{name}: {what} in {root}; sparsae cache lists them")
    return found[0]
