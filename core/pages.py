"""The page ledger: who owns every page of an arena, in one place, pure.

A page is free, belongs to one holder in one state, is shared, or is cached; it changes owner in one call. A *promise*
is memory without pages: it lowers what others may take until its holder binds pages from it, so that pages are
bound late. The allocator prefers long runs of neighbouring pages, because a run is one read on the wire.

Full pages can be *named* by the prefix they hold (core/prefix.py). A named page may be in the tables of several
holders. It has one state all the same: that of the holder that bound it while it is there, then SHARED until the last
of the others leaves, then CACHED. A cached page is memory that nobody holds: it counts as available unless it is
pinned, and is reclaimed when free pages run out, which is when pages are bound and not yet when they are promised.

A call costs O(runs of the table and pieces of its prefix + log of free runs), and what it takes to copy the page
numbers or hashes that go in and out.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from itertools import pairwise

from core.errors import LocalError
from core.free import FreeRuns, Run, cut_tail, extend, joined, numbers
from core.kv import PageRun
from core.prefix import Piece, Prefixes


class Owner(StrEnum):
    """What a page is being used for."""

    FREE = "free"
    PREFILLING = "prefilling"
    HANDING_OFF = "handing_off"
    PULLING = "pulling"
    DECODING = "decoding"
    IN_DOUBT = "in_doubt"
    SCRATCH = "scratch"
    SHARED = "shared"
    """In tables, but no longer in that of the holder that bound it."""
    CACHED = "cached"
    """In no table; kept for its prefix until the memory is wanted."""


class _Holding:
    """A holder's table: `shared` pages that others bound, then its own."""

    __slots__ = ("count", "numbers", "prefix", "promised", "runs", "shared", "state")

    def __init__(self, state: Owner, prefix: Piece) -> None:
        self.state = state
        self.runs: list[Run] = []
        """The whole table, joined where the next page is the next number."""
        self.count = 0
        self.shared = 0
        self.promised = 0
        self.prefix = prefix
        """The end of what is named; of pages up to there that it does not own, the table may have copies."""
        self.numbers: tuple[int, ...] | None = None
        """The table, if somebody asked since it changed."""

    @property
    def own(self) -> int:
        """Pages that have the holder's state."""
        return self.count - self.shared

    def append(self, runs: Sequence[Run], count: int) -> None:
        """`count` pages more, which are these runs."""
        extend(self.runs, runs)
        self.count += count
        self.numbers = None

    def cut(self, count: int) -> list[Run]:
        """Take the last `count` pages off; the last run comes first."""
        self.count -= count
        self.numbers = None
        return cut_tail(self.runs, count)

    def between(self, first: int, last: int) -> list[Run]:
        """Pages number `first` to before `last` of the table, found from its end, where it grows."""
        cut: list[Run] = []
        position = self.count
        for start, stop in reversed(self.runs):
            position -= stop - start
            low, high = max(first - position, 0), min(last - position, stop - start)
            if low < high:
                cut.append((start + low, start + high))
            if position <= first:
                break
        cut.reverse()
        return cut


class Pages:
    """The ledger of an arena of `total` pages. Every call that cannot be honoured raises and changes nothing."""

    def __init__(self, total: int) -> None:
        if total < 1:
            raise LocalError(f"pages: got {total}, want at least 1")
        self.total = total
        self._free = FreeRuns(total)
        self._prefixes = Prefixes()
        self._promised = 0
        self._holdings: dict[str, _Holding] = {}
        self._counts: dict[Owner, int] = dict.fromkeys(Owner, 0)
        """Of states that holders have, and of SHARED."""

    @property
    def available(self) -> int:
        """Pages that are not held, promised or pinned: free ones, and cached ones to be reclaimed."""
        return self._free.count + self._prefixes.idle_pages - self._promised

    @property
    def promised(self) -> int:
        """Pages promised and not yet bound."""
        return self._promised

    @property
    def pinned(self) -> int:
        """Cached pages that are pinned: they are not available."""
        return self._prefixes.pinned_pages

    @property
    def asked_pages(self) -> int:
        """Pages asked for by `share` so far."""
        return self._prefixes.asked_pages

    @property
    def hit_pages(self) -> int:
        """Of `asked_pages` those that were there."""
        return self._prefixes.hit_pages

    @property
    def reclaimed_pages(self) -> int:
        """Cached pages whose memory was wanted so far."""
        return self._prefixes.reclaimed_pages

    def counts(self) -> dict[Owner, int]:
        """Pages in every state; the sum is `total`."""
        cached = self._prefixes.idle_pages + self._prefixes.pinned_pages
        return {**self._counts, Owner.FREE: self._free.count, Owner.CACHED: cached}

    def holders(self) -> tuple[str, ...]:
        """Everybody who holds or was promised pages."""
        return tuple(self._holdings)

    def pages(self, holder: str) -> tuple[int, ...]:
        """The holder's pages in the order of its table, shared ones first; empty if unknown."""
        holding = self._holdings.get(holder)
        if holding is None:
            return ()
        if holding.numbers is None:
            holding.numbers = numbers(holding.runs)
        return holding.numbers

    def runs(self, holder: str) -> tuple[PageRun, ...]:
        """The same as runs of neighbours."""
        holding = self._holdings.get(holder)
        return tuple([PageRun(start, stop - start) for start, stop in holding.runs]) if holding else ()

    def count(self, holder: str) -> int:
        """How many pages the holder has; 0 if unknown."""
        holding = self._holdings.get(holder)
        return holding.count if holding else 0

    def own(self, holder: str) -> int:
        """How many pages are in the holder's state; others of its table were bound by somebody else. 0 if unknown."""
        holding = self._holdings.get(holder)
        return holding.own if holding else 0

    def promise(self, holder: str, count: int, state: Owner) -> None:
        """Set `count` more pages aside for `holder`, whose pages will be in `state`."""
        if count < 0 or count > self.available:
            raise LocalError(f"promise to {holder}: got {count} pages, want at most {self.available}")
        self._holding(holder, state).promised += count
        self._promised += count

    def keep(self, holder: str, count: int, state: Owner) -> None:
        """Have `count` pages in all set aside for `holder`, beside those it has: more or fewer than before."""
        holding = self._holdings.get(holder)
        before = holding.promised if holding else 0
        if count < 0 or count - before > self.available:
            raise LocalError(f"promise to {holder}: got {count} pages, want at most {before + self.available}")
        if holding is None or holding.state is not state:
            holding = self._holding(holder, state)
        holding.promised = count
        self._promised += count - before
        if not count and not holding.count:
            del self._holdings[holder]

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
        room = promised + self._free.count + self._prefixes.idle_pages - self._promised
        if count < 0 or count > room:
            raise LocalError(f"bind for {holder}: got {count} pages, want at most {room}")
        if holding is None or holding.state is not state:
            holding = self._holding(holder, state)
        if promised:
            used = min(count, promised)
            holding.promised -= used
            self._promised -= used
        if not count:
            return ()
        free = self._free
        if count > free.count:
            free.give(self._prefixes.reclaim(count - free.count))
        runs = holding.runs
        fresh = free.take(count, runs[-1][1] if runs else None)
        extend(runs, fresh)
        bound = numbers(fresh)
        holding.numbers = None if holding.count else bound
        holding.count += count
        self._counts[state] += count
        return bound

    def trim(self, holder: str, count: int) -> int:
        """Free the holder's last `count` pages, but none that is named; returns how many. A promise does not grow."""
        if count < 0:
            raise LocalError(f"trim of {holder}: got {count} pages, want at least 0")
        holding = self._holdings.get(holder)
        if holding is None:
            return 0
        count = min(count, holding.count - holding.prefix.stop)
        self._free.give(holding.cut(count))
        self._counts[holding.state] -= count
        return count

    def move(self, holder: str, state: Owner, *, to: str | None = None) -> None:
        """Change the state of a holder's own pages, and the owner of all to `to` if given, promise included."""
        holding = self._holdings.get(holder)
        if holding is None:
            raise LocalError(f"move: got unknown holder {holder!r}")
        _check_state(state)
        if to is not None and to != holder:
            if to in self._holdings:
                raise LocalError(f"move: {to!r} holds pages already")
            self._holdings[to] = self._holdings.pop(holder)
        own = holding.count - holding.shared
        self._counts[holding.state] -= own
        self._counts[state] += own
        holding.state = state

    def release(self, holder: str) -> int:
        """End all of `holder`'s pages and promises; returns how many pages it had, 0 if it is unknown.

        Named pages stay: with who shares them, else cached. The others are free.
        """
        holding = self._holdings.pop(holder, None)
        if holding is None:
            return 0
        self._promised -= holding.promised
        self._counts[holding.state] -= holding.own
        count = holding.count
        if holding.prefix.parent is None:
            self._free.give(reversed(holding.runs))
            return count
        for piece in holding.prefix.path():
            if piece.owner is holding:
                self._free.give(holding.cut(holding.count - piece.stop))
                holding.cut(len(piece.hashes))
        self._counts[Owner.SHARED] += self._prefixes.drop(holding, holding.prefix)
        self._free.give(holding.cut(holding.count - holding.shared))
        return count

    def cached(self, hashes: Sequence[int]) -> int:
        """How many leading `hashes` are those of pages that can be shared now."""
        return self._prefixes.cached(hashes)

    def need(self, count: int, hashes: Sequence[int]) -> int:
        """How many of the available pages a holder of `count` pages would take if it shared what is cached of `hashes`.

        Cached pages that nobody holds are available, so sharing them takes them like binding others does.
        """
        return count - self._prefixes.kept(hashes)

    def share(self, holder: str, hashes: Sequence[int], state: Owner, *, promised: bool = False) -> int:
        """Start the table of `holder`, which has no page yet, with the leading cached pages; returns how many.

        Fewer than are cached where the rest is promised to others. A promise of the holder is left as it is, unless
        it was `promised` these pages, too: then they are taken from it first, as by `bind`.
        """
        holding = self._holdings.get(holder)
        if holding is not None and holding.count:
            raise LocalError(f"share for {holder}: it holds {holding.count} pages, want none")
        holding = self._holding(holder, state)
        promise = holding.promised if promised else 0
        holding.prefix, woken = self._prefixes.share(hashes, self.available + promise)
        holding.shared = holding.prefix.stop
        if promise:
            used = min(promise, holding.shared)
            holding.promised -= used
            self._promised -= used
        for piece in reversed(list(holding.prefix.path())):
            holding.append(piece.runs, len(piece.hashes))
        self._counts[Owner.SHARED] += woken
        return holding.shared

    def name(self, holder: str, hashes: Sequence[int]) -> None:
        """The holder's first `len(hashes)` pages are full, will not change, and hold these: others may share them.

        Call it again with a longer list as more pages fill: only the new ones cost. A page whose hash another page has
        already is not shared if that one is in a table, and takes its place if it is not.
        """
        holding = self._holdings.get(holder)
        if holding is None or len(hashes) > holding.count:
            raise LocalError(f"name for {holder}: got {len(hashes)} hashes, want at most {self.count(holder)}")
        named = holding.prefix.stop
        if len(hashes) < named:
            return
        if named and holding.prefix.hashes[-1] != hashes[named - 1]:
            raise LocalError(f"name for {holder}: got {hashes[named - 1]} for page {named - 1}, which has another hash")
        if len(hashes) > named:
            runs = holding.between(named, len(hashes))
            holding.prefix, freed = self._prefixes.seal(holding, holding.prefix, hashes, runs)
            self._free.give(freed)

    def pin(self, name: str, hashes: Sequence[int]) -> int:
        """Keep the leading cached pages from being reclaimed, in place of what `name` pinned before; returns how many.

        Fewer than are cached where the rest is promised to others. How long is for the caller: call `unpin`.
        """
        self._prefixes.unpin(name)
        return self._prefixes.pin(name, hashes, self.available)

    def unpin(self, name: str) -> None:
        """End a pin, if there is one."""
        self._prefixes.unpin(name)

    def yield_pins(self, count: int) -> tuple[str, ...]:
        """End the least recent pins until `count` more pages are available, or none is left; returns their names."""
        return self._prefixes.yield_pins(count)

    def check(self) -> None:
        """Invariants: every page is in exactly one place, counts agree, promises are covered."""
        self._free.check()
        self._prefixes.check([holding.prefix for holding in self._holdings.values()])
        taken = list(self._free.runs())
        mine = dict.fromkeys(Owner, 0)
        for holding in self._holdings.values():
            table = holding.runs
            assert holding.shared <= holding.prefix.stop <= holding.count == sum(stop - start for start, stop in table)
            assert all(before[1] != after[0] for before, after in pairwise(table)), "runs not joined"
            assert holding.numbers is None or holding.numbers == numbers(table)
            for piece in holding.prefix.path():
                if piece.stop <= holding.shared or piece.owner is holding:
                    assert holding.between(piece.stop - len(piece.hashes), piece.stop) == joined(numbers(piece.runs))
            taken += holding.between(holding.shared, holding.count)
            mine[holding.state] += holding.own
        for piece in self._prefixes.pieces():
            if piece.owner is None:
                taken += piece.runs
                mine[Owner.SHARED if piece.refs else Owner.CACHED] += len(piece.hashes)
        taken.sort()
        assert [start for start, _ in taken] == [0, *(stop for _, stop in taken[:-1])], "a page is lost or owned twice"
        assert taken[-1][1] == self.total
        assert all(start < stop for start, stop in taken)
        assert self.counts() == {**mine, Owner.FREE: self._free.count}
        assert self._promised == sum(holding.promised for holding in self._holdings.values())
        assert 0 <= self._promised <= self._free.count + self._prefixes.idle_pages, "more promised than available"

    def _holding(self, holder: str, state: Owner) -> _Holding:
        holding = self._holdings.get(holder)
        if holding is None:
            _check_state(state)
            holding = self._holdings[holder] = _Holding(state, self._prefixes.root)
        elif holding.state is not state:
            raise LocalError(f"{holder} holds {holding.state} pages: got {state}, want the same state")
        return holding


_NOT_HELD = frozenset({Owner.FREE, Owner.SHARED, Owner.CACHED})


def _check_state(state: Owner) -> None:
    if state in _NOT_HELD:
        raise LocalError(f"state: got {state}, which is that of pages without a holder")
