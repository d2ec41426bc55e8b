"""Which full pages hold which prefix, who uses them, and which of those nobody uses goes first, pure.

A full page is named by a chained 64-bit hash: the hash of page i covers the tokens of pages 0 to i and a salt of the
tenant (`page_hashes`), so that equal hashes mean equal prefixes, and one tenant never learns what another one asked.
The tree itself takes them as numbers.

Prefixes form a tree (as in RadixAttention of SGLang), whose nodes are *pieces*: pages in a row that were always used
together. Because hashes are chained, a piece matches as a whole when its last hash does, so that using a prefix costs
as much as it has pieces, not pages. Who uses or pins a piece uses or pins all before it.

Pieces nobody uses are reclaimed in the order in which they were last used, and of one prefix the tail before the head:
what is before an idle piece is in use, pinned, or idle and reclaimed later. So what remains is always usable.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b

from core.free import Run, cut_head, cut_tail, extend


def page_hashes(
    tokens: Sequence[int], page_tokens: int, salt: str = "", *, after: int | None = None
) -> tuple[int, ...]:
    """A name for each full page of a prompt, 64 bits wide; the same in every process.

    BLAKE2b over the hash before, of `salt` for the first page, and the page's tokens as 4 bytes each. Whoever may
    share pages has the same salt. Where `tokens` follow on others, whose last page is named `after`, no salt is needed.
    """
    before = blake2b(salt.encode(), digest_size=8).digest() if after is None else after.to_bytes(8, "little")
    whole, page = struct.pack(f"<{len(tokens)}i", *tokens), 4 * page_tokens
    hashes = []
    for at in range(0, len(whole) - page + 1, page):
        before = blake2b(before + whole[at : at + page], digest_size=8).digest()
        hashes.append(int.from_bytes(before, "little"))
    return tuple(hashes)


class Piece:
    """Full pages in a row, behind those of `parent`."""

    __slots__ = ("children", "hashes", "owner", "parent", "pins", "refs", "runs", "stop")

    def __init__(self, parent: Piece | None, hashes: list[int], runs: list[Run], stop: int) -> None:
        self.parent = parent
        """None for the root, which has no pages."""
        self.children: dict[int, Piece] = {}
        """By their first hash."""
        self.hashes = hashes
        self.runs = runs
        self.stop = stop
        """Pages of the prefix to the end of this piece."""
        self.owner: object = None
        """The table for which the pages were bound, while they are in it."""
        self.refs = 0
        """Tables with this prefix."""
        self.pins = 0
        """Pins of this prefix."""

    def path(self) -> Iterator[Piece]:
        """From here to the head of the prefix."""
        piece = self
        while piece.parent is not None:
            yield piece
            piece = piece.parent


class Prefixes:
    """The tree. Calls cost O(pieces of the prefix + their runs), beside the copying of new hashes."""

    def __init__(self) -> None:
        self.root = Piece(None, [], [], 0)
        self._idle: OrderedDict[Piece, None] = OrderedDict()
        """Neither used nor pinned; the next to be reclaimed first."""
        self._pins: OrderedDict[str, Piece] = OrderedDict()
        """The ends of what is pinned, the least recent pin first."""
        self.idle_pages = 0
        """May be reclaimed."""
        self.pinned_pages = 0
        """Kept by pins alone."""
        self.asked_pages = 0
        self.hit_pages = 0
        self.reclaimed_pages = 0

    def cached(self, hashes: Sequence[int]) -> int:
        """How many leading hashes are held by a page."""
        piece, position = self.root, 0
        while position < len(hashes):
            child = piece.children.get(hashes[position])
            if child is None:
                break
            position += _match(child, hashes, position)
            piece = child
        return position

    def kept(self, hashes: Sequence[int]) -> int:
        """How many leading hashes are held by a page in use or pinned: using those takes no idle page."""
        piece, position = self.root, 0
        while position < len(hashes):
            child = piece.children.get(hashes[position])
            if child is None or not (child.refs or child.pins):
                break
            position += _match(child, hashes, position)
            piece = child
        return position

    def share(self, hashes: Sequence[int], room: int) -> tuple[Piece, int]:
        """One more table with the leading pages that are held: the last piece, and pages that no table had before.

        It ends early where it would take more than `room` idle pages, which others were promised.
        """
        last = self._leading(hashes, room)
        woken = 0
        for piece in last.path():
            if not piece.refs:
                woken += len(piece.hashes)
                self._wake(piece)
            piece.refs += 1
        self.asked_pages += len(hashes)
        self.hit_pages += last.stop
        return last, woken

    def seal(self, owner: object, piece: Piece, hashes: Sequence[int], runs: list[Run]) -> tuple[Piece, list[Run]]:
        """A table that has the prefix to the end of `piece` has all of `hashes`, the new ones in the pages of `runs`.

        Returns its last piece, and what is to be freed: pages with the same hashes which no table has. Where a table
        has them, those stay in the tree, and this one uses them too, so that nothing behind them is ever cut off.
        """
        freed: list[Run] = []
        while piece.stop < len(hashes):
            child = piece.children.get(hashes[piece.stop])
            if child is None:
                fresh = list(hashes[piece.stop :])
                if piece.owner is owner and piece.refs == 1 and not (piece.pins or piece.children):
                    piece.hashes += fresh
                    piece.stop = len(hashes)
                    extend(piece.runs, runs)
                else:
                    child = Piece(piece, fresh, runs, len(hashes))
                    child.owner, child.refs = owner, 1
                    piece.children[fresh[0]] = child
                    piece = child
                break
            child = self._head(child, _match(child, hashes, piece.stop))
            mine = cut_head(runs, len(child.hashes))
            if not child.refs:
                self._wake(child)
                freed += child.runs
                child.runs, child.owner = mine, owner
            child.refs += 1
            piece = child
        return piece, freed

    def drop(self, owner: object, last: Piece) -> int:
        """One table less with the prefix to the end of `last`; by how many more pages are only in tables of others."""
        left = 0
        for piece in last.path():
            piece.refs -= 1
            if piece.owner is owner:
                piece.owner = None
                left += len(piece.hashes) if piece.refs else 0
            elif not piece.refs:
                left -= len(piece.hashes)
            if not piece.refs:
                self._rest(piece)
        return left

    def reclaim(self, count: int) -> list[Run]:
        """Forget the `count` idle pages that were used least recently; at least so many must be idle."""
        self.idle_pages -= count
        self.reclaimed_pages += count
        runs: list[Run] = []
        while count:
            piece = next(iter(self._idle))
            size = len(piece.hashes)
            if size > count:
                del piece.hashes[size - count :]
                piece.stop -= count
                return runs + cut_tail(piece.runs, count)
            del self._idle[piece]
            assert piece.parent is not None
            del piece.parent.children[piece.hashes[0]]
            runs += piece.runs
            count -= size
        return runs

    def pin(self, name: str, hashes: Sequence[int], room: int) -> int:
        """Keep the leading pages that are held, under a name that pins nothing yet; ends early as `share` does."""
        last = self._leading(hashes, room)
        for piece in last.path():
            if not (piece.refs or piece.pins):
                self._wake(piece)
                self.pinned_pages += len(piece.hashes)
            piece.pins += 1
        if last.stop:
            self._pins[name] = last
        return last.stop

    def unpin(self, name: str) -> None:
        """End a pin; its pages count as used just now."""
        last = self._pins.pop(name, None)
        if last is not None:
            for piece in last.path():
                piece.pins -= 1
                if not (piece.refs or piece.pins):
                    self.pinned_pages -= len(piece.hashes)
                    self._rest(piece)

    def yield_pins(self, count: int) -> tuple[str, ...]:
        """End the least recent pins until `count` more pages are idle, or no pin is left; returns their names."""
        wanted = self.idle_pages + count
        names: list[str] = []
        while self._pins and self.idle_pages < wanted:
            name = next(iter(self._pins))
            self.unpin(name)
            names.append(name)
        return tuple(names)

    def pieces(self) -> Iterator[Piece]:
        """All of them, those before others first."""
        stack = list(self.root.children.values())
        while stack:
            piece = stack.pop()
            yield piece
            stack += piece.children.values()

    def check(self, tables: Iterable[Piece]) -> None:
        """Invariants, given the last piece of every table."""
        refs: dict[Piece, int] = {}
        for last in tables:
            for piece in last.path():
                refs[piece] = refs.get(piece, 0) + 1
        pins: dict[Piece, int] = {}
        for last in self._pins.values():
            for piece in last.path():
                pins[piece] = pins.get(piece, 0) + 1
        pieces = list(self.pieces())
        assert refs.keys() | pins.keys() | self._idle.keys() <= set(pieces), "a piece in use was reclaimed"
        for piece in pieces:
            size = len(piece.hashes)
            assert piece.parent is not None
            assert piece.parent.children[piece.hashes[0]] is piece
            assert size == sum(stop - start for start, stop in piece.runs) == piece.stop - piece.parent.stop > 0
            assert (piece.refs, piece.pins) == (refs.get(piece, 0), pins.get(piece, 0))
            assert (piece in self._idle) == (not piece.refs and not piece.pins)
            assert piece.owner is None or piece.refs
        assert self.idle_pages == sum(len(piece.hashes) for piece in self._idle)
        assert self.pinned_pages == sum(len(piece.hashes) for piece in pieces if piece.pins and not piece.refs)
        order = {piece: place for place, piece in enumerate(self._idle)}
        for piece, place in order.items():
            assert piece.parent is not None
            assert order.get(piece.parent, place + 1) > place, "a head would be reclaimed before its tail"

    def _leading(self, hashes: Sequence[int], room: int) -> Piece:
        """The end of the leading pages that are held, as far as they take no more than `room` idle pages."""
        piece = self.root
        while piece.stop < len(hashes):
            child = piece.children.get(hashes[piece.stop])
            if child is None:
                break
            count = _match(child, hashes, piece.stop)
            if not (child.refs or child.pins):
                count = min(count, room)
                room -= count
            if not count:
                break
            piece = self._head(child, count)
        return piece

    def _head(self, piece: Piece, count: int) -> Piece:
        """The first `count` pages of a piece as one; whoever has the piece has both then.

        The head of an idle piece has no place among the idle ones: the caller uses or pins it at once.
        """
        if count == len(piece.hashes):
            return piece
        parent = piece.parent
        assert parent is not None
        head = Piece(parent, piece.hashes[:count], cut_head(piece.runs, count), parent.stop + count)
        head.owner, head.refs, head.pins = piece.owner, piece.refs, piece.pins
        parent.children[head.hashes[0]] = head
        del piece.hashes[:count]
        piece.parent = head
        head.children[piece.hashes[0]] = piece
        return head

    def _wake(self, piece: Piece) -> None:
        """A piece that no table has gets used, or an idle one pinned."""
        if piece.pins:
            self.pinned_pages -= len(piece.hashes)
        else:
            self.idle_pages -= len(piece.hashes)
            self._idle.pop(piece, None)

    def _rest(self, piece: Piece) -> None:
        """No table has the piece any more."""
        if piece.pins:
            self.pinned_pages += len(piece.hashes)
        else:
            self.idle_pages += len(piece.hashes)
            self._idle[piece] = None


def _match(piece: Piece, hashes: Sequence[int], position: int) -> int:
    """How many leading pages of a piece, whose first one does, have the hashes from `position` on."""
    mine = piece.hashes
    size = min(len(mine), len(hashes) - position)
    if mine[size - 1] == hashes[position + size - 1]:
        return size
    low, high = 1, size - 1
    while low < high:
        middle = (low + high + 1) // 2
        if mine[middle - 1] == hashes[position + middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low
