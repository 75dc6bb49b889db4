"""What the results of every kind of experiment hold: the plan that asked for them. Needs no torch."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar, Generic, Self, TypeVar

from sparsae.core.record import decode

Asked = TypeVar("Asked")


class Planned(ABC, Generic[Asked]):
    """A record of results that holds its plan, of which a kind reads what `asks` has."""

    asks: ClassVar[type[Any]]
    plan: Mapping[str, Any]

    @classmethod
    def read(cls, content: Mapping[str, Any], origin: str) -> Self:
        """From the content of a file. Raises InputError, which names the origin, for anything else."""
        found = decode(cls, content, origin)
        decode(cls.asks, found.plan, f"{origin}: plan")  # it is looked at where the file is not known any more
        return found

    @cached_property
    def asked(self) -> Asked:
        """The plan. InputError where it lacks what is read of it."""
        found: Asked = decode(self.asks, self.plan, "results: plan")
        return found
