"""Nelder and Mead's simplex: the least of a function of a few numbers, from its values alone. Deterministic."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Point = tuple[float, ...]


def least(
    of: Callable[[Point], float], start: Sequence[float], steps: Sequence[float], calls: int, *, small: float = 1e-4
) -> tuple[Point, float]:
    """The best point found and its value, after `calls` calls, or when all values of the simplex are within `small`.

    `steps`: how far the first simplex reaches along each coordinate. Coefficients are the usual 1, 2, 1/2, 1/2.
    """
    asked = 0

    def value(point: Point) -> float:
        nonlocal asked
        asked += 1
        return of(point)

    origin = tuple(start)
    corners = [(value(origin), origin)]
    for axis, step in enumerate(steps):
        corner = tuple(each + step * (at == axis) for at, each in enumerate(origin))
        corners.append((value(corner), corner))
    while asked < calls:
        corners.sort()
        (low, best), (second, _), (high, worst) = corners[0], corners[-2], corners[-1]
        if high - low <= small * (abs(low) + 1e-12):
            break
        centre = tuple(sum(axis) / len(start) for axis in zip(*[point for _, point in corners[:-1]], strict=True))

        def along(share: float, centre: Point = centre, worst: Point = worst) -> Point:
            return tuple(c + share * (c - w) for c, w in zip(centre, worst, strict=True))

        mirrored = along(1.0)
        found = value(mirrored)
        if found < low:
            further = along(2.0)
            beyond = value(further)
            corners[-1] = min((found, mirrored), (beyond, further))
        elif found < second:
            corners[-1] = (found, mirrored)
        else:
            nearer = along(0.5 if found < high else -0.5)
            within = value(nearer)
            if within < min(found, high):
                corners[-1] = (within, nearer)
            else:
                shrunk = [tuple((b + c) / 2 for b, c in zip(best, corner, strict=True)) for _, corner in corners[1:]]
                corners = [(low, best), *[(value(corner), corner) for corner in shrunk]]
    low, best = min(corners)
    return best, low
