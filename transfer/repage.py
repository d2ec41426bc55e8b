"""Reads of a peer whose pages hold more or fewer tokens than ours: in whole pages, laid out anew here, or in ranges.

Such a peer's pages hold just the bytes that ours need, in another order: where one page's tokens are as many as k
pages', both have ``[layer, K|V, head]`` lanes, and a lane is in one piece on one side and in k on the other. There are
two ways to bring them.

*In ranges*: each piece of a lane is read to its place (`transfer/plan.py`). They are small: 16 tokens of one head of
128 two-byte numbers are 4 KiB, and 4,096 tokens of a model with 8 heads and 32 layers are 131,072 of them.

*Laid out*: the peer's pages are read as they are, in the large reads that alike pages have, into those of ours that
they will fill; then the lanes are put in order, a block at a time through a copy of it that stays in the cache, just
before its digests are computed. Nothing but those pages is written, so the sink's rules for reads that fail, or linger
in doubt, hold as they are, and neither a buffer nor a word to the source is needed.

`Cost.lays_out` says which is quicker for pieces of a size. Where a sequence ends in pages of theirs that are larger
than what is left of ours, there is no room for these as they are: the last tokens come in ranges in any case.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.errors import LocalError
from core.kv import KvShape, PageRun, page_runs, pages_of
from transfer.plan import Bytes, Cost, Layout, copy, reshard, spans
from transfer.transport import Span


@dataclass(frozen=True, slots=True)
class Reading:
    """What to read, and of how many of our pages, from the first one on, the bytes are to be put in order then."""

    spans: tuple[Span, ...]
    raw_pages: int


def block_pages(ours: int, theirs: int, most: int) -> int:
    """How many of our pages to lay out at once: about `most`, and as many as are whole pages of theirs, too."""
    unit = math.lcm(ours, theirs) // ours
    return max(1, most // unit) * unit


def reading(
    kv: KvShape,
    theirs: int,
    source: Sequence[PageRun],
    pages: Sequence[int],
    first_page: int,
    tokens: int,
    cost: Cost,
) -> Reading:
    """How to bring `tokens` tokens out of `source`, pages of `theirs` tokens at a peer, into `pages` of shape `kv`.

    The first of `pages` is the sequence's page `first_page`, where one of theirs begins as well. Raises LocalError if
    there are not as many pages on either side as these tokens have.
    """
    ours = kv.page_tokens
    both = math.lcm(ours, theirs)
    if first_page * ours % both:
        raise LocalError(f"pull: got token {first_page * ours} as the first, want one where {theirs} begin as well")
    counts = -(-tokens // theirs), -(-tokens // ours)
    got = sum(run.count for run in source), len(pages)
    if got != counts or min((run.count for run in source), default=0) < 1:
        raise LocalError(f"pull: got {got} pages on both sides for {tokens} tokens, want {counts}")
    there = pages_of(source)
    raw = 0
    if cost.lays_out(min(ours, theirs) * kv.row_nbytes):
        # All, or all but a last part for whose pages, as they are, there is no room here.
        raw = tokens if counts[0] * theirs <= counts[1] * ours else tokens // both * both
    raw_theirs, raw_ours = -(-raw // theirs), -(-raw // ours)
    found = _whole(kv, theirs, page_runs(there[:raw_theirs]), page_runs(pages[:raw_ours]))
    if raw < tokens:
        sides = Layout(replace(kv, page_tokens=theirs)), Layout(kv)
        (ranges,) = reshard(*sides, there[raw_theirs:], pages[raw_ours:], raw, tokens)
        found += spans(ranges)
    return Reading(tuple(found), raw_ours)


def lay_out(arena: Bytes, kv: KvShape, theirs: int, pages: Sequence[int], tokens: int) -> None:
    """Put `pages` of `arena`, which hold the bytes of a peer's pages of `theirs` tokens, in our order.

    They are `tokens` tokens, from one on where a page of each side begins.
    """
    flat: NDArray[Any] = arena if isinstance(arena, np.ndarray) else np.frombuffer(arena, dtype=np.uint8)
    bodies = flat.reshape(-1).view(np.uint8).reshape(-1, kv.page_nbytes)
    (ranges,) = reshard(
        Layout(replace(kv, page_tokens=theirs)), Layout(kv), range(-(-tokens // theirs)), pages, 0, tokens
    )
    copy(ranges, bodies[np.asarray(pages)], bodies)


def _whole(kv: KvShape, theirs: int, source: Sequence[PageRun], target: Sequence[PageRun]) -> list[Span]:
    """The fewest spans that bring all bytes of `source` in order to the beginning of `target`."""
    unit = theirs * kv.token_nbytes
    found: list[Span] = []
    room = _bytes(target, kv.page_nbytes)
    at = left = 0
    for start, nbytes in _bytes(source, unit):
        while nbytes:
            if not left:
                at, left = next(room)
            size = min(nbytes, left)
            found.append(Span(start, at, size))
            start, nbytes, at, left = start + size, nbytes - size, at + size, left - size
    return found


def _bytes(runs: Sequence[PageRun], page_nbytes: int) -> Iterator[tuple[int, int]]:
    for run in runs:
        yield run.start * page_nbytes, run.count * page_nbytes
