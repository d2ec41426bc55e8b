"""A consistent-hash ring: a key's worker changes only where a worker next to it comes or goes. Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from hashlib import blake2b

MASK = 2**64 - 1


def mix64(word: int) -> int:
    """A 64-bit word whose every bit depends on every bit of `word` (the finaliser of SplitMix64); invertible."""
    word = (word + 0x9E3779B97F4A7C15) & MASK
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & MASK
    return word ^ (word >> 31)


class Ring:
    """Names at `points` places each. Places depend on the name alone, never on who else is there or came first."""

    def __init__(self, points: int) -> None:
        self._points = points
        self._places: dict[str, tuple[int, ...]] = {}
        self._sorted: list[tuple[int, str]] = []
        self.names: tuple[str, ...] = ()

    def set(self, names: Iterable[str]) -> None:
        """These are on it, and nobody else."""
        now = tuple(sorted(set(names)))
        if now == self.names:
            return
        there, self.names = self._places, now
        self._places = {name: there.get(name) or _places(name, self._points) for name in now}
        # Most stay where they are, in order: sorting that with a few more behind it takes little more than a look.
        kept = [each for each in self._sorted if each[1] in self._places]
        kept += sorted((place, name) for name in now if name not in there for place in self._places[name])
        self._sorted = sorted(kept)

    def pair(self, key: int) -> tuple[str, ...]:
        """The two names of a 64-bit key, different ones; fewer where there are fewer names."""
        if len(self.names) < 2:
            return self.names
        first = self._next(mix64(key), "")
        return first, self._next(mix64(~key & MASK), first)

    def _next(self, place: int, other: str) -> str:
        """The first name after a place that is not the other one."""
        ring = self._sorted
        at = bisect_right(ring, (place, ""))
        while True:
            name = ring[at % len(ring)][1]
            if name != other:
                return name
            at += 1


def _places(name: str, points: int) -> tuple[int, ...]:
    words = (blake2b(f"{name}/{point}".encode(), digest_size=8).digest() for point in range(points))
    return tuple(int.from_bytes(word, "big") for word in words)
