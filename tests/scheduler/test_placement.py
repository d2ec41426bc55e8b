"""Who is asked first: a table for each strategy, and what all of them promise."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from core.messages import Accept, Finished, Handed, Offer, Reject, SlotFree, Tokens
from core.request import Request
from core.sampling import Sampling
from core.worker import Identity, Role
from scheduler.distserve import DistServe
from scheduler.dualmap import DualMap
from scheduler.least_loaded import LeastLoaded
from scheduler.placement import Load, Need, Placement, Post, Workers
from scheduler.ring import mix64
from scheduler.round_robin import RoundRobin
from scheduler.router import Router, RouterConfig
from scheduler.router_events import Arrived, ClientGone, End, ToOne, WorkerDown, WorkerUp
from scheduler.splitwise import Splitwise
from tests.cast import GATEWAY, worker

STRATEGIES: dict[str, Callable[[], Placement]] = {
    "least_loaded": LeastLoaded,
    "round_robin": RoundRobin,
    "splitwise": Splitwise,
    "distserve": DistServe,
    "distserve, apart": lambda: DistServe(paired=False),
    "dualmap": DualMap,
}
ROLES = {"p": Role.PREFILL, "d": Role.DECODE, "m": Role.MIXED}


def fleet(
    placement: Placement, *names: str, pages: int = 1000, mixed_alone: bool = False
) -> tuple[Workers, dict[str, Post]]:
    """Ready workers, "p1" a prefill worker and so on, and each by its name."""
    workers = Workers(placement.queue_load, placement.decode_load, mixed_alone=mixed_alone)
    for number, name in enumerate(names):
        workers.up(worker(Identity(name, number + 1), ROLES[name[0]], pages=pages))
    return workers, {post.identity.name: post for post in (*workers.prefills, *workers.decodes)}


def put(workers: Workers, source: Post, sink: Post, tokens: int, size: int = 0) -> Load:
    load = Load(source, sink, tokens, size or tokens)
    workers.put(load)
    return load


def order(placement: Placement, workers: Workers, need: Need) -> list[str]:
    return [post.identity.name for post in placement.sources(need, workers)]


def sinks(placement: Placement, workers: Workers, source: Post, need: Need) -> list[str]:
    return [post.identity.name for post in placement.sinks(source, need, workers)][:2]


# (queued tokens of each prompt at p1, p2, p3) -> who is asked first; (sizes at d1, d2, d3) -> who decodes.
@pytest.mark.parametrize(
    ("strategy", "queued", "first", "sizes", "decode"),
    [
        ("least_loaded", [(300,), (20, 20), (100,)], "p2", [(500,), (100, 100), (300,)], "d2"),
        ("least_loaded", [(7,), (7,), (8,)], "p1", [(9,), (8,), (8,)], "d2"),
        ("distserve", [(300,), (20, 20), (100,)], "p1", [(500,), (1, 1), ()], "d1"),
        ("distserve", [(1, 1), (20, 20), (900,)], "p3", [(), (), (5, 5)], "d3"),
        ("distserve, apart", [(300,), (20, 20), (100,)], "p1", [(500,), (1, 1), (5, 5)], "d1"),
        ("splitwise", [(300,), (20, 20), (100,)], "p2", [(500,), (100, 100), (300,)], "d2"),
        ("round_robin", [(300,), (), ()], "p1", [(500,), (), ()], "d1"),
        ("dualmap", [(300,), (20, 20), (100,)], "p2", [(500,), (100, 100), (300,)], "d2"),
    ],
)
def test_who_is_asked_first_and_who_decodes(strategy, queued, first, sizes, decode):
    placement = STRATEGIES[strategy]()
    workers, posts = fleet(placement, "p1", "p2", "p3", "d1", "d2", "d3")
    loads = []
    for number in range(3):
        source, sink = posts[f"p{number + 1}"], posts[f"d{number + 1}"]
        for tokens in queued[number]:
            loads.append(Load(source, sink, tokens, 0))
        for size in sizes[number]:
            loads.append(Load(source, sink, 0, size, queued=False))
    for load in loads:
        load.sink.held_tokens += load.size
        load.sink.rows += load.size > 0
        load.source.queue += load.queued
        load.source.queue_tokens += load.tokens
    for post in posts.values():
        workers.prefills.moved(post)
        workers.decodes.moved(post)
    need = Need(10, 20, wait_s=1.0)
    assert order(placement, workers, need)[0] == first
    assert sinks(placement, workers, posts[first], need)[0] == decode


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_everyone_is_asked_once_in_the_end(strategy):
    placement = STRATEGIES[strategy]()
    workers, posts = fleet(placement, "p1", "m1", "p2", "d1", "d2", "m2", "p3")
    rng = random.Random(5)
    for _ in range(30):
        source = rng.choice(list(workers.prefills.posts))
        put(workers, source, rng.choice(list(workers.decodes.posts)), rng.randrange(1, 300))
        need = Need(400, 420, prefix=(rng.getrandbits(64),) * rng.randrange(2), wait_s=1.0)
        asked = order(placement, workers, need)
        assert sorted(asked) == ["m1", "m2", "p1", "p2", "p3"]
        for name in asked:
            given = sinks(placement, workers, posts[name], need)
            assert given
            assert given == [name] or not any(sink[0] == "m" and name[0] == "m" for sink in given)
            assert len(set(given)) == len(given)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_mixed_worker_of_one_machine_keeps_its_own_and_is_handed_nothing(strategy):
    """Whoever is the lightest, and also when it cannot keep it."""
    placement = STRATEGIES[strategy]()
    workers, posts = fleet(placement, "p1", "m1", "p2", "d1", "d2", "m2", pages=200, mixed_alone=True)
    for number in range(40):
        put(workers, posts[f"p{1 + number % 2}"], posts[f"d{1 + number % 2}"], 60, 15)
        for need in (Need(100, 120, wait_s=1.0), Need(100, 780, wait_s=1.0)):
            asked = order(placement, workers, need)
            assert set(asked) == {"m1", "m2", "p1", "p2"}
            given = {name: sinks(placement, workers, posts[name], need) for name in asked}
            for name in ("m1", "m2"):
                assert given[name] == ([name] if need.size == 120 else [])
            assert all(given[name] and not {"m1", "m2"} & set(given[name]) for name in ("p1", "p2"))


@pytest.mark.parametrize(
    ("names", "pages", "fits", "much"),
    [
        # A mixed worker has 100 pages of 4 tokens, and a prompt of 40 tokens counts twice while it is its own.
        (("m1",), {}, 400 - 40, "no decode worker holds more than 360"),
        (("m1", "d1"), {"d1": 300}, 400 - 40, "no decode worker holds more than 360"),
        (("m1", "p1"), {"p1": 300}, 400 - 40, "no decode worker holds more than 360"),
        (("m1", "p1", "d1"), {"d1": 300}, 1200, "no decode worker holds more than 1200"),
        (("m1", "p1", "d1"), {"d1": 50}, 400 - 40, "no decode worker holds more than 360"),
    ],
)
def test_what_can_be_held_where_mixed_workers_are_alone(names, pages, fits, much):
    workers = Workers(LeastLoaded().queue_load, LeastLoaded().decode_load, mixed_alone=True)
    for number, name in enumerate(names):
        workers.up(worker(Identity(name, number + 1), ROLES[name[0]], pages=pages.get(name, 100)))
    assert workers.missing() is None
    most = workers.most_tokens()(40, 1)
    assert most is not None
    assert 40 + most in range(fits - 4, fits + 2)
    request = Request("r", (1,) * 40, Sampling(fits - 40), 9.0)
    assert workers.too_large(request) is None
    assert much in (workers.too_large(replace(request, sampling=Sampling(fits - 39))) or "")


def test_round_robin_takes_everyone_in_turn_and_a_refusal_disturbs_nobodys_turn():
    placement = RoundRobin()
    workers, posts = fleet(placement, "p1", "p2", "p3", "d1", "d2")
    needs = [Need(10, 20) for _ in range(4)]
    assert [order(placement, workers, need)[0] for need in needs] == ["p1", "p2", "p3", "p1"]
    assert order(placement, workers, needs[1]) == ["p2", "p3", "p1"]
    assert order(placement, workers, Need(10, 20))[0] == "p2"
    assert [sinks(placement, workers, posts["p1"], needs[0])[0] for _ in range(3)] == ["d1", "d2", "d1"]


def test_distserve_hands_over_within_a_segment_only():
    placement = DistServe()
    workers, posts = fleet(placement, "p1", "p2", "d1", "d2", "d3")
    need = Need(10, 20)
    assert sinks(placement, workers, posts["p1"], need) == ["d1", "d3"]
    assert sinks(placement, workers, posts["p2"], need) == ["d2"]
    put(workers, posts["p1"], posts["d1"], 1)
    assert sinks(placement, workers, posts["p1"], need) == ["d3", "d1"]
    workers.down(posts["d2"].identity)
    assert sinks(placement, workers, posts["p2"], need) == ["d3"]


def test_splitwise_uses_the_mixed_pool_over_the_thresholds():
    placement = Splitwise(prompt_tokens=100, token_share=0.5)
    workers, posts = fleet(placement, "p1", "p2", "d1", "m1", pages=50)
    need = Need(60, 80)
    assert order(placement, workers, need) == ["p1", "p2", "m1"]
    put(workers, posts["p1"], posts["d1"], 41, 20)
    assert order(placement, workers, need) == ["p2", "p1", "m1"]
    put(workers, posts["p2"], posts["d1"], 41, 20)
    assert order(placement, workers, need)[0] == "m1"
    assert sinks(placement, workers, posts["m1"], need) == ["m1"]
    assert sinks(placement, workers, posts["p1"], need)[0] == "m1", "40 of 200 tokens and 80 more are over a half"
    assert sinks(placement, workers, posts["p1"], replace_size(need, 60)) == ["d1"]


def replace_size(need: Need, size: int) -> Need:
    return Need(need.tokens, size, need.prefix, need.wait_s, need.gap_s)


def test_a_cached_prefix_counts_for_nothing_in_a_queue():
    placement = LeastLoaded()
    workers, posts = fleet(placement, "p1", "p2", "d1")
    load = put(workers, posts["p1"], posts["d1"], 100)
    put(workers, posts["p2"], posts["d1"], 30)
    assert order(placement, workers, Need(1, 1)) == ["p2", "p1"]
    workers.cached(load, 80)
    assert order(placement, workers, Need(1, 1)) == ["p1", "p2"]
    workers.check([load, Load(posts["p2"], posts["d1"], 30, 30)])
    workers.cached(load, 1000)
    assert posts["p1"].queue_tokens == 0
    workers.over(load)
    assert (posts["p1"].queue, posts["p1"].queue_tokens, posts["d1"].held_tokens) == (0, 0, 30)


def test_of_mixed_workers_with_equal_queues_the_one_with_most_free_memory_is_first():
    placement = LeastLoaded()
    workers, posts = fleet(placement, "m1", "m2", "m3", "p1", "d1")
    one = put(workers, posts["m1"], posts["m1"], 100, 900)
    two = put(workers, posts["m2"], posts["m2"], 30, 400)
    far = put(workers, posts["p1"], posts["m3"], 10, 200)
    assert order(placement, workers, Need(1, 1)) == ["m3", "p1", "m2", "m1"], "tokens that are queued come first"
    workers.computed(one)
    workers.computed(two)
    workers.computed(far)
    assert order(placement, workers, Need(1, 1)) == ["p1", "m3", "m2", "m1"]
    workers.moved(far, posts["d1"])
    assert order(placement, workers, Need(1, 1)) == ["m3", "p1", "m2", "m1"]
    workers.over(one)
    assert order(placement, workers, Need(1, 1)) == ["m1", "m3", "p1", "m2"]
    workers.check([two, Load(posts["p1"], posts["d1"], 0, 200, queued=False)])


def test_a_worker_that_comes_back_still_has_what_it_had():
    placement = LeastLoaded()
    workers, posts = fleet(placement, "p1", "d1")
    load = put(workers, posts["p1"], posts["d1"], 100)
    workers.down(posts["d1"].identity)
    workers.check([load])
    workers.up(posts["d1"].member)
    assert workers.get(posts["d1"].identity) is posts["d1"]
    workers.down(posts["d1"].identity)
    workers.over(load)
    workers.check([])
    workers.up(posts["d1"].member)
    assert workers.get(posts["d1"].identity) is not posts["d1"]


def step(machine: Router, rng: random.Random, live: dict, now: float, counter: int) -> list:
    """One seeded event: arrivals, answers, tokens, ends, room, losses."""
    kind = rng.randrange(10)
    if kind < 4 or not live:
        prefix = tuple(mix64(page + 97 * min(5, int(rng.paretovariate(1)))) for page in range(rng.randrange(6)))
        request = Request("r", (1,) * rng.randrange(1, 60), Sampling(rng.randrange(2, 9)), 50.0, prefix=prefix)
        return machine.on(Arrived(counter, request), now)
    key = rng.choice(sorted(live))
    ticket, stage = live[key]
    if stage == "offered":
        return machine.on(Accept(ticket, rng.randrange(3)) if kind < 8 else Reject(ticket, "busy", 1.0), now)
    if kind == 9:
        return machine.on(ClientGone(ticket.counter, "left"), now)
    if kind == 8:
        return machine.on(SlotFree(ticket.source, rng.randrange(80)), now)
    tokens = machine.on(Tokens(ticket, 0, (1,)), now) + machine.on(Tokens(ticket, 1, (2,)), now)
    tokens += machine.on(Handed(ticket, ()), now)
    return tokens + machine.on(Finished(ticket, "stop", 2, decoded=True), now)


def play(strategy: str, seed: int, again: bool = False) -> list:
    """What a router commands in 300 events; `again`: its placement is written down and read back half-way."""
    names = ("p1", "p2", "p3", "m1", "d1", "d2", "d3")
    placement = STRATEGIES[strategy]()
    machine = Router(GATEWAY, RouterConfig(max_queue_s=3.0, max_tries=2), placement)
    members = [worker(Identity(name, n + 1), ROLES[name[0]]) for n, name in enumerate(names)]
    for member in members:
        machine.on(WorkerUp(member), 0.0)
    rng, live, said, now = random.Random(seed), {}, [], 0.0
    for number in range(300):
        now += rng.random() / 5
        if again and number == 150:
            document = json.loads(json.dumps(placement.document()))
            placement = STRATEGIES[strategy]()
            placement.restore(document)
            assert json.loads(json.dumps(placement.document())) == document
            machine._placement = placement
        while (due := machine.deadline()) is not None and due <= now:
            commands = machine.on(None, due)
            said += commands
            follow(live, commands)
        if number % 97 == 96:
            member = rng.choice(members)
            commands = machine.on(WorkerDown(member.identity), now) + machine.on(WorkerUp(member), now)
        else:
            commands = step(machine, rng, live, now, number + 1)
        said += commands
        follow(live, commands)
        if number % 30 == 0:
            machine.check()
    return said


def follow(live: dict, commands: list) -> None:
    for command in commands:
        match command:
            case ToOne(_, Offer(ticket)):
                live[ticket.counter] = ticket, "offered"
            case ToOne(_, message) if hasattr(message, "request"):
                live[message.ticket.counter] = message.ticket, "placed"
            case End(counter):
                live.pop(counter, None)


def digest(strategy: str) -> str:
    return hashlib.sha256(repr(play(strategy, 3)).encode()).hexdigest()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_a_placement_remembers_goes_through_json(strategy):
    said = play(strategy, 1)
    assert said == play(strategy, 1, again=True)
    assert sum(isinstance(command, End) for command in said) > 30
    assert said != play(strategy, 2)


def test_another_process_with_another_hash_seed_decides_alike():
    root = Path(__file__).resolve().parents[2]
    names = list(STRATEGIES)
    script = f"from tests.scheduler.test_placement import digest\nfor n in {names!r}: print(digest(n))"
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=root,
        env={**os.environ, "PYTHONHASHSEED": "4711"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.split() == [digest(name) for name in names]


def test_a_prompt_that_a_worker_cannot_hold_is_not_offered_to_it():
    machine = Router(GATEWAY, RouterConfig())
    for name, pages in (("p1", 2), ("p2", 100), ("d1", 100)):
        machine.on(WorkerUp(worker(Identity(name, 1), ROLES[name[0]], pages=pages)), 0.0)
    (offer,) = machine.on(Arrived(1, Request("r", (1,) * 9, Sampling(2), 9.0)), 0.0)
    assert offer.worker.name == "p2"


def test_hashes_go_with_the_offer_and_the_prompt():
    machine = Router(GATEWAY, RouterConfig(offer_pages=2))
    for name in ("p1", "d1"):
        machine.on(WorkerUp(worker(Identity(name, 1), ROLES[name[0]])), 0.0)
    request = replace(Request("r", (1,) * 12, Sampling(2), 9.0), prefix=(7, 8, 9))
    (offer,) = machine.on(Arrived(1, request), 0.0)
    assert offer.message.prefix == (7, 8)
    assert machine.on(Accept(offer.message.ticket), 0.0)[0].message.request.prefix == (7, 8, 9)
