"""Whether a prompt's pages are pulled from a worker that has them, or computed again. Pure.

After Mooncake (FAST'25), algorithm 1 (KVCache-centric scheduling): where another instance has a longer prefix than the
one that is to prefill, the time to first token there is what the transfer takes, and the queue, and the prefill of the
rest. Mooncake adds them up, and asks for a prefix that is longer by a ratio before it considers a transfer. Here a pull
goes on while the request waits for its turn, so that only what is longer than the wait delays it, and no ratio is
needed: what a few more pages save is little by itself, and the pull's fixed cost outweighs it.

It serves both uses of a fetch: a prefix that another prefill worker has, and the answer of a session's last turn, which
only the decode worker has that generated it. Nobody waits for a fetch that is of no use any more: `Plan.within_s` is
when computing would have been as soon.

| parameter | unit | default | meaning |
|---|---|---|---|
| gain | times | 1.5 | what is saved must be so many times the delay, because a pull also takes memory and a lane |
| quantile | share | 0.9 | a pull is taken to be as long as this share of the cost model's own errors allow |
| run_pages | pages | 16 | in one run of neighbours, as far as nobody knows before the source has answered |
| digest_byte_s | s/byte | 2.5e-10 | to digest a byte at both ends: 8 GB/s at either |
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from core.errors import LocalError
from core.kv import KvShape
from core.worker import Identity
from scheduler.cost import CostModel


@dataclass(frozen=True, slots=True)
class FetchConfig:
    """See the table above."""

    gain: float = 1.5
    quantile: float = 0.9
    run_pages: int = 16
    digest_byte_s: float = 2.5e-10

    def __post_init__(self) -> None:
        if self.gain < 1 or self.run_pages < 1 or self.digest_byte_s < 0 or not 0 <= self.quantile <= 1:
            raise LocalError(f"fetch: got {self}, want gain and run_pages from 1 on, a share, and seconds from 0 on")


@dataclass(frozen=True, slots=True)
class Holder:
    """A worker that has leading pages of a prompt."""

    worker: Identity
    pages: int
    lane: str
    """The cost model's name for the way from there."""
    busy_s: float = 0.0
    """Until that way is free."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Fetch the first `pages` pages of the prompt, as far as they are not here, from `worker`."""

    worker: Identity
    pages: int
    pull_s: float
    """What it will take."""
    saved_s: float
    """What computing them would take."""
    within_s: float
    """After this time it would have been as good to compute them."""


@dataclass(frozen=True, slots=True)
class Fetching:
    """The rule, for one model on one kind of worker."""

    shape: KvShape
    cost: CostModel
    config: FetchConfig = field(default=FetchConfig())

    def plan(
        self, prompt: int, cached_pages: int, room_pages: int, wait_s: float, holders: Iterable[Holder]
    ) -> Plan | None:
        """From whom to fetch pages for a prompt of so many tokens, if that is worth it; O(holders).

        `cached_pages` of its pages are here, `room_pages` more may be taken, and it will wait for `wait_s` in any
        case. The page with the last token is computed for the first token's sake, whoever has it.
        """
        most = min((prompt - 1) // self.shape.page_tokens, cached_pages + room_pages)
        best: Plan | None = None
        best_rank: tuple[float, Identity] | None = None
        for holder in holders:
            pages = min(holder.pages, most)
            if pages <= cached_pages:
                continue
            pull_s = self._pull_s(pages - cached_pages, holder)
            saved_s = self._prefill_s(prompt, cached_pages) - self._prefill_s(prompt, pages)
            late_s = max(0.0, pull_s - wait_s)
            rank = late_s - saved_s, holder.worker
            if late_s * self.config.gain < saved_s and (best_rank is None or rank < best_rank):
                best, best_rank = Plan(holder.worker, pages, pull_s, saved_s, wait_s + saved_s), rank
        return best

    def _pull_s(self, pages: int, holder: Holder) -> float:
        nbytes, runs = pages * self.shape.page_nbytes, -(-pages // self.config.run_pages)
        seconds = self.cost.transfer_s(nbytes, runs, holder.lane)
        margin = self.cost.margin("transfer", self.config.quantile)
        return holder.busy_s + seconds * (1 + margin) + nbytes * self.config.digest_byte_s

    def _prefill_s(self, prompt: int, pages: int) -> float:
        done = pages * self.shape.page_tokens
        return self.cost.prefill_s([(prompt - done, done)])
