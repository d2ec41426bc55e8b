"""What a router's decision costs with 10, 100 and 1,000 workers, without a clock: calls, and comparisons of loads.

Loads are numbers that count how often they are compared, so that nothing which looks at every worker can hide in the
built-in functions that no profiler sees into. `bench/scale.py` has the seconds.
"""

from __future__ import annotations

import functools
import gc
import json
import random
import sys
from dataclasses import dataclass, replace
from typing import Any

import pytest

from core.messages import Accept, Finished, Handed, Offer, Prompt, Reject, SlotFree, Tokens
from core.request import Request
from core.sampling import Sampling
from core.worker import Identity, Role
from scheduler.dualmap import HOLDERS, DualMap, DualMapConfig
from scheduler.least_loaded import LeastLoaded
from scheduler.placement import Need, Workers
from scheduler.ring import Ring
from scheduler.router import Router, RouterConfig
from scheduler.router_events import Arrived, End, ToOne, WorkerDown, WorkerUp
from tests.cast import GATEWAY, worker

SIZES = (10, 100, 1000)
SPARE = 0.1
"""Of the cost at the smallest size: so much is chance."""


class Load(float):
    """A load that counts."""

    compared = 0

    def __lt__(self, other):
        Load.compared += 1
        return float.__lt__(self, other)

    def __eq__(self, other):
        Load.compared += 1
        return float.__eq__(self, other)

    __hash__ = float.__hash__


def counting(kind: Any) -> Any:
    class Counting(kind):
        def queue_load(self, post):
            return Load(super().queue_load(post))

        def decode_load(self, post):
            return Load(super().decode_load(post))

    return Counting()


@dataclass
class Spent:
    calls: float = 0.0
    compared: float = 0.0


def spent(do, times=1):
    """On average."""
    calls, before = 0, Load.compared

    def profile(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    former = sys.getprofile()
    gc.disable()  # others have callbacks there, which are calls as well
    sys.setprofile(profile)
    try:
        do()
    finally:
        sys.setprofile(former)
        gc.enable()
    return Spent(calls / times, (Load.compared - before) / times)


class Gateway:
    """A router among so many workers, with a request for each of them under way."""

    def __init__(self, size, kind=DualMap):
        self.dice = random.Random(1)
        self.router = Router(GATEWAY, RouterConfig(), counting(kind))
        self.live: list = []
        self.asked: list = []
        self.counter = 0
        self.prefills = [Identity(f"prefill-{n}", 1) for n in range(size * 2 // 5)]
        self.decodes = [Identity(f"decode-{n}", 1) for n in range(size - len(self.prefills))]
        self.up = spent(lambda: [self.join(n) for n in range(size)], size)
        for _ in range(size):
            self.come()

    def join(self, number):
        role = Role.PREFILL if number < len(self.prefills) else Role.DECODE
        who = (self.prefills + self.decodes)[number]
        self.router.on(WorkerUp(worker(who, role, pages=10_000)), 0.0)

    def do(self, event):
        commands = self.router.on(event, 0.0)
        self.asked += [each.message for each in commands if isinstance(each, ToOne)]
        return commands

    def come(self):
        self.counter += 1
        prefix: tuple[int, ...] = (self.dice.randrange(10 * len(self.prefills)),)
        prefix += tuple(self.dice.randrange(2**40) for _ in range(3))
        request = Request("r", (0,) * self.dice.randrange(16, 200), Sampling(8), 100.0, prefix=prefix)
        return self.do(Arrived(self.counter, request))

    def settle(self):
        """All offers are accepted; the oldest requests run to their ends."""
        asked, self.asked = self.asked, []
        for message in asked:
            if isinstance(message, Offer):
                self.do(Accept(message.ticket))
            elif isinstance(message, Prompt):
                self.live.append(message.ticket)
        while len(self.live) > len(self.prefills):
            ticket = self.live.pop(0)
            self.do(Tokens(ticket, 0, (1,)))
            self.do(Handed(ticket, ()))
            self.do(Tokens(ticket, 1, (1,) * 7))
            ends = self.do(Finished(ticket, "length", 8))
            assert isinstance(ends[-1], End)


def grows_no_faster_than_the_logarithm(costs):
    """Ten times as many workers again add about what ten times as many did before; a look at all would add tenfold."""
    for what in ("calls", "compared"):
        small, middle, large = (getattr(costs[size], what) for size in SIZES)
        assert large - middle <= 2 * max(0.0, middle - small) + SPARE * small, costs


@pytest.mark.parametrize("kind", [DualMap, LeastLoaded])
def test_a_request_from_arrival_to_end(kind):
    costs = {}
    for size in SIZES:
        gateway = Gateway(size, kind)
        gateway.settle()
        gateway.settle()

        def some(gateway=gateway):
            for _ in range(60):
                gateway.come()
                gateway.settle()

        costs[size] = spent(some, 60)
        gateway.router.check()
    grows_no_faster_than_the_logarithm(costs)


def test_one_that_is_refused_four_times_and_waits_until_somebody_has_room():
    """All others said that they have room, for less than it needs: none of them is asked in vain."""
    costs = {}
    for size in SIZES:
        gateway = Gateway(size)
        gateway.settle()
        for who in gateway.prefills:
            gateway.do(SlotFree(who, 4))

        def waits(gateway=gateway):
            for _ in range(30):
                gateway.asked.clear()
                gateway.come()
                while gateway.asked:
                    offer = gateway.asked.pop()
                    assert isinstance(offer, Offer)
                    gateway.do(Reject(offer.ticket, "full", 0.0))
            for who in gateway.prefills[:4]:
                gateway.do(SlotFree(who, 10_000))

        costs[size] = spent(waits, 30)
        assert len(gateway.router._parked)
        gateway.router.check()
    grows_no_faster_than_the_logarithm(costs)


def test_one_that_waits_is_offered_to_the_first_with_room_and_no_other_is_looked_at():
    costs = {}
    for size in SIZES:
        gateway = Gateway(size)
        gateway.settle()
        for who in gateway.prefills:
            gateway.do(SlotFree(who, 10_000))

        def parks(gateway=gateway):
            for _ in range(20):
                gateway.asked.clear()
                gateway.come()
                for _ in range(4):
                    offer = gateway.asked.pop()
                    gateway.do(Reject(offer.ticket, "full", 0.0))
                    gateway.do(SlotFree(offer.ticket.source, 10_000))

        costs[size] = spent(parks, 20)
        gateway.router.check()
    grows_no_faster_than_the_logarithm(costs)


def test_workers_that_come_and_say_something_new_cost_no_look_at_the_others():
    """Ranks are made once for all that came, when somebody asks for them."""
    ups = {size: Gateway(size).up for size in SIZES}
    assert ups[1000].calls <= 1.1 * ups[10].calls
    assert ups[1000].compared == 0
    gateway = Gateway(100)
    version = gateway.router._workers.version
    who = gateway.prefills[3]
    again = worker(who, Role.PREFILL, pages=10_000)
    gateway.do(WorkerUp(replace(again, build="other")))
    assert gateway.router._workers.version == version
    gateway.do(WorkerUp(replace(again, pages=9_999)))
    assert gateway.router._workers.version == version + 1


def test_a_worker_that_is_quiet_or_lost_costs_no_look_at_those_that_it_never_had():
    costs = {}
    for size in SIZES:
        gateway = Gateway(size)
        gateway.settle()
        who = Identity("decode-new", 1)
        gateway.do(WorkerUp(worker(who, Role.DECODE, pages=10_000)))
        gateway.come()

        def leaves(gateway=gateway, who=who):
            gateway.router._leave_quiet(0.0)
            assert gateway.do(WorkerDown(who)) == []

        gateway.router._workers.hush(who, True)
        gateway.router._workers.spares(who, decodes=True)
        costs[size] = spent(leaves)
        assert len(gateway.router) >= size
        gateway.router.check()
    assert costs[1000].calls <= costs[10].calls


def test_what_was_there_last_is_remembered_however_seldom_somebody_asked():
    """All workers come and go before anybody asks what they have room for."""
    router = Router(GATEWAY, RouterConfig(), DualMap())
    p, d = Identity("prefill-0", 1), Identity("decode-0", 1)
    router.on(WorkerUp(worker(p, Role.PREFILL)), 0.0)
    assert router.missing() == "no decode worker is ready"
    router.on(WorkerUp(worker(d, Role.DECODE, pages=7)), 0.0)
    assert router.missing() is None
    router.on(WorkerDown(d), 1.0)
    assert router.missing() == "no decode worker is ready"
    assert router.most_tokens()(4, 1) == 7 * 4 - 4
    router.on(WorkerUp(worker(d, Role.DECODE, pages=9)), 2.0)
    router.on(WorkerUp(replace(worker(d, Role.DECODE, pages=9), ready=False)), 2.0)
    assert router.most_tokens()(4, 1) == 9 * 4 - 4
    router.check()


def test_a_ring_is_the_same_whoever_came_in_which_order():
    names = [f"w-{number}" for number in range(40)]
    dice, ring = random.Random(2), Ring(16)
    for _ in range(60):
        some = dice.sample(names, dice.randrange(41))
        ring.set(some)
        fresh = Ring(16)
        fresh.set(reversed(some))
        keys = [dice.randrange(2**64) for _ in range(20)]
        assert [ring.pair(key) for key in keys] == [fresh.pair(key) for key in keys]


def fetching(size):
    """Workers that fetch, and a placement that knows of some pages at each."""
    placement = DualMap(DualMapConfig(known_pages=64))
    posts = Workers(placement.queue_load, placement.decode_load)
    for number in range(size):
        who = Identity(f"prefill-{number}", 1)
        posts.up(replace(worker(who, Role.PREFILL, pages=10_000), fetches=True))
    placement.fewest(Need(1, 1), posts)
    for number, post in enumerate(posts.prefills.posts):
        placement.kept(post, (1, 2, 1000 + number))
    return placement, posts


def test_who_has_a_prompts_pages_is_found_without_a_look_at_every_worker():
    costs = {}
    for size in SIZES:
        placement, posts = fetching(size)
        source, other = posts.prefills.posts[:2]
        need = Need(20, 28, (1, 2, 1001, 7))
        assert placement.holders(source, need, 2, posts) == ((other.identity, 3),)
        costs[size] = spent(functools.partial(placement.holders, source, need, 2, posts))
    assert costs[1000].calls == costs[10].calls


def test_holders_are_those_whose_memory_has_the_pages_whatever_came_and_went():
    dice = random.Random(4)
    placement, posts = fetching(12)
    chains = [tuple(range(9000 + 10 * chain, 9000 + 10 * chain + dice.randrange(2, 9))) for chain in range(12)]
    for step in range(600):
        everyone = posts.prefills.posts
        match dice.randrange(12):
            case 0 if len(everyone) > 2:
                posts.down(dice.choice(everyone).identity)
            case 1:
                who = Identity(f"prefill-{dice.randrange(12)}", 1 + step)
                posts.up(replace(worker(who, Role.PREFILL), fetches=dice.random() < 0.9))
            case 2:
                placement.restore(json.loads(json.dumps(placement.document())))
            case _:
                chain = dice.choice(chains)
                placement.kept(dice.choice(everyone), chain[: dice.randrange(1, len(chain) + 1)])
        source, prefix = dice.choice(posts.prefills.posts), dice.choice(chains)
        pages = dice.randrange(len(prefix) + 1)
        if not posts.fetches:
            continue
        memory = {post.identity: placement._known[post.identity] for post in posts.prefills.posts
                  if post.identity in placement._known and post is not source}  # fmt: skip
        there = sorted((-known.pages(prefix), who) for who, known in memory.items() if known.pages(prefix) > pages)
        want = tuple((who, -less) for less, who in there[:HOLDERS])
        assert placement.holders(source, Need(20, 28, prefix), pages, posts) == want
