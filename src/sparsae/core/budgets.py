"""How many units each layer gets, so that the model has exactly k.

A budget gives each layer a relative density: 1 (`uniform`), (n_out + n_in) / (n_out n_in) (`er`, Erdos-Renyi: Mocanu et
al., 2018, SET), or the same with every dimension of the kernel in numerator and denominator (`erk`: Evci et al., 2020,
RigL; for linear layers it equals `er`). Layer l gets clip(epsilon * relative_l * units_l, low_l, high_l), with the one
epsilon for which these sum to k: a layer that saturates leaves its surplus to the others. Relative densities may be
multiplied by factors, by the layer's name or depth; the sum stays k.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

from sparsae.config.density import DEPTH, DensityFactors, require_factors
from sparsae.errors import InputError, argument

BUDGETS = ("uniform", "er", "erk")


def relative_density(budget: str, shape: Sequence[int]) -> float:
    """Density of a layer up to a factor common to all; shape is (out, in, kernel dimensions...)."""
    match budget:
        case "uniform":
            return 1.0
        case "er":
            return sum(shape[:2]) / math.prod(shape[:2])
        case "erk":
            return sum(shape) / math.prod(shape)
    raise InputError(f"unknown budget '{budget}': use one of {', '.join(BUDGETS)}")


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """(out, in times kernel positions) of a layer of (out, in, kernel dimensions...)."""
    return shape[0], math.prod(shape[1:])


def density_factors(density: DensityFactors, layers: Sequence[str], where: str = "density") -> dict[str, float]:
    """The factor of each layer: the product of all that concern it.

    A block is what has the first number in a layer's name; between the given ones, factors by depth are interpolated. A
    layer in no block has none. where: what the factors are called where they are given. Raises InputError for what is
    no factor, or concerns no layer.
    """
    try:
        require_factors(density)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None
    factors = dict.fromkeys(layers, 1.0)
    blocks = {name: block for name in layers if (block := _block(name)) is not None}
    for key, value in density.items():
        if isinstance(value, Sequence):
            concerned = {name: _at_depth(value, block, blocks.values()) for name, block in blocks.items()}
        else:
            concerned = {name: float(value) for name in layers if fnmatchcase(name, key)}
        if not concerned:
            what = "no layer has a number in its name" if key == DEPTH else f"no sparse layer matches '{key}'"
            some = ", ".join([*layers[:3], *(["..."] if len(layers) > 3 else [])])
            roles = " (roles such as attention are known in the settings of a run only)" if key.isidentifier() else ""
            raise InputError(f"{where}: {what}; their names are {some}{roles}")
        for name, factor in concerned.items():
            factors[name] *= factor
    return factors


def _block(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def _at_depth(factors: Sequence[float], block: int, blocks: Collection[int]) -> float:
    first, last = min(blocks), max(blocks)
    at = (block - first) / max(1, last - first) * (len(factors) - 1)
    below = min(math.floor(at), max(0, len(factors) - 2))
    return factors[below] + (at - below) * (factors[min(below + 1, len(factors) - 1)] - factors[below])


def allocate(relative: Sequence[float], bounds: Sequence[tuple[int, int]], units: Sequence[int], k: int) -> list[int]:
    """Units of each layer, summing to exactly k, each within its (low, high).

    relative: densities up to a common factor. Fractions are rounded by the largest remainder, the earlier layer first
    where they tie. Raises InputError where the bounds cannot hold k.
    """
    least, most = sum(low for low, _ in bounds), sum(high for _, high in bounds)
    if not least <= k <= most:
        raise InputError(
            f"the layers' bounds hold between {least} and {most} units, not the {k} asked for: "
            f"widen {argument('min_density')} / {argument('max_density')}"
        )

    def shares(epsilon: float) -> list[float]:
        return [min(max(epsilon * r * n, low), high) for r, n, (low, high) in zip(relative, units, bounds, strict=True)]

    floor, ceiling = 0.0, max(high / (r * n) for r, n, (_, high) in zip(relative, units, bounds, strict=True))
    for _ in range(200):
        middle = (floor + ceiling) / 2
        if sum(shares(middle)) < k:
            floor = middle
        else:
            ceiling = middle
    exact = shares(ceiling)
    counts = [max(low, math.floor(share)) for share, (low, _) in zip(exact, bounds, strict=True)]
    # Floating-point sums can leave a floor one unit high or low: hand out, or take back, what is missing.
    while (missing := k - sum(counts)) != 0:
        sign = 1 if missing > 0 else -1
        movable = [i for i, (low, high) in enumerate(bounds) if (counts[i] < high if sign > 0 else counts[i] > low)]
        movable.sort(key=lambda i: sign * (counts[i] - exact[i]))
        for i in movable[: abs(missing)]:
            counts[i] += sign
    return counts


def shrunk(start: int, end: int, left: float) -> int:
    """Units of a model, or of a layer, `left` of whose way from `start` to `end` remains."""
    return end + round(left * (start - end))


def density_bounds(units: int, low: float, high: float) -> tuple[int, int]:
    """(k_min, k_max) in units of a layer for densities [low, high]; at least one unit."""
    k_min = max(1, math.ceil(low * units - 1e-9))
    return k_min, max(k_min, min(units, math.floor(high * units + 1e-9)))
