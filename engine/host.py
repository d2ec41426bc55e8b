"""Which pages of the host's memory hold KV of sequences that were taken out of an arena. No torch here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from core.errors import LocalError


class HostPool:
    """`pages` pages beside an arena, each free or one sequence's. A call that cannot be honoured changes nothing."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self._free = list(reversed(range(pages)))
        self._held: dict[str, list[int]] = {}

    @property
    def used(self) -> int:
        """Pages that sequences have."""
        return self.pages - len(self._free)

    def take(self, sequence: str, count: int) -> list[int]:
        """So many pages for a sequence that has none; `LocalError` if it has some, or if there are too few."""
        if sequence in self._held:
            raise LocalError(f"sequence {sequence!r} is in host memory already")
        if count > len(self._free):
            raise LocalError(f"sequence {sequence!r}: got {count} pages for host memory, {len(self._free)} are free")
        held = [self._free.pop() for _ in range(count)]
        self._held[sequence] = held
        return held

    def of(self, sequence: str, count: int) -> list[int]:
        """The pages of a sequence, in order; `LocalError` if they are not so many."""
        held = self._held.get(sequence)
        if held is None:
            raise LocalError(f"sequence {sequence!r} is not in host memory")
        if len(held) != count:
            raise LocalError(f"sequence {sequence!r}: got {count} pages for the {len(held)} in host memory")
        return held

    def drop(self, sequence: str) -> None:
        """Free the pages of a sequence; one that has none is ignored."""
        self._free += reversed(self._held.pop(sequence, ()))


def runs(pages: Sequence[int], held: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """Pages of an arena and as many of the host, cut where either are not next to each other."""
    start = 0
    for at in range(1, len(pages) + 1):
        if at == len(pages) or pages[at] != pages[at - 1] + 1 or held[at] != held[at - 1] + 1:
            count = at - start
            yield slice(pages[start], pages[start] + count), slice(held[start], held[start] + count)
            start = at
