"""The manifest of a run: what it is, its settings, and the digests of the files that it reads again.

`manifest.json` is sealed, and written before anything else of a run. `config.yaml` is the same settings for people: a
run is resumed where both agree. Each checkpoint's `state.json` is sealed too, names the run, and holds the
digests of its tensors and of the metrics up to it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from secrets import token_hex
from typing import Any, Self

from pydantic import ValidationError

from sparsae.config import Config
from sparsae.config.complaints import nearest, shown
from sparsae.config.difference import differences
from sparsae.config.load import resolve, setting_names
from sparsae.config.text import dump
from sparsae.errors import InputError
from sparsae.files import read_sealed, sha256_of, sync, write_atomically, write_sealed

NAME = "manifest.json"
FORMAT = 1
# Sections of which a checkpoint's tensors and counts are.
_FIXED = ("preset", "method", "model", "parameterization", "sparsity")


@dataclass(frozen=True)
class Extension:
    """A run of `previous_steps` was made one of `steps`, at `step`."""

    step: int
    previous_steps: int
    steps: int

    @property
    def warmup_steps(self) -> int:
        """Steps over which the learning rate rises again: one in a hundred of those that were added."""
        return max(1, round(0.01 * (self.steps - self.previous_steps)))

    def factor(self, step: int) -> float:
        """What this warm-up multiplies the learning rate of `step`, counted from 0, with."""
        return min(1.0, (step - self.step + 1) / self.warmup_steps)


@dataclass(frozen=True)
class SettingChange:
    """From `step` on, the setting `key` is `after` and no longer `before`, both as messages show them."""

    step: int
    key: str
    before: str
    after: str


@dataclass(frozen=True)
class Manifest:
    """See the module; `tokenizer` holds SHA-256 by file name, `started_from` the run whose weights this one took.

    changes: of settings, which whoever resumed the run allowed.
    """

    config: Config
    run: str = field(default_factory=lambda: token_hex(16))
    tokenizer: Mapping[str, str] = field(default_factory=dict)
    started_from: Mapping[str, Any] | None = None
    extensions: tuple[Extension, ...] = ()
    changes: tuple[SettingChange, ...] = ()

    @classmethod
    def read(cls, directory: Path) -> Self | None:
        """The manifest in the directory of a run; None where there is none. InputError for a damaged one."""
        path = directory / NAME
        if not path.is_file():
            return None
        content = read_sealed(path)
        if content.get("format") != FORMAT:
            raise InputError(f"{path}: has format {shown(content.get('format'))}: this version reads format {FORMAT}")
        try:
            return cls(
                config=Config.model_validate_json(json.dumps(content["config"])),
                run=str(content["run"]),
                tokenizer=dict(content["tokenizer"]),
                started_from=content["started_from"],
                extensions=tuple(Extension(**entry) for entry in content["extensions"]),
                changes=tuple(SettingChange(**entry) for entry in content.get("changes", ())),
            )
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(map(str, first["loc"]))
            # A rule or a term that is not here any more is named; other settings were right when they were written.
            why = str(first["ctx"]["error"]) if first["type"] == "value_error" else "not of this version of sparsae"
            raise InputError(f"{path}: {key}: {why}") from None
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: lacks {error}; it is of another version of sparsae") from None

    def write(self, directory: Path) -> None:
        """Write it, whole or not at all."""
        content = {
            "format": FORMAT,
            "run": self.run,
            "tokenizer": dict(self.tokenizer),
            "started_from": self.started_from,
            "extensions": [asdict(extension) for extension in self.extensions],
            "changes": [asdict(change) for change in self.changes],
            "config": self.config.model_dump(mode="json"),
        }
        write_sealed(directory / NAME, content)

    def write_config(self, file: Path) -> None:
        """Write the settings for people."""
        write_atomically(file, dump(self.config))

    def validated_config(self, file: Path, allowed: Collection[str] = ()) -> Config:
        """The run's settings, with those changes in config.yaml whose keys are allowed.

        InputError where it is not readable, or has another change, or where a key that is allowed was not changed.
        """
        if not file.exists():
            raise InputError(f"{file}: is missing; the run's settings are in {NAME} too: restore it from there")
        there = resolve(file)
        changes = [] if self._not_yet_extended(there) else self._changed_to(there)
        if idle := [key for key in allowed if key not in {change.key for change in changes}]:
            if idle[0] not in (known := setting_names()):
                raise InputError(f"--allow-change {idle[0]}: no such setting; {nearest(idle[0], known)}")
            raise InputError(f"--allow-change {idle[0]}: {file} has the value of it that the run has: leave it out")
        if not changes:
            return self.config
        left = [change for change in changes if change.key not in allowed]
        if fixed := [key for key in allowed if key == "training.steps" or key.partition(".")[0] in _FIXED]:
            raise InputError(
                f"--allow-change {fixed[0]}: is part of what a checkpoint is of, and cannot change: undo it in {file} "
                "(more steps: --resume RUN --steps N; another model: train --preset NAME)"
            )
        if not left:
            return there
        named = ", ".join(f"{change.key} is {change.after}, not {change.before}" for change in left[:3])
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        raise InputError(
            f"{file}: {named}{more}: the settings of a run do not change: undo it "
            "(more steps: --resume RUN --steps N; other settings: train --from RUN; or --resume RUN "
            f"--allow-change {left[0].key}, and it is no longer the run that it would have been)"
        )

    def changed(self, step: int, config: Config) -> Self:
        """Of the run that has these settings from `step` on."""
        changes = [replace(change, step=step) for change in self._changed_to(config)]
        return replace(self, config=config, changes=(*self.changes, *changes))

    def _changed_to(self, config: Config) -> list[SettingChange]:
        """How settings differ from the run's own, at no step yet."""
        if config == self.config:
            return []
        found = differences(self.config.model_dump(mode="json"), config.model_dump(mode="json"))
        return [SettingChange(0, change.name, before=change.there, after=change.here) for change in found]

    def _not_yet_extended(self, there: Config) -> bool:
        """Whether config.yaml is that of before the last extension: a crash came between the two files."""
        if not self.extensions:
            return False
        steps = {"steps": self.extensions[-1].previous_steps}
        return there == self.config.model_copy(update={"training": self.config.training.model_copy(update=steps)})

    def with_tokenizer(self, folder: Path) -> Self:
        """With the digests of the files in `folder`, which are brought to disk."""
        files = sorted(path for path in folder.iterdir() if path.is_file())
        for path in [*files, folder, folder.parent]:
            sync(path)
        return replace(self, tokenizer={path.name: sha256_of(path) for path in files})

    def require_tokenizer(self, folder: Path) -> None:
        """InputError where a file of the tokenizer is not what was written."""
        for name, digest in self.tokenizer.items():
            path = folder / name
            if not path.is_file() or sha256_of(path) != digest:
                raise InputError(f"{path}: is missing or was changed since the run began: restore it")

    def extended(self, step: int, steps: int) -> Self:
        """Of the run that has more steps from `step` on."""
        training = self.config.training
        config = self.config.model_copy(update={"training": training.model_copy(update={"steps": steps})})
        return replace(self, config=config, extensions=(*self.extensions, Extension(step, training.steps, steps)))
