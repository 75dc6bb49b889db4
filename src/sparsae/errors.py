"""The exceptions for what a person can mend."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

_SECTION = ContextVar("section", default="")


class InputError(Exception):
    """Something that the user gave is wrong: what, where, and what would be right, in one line.

    The command line prints it and exits with code 2, before anything is written. Library callers catch it like
    any exception; it never hides a fault of our own.
    """


class DivergedError(InputError):
    """Training whose loss is no number any more; a grid of learning rates counts it as a trial that failed."""

    def __init__(self, message: str, step: int, train_flops: int, reason: str) -> None:
        """reason: what is not finite."""
        super().__init__(message)
        self.step, self.train_flops, self.reason = step, train_flops, reason


class TakenError(InputError):
    """A directory in which nothing new can be made: something is there, or another process works in it."""


class RanksError(Exception):
    """Ranks that train one model together are no longer one run: they differ, or one of them has ended."""


class RankLostError(RanksError):
    """Another rank does not answer."""


def argument(name: str) -> str:
    """What an error calls an argument of `sparsify`: by its name, and in a run's settings by the key that gives it."""
    return f"{_SECTION.get()}{name}"


@contextmanager
def called_by_keys() -> Iterator[None]:
    """Arguments of `sparsify` that are wrong inside are called by the keys of settings."""
    before = _SECTION.set("sparsity.")
    try:
        yield
    finally:
        _SECTION.reset(before)


def require_state(owner: str, state: object, keys: Iterable[str]) -> None:
    """InputError for a state that lacks one of the keys that `owner.state_dict()` gives."""
    given = state if isinstance(state, Mapping) else {}
    if lacking := [key for key in keys if key not in given]:
        raise InputError(f"the state has no '{lacking[0]}': give what {owner}.state_dict() returned")


def require_utf8(where: str, text: str) -> None:
    """InputError for a text or a path in another encoding, which settings, tokenizers and reports could not hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{where}: {text!a} is not UTF-8; give text and names of files in UTF-8") from None
