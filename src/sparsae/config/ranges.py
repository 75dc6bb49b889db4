"""Which numbers a setting may be, as its declaration says: so that what looks for its best value proposes no other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo


@dataclass(frozen=True)
class From:
    """The least number of a setting that may be text as well, beside its own validation."""

    ge: int


@dataclass(frozen=True)
class Range:
    """Numbers from `least` to `most` (None: it has no such end, or not itself), whole ones alone or all."""

    whole: bool = False
    least: float | None = None
    most: float | None = None

    @classmethod
    def of(cls, config: BaseModel, setting: str) -> Range:
        """Of a setting, by its dotted name, that this configuration has."""
        *above, last = setting.split(".")
        section: Any = config
        for key in above:
            section = section[key] if isinstance(section, dict) else getattr(section, key)
        parts = list(_parts(type(section).model_fields[last]))
        ends = {kind: [getattr(p, kind) for p in parts if hasattr(p, kind)] for kind in ("ge", "gt", "le", "lt")}
        whole = float not in parts
        return cls(
            whole,
            max([*ends["ge"], *(end + 1 for end in ends["gt"] if whole)], default=None),
            min([*ends["le"], *(end - 1 for end in ends["lt"] if whole)], default=None),
        )

    def beyond(self, last: float, before: float) -> float | None:
        """The value after `last` in the direction from `before`: by their ratio, or their difference if one is 0.

        None: the range ends with `last`.
        """
        after = last * last / before if last and before else 2 * last - before
        after = float(f"{after:.6g}")
        if self.whole:
            after = max(round(after), int(last) + 1) if last > before else min(round(after), int(last) - 1)
        for end, nearer in ((self.least, max), (self.most, min)):
            after = after if end is None else nearer(after, end)
        return None if after == last else after


def is_span(field: FieldInfo) -> bool:
    """Whether a setting is how long something lasts, a number or text."""
    return any(isinstance(part, From) for part in _parts(field))


NUMBERS = Range()  # all of them


def _parts(annotation: Any) -> Iterator[Any]:
    """The types and the bounds that an annotation is made of."""
    if isinstance(annotation, FieldInfo):
        yield from _parts(annotation.annotation)
        for bound in annotation.metadata:
            yield from _parts(bound)
    elif inner := get_args(annotation):
        for part in (*inner, *getattr(annotation, "__metadata__", ())):
            yield from _parts(part)
    elif isinstance(annotation, type | From | Ge | Gt | Le | Lt):
        yield annotation
