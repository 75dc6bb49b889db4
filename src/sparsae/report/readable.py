"""Numbers as people read them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

UNKNOWN = "–"
_PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")


def compact(value: float, unit: str = "", digits: int = 3) -> str:
    """So many significant digits with an SI prefix: 8175471177728, "FLOP" -> "8.18 TFLOP". NaN: a dash."""
    if not math.isfinite(value):
        return UNKNOWN
    rounded = float(f"{value:.{digits}g}")
    power = 0
    while abs(rounded) >= 1000 and power < len(_PREFIXES) - 1:
        rounded /= 1000
        power += 1
    return f"{_signed(rounded, digits)} {_PREFIXES[power]}{unit}".strip()


def in_bytes(value: float) -> str:
    """Bytes with an SI prefix."""
    return compact(value, "B")


def ticks(values: Sequence[float], *, signed: bool = False, linear: bool = True) -> list[str]:
    """Labels of an axis: as `compact` without the space, with as many digits as tell each value from the next.

    linear: whether values lie evenly, so that all have the digits of the smallest step.
    """
    if not linear:
        return [compact(value).replace(" ", "") for value in values]
    step = min((after - before for before, after in pairwise(sorted(set(values)))), default=0.0)
    digits = 3
    while digits < 12 and any(abs(float(f"{value:.{digits}g}") - value) > step / 100 for value in values):
        digits += 1
    largest = max(map(abs, values), default=0.0)
    if 1e-6 <= step <= largest < 1000:  # without exponents, which labels would have beside others that have none
        places = next(n for n in range(9) if n == 8 or all(abs(round(v, n) - v) <= step / 100 for v in values))
        labels = [f"{value:.{places}f}".replace("-", "−") if value else "0" for value in values]
    else:
        labels = [compact(value, digits=digits).replace(" ", "") for value in values]
    return [f"+{label}" if signed and value > 0 else label for label, value in zip(labels, values, strict=True)]


def decimal(value: float, digits: int = 4) -> str:
    """So many significant digits, thousands set apart: 4238.13 -> "4,238", 1.2e200 -> "1.2e200"."""
    if not math.isfinite(value):
        return UNKNOWN
    if abs(value) >= 1e9:
        return _signed(value)
    places = max(0, digits - 1 - (math.floor(math.log10(abs(value))) if value else 0))
    return f"{value:,.{min(places, 10)}f}".replace("-", "−")


def in_short(value: float) -> str:
    """A value of a setting: whole numbers in full, others to three significant digits: 0.0333333 -> "0.0333"."""
    return f"{value:g}" if float(value).is_integer() else f"{value:.3g}"


def count(value: float) -> str:
    """A whole number, thousands set apart."""
    return f"{value:,.0f}".replace("-", "−") if math.isfinite(value) else UNKNOWN


def percent(share: float, digits: int = 3) -> str:
    """A share of one as a percentage."""
    return f"{share * 100:.{digits}g} %".replace("-", "−") if math.isfinite(share) else UNKNOWN


def sparsity_text(share: float) -> str:
    """A sparsity as a percentage, with the digits by which plans tell two apart: 99.95 % are not 100 %."""
    return percent(share, 6)


def duration(seconds: float) -> str:
    """Seconds as the two largest units."""
    if not math.isfinite(seconds):
        return UNKNOWN
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, rest = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {rest} min"
    days, rest = divmod(hours, 24)
    return f"{days} days {rest} h" if days < 730 else f"{days // 365} years {days % 365} days"


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Dotted names without the parts that all begin with: transformer.h.0.attn.c_proj -> 0.attn.c_proj."""
    parts = {name: name.split(".") for name in names}
    shared = 0
    if len(parts) > 1:
        shortest = min(len(split) for split in parts.values()) - 1
        while shared < shortest and len({split[shared] for split in parts.values()}) == 1:
            shared += 1
    return {name: ".".join(split[shared:]) for name, split in parts.items()}


def _signed(value: float, digits: int = 3) -> str:
    plain = f"{value:.{digits}g}"
    if "e" in plain:
        mantissa, exponent = plain.split("e")
        plain = f"{mantissa}e{int(exponent)}"
    return plain.replace("-", "−")
