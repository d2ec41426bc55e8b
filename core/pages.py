"""The page ledger: who owns every page of an arena, in one place, pure.

A page is free or belongs to exactly one holder in exactly one state; it changes owner in one call. A *promise*
is memory without pages: it lowers what others may take until its holder binds pages from it, so that pages are
bound late. The allocator prefers long runs of neighbouring pages, because a run is one read on the wire.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from core.errors import LocalError


class Owner(StrEnum):
    """What a page is being used for."""

    FREE = "free"
    PREFILLING = "prefilling"
    HANDING_OFF = "handing_off"
    PULLING = "pulling"
    DECODING = "decoding"
    IN_DOUBT = "in_doubt"
    SCRATCH = "scratch"


@dataclass(slots=True)
class _Holding:
    state: Owner
    pages: list[int] = field(default_factory=list)
    promised: int = 0


class Pages:
    """The ledger of an arena of `total` pages. Every call that cannot be honoured raises and changes nothing."""

    def __init__(self, total: int) -> None:
        if total < 1:
            raise LocalError(f"pages: got {total}, want at least 1")
        self.total = total
        self._starts: list[int] = [0]
        self._length: dict[int, int] = {0: total}
        self._free = total
        self._promised = 0
        self._holdings: dict[str, _Holding] = {}
        self._counts: dict[Owner, int] = dict.fromkeys(Owner, 0)

    @property
    def available(self) -> int:
        """Pages that are neither held nor promised."""
        return self._free - self._promised

    @property
    def promised(self) -> int:
        """Pages promised and not yet bound."""
        return self._promised

    def counts(self) -> dict[Owner, int]:
        """Pages in every state; the sum is `total`."""
        return {**self._counts, Owner.FREE: self._free}

    def holders(self) -> tuple[str, ...]:
        """Everybody who holds or was promised pages."""
        return tuple(self._holdings)

    def pages(self, holder: str) -> tuple[int, ...]:
        """The holder's pages in the order they were bound; empty if unknown."""
        holding = self._holdings.get(holder)
        return tuple(holding.pages) if holding else ()

    def promise(self, holder: str, count: int, state: Owner) -> None:
        """Set `count` more pages aside for `holder`, whose pages will be in `state`."""
        if count < 0 or count > self.available:
            raise LocalError(f"promise to {holder}: got {count} pages, want at most {self.available}")
        self._holding(holder, state).promised += count
        self._promised += count

    def unpromise(self, holder: str) -> None:
        """Give back what `holder` was promised and has not bound; its pages stay."""
        holding = self._holdings.get(holder)
        if holding:
            self._promised -= holding.promised
            holding.promised = 0

    def bind(self, holder: str, count: int, state: Owner) -> tuple[int, ...]:
        """Give `holder` pages, from its promise first, then from what is available; returns the new pages."""
        holding = self._holdings.get(holder)
        promised = holding.promised if holding else 0
        if count < 0 or count > promised + self.available:
            raise LocalError(f"bind for {holder}: got {count} pages, want at most {promised + self.available}")
        holding = self._holding(holder, state)
        used = min(count, holding.promised)
        holding.promised -= used
        self._promised -= used
        fresh = self._take(count, holding.pages[-1] + 1 if holding.pages else None)
        holding.pages.extend(fresh)
        self._counts[state] += count
        return tuple(fresh)

    def move(self, holder: str, state: Owner, *, to: str | None = None) -> None:
        """Change the state of a holder's pages, and their owner to `to` if given, promise included."""
        holding = self._holdings.get(holder)
        if holding is None:
            raise LocalError(f"move: got unknown holder {holder!r}")
        if to is not None and to != holder:
            if to in self._holdings:
                raise LocalError(f"move: {to!r} holds pages already")
            self._holdings[to] = self._holdings.pop(holder)
        self._counts[holding.state] -= len(holding.pages)
        self._counts[state] += len(holding.pages)
        holding.state = state

    def release(self, holder: str) -> int:
        """Free all pages and promises of `holder`; returns the pages freed, 0 if it is unknown."""
        holding = self._holdings.pop(holder, None)
        if holding is None:
            return 0
        self._promised -= holding.promised
        self._counts[holding.state] -= len(holding.pages)
        self._give(holding.pages)
        return len(holding.pages)

    def check(self) -> None:
        """Invariants: every page is in exactly one place, counts agree, promises are covered."""
        free = [page for start in self._starts for page in range(start, start + self._length[start])]
        held = [page for holding in self._holdings.values() for page in holding.pages]
        assert sorted(free + held) == list(range(self.total)), "a page is lost or owned twice"
        assert len(free) == self._free
        assert sum(self.counts().values()) == self.total
        assert self._promised == sum(holding.promised for holding in self._holdings.values())
        assert 0 <= self._promised <= self._free, "more promised than free"
        for state in Owner:
            if state is not Owner.FREE:
                mine = sum(len(h.pages) for h in self._holdings.values() if h.state is state)
                assert self._counts[state] == mine, state
        ends = [start + self._length[start] for start in self._starts]
        assert all(end < start for end, start in zip(ends, self._starts[1:], strict=False)), "free runs not merged"

    def _holding(self, holder: str, state: Owner) -> _Holding:
        holding = self._holdings.setdefault(holder, _Holding(state))
        if holding.state is not state:
            raise LocalError(f"{holder} holds {holding.state} pages: got {state}, want the same state")
        return holding

    def _take(self, count: int, after: int | None) -> list[int]:
        """Free pages for a holder: behind its last page, else the tightest run that fits, else the longest runs."""
        taken: list[int] = []
        if after is not None and after in self._length:
            taken += self._cut(after, min(count, self._length[after]))
        while len(taken) < count:
            need = count - len(taken)
            fitting = [start for start in self._starts if self._length[start] >= need]
            if fitting:
                start = min(fitting, key=lambda s: (self._length[s], s))
            else:
                start = max(self._starts, key=lambda s: (self._length[s], -s))
            taken += self._cut(start, min(need, self._length[start]))
        return taken

    def _cut(self, start: int, count: int) -> list[int]:
        if count == 0:
            return []
        length = self._length.pop(start)
        index = bisect_left(self._starts, start)
        if length > count:
            self._starts[index] = start + count
            self._length[start + count] = length - count
        else:
            del self._starts[index]
        self._free -= count
        return list(range(start, start + count))

    def _give(self, pages: Iterable[int]) -> None:
        for page in sorted(pages):
            start, length = page, 1
            index = bisect_left(self._starts, page)
            if index and self._starts[index - 1] + self._length[self._starts[index - 1]] == page:
                start = self._starts[index - 1]
                length += self._length[start]
                index -= 1
            else:
                insort(self._starts, page)
            if index + 1 < len(self._starts) and self._starts[index + 1] == page + 1:
                length += self._length.pop(page + 1)
                del self._starts[index + 1]
            self._length[start] = length
            self._free += 1
