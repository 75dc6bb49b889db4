"""Every setting of a section that was validated, and of those inside it."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import BaseModel

from sparsae.config.complaints import Keys


def settings_in(section: BaseModel, above: Keys = ()) -> Iterator[tuple[Keys, BaseModel, str]]:
    """The keys of each setting, the section that it is in and its name there; a section comes before what it holds."""
    for name in type(section).model_fields:
        keys, value = (*above, name), getattr(section, name)
        yield keys, section, name
        for inner, part in value.items() if isinstance(value, dict) else [(None, value)]:
            if isinstance(part, BaseModel):
                yield from settings_in(part, keys if inner is None else (*keys, inner))
