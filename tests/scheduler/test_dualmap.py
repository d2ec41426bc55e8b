"""DualMap: what two choices are worth, where a prefix goes, and how a decode worker is chosen."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from dataclasses import replace

import pytest

from core.worker import Costs, Identity, Role
from scheduler.cost import CostModel
from scheduler.dualmap import DualMap, DualMapConfig
from scheduler.heat import Heat, Known
from scheduler.placement import Load, Need, Post
from scheduler.ring import Ring, mix64
from tests.cast import SHAPE, worker
from tests.scheduler.test_placement import fleet, order, put, sinks

PAGE = SHAPE.page_tokens
COST = CostModel("made", prefill=((0.0, 1e-4, 0.0, 0.0),), decode=((0.01, 0.001, 1e-5),), lanes=())


def pages(name: int, count: int = 4) -> tuple[int, ...]:
    """Chained hashes of a prefix of its own."""
    return tuple(mix64(name * 1000 + page) for page in range(count))


def need(
    prefix: tuple[int, ...], tokens: int = 40, *, wait_s: float = 10.0, gap_s: float = 0.0, size: int = 60
) -> Need:
    return Need(tokens, size, prefix, wait_s, gap_s)


# The ring.
def test_a_key_has_two_workers_and_keeps_them_where_others_come_and_go():
    names = [f"p{number}" for number in range(20)]
    ring, keys = Ring(64), [mix64(number) for number in range(2000)]
    ring.set(names)
    before = {key: ring.pair(key) for key in keys}
    assert all(len(set(pair)) == 2 for pair in before.values())
    held = Counter(name for pair in before.values() for name in pair)
    assert set(held) == set(names)
    assert len({other for one, other in before.values() if one == "p0"}) == 19, "not only those beside it"
    assert max(held.values()) < 1.8 * 2 * len(keys) / len(names)
    ring.set(names[1:])
    for key in keys:
        if "p0" not in before[key]:
            assert ring.pair(key) == before[key]
        else:
            assert set(before[key]) - {"p0"} <= set(ring.pair(key))
    ring.set(names)
    assert {key: ring.pair(key) for key in keys} == before


@pytest.mark.parametrize("names", [(), ("p1",), ("p1", "p2")])
def test_a_ring_of_few(names):
    ring = Ring(8)
    ring.set(names)
    assert set(ring.pair(12345)) == set(names)


def test_mixing_is_splitmix():
    """The first outputs of SplitMix64 from state 0, as published with xoshiro."""
    assert mix64(0) == 0xE220A8397B1DCDAF
    assert mix64(0x9E3779B97F4A7C15) == 0x6E789E6AA1B965F4


LOYAL = DualMapConfig(hot=1000.0, loyalty=1e6, astray=math.inf)
"""Nobody leaves a prefix for a shorter queue, as in the paper."""


# Load and hits.
def zipf(rng: random.Random, count: int, kinds: int) -> list[int]:
    """Keys of a Zipf law with exponent 0.9, flat at the top, as it is when hot prefixes are split."""
    weights = [1 / (rank + 10) ** 0.9 for rank in range(kinds)]
    return rng.choices(range(kinds), weights, k=count)


def peak(count: int, choices: int, *, workers: int = 32, seed: int = 1) -> float:
    """The largest number of requests of a worker over the mean, when nothing ends."""
    ring = Ring(64)
    ring.set(f"p{number}" for number in range(workers))
    held: Counter[str] = Counter()
    for key in zipf(random.Random(seed), count, 20_000):
        pair = ring.pair(mix64(key))[:choices]
        held[min(pair, key=lambda name: (held[name], name))] += 1
    return max(held.values()) - count / workers


def test_two_choices_keep_the_largest_load_near_the_mean():
    """Above the mean of 125: 51 requests with one choice, 3 with two."""
    one, two = peak(4000, 1), peak(4000, 2)
    assert one > 30
    assert two < 6
    assert two < one / 8


def test_a_prefix_misses_at_most_once_at_each_of_its_two_workers():
    """Hits >= 1 - 2 / m of m requests, whatever the loads are, as long as both are fast enough."""
    placement = DualMap(LOYAL)
    workers, posts = fleet(placement, *(f"p{n}" for n in range(16)), "d1")
    rng, seen, asked, hits = random.Random(2), set(), Counter(), Counter()
    for key in zipf(rng, 3000, 300):
        this = need(pages(key), wait_s=math.inf)
        source = next(iter(placement.sources(this, workers)))
        asked[key] += 1
        hits[key] += (key, source.identity) in seen
        seen.add((key, source.identity))
        placement.accepted(source, this)
        put(workers, source, posts["d1"], rng.randrange(1, 5000))
    for key, count in asked.items():
        assert hits[key] >= count - 2
    assert max(asked.values()) > 50, "m is large for some"


# The order of tries.
def pair_of(placement: DualMap, workers, prefix) -> list[str]:
    return order(placement, workers, need(prefix))[:2]


def test_the_worker_with_the_prefix_comes_first_and_the_rest_by_their_queues():
    placement = DualMap()
    workers, posts = fleet(placement, "p1", "p2", "p3", "p4", "d1")
    one, other = pair_of(placement, workers, pages(1))
    for number, name in enumerate(sorted(set(posts) - {one, other, "d1"})):
        put(workers, posts[name], posts["d1"], 50 - number)
    placement.accepted(posts[other], need(pages(1)))
    put(workers, posts[other], posts["d1"], 60)
    rest = sorted(set(posts) - {one, other, "d1"}, reverse=True)
    this = need(pages(1), wait_s=1.0)
    assert order(placement, workers, this) == [other, one, *rest], "16 cached tokens for 4 times as many queued ones"
    put(workers, posts[other], posts["d1"], 6)
    assert order(placement, workers, this) == [one, other, *rest]
    assert placement.fewest(need(pages(1)), workers) == 40 - 4 * PAGE
    assert placement.fewest(need(pages(2)), workers) == 40


def test_of_two_that_know_nothing_the_one_with_the_shorter_queue_comes_first():
    placement = DualMap()
    workers, posts = fleet(placement, "p1", "p2", "p3", "d1")
    one, other = pair_of(placement, workers, pages(1))
    put(workers, posts[one], posts["d1"], 1)
    assert pair_of(placement, workers, pages(1)) == [other, one]


@pytest.mark.parametrize(("queued", "first"), [(800, "cached"), (900, "other")])
def test_the_one_with_the_prefix_is_left_when_it_would_be_too_late(queued, first):
    """1,000 tokens/s, 16 of 40 tokens cached, 1 s wanted, of which 0.9 may be used: 876 queued tokens."""
    placement = DualMap(replace(LOYAL, tokens_per_s=1000.0))
    workers, posts = fleet(placement, "p1", "p2", "p3", "d1")
    one, other = pair_of(placement, workers, pages(1))
    placement.accepted(posts[one], need(pages(1)))
    put(workers, posts[one], posts["d1"], queued)
    asked = order(placement, workers, need(pages(1), wait_s=1.0))[0]
    assert asked == (one if first == "cached" else other)


def test_a_third_worker_comes_first_where_it_is_lighter_by_the_prompt():
    placement = DualMap()
    workers, posts = fleet(placement, "p1", "p2", "p3", "d1")
    this = need(pages(1), wait_s=1.0)
    one, other, third = order(placement, workers, this)
    for name in (one, other):
        put(workers, posts[name], posts["d1"], 40)
    assert order(placement, workers, this) == [one, other, third]
    for name in (one, other):
        put(workers, posts[name], posts["d1"], 1)
    assert order(placement, workers, this) == [third, one, other]


def test_a_speed_is_measured():
    placement = DualMap(DualMapConfig(tokens_per_s=1000.0))
    workers, posts = fleet(placement, "p1", "d1")
    this = need((), tokens=1000)
    assert placement.ttft_s(posts["p1"], this, workers) == pytest.approx(1.0)
    for _ in range(200):
        placement.prefilled(posts["p1"], 500, 0.1)
    assert placement.ttft_s(posts["p1"], this, workers) == pytest.approx(0.2, rel=0.02)
    assert DualMap(cost=COST).ttft_s(posts["p1"], this, workers) == pytest.approx(0.1)


def test_without_hashes_the_shortest_queue_comes_first():
    placement = DualMap()
    workers, posts = fleet(placement, "p1", "p2", "d1")
    put(workers, posts["p1"], posts["d1"], 1)
    assert order(placement, workers, need(())) == ["p2", "p1"]


def test_what_was_known_of_a_worker_goes_with_it():
    placement = DualMap()
    workers, posts = fleet(placement, "p1", "p2", "d1")
    placement.accepted(posts["p1"], need(pages(1)))
    assert placement.fewest(need(pages(1)), workers) == 24
    workers.down(posts["p1"].identity)
    assert placement.fewest(need(pages(1)), workers) == 40
    assert placement.document()["known"] == {}


# Hot prefixes.
def keys_of(heat: Heat, prefixes: list[tuple[int, ...]], workers: int) -> list[int]:
    return [prefix.index(heat.key(prefix, workers)) + 1 for prefix in prefixes]


def test_a_hot_prefix_is_lengthened_until_its_parts_are_not_hot_and_shortened_when_it_cools():
    heat = Heat(first_pages=2, window=200, hot=2.0, cool=1.0)
    rng = random.Random(3)

    def shared(own: int) -> tuple[int, ...]:
        """Eight pages of a system prompt, then eight of its own."""
        return pages(0, 8) + pages(own, 8)

    lengths = keys_of(heat, [shared(rng.randrange(10**6)) for _ in range(300)], 10)
    assert set(lengths[-100:]) == {16}, "below the common part all of them differ"
    assert keys_of(heat, [pages(rng.randrange(10**6)) for _ in range(600)], 10)[-1] == 2
    assert keys_of(heat, [shared(1)], 10) == [2], "cooled"


def test_a_prefix_that_is_not_hot_keeps_its_key():
    heat = Heat(first_pages=2, window=100, hot=2.0, cool=1.0)
    prefixes = [pages(number % 20) for number in range(500)]
    assert set(keys_of(heat, prefixes, 10)) == {2}
    assert set(keys_of(heat, [pages(1)] * 300, 2)) == {2}, "two workers are all that there are"


def test_a_share_between_the_thresholds_stays_what_it_was():
    """0.15 of the requests, with thresholds of 0.2 and 0.1: not split, unless it was before."""
    rng = random.Random(1)

    def lengths(heat: Heat, share: float, count: int) -> list[int]:
        prefixes = [pages(0, 4) if rng.random() < share else pages(rng.randrange(1, 10**6)) for _ in range(count)]
        found = [len(p) if heat.key(p, 10) == p[-1] else 2 for p in prefixes if p == pages(0, 4) or heat.key(p, 10)]
        return [length for prefix, length in zip(prefixes, found, strict=True) if prefix == pages(0, 4)]

    assert set(lengths(Heat(first_pages=2, window=1000, hot=2.0, cool=1.0), 0.08, 3000)[50:]) == {2}
    heat = Heat(first_pages=2, window=1000, hot=2.0, cool=1.0)
    lengths(heat, 0.5, 1000)
    assert lengths(heat, 0.3, 3000)[-1] == 4


def test_what_is_hot_goes_through_json():
    rng, placement = random.Random(4), DualMap(DualMapConfig(window=100))
    workers, _ = fleet(placement, *(f"p{number}" for number in range(10)), "d1")
    some = [pages(0, 4) if rng.random() < 0.5 else pages(rng.randrange(99)) for _ in range(250)]
    for prefix in some:
        order(placement, workers, need(prefix))
    document = json.loads(json.dumps(placement.document()))
    copy = DualMap(DualMapConfig(window=100))
    copy.restore(document)
    assert document["heat"]["split"]
    assert copy.document() == document
    for prefix in some:
        assert order(copy, workers, need(prefix)) == order(placement, workers, need(prefix))
    assert copy.document() == json.loads(json.dumps(placement.document())) != document


def test_pages_are_known_up_to_the_first_that_is_not():
    known = Known(100)
    known.add(pages(1, 10))
    assert known.pages(pages(1, 10)) == 10
    assert known.pages(pages(1, 6) + pages(2, 5)) == 6
    assert (known.pages(pages(2)), known.pages(())) == (0, 0)


def test_what_is_known_is_bounded_and_the_oldest_goes_first():
    known = Known(20)
    for number in range(50):
        known.add(pages(number, 3))
        known.add(pages(7, 3))
    document = known.document()
    assert len(document["young"]) + len(document["old"]) <= 20 + 2 * 3
    assert known.pages(pages(7, 3)) == 3, "it was used all the time"
    assert known.pages(pages(49, 3)) == 3
    assert known.pages(pages(8, 3)) == 0
    assert Known.of(document).document() == document


# Decode.
def decoding(post: Post, workers, rows: int, size: int) -> None:
    for _ in range(rows):
        load = Load(post, post, 0, size, queued=False)
        post.rows += 1
        post.held_tokens += load.size
    workers.decodes.moved(post)


@pytest.mark.parametrize(
    ("decode", "gap_s", "rows", "want"),
    [
        ("spread", 0.0, (3, 2, 1), ["d3", "d2"]),
        ("spread", 0.03, (3, 2, 1), ["d3", "d2"]),
        ("first_fit", 0.0, (3, 2, 1), ["d1", "d3"]),
        ("first_fit", 0.016, (3, 2, 1), ["d2", "d3"]),  # gaps with one row more: 0.0167, 0.0150, 0.0132 s
        ("first_fit", 0.001, (3, 2, 1), ["d3", "d2"]),  # nobody keeps it: the lightest
        ("first_fit", 0.0, (9, 2, 1), ["d2", "d3"]),  # 900 of 1,000 promised tokens are as many as may be
    ],
)
def test_how_a_decode_worker_is_chosen(decode, gap_s, rows, want):
    placement = DualMap(DualMapConfig(decode=decode), cost=COST)
    workers, posts = fleet(placement, "p1", "d1", "d2", "d3", pages=250)
    for number, count in enumerate(rows):
        decoding(posts[f"d{number + 1}"], workers, count, 100)
    assert sinks(placement, workers, posts["p1"], need((), gap_s=gap_s)) == want


def test_a_decode_worker_that_says_it_is_slow_is_passed_over():
    """With one more row d1 would take 0.12 s, d2 11 ms; no model of all is known. Then d1 says that it is fast."""
    placement = DualMap()
    workers, posts = fleet(placement, "p1", "d1", "d2", pages=2500)
    decoding(posts["d2"], workers, 1, 100)
    asked = need((), gap_s=0.05)
    list(placement.sources(asked, workers))
    assert sinks(placement, workers, posts["p1"], asked) == ["d1", "d2"], "nobody says anything: the lightest"
    for slow, want in ((0.1, ["d2", "d1"]), (0.01, ["d1", "d2"])):
        for name, fixed_s in (("d1", slow), ("d2", 0.01)):
            costs = Costs(((0.0, 1e-4, 0.0, 0.0),), ((fixed_s, 1e-3, 0.0),))
            workers.up(replace(posts[name].member, costs=costs))
        list(placement.sources(asked, workers))
        assert sinks(placement, workers, posts["p1"], asked) == want
    assert sinks(placement, workers, posts["p1"], need(())) == ["d1", "d2"], "who was promised nothing does not care"


def test_a_prefill_worker_is_as_fast_as_it_says_until_it_is_measured():
    placement = DualMap(cost=COST)
    workers, posts = fleet(placement, "p1", "p2", "d1")
    workers.up(replace(posts["p1"].member, costs=Costs(((0.0, 1e-3, 0.0, 0.0),), ((1e-3, 0.0, 0.0),))))
    asked = need((), 1000)
    list(placement.sources(asked, workers))
    assert placement.ttft_s(posts["p1"], asked, workers) == pytest.approx(1.0)
    assert placement.ttft_s(posts["p2"], asked, workers) == pytest.approx(0.1), "the model of all"
    for _ in range(200):
        placement.prefilled(posts["p1"], 1000, 0.2)
    assert placement.ttft_s(posts["p1"], asked, workers) == pytest.approx(0.2, rel=0.05)


def test_spread_passes_over_a_worker_with_many_short_rows():
    """d1 has the smaller share of its memory promised, but so many rows that a gap is too long."""
    placement = DualMap(cost=COST)
    workers, posts = fleet(placement, "p1", "d1", "d2", pages=2500)
    decoding(posts["d1"], workers, 50, 10)
    decoding(posts["d2"], workers, 2, 300)
    assert sinks(placement, workers, posts["p1"], need((), gap_s=0.05)) == ["d2", "d1"]
    assert sinks(placement, workers, posts["p1"], need((), gap_s=0.1)) == ["d1", "d2"]


# Skipping disaggregation.
@pytest.mark.parametrize(
    ("tokens", "rows", "first"),
    [(20, 0, "m1"), (21, 0, "p1"), (20, 3, "m1"), (20, 5, "p1")],
)
def test_few_new_tokens_go_to_a_mixed_worker_with_slack(tokens, rows, first):
    placement = DualMap(DualMapConfig(skip_tokens=20))
    workers, posts = fleet(placement, "p1", "d1", "m1", pages=250)
    decoding(posts["m1"], workers, rows, 100)
    put(workers, posts["m1"], posts["d1"], 1)
    asked = order(placement, workers, need((), tokens=tokens))
    assert asked[0] == first
    assert sinks(placement, workers, posts["m1"], need((), tokens=tokens)) == ["m1"]


def test_a_long_prompt_with_a_cached_prefix_has_few_new_tokens():
    placement = DualMap(DualMapConfig(skip_tokens=20))
    workers, posts = fleet(placement, "p1", "p2", "d1", "m1")
    assert order(placement, workers, need(pages(1, 9)))[0] != "m1" or "m1" in pair_of(placement, workers, pages(1, 9))
    for name in ("p1", "p2"):
        placement.accepted(posts[name], need(pages(1, 9)))
    assert order(placement, workers, need(pages(1, 9)))[0] == "m1"


def test_only_mixed_workers_keep_what_is_short():
    placement = DualMap(DualMapConfig(skip_tokens=100))
    workers, _ = fleet(placement, "p1", "d1")
    assert order(placement, workers, need(())) == ["p1"]
    assert worker(Identity("d1", 1), Role.DECODE).role.prefills is False
