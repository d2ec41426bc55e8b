"""How much memory the requests of a decode worker will take together: two rules of admission. Pure.

`WorstCase` promises every row all it may ever need: nobody is ever evicted, and much memory is never used. `PastFuture`
admits by the peak of what rows will hold *at the same time*, with each row's length forecast from the past
(Past-Future, ASPLOS'25): sort rows by predicted end; when one ends, those that end later have grown by as many tokens
as steps were taken, and

    peak = max over predicted ends e of the sum over rows j with end_j >= e of (tokens_j + e - now)

In absolute steps of the worker a row's tokens at step s are `offset + s` as long as it runs, whatever the time is now,
so that one sorted list holds all rows, and none of them is touched as steps go by.

| rule | admits iff | sets aside |
|---|---|---|
| worst_case | the sum of longest lengths, in whole pages, fits | that sum |
| past_future | the sum of forecast lengths fits (quick), or the peak does | what rows grow by until the next decision |
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Any, Protocol

FORMAT = 1


@dataclass(slots=True)
class Claim:
    """What a request, or one of its rows, holds and will hold; a request that is not here yet as if it joined now."""

    key: str
    tokens: int
    """Of each row's own at `step`: those with KV and the newest; the prompt's that rows share are in `fixed`."""
    step: int
    left: int
    """Tokens that each row will probably add."""
    rows: int = 1
    """Continuations that grow alike; 0 for pages that only stay."""
    fixed: int = 0
    """Pages that they share."""


class Admission(Protocol):
    """Who holds memory and who may have some. Claims are added once and removed once, by key."""

    @property
    def promised(self) -> int:
        """Pages to set aside for all claims, those that they hold included."""
        ...

    def add(self, claim: Claim) -> None:
        """Count a claim."""
        ...

    def remove(self, key: str) -> None:
        """Count it no longer."""
        ...

    def fits(self, claim: Claim, room: int, step: int) -> bool:
        """Whether `room` pages suffice for all claims and this one, which has not been added."""
        ...


class WorstCase:
    """Whole lengths for everybody at once; give it claims whose `left` is the most that is allowed."""

    def __init__(self, page_tokens: int) -> None:
        self._page_tokens = page_tokens
        self._pages: dict[str, int] = {}
        self.promised = 0

    def add(self, claim: Claim) -> None:
        self._pages[claim.key] = pages = whole_pages(claim, self._page_tokens)
        self.promised += pages

    def remove(self, key: str) -> None:
        self.promised -= self._pages.pop(key)

    def fits(self, claim: Claim, room: int, step: int) -> bool:
        return self.promised + whole_pages(claim, self._page_tokens) <= room


class PastFuture:
    """The future peak, in absolute steps; every row is counted with one open page, so that whole pages suffice.

    Ends are rounded up to whole pages of steps, and what ends together is one entry: that errs by less than a page a
    row, and only for the rows that end at the peak. Adding and removing cost O(log entries); the test costs O(1) where
    all forecast lengths fit together, else O(entries), which is the longest forecast in pages at most.
    """

    def __init__(self, page_tokens: int) -> None:
        self._page_tokens = page_tokens
        self._claims: dict[str, Claim] = {}
        self._ends: list[int] = []
        """Ascending, in pages of steps; each with what ends there."""
        self._ending: dict[int, _Ending] = {}
        self._whole = 0
        """Pages of all forecast lengths at once."""
        self._fixed = 0
        self.promised = 0
        self.quick = 0
        """Tests that were passed because all forecast lengths fit together."""
        self.peaks = 0
        """Tests that were passed because the peak fits."""

    def add(self, claim: Claim) -> None:
        self._claims[claim.key] = claim
        self._whole += whole_pages(claim, self._page_tokens)
        self._fixed += claim.fixed
        if claim.rows:
            self._place(claim)

    def remove(self, key: str) -> None:
        claim = self._claims.pop(key)
        self._whole -= whole_pages(claim, self._page_tokens)
        self._fixed -= claim.fixed
        if claim.rows:
            self._displace(claim)

    def fits(self, claim: Claim, room: int, step: int) -> bool:
        if self._whole + whole_pages(claim, self._page_tokens) <= room:
            self.quick += 1
            return True
        if claim.rows:
            self._place(claim)
        peak = claim.fixed + self.peak(step)
        if claim.rows:
            self._displace(claim)
        self.peaks += peak <= room
        return peak <= room

    def peak(self, step: int) -> int:
        """The most pages that all claims will hold together, seen from `step`: from the last end back to the first."""
        self._renew(step)
        page_tokens, ending = self._page_tokens, self._ending
        peak = offsets = rows = 0
        for end in reversed(self._ends):
            here = ending[end]
            offsets += here.offsets
            rows += here.rows
            held = offsets + rows * end * page_tokens
            if held > peak:
                peak = held
        return self._fixed - (-peak // page_tokens)

    def document(self) -> dict[str, Any]:
        """All claims as JSON; `of` reads them back."""
        return {
            "format": FORMAT,
            "page_tokens": self._page_tokens,
            "claims": [list(astuple(claim)) for claim in self._claims.values()],
        }

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> PastFuture:
        """What `document` describes."""
        if document.get("format") != FORMAT:
            raise ValueError(f"past-future: format: got {document.get('format')!r}, wanted {FORMAT}")
        rule = cls(document["page_tokens"])
        for claim in document["claims"]:
            rule.add(Claim(*claim))
        return rule

    def _place(self, claim: Claim) -> None:
        end = -(-(claim.step + claim.left) // self._page_tokens)
        ending = self._ending.get(end)
        if ending is None:
            ending = self._ending[end] = _Ending()
            insort(self._ends, end)
        ending.rows += claim.rows
        ending.offsets += claim.rows * (claim.tokens - claim.step + self._page_tokens - 1)
        ending.claims[claim.key] = claim

    def _displace(self, claim: Claim) -> None:
        end = -(-(claim.step + claim.left) // self._page_tokens)
        ending = self._ending[end]
        ending.rows -= claim.rows
        ending.offsets -= claim.rows * (claim.tokens - claim.step + self._page_tokens - 1)
        del ending.claims[claim.key]
        if not ending.claims:
            del self._ending[end]
            del self._ends[bisect_left(self._ends, end)]

    def _renew(self, step: int) -> None:
        """What should have ended by now has not even joined: it is counted as if it joined now."""
        while self._ends and self._ends[0] * self._page_tokens <= step:
            for claim in list(self._ending[self._ends[0]].claims.values()):
                self._displace(claim)
                claim.step = step
                self._place(claim)


class _Ending:
    """Claims that end together."""

    __slots__ = ("claims", "offsets", "rows")

    def __init__(self) -> None:
        self.rows = 0
        self.offsets = 0
        """Tokens at step 0 of all their rows: a claim is a straight line until its end."""
        self.claims: dict[str, Claim] = {}


def whole_pages(claim: Claim, page_tokens: int) -> int:
    """Pages of a claim at its predicted end."""
    return claim.fixed - claim.rows * (-(claim.tokens + claim.left) // page_tokens)
