"""Whether a directory is that of a run; of one that is not, what it is and what to give instead. Needs no torch."""

from __future__ import annotations

from pathlib import Path

from sparsae.errors import InputError
from sparsae.files import read_json
from sparsae.runs.lock import LOCK
from sparsae.runs.manifest import NAME

# Files of other layers, by which their directories are known.
_PLAN, _COMPACT, _SEMI_STRUCTURED = "plan.yaml", "compact.json", "semi-structured.json"


def is_run(path: Path) -> bool:
    """Whether a run has begun in this directory."""
    return (path / "config.yaml").is_file() or (path / NAME).is_file()


def is_pretrained(path: Path) -> bool:
    """Whether this is a directory of transformers', not of a run, nor with weights that transformers does not read."""
    others = "config.yaml", _SEMI_STRUCTURED
    return (path / "config.json").is_file() and not any((path / name).exists() for name in others)


def what_is(path: Path) -> str:
    """What a directory is, for a line that says it is no run's: "is empty: ..."."""
    try:
        entries = sorted(path.iterdir())
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    names = {entry.name for entry in entries}
    # Projects of any kind have a config.yaml at their top: a run has a manifest beside it.
    parents = [parent for parent in path.absolute().parents if (parent / NAME).is_file()]
    if around := next((each for each in parents if (each / "config.yaml").is_file()), None):
        return f"it is a part of the run {_as_given(around, path)}: give that"
    if not entries:
        return "it is empty: train a run with --out, or give that of one"
    if _PLAN in names:
        return f"it is an experiment: {_one_of(path / 'runs') or 'none of its runs has begun'}"
    if _COMPACT in names:
        return "it is a compact export: evaluate and generate read it; for all else give the run that it was made of"
    if _SEMI_STRUCTURED in names:
        return "it is a semi-structured export: load_semi_structured reads it; for all else give the run it was made of"
    if "config.json" in names:
        what = "a sparse model" if _is_stored_sparse(path / "config.json") else "a model"
        return f"it is {what} for transformers: only train --from and check sparsity read it; for all else give a run"
    if any(entry.name.startswith("checkpoint-") and (entry / "trainer_state.json").is_file() for entry in entries):
        return "it holds checkpoints of transformers' Trainer: only train --from and check sparsity read one of them"
    if found := _one_of(path):
        return found
    if LOCK in names:
        return "nothing of a run is written there yet: one is being set up, or was killed at that: wait, or begin anew"
    more = f" and {len(entries) - 1} more" if len(entries) > 1 else ""
    return f"it has no config.yaml, but {entries[0].name}{more}: give the directory that train wrote (--out)"


def _one_of(folder: Path) -> str | None:
    runs = [entry for entry in sorted(folder.iterdir()) if is_run(entry)] if folder.is_dir() else []
    if not runs:
        return None
    return f"it holds {len(runs)} runs: give one of them, such as {runs[0]}" if runs[1:] else f"give the run {runs[0]}"


def _as_given(parent: Path, path: Path) -> Path:
    """A parent of a path's absolute form, relative where the path was."""
    here = Path.cwd()
    return parent.relative_to(here) if not path.is_absolute() and parent.is_relative_to(here) else parent


def _is_stored_sparse(file: Path) -> bool:
    try:
        stored = read_json(file).get("quantization_config")
    except InputError:
        return False
    return isinstance(stored, dict) and stored.get("quant_method") == "sparsae"
