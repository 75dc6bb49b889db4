"""Taking a directory for a run: where one may begin, and giving the place back as it was."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from sparsae.config import Config
from sparsae.config.load import with_absolute_paths
from sparsae.errors import InputError, TakenError
from sparsae.files import holds_files, is_temporary
from sparsae.runs import manifest
from sparsae.runs.directory import RunDirectory
from sparsae.runs.lock import LOCK, locked


@dataclass(frozen=True)
class Claim:
    """A directory that this process alone works in; `made` are the directories that did not exist before it."""

    path: Path
    made: tuple[Path, ...]
    was_run: bool

    def undo(self) -> None:
        """Remove what a run that measured nothing has made here, and nothing else.

        Directories go where nobody has put anything into them; a run that was there before stays.
        """
        run = RunDirectory(self.path)
        if self.was_run or run.measured():
            return
        tokenizer = [run.tokenizer / name for name in ("tokenizer.json", "tokenizer_config.json")]
        own = [run.path / manifest.NAME, run.config_file, run.metrics, *tokenizer, run.path / LOCK]
        for file in own:
            if not file.is_dir() or file.is_symlink():
                file.unlink(missing_ok=True)
        for directory in (run.tokenizer, run.checkpoints, *reversed(self.made)):
            with suppress(OSError):  # not empty, or not there
                directory.rmdir()


@contextmanager
def claimed(path: Path) -> Iterator[Claim]:
    """Make the directory where it is new, and keep others out of it while inside.

    Raises InputError where it cannot be made or written, or another process works in it.
    """
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot make this directory: {error.strerror}; choose another") from None
    with locked(path, "this run"):
        run = RunDirectory(path)
        folders = [folder for folder in (path, run.checkpoints, run.tokenizer) if folder.is_dir()]
        for leftover in [entry for folder in folders for entry in folder.iterdir()]:
            if is_temporary(leftover):
                shutil.rmtree(leftover) if leftover.is_dir() and not leftover.is_symlink() else leftover.unlink()
        yield Claim(path, tuple(reversed(made)), was_run=run.begun())


def refuse_occupied(path: Path, config: Config | None = None) -> None:
    """TakenError if nothing new can be made at this path: something is there, or it cannot be made.

    config: of a run that is to begin here. It may take over the directory of a run of the same settings that ended
    before its first checkpoint.
    """
    if not holds_files(path, but=LOCK):
        return
    run = RunDirectory(path)
    if not run.begun():
        raise TakenError(f"{path}: is not empty; give a new directory")
    if config is None or run.manifest() is None or run.saved_steps() or run.summary.exists():
        raise TakenError(
            f"{path}: holds a run already; give a new directory, or continue that run with --resume {path}"
        )
    if run.config() != with_absolute_paths(config):
        raise TakenError(
            f"{path}: holds a run with other settings, which has no checkpoint yet; give a new directory, or continue "
            f"that run with --resume {path}"
        )
