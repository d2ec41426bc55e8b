"""Which prompts of a prefill worker wait for pages that another worker has, and whose pages. Pure; part of its policy.

The gateway says with a prompt who may have more of it (`core.messages.Holding`); whether pulling that beats computing
it is `Fetching`'s rule, with this worker's own cost model and the lanes that it has measured. A prompt is out of the
line while its pages come, so that nobody waits behind it; when they are here, or when it is clear that they will not
be, it is a prompt like others, with more or fewer tokens to compute. One that begins like a prompt whose pages are on
their way waits for those, and asks for none.

| parameter | unit | default | meaning |
|---|---|---|---|
| message_s | s | 0.002 | from the question to the announcement and from the last byte to the word of it: two messages |
| run_s | s | 4e-6 | to post a run of neighbouring pages |
| latency_s | s | 0.005 | most that counts of a lane's latency: it was measured once, perhaps on a busy machine |
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from core.errors import LocalError
from core.kv import KvShape
from core.messages import Holding
from core.pages import Pages
from core.request import Ticket
from core.worker import Identity
from core.worker import Lane as Measured
from scheduler.cost import CostModel, Lane
from scheduler.fetching import Fetching, Holder
from scheduler.prefill_events import DropFetch, FetchOver, FetchPages

MESSAGE_S = 0.002
RUN_S = 4e-6
LATENCY_S = 0.005


@dataclass(slots=True)
class _Fetch:
    ticket: Ticket
    first: int
    """Name of the first page that was missing."""
    waiting: list[str]
    """Prompts that need it."""
    dropped: bool = False


class Fetches:
    """All fetches of one prefill worker. Each `FetchPages` is answered by one `FetchOver`, also after `DropFetch`."""

    def __init__(
        self,
        me: Identity,
        shape: KvShape,
        ledger: Pages,
        cost: CostModel,
        message_s: float = MESSAGE_S,
        run_s: float = RUN_S,
        latency_s: float = LATENCY_S,
    ) -> None:
        self._me = me
        self._page_tokens = shape.page_tokens
        self._ledger = ledger
        self._message_s, self._run_s, self._latency_s = message_s, run_s, latency_s
        self._rule = Fetching(shape, replace(cost, lanes=()))
        self._busy_until: dict[Identity, float] = {}
        """By workers whose pages can be read."""
        self._fetches: dict[str, _Fetch] = {}
        self._coming: dict[int, _Fetch] = {}
        """By the first page that was missing."""
        self._for: dict[str, _Fetch] = {}
        """By the prompts that wait."""
        self._counter = 0
        self.fetched = 0
        """That brought pages."""
        self.failed = 0
        """That brought none, for whatever reason, and were not given up here."""
        self.fetched_nbytes = 0

    def __len__(self) -> int:
        return len(self._fetches)

    def reprice(self, cost: CostModel) -> None:
        """Steps take as long as this model says, from now on."""
        self._rule = replace(self._rule, cost=replace(cost, lanes=self._rule.cost.lanes))

    def reach(self, lane: Measured) -> None:
        """A worker's pages can be read, as was measured; or cannot, if nothing carries them."""
        source, name = lane.source, str(lane.source)
        lanes = [each for each in self._rule.cost.lanes if each.name != name]
        self._busy_until.pop(source, None)
        if lane.transport and lane.gbytes_per_s > 0:
            latency_s = min(lane.latency_us / 1e6, self._latency_s)
            lanes.append(Lane(name, self._message_s + latency_s, self._run_s, 1e-9 / lane.gbytes_per_s))
            self._busy_until[source] = 0.0
        self._rule = replace(self._rule, cost=replace(self._rule.cost, lanes=tuple(lanes)))

    def ask(
        self,
        key: str,
        prompt: int,
        prefix: tuple[int, ...],
        holdings: Iterable[Holding],
        first_s: float,
        now: float,
    ) -> list[FetchPages] | None:
        """What to do so that a prompt can wait for pages, nothing where they are coming; None: it need not wait.

        `prefix` are the names of the pages that it could use, `first_s` its predicted time to first token if it
        computes all that is not here. It waits until `over`, or until it is dropped.
        """
        here = self._ledger.cached(prefix)
        if here == len(prefix):
            return None
        fetch = self._coming.get(prefix[here])
        if fetch is not None:
            self._wait(key, fetch)
            return []
        holders = [
            Holder(
                each.worker,
                min(each.tokens // self._page_tokens, len(prefix)),
                str(each.worker),
                max(0.0, self._busy_until[each.worker] - now),
            )
            for each in holdings
            if each.worker in self._busy_until
        ]
        if not holders:
            return None
        done = here * self._page_tokens
        wait_s = max(0.0, first_s - self._rule.cost.prefill_s([(prompt - done, done)]))
        plan = self._rule.plan(prompt, here, self._ledger.available, wait_s, holders)
        if plan is None:
            return None
        self._counter += 1
        ticket = Ticket(self._me, self._counter, 1, plan.worker, self._me)
        fetch = self._fetches[ticket.key] = self._coming[prefix[here]] = _Fetch(ticket, prefix[here], [])
        self._wait(key, fetch)
        self._busy_until[plan.worker] = now + plan.pull_s
        return [FetchPages(ticket, prefix[: plan.pages], now + plan.within_s)]

    def over(self, event: FetchOver) -> tuple[str, ...]:
        """A fetch has ended; the prompts that waited for it, in the order in which they began to."""
        fetch = self._fetches.pop(event.key, None)
        if fetch is None:
            raise LocalError(f"fetch over: got {event.key}, want one that was asked for")
        if not fetch.dropped:
            del self._coming[fetch.first]
        if event.nbytes:
            self.fetched += 1
            self.fetched_nbytes += event.nbytes
        else:
            self.failed += not fetch.dropped
        for key in fetch.waiting:
            del self._for[key]
        return tuple(fetch.waiting)

    def drop(self, key: str, reason: str) -> list[DropFetch]:
        """A prompt waits no more, if it did; what nobody waits for is given up."""
        fetch = self._for.pop(key, None)
        if fetch is None:
            return []
        fetch.waiting.remove(key)
        if fetch.waiting:
            return []
        fetch.dropped = True
        del self._coming[fetch.first]
        return [DropFetch(fetch.ticket.key, reason)]

    def source(self, key: str) -> str:
        """From whom the pages come that a prompt waits for."""
        return self._for[key].ticket.source.name

    def check(self, waiting: set[str]) -> None:
        """Invariant: exactly these prompts wait, each for one fetch under way."""
        assert self._for.keys() == waiting
        for key, fetch in self._for.items():
            assert key in fetch.waiting
            assert self._fetches[fetch.ticket.key] is fetch
        for ticket, fetch in self._fetches.items():
            assert ticket == fetch.ticket.key
            assert fetch.dropped == (not fetch.waiting) == (self._coming.get(fetch.first) is not fetch)
        assert sum(len(fetch.waiting) for fetch in self._fetches.values()) == len(waiting)
        assert len(self._coming) == sum(not fetch.dropped for fetch in self._fetches.values())
        assert {lane.name for lane in self._rule.cost.lanes} == {str(worker) for worker in self._busy_until}

    def _wait(self, key: str, fetch: _Fetch) -> None:
        fetch.waiting.append(key)
        self._for[key] = fetch
