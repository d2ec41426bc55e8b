"""Named pages: who shares them, what is reclaimed first, what pins keep. By hand, and against a model without runs."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from core.errors import LocalError
from core.kv import page_runs
from core.pages import Owner, Pages
from core.prefix import page_hashes
from tests.cast import efforts

HELD = [Owner.PREFILLING, Owner.DECODING]


@cache
def chain(text: str) -> tuple[int, ...]:
    """Hashes of the pages of a prefix with one letter a page: equal for equal prefixes alone."""
    return tuple(int.from_bytes(text[: end + 1].encode()) for end in range(len(text)))


def cached(ledger: Pages, text: str, holder: str = "filler") -> None:
    """Leave the pages of a prefix in the cache."""
    ledger.bind(holder, len(text), Owner.PREFILLING)
    ledger.name(holder, chain(text))
    ledger.release(holder)


def states(ledger: Pages) -> dict[str, int]:
    ledger.check()
    return {state.value: count for state, count in ledger.counts().items() if count}


def test_a_released_prefix_stays_cached_and_available():
    ledger = Pages(10)
    ledger.bind("a", 5, Owner.PREFILLING)
    ledger.name("a", chain("abc"))
    assert states(ledger) == {"free": 5, "prefilling": 5}
    assert ledger.release("a") == 5
    assert states(ledger) == {"free": 7, "cached": 3}
    assert ledger.available == 10
    assert [ledger.cached(chain(text)) for text in ("abc", "abcd", "ab", "abx", "x", "")] == [3, 3, 2, 2, 0, 0]


def test_full_pages_have_names_that_stand_for_all_before_them():
    tokens = tuple(range(100, 140))
    names = page_hashes(tokens, 16)
    assert names == (0xCDD4C7547C5355C8, 0xD596DA4C0FDD09F0), "the same in every process and version"
    assert page_hashes(tokens[:32], 16) == names
    assert page_hashes(tokens[:31], 16) == names[:1]
    assert page_hashes(tokens[:15], 16) == ()
    assert page_hashes(tokens[16:], 16, after=names[0]) == names[1:], "what follows needs no more than the last name"
    others = [
        page_hashes((*tokens[:15], 999, *tokens[16:]), 16),
        page_hashes((*tokens[:16], 999, *tokens[17:]), 16),
        page_hashes(tokens, 16, "tenant"),
        page_hashes(tokens, 8)[1::2],
    ]
    assert [len(set(names) & set(other)) for other in others] == [0, 1, 0, 0]


@pytest.mark.parametrize(
    ("asked", "hit"), [("abcd", 4), ("abcdef", 4), ("ab", 2), ("abx", 2), ("a", 1), ("xabcd", 0), ("", 0)]
)
def test_a_table_starts_with_the_leading_pages_that_are_cached(asked, hit):
    ledger = Pages(10)
    cached(ledger, "abcd")
    assert ledger.share("b", chain(asked), Owner.DECODING) == hit
    assert ledger.pages("b") == (0, 1, 2, 3)[:hit]
    assert ledger.count("b") == hit
    assert (ledger.asked_pages, ledger.hit_pages) == (len(asked), hit)
    assert len(ledger.bind("b", 2, Owner.DECODING)) == 2
    assert states(ledger) == {
        state: count for state, count in {"free": 4, "decoding": 2, "shared": hit, "cached": 4 - hit}.items() if count
    }
    assert ledger.release("b") == hit + 2
    assert states(ledger) == {"free": 6, "cached": 4}


def test_who_was_promised_memory_may_share_out_of_the_promise():
    ledger = Pages(10)
    cached(ledger, "abcd")
    ledger.promise("b", 6, Owner.PULLING)
    ledger.promise("c", 4, Owner.PULLING)
    assert ledger.share("b", chain("abcdef"), Owner.PULLING, promised=True) == 4
    assert (ledger.promised, ledger.available) == (6, 0)
    assert ledger.share("c", chain("abcdef"), Owner.PULLING, promised=True) == 4
    assert (ledger.promised, ledger.available) == (2, 4), "these are in use already"
    ledger.bind("b", 2, Owner.PULLING)
    assert (ledger.own("b"), ledger.own("c"), ledger.own("?")) == (2, 0, 0)
    ledger.check()


def test_a_shared_page_has_the_state_of_who_bound_it_then_shared_then_cached():
    ledger = Pages(10)
    ledger.bind("a", 4, Owner.PREFILLING)
    ledger.name("a", chain("abc"))
    assert ledger.share("b", chain("abc"), Owner.DECODING) == 3
    ledger.bind("b", 1, Owner.DECODING)
    assert ledger.pages("b") == (0, 1, 2, 4)
    assert states(ledger) == {"free": 5, "prefilling": 4, "decoding": 1}
    ledger.move("a", Owner.HANDING_OFF)
    ledger.move("b", Owner.IN_DOUBT, to="c")
    assert states(ledger) == {"free": 5, "handing_off": 4, "in_doubt": 1}
    ledger.release("a")
    assert states(ledger) == {"free": 6, "in_doubt": 1, "shared": 3}
    assert ledger.share("d", chain("ab"), Owner.DECODING) == 2
    assert states(ledger) == {"free": 6, "in_doubt": 1, "shared": 3}
    ledger.release("c")
    assert states(ledger) == {"free": 7, "shared": 2, "cached": 1}
    ledger.release("d")
    assert states(ledger) == {"free": 7, "cached": 3}


def test_the_least_recently_used_goes_first_and_of_one_prefix_the_tail_before_the_head():
    ledger = Pages(9)
    for text in ("aaa", "bbb", "ccc"):
        cached(ledger, text)
    ledger.share("again", chain("aaa"), Owner.DECODING)
    ledger.release("again")
    left = []
    for count in range(1, 10):
        ledger.bind(f"new{count}", 1, Owner.DECODING)
        ledger.check()
        left.append([ledger.cached(chain(text)) for text in ("aaa", "bbb", "ccc")])
    assert left == [[3, 2, 3], [3, 1, 3], [3, 0, 3], [3, 0, 2], [3, 0, 1], [3, 0, 0], [2, 0, 0], [1, 0, 0], [0, 0, 0]]
    assert (ledger.available, ledger.reclaimed_pages) == (0, 9)


def test_a_common_head_outlives_both_of_its_tails():
    ledger = Pages(8)
    cached(ledger, "aabb")
    ledger.share("x", chain("aacc"), Owner.PREFILLING)
    ledger.bind("x", 2, Owner.PREFILLING)
    ledger.name("x", chain("aacc"))
    ledger.release("x")
    assert states(ledger) == {"free": 2, "cached": 6}
    for want, left in [(3, (3, 4)), (4, (2, 4)), (6, (2, 2)), (7, (1, 1)), (8, (0, 0))]:
        ledger.bind("new", want - ledger.count("new"), Owner.DECODING)
        ledger.check()
        assert (ledger.cached(chain("aabb")), ledger.cached(chain("aacc"))) == left


def test_pages_are_reclaimed_only_when_free_ones_run_out_and_their_neighbours_become_one_run():
    ledger = Pages(10)
    cached(ledger, "abcdef")
    ledger.bind("a", 4, Owner.DECODING)
    assert ledger.cached(chain("abcdef")) == 6
    assert ledger.bind("b", 3, Owner.DECODING) == (3, 4, 5)
    assert ledger.cached(chain("abcdef")) == 3


def test_who_computes_the_same_prefix_at_the_same_time_keeps_pages_of_its_own():
    ledger = Pages(12)
    for name in "ab":
        ledger.bind(name, 4, Owner.PREFILLING)
    ledger.name("a", chain("abc"))
    ledger.name("b", chain("abcd"))
    assert (ledger.pages("a"), ledger.pages("b")) == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert ledger.share("c", chain("abcd"), Owner.DECODING) == 4
    assert ledger.pages("c") == (0, 1, 2, 7)
    ledger.release("c")
    assert states(ledger) == {"free": 4, "prefilling": 8}
    # b's page is behind pages of a: they stay while b does, or b's page would be cached without its head.
    ledger.release("a")
    assert states(ledger) == {"free": 5, "prefilling": 4, "shared": 3}
    ledger.bind("new", 5, Owner.DECODING)
    assert ledger.cached(chain("abcd")) == 4
    ledger.release("b")
    assert states(ledger) == {"free": 3, "decoding": 5, "cached": 4}


def test_a_page_that_nobody_uses_makes_way_for_one_with_the_same_hash():
    ledger = Pages(12)
    cached(ledger, "abcd")
    ledger.pin("session", chain("ab"))
    ledger.bind("a", 3, Owner.PREFILLING)
    assert ledger.pages("a") == (4, 5, 6)
    assert (ledger.available, ledger.pinned) == (7, 2)
    ledger.name("a", chain("abc"))
    assert states(ledger) == {"free": 8, "prefilling": 3, "cached": 1}
    assert (ledger.available, ledger.pinned) == (9, 0)
    ledger.share("b", chain("abcd"), Owner.DECODING)
    assert ledger.pages("b") == (4, 5, 6, 3)
    for name in "ab":
        ledger.release(name)
    assert states(ledger) == {"free": 8, "cached": 4}
    assert (ledger.available, ledger.pinned) == (10, 2)


def test_naming_chunk_by_chunk_is_naming_at_once():
    ledger = Pages(10)
    for count in range(1, 7):
        ledger.bind("a", 1, Owner.PREFILLING)
        ledger.name("a", chain("abcdef"[:count]))
        ledger.name("a", chain("abcdef"[: count // 2]))
        ledger.check()
        assert ledger.cached(chain("abcdef")) == count
        ledger.share(f"reader{count}", chain("abcdef"), Owner.DECODING)
        assert ledger.pages(f"reader{count}") == ledger.pages("a")


def test_a_prefix_that_grows_leaves_what_was_pinned_or_continued_by_others_as_it_was():
    ledger = Pages(12)
    ledger.bind("a", 4, Owner.PREFILLING)
    ledger.name("a", chain("ab"))
    assert ledger.pin("session", chain("abcd")) == 2
    ledger.name("a", chain("abc"))
    ledger.share("b", chain("abc"), Owner.PREFILLING)
    ledger.bind("b", 1, Owner.PREFILLING)
    ledger.name("b", chain("abcx"))
    ledger.release("b")
    ledger.name("a", chain("abcd"))
    assert (ledger.cached(chain("abcx")), ledger.cached(chain("abcd"))) == (4, 4)
    ledger.release("a")
    assert states(ledger) == {"free": 7, "cached": 5}
    assert (ledger.available, ledger.pinned) == (10, 2)


@pytest.mark.parametrize("same", range(14))
def test_a_long_prefix_is_shared_up_to_the_page_that_differs(same):
    ledger = Pages(40)
    text = "abcdefghijklm"
    cached(ledger, text)
    other = text[:same] + "-" * (20 - same)
    assert ledger.cached(chain(other)) == same
    assert ledger.share("a", chain(other), Owner.DECODING) == same
    assert ledger.share("b", chain(text), Owner.DECODING) == 13
    assert (ledger.pages("a"), ledger.pages("b")) == (tuple(range(same)), tuple(range(13)))
    assert (ledger.asked_pages, ledger.hit_pages) == (33, same + 13)
    ledger.check()


def test_memory_promised_to_others_is_neither_shared_nor_pinned():
    ledger = Pages(10)
    cached(ledger, "abcdef")
    ledger.promise("other", 8, Owner.PULLING)
    assert ledger.available == 2
    assert ledger.pin("session", chain("abcdef")) == 2
    assert ledger.available == 0
    assert ledger.share("a", chain("abcdef"), Owner.DECODING) == 2
    ledger.release("a")
    ledger.unpin("session")
    assert ledger.share("a", chain("abcdef"), Owner.DECODING) == 2
    assert ledger.share("b", chain("abcdef"), Owner.DECODING) == 2
    ledger.check()
    assert len(ledger.bind("other", 8, Owner.PULLING)) == 8
    assert states(ledger) == {"pulling": 8, "shared": 2}


def test_what_sharing_takes_from_the_available_pages_is_told_beforehand():
    ledger = Pages(10)
    ledger.bind("a", 2, Owner.DECODING)
    ledger.name("a", chain("ab"))
    cached(ledger, "xyz")
    ledger.pin("session", chain("xy"))
    asks = {"abc": 4, "xyz": 4, "q": 4}
    needs = {text: ledger.need(count, chain(text)) for text, count in asks.items()}
    assert needs == {"abc": 2, "xyz": 2, "q": 4}
    for text, count in asks.items():
        before = ledger.available
        shared = ledger.share("new", chain(text), Owner.DECODING)
        ledger.bind("new", count - shared, Owner.DECODING)
        assert before - ledger.available == needs[text]
        ledger.release("new")


def test_what_is_pinned_is_not_reclaimed_and_not_available():
    ledger = Pages(6)
    cached(ledger, "abc")
    cached(ledger, "xyz")
    assert ledger.pin("session", chain("abq")) == 2
    assert (ledger.available, ledger.pinned) == (4, 2)
    assert ledger.pin("nothing", chain("q")) == 0
    ledger.bind("new", 4, Owner.DECODING)
    assert ledger.cached(chain("abc")) == 2
    with pytest.raises(LocalError, match="at most 0"):
        ledger.bind("new", 1, Owner.DECODING)
    ledger.unpin("session")
    ledger.unpin("session")
    assert (ledger.available, ledger.pinned) == (2, 0)


def test_a_pin_may_come_before_its_pages_are_given_up():
    ledger = Pages(6)
    ledger.bind("a", 3, Owner.DECODING)
    ledger.name("a", chain("abc"))
    assert ledger.pin("session", chain("abc")) == 3
    assert (ledger.available, ledger.pinned) == (3, 0)
    ledger.release("a")
    assert (ledger.available, ledger.pinned) == (3, 3)
    assert ledger.share("a", chain("ab"), Owner.DECODING) == 2
    assert (ledger.available, ledger.pinned) == (3, 1)
    ledger.unpin("session")
    assert (ledger.available, ledger.pinned) == (4, 0)


def test_a_later_pin_takes_the_place_of_an_earlier_one_of_the_same_name():
    ledger = Pages(6)
    cached(ledger, "abc")
    cached(ledger, "xyz")
    ledger.pin("session", chain("abc"))
    assert ledger.pin("session", chain("x")) == 1
    assert (ledger.available, ledger.pinned) == (5, 1)


@pytest.mark.parametrize(
    ("count", "names"), [(0, ()), (1, ("one",)), (2, ("one",)), (3, ("one", "three")), (9, ("one", "three", "two"))]
)
def test_the_least_recent_pins_yield_first(count, names):
    ledger = Pages(6)
    for text in ("aa", "bb", "cc"):
        cached(ledger, text)
    for name, text in [("one", "aa"), ("two", "bb"), ("three", "cc"), ("two", "bb")]:
        ledger.pin(name, chain(text))
    before = ledger.available
    assert ledger.yield_pins(count) == names
    assert ledger.available - before >= min(count, 6)
    ledger.check()


def test_trimming_gives_back_the_end_of_a_table_but_nothing_named():
    ledger = Pages(12)
    cached(ledger, "ab")
    ledger.share("a", chain("ab"), Owner.DECODING)
    ledger.bind("a", 5, Owner.DECODING)
    ledger.name("a", chain("abc"))
    assert (ledger.trim("a", 2), ledger.count("a")) == (2, 5)
    assert (ledger.trim("a", 9), ledger.pages("a")) == (2, (0, 1, 2))
    assert ledger.trim("nobody", 1) == 0
    assert states(ledger) == {"free": 9, "decoding": 1, "shared": 2}
    ledger.release("a")
    assert states(ledger) == {"free": 9, "cached": 3}


@pytest.mark.parametrize(
    "call",
    [
        lambda ledger: ledger.share("a", chain("ab"), Owner.DECODING),
        lambda ledger: ledger.share("promised", chain("ab"), Owner.DECODING),
        lambda ledger: ledger.share("new", chain("ab"), Owner.SHARED),
        lambda ledger: ledger.bind("new", 1, Owner.CACHED),
        lambda ledger: ledger.promise("new", 1, Owner.FREE),
        lambda ledger: ledger.move("a", Owner.SHARED),
        lambda ledger: ledger.name("a", chain("abcd")),
        lambda ledger: ledger.name("a", chain("xyz")),
        lambda ledger: ledger.name("a", chain("xy")),
        lambda ledger: ledger.name("new", chain("a")),
        lambda ledger: ledger.trim("a", -1),
    ],
)
def test_a_call_that_cannot_be_honoured_raises_and_changes_nothing(call):
    ledger = Pages(10)
    ledger.bind("a", 3, Owner.DECODING)
    ledger.name("a", chain("ab"))
    ledger.promise("promised", 1, Owner.PULLING)
    before = states(ledger), ledger.holders(), ledger.available, ledger.asked_pages, ledger.cached(chain("abcd"))
    with pytest.raises(LocalError):
        call(ledger)
    assert (states(ledger), ledger.holders(), ledger.available, ledger.asked_pages, ledger.cached(chain("abcd"))) == (
        before
    )


@pytest.mark.parametrize("hashes", [[5, 5, 5], [5, 6, 5, 6], [7, 5, 5, 6]])
def test_hashes_that_are_no_chain_break_no_invariant(hashes):
    ledger = Pages(40)
    rng = random.Random(1)
    for step in range(300):
        name = rng.choice("abcd")
        some = [rng.choice([5, 6, 7]) for _ in range(rng.randrange(5))] if step % 2 else hashes
        ledger.release(name)
        shared = ledger.share(name, some, Owner.DECODING)
        ledger.bind(name, len(some) - shared + 1, Owner.DECODING)
        ledger.name(name, some)
        ledger.pin(rng.choice("xy"), some)
        ledger.check()


@dataclass
class Held:
    state: Owner
    table: list[int] = field(default_factory=list)
    promised: int = 0
    shared: int = 0
    named: list[int] = field(default_factory=list)


TEXTS = ["".join(letters) for letters in product("ab", repeat=4)]
"""All prefixes of the state machine are heads of these."""


class Cache(RuleBasedStateMachine):
    """Every call on the ledger and on dictionaries that know pages, but neither runs nor pieces."""

    names = st.sampled_from("abcde")
    pin_names = st.sampled_from(["s", "t", "u"])
    counts = st.integers(-1, 6)
    states = st.sampled_from(HELD)
    texts = st.builds(lambda text, end: text[:end], st.sampled_from(TEXTS), st.integers(0, 4))

    total = 16

    def __init__(self):
        super().__init__()
        self.ledger = Pages(self.total)
        self.held: dict[str, Held] = {}
        self.carrier: dict[int, int] = {}
        """Page by hash."""
        self.idle: list[int] = []
        """Hashes, the next to be reclaimed first."""
        self.pins: dict[str, list[int]] = {}
        self.asked = self.hit = 0

    def refs(self, each: int) -> int:
        return sum(each in held.named for held in self.held.values())

    def pinned(self, each: int) -> bool:
        return any(each in hashes for hashes in self.pins.values())

    @property
    def free(self) -> set[int]:
        tables = {page for held in self.held.values() for page in held.table}
        return set(range(self.total)) - tables - set(self.carrier.values())

    @property
    def available(self) -> int:
        return len(self.free) + len(self.idle) - sum(held.promised for held in self.held.values())

    def leading(self, hashes: Sequence[int]) -> list[int]:
        """Those that are held, as far as no more idle ones are taken than are available."""
        taken: list[int] = []
        room = self.available
        for each in hashes:
            room -= each in self.idle
            if each not in self.carrier or room < 0:
                break
            taken.append(each)
        return taken

    def settle(self, hashes: Sequence[int]) -> None:
        """Their user or pin has gone: the tail becomes idle first."""
        for each in reversed(hashes):
            if not self.refs(each) and not self.pinned(each):
                self.idle.append(each)

    def honoured(self, possible: bool, call) -> Any:
        if possible:
            return call()
        with pytest.raises(LocalError):
            call()
        return None

    def agrees(self, name: str, state: Owner) -> bool:
        return name not in self.held or self.held[name].state is state

    @rule(name=names, count=counts, state=states)
    def promise(self, name, count, state):
        possible = 0 <= count <= self.available and self.agrees(name, state)
        self.honoured(possible, lambda: self.ledger.promise(name, count, state))
        if possible:
            self.held.setdefault(name, Held(state)).promised += count

    @rule(name=names)
    def unpromise(self, name):
        self.ledger.unpromise(name)
        if name in self.held:
            self.held[name].promised = 0

    @rule(name=names, count=counts, state=states)
    def bind(self, name, count, state):
        held = self.held.get(name, Held(state))
        possible = 0 <= count <= held.promised + self.available and self.agrees(name, state)
        fresh = self.honoured(possible, lambda: self.ledger.bind(name, count, state))
        if not possible:
            return
        assert isinstance(fresh, tuple)
        for _ in range(count - len(self.free)):
            del self.carrier[self.idle.pop(0)]
        assert len(fresh) == len(set(fresh)) == count
        assert set(fresh) <= self.free
        self.held.setdefault(name, held)
        held.table += fresh
        held.promised -= min(count, held.promised)

    @rule(name=names, count=counts)
    def trim(self, name, count):
        possible = count >= 0
        given = self.honoured(possible, lambda: self.ledger.trim(name, count))
        if possible and name not in self.held:
            assert given == 0
        elif possible:
            held = self.held[name]
            assert given == min(count, len(held.table) - len(held.named))
            del held.table[len(held.table) - given :]

    @rule(name=names, to=st.sampled_from(["a", "b", "x", None]), state=states)
    def move(self, name, to, state):
        target = to or name
        possible = name in self.held and (target == name or target not in self.held)
        self.honoured(possible, lambda: self.ledger.move(name, state, to=to))
        if possible:
            self.held[target] = self.held.pop(name)
            self.held[target].state = state

    @rule(name=st.sampled_from("abcdex"))
    def release(self, name):
        held = self.held.pop(name, None)
        assert self.ledger.release(name) == (len(held.table) if held else 0)
        if held:
            self.settle(held.named)

    @rule(name=names, text=texts, state=states)
    def share(self, name, text, state):
        held = self.held.get(name, Held(state))
        possible = not held.table and self.agrees(name, state)
        taken = self.leading(chain(text))
        got = self.honoured(possible, lambda: self.ledger.share(name, chain(text), state))
        if possible:
            assert got == len(taken)
            self.held.setdefault(name, held)
            self.idle = [each for each in self.idle if each not in taken]
            held.table = [self.carrier[each] for each in taken]
            held.named, held.shared = taken, got
            self.asked += len(text)
            self.hit += got

    @rule(name=names, text=texts, end=st.integers(0, 6), anew=st.booleans())
    def name(self, name, text, end, anew):
        held = self.held.get(name, Held(Owner.DECODING))
        hashes = chain(text)
        if not anew:
            # A text that goes on where the named pages end.
            for before in TEXTS:
                if tuple(held.named) == chain(before)[: len(held.named)]:
                    hashes = chain((before[: len(held.named)] + text)[:4])[:end]
                    break
        known = len(held.named)
        fits = len(hashes) < known or not known or hashes[known - 1] == held.named[-1]
        possible = name in self.held and len(hashes) <= len(held.table) and fits
        self.honoured(possible, lambda: self.ledger.name(name, hashes))
        if possible:
            for each, page in list(zip(hashes, held.table, strict=False))[known:]:
                if not self.refs(each):
                    self.carrier[each] = page
                    self.idle = [other for other in self.idle if other != each]
                held.named = [*held.named, each]

    @rule(name=pin_names, text=texts)
    def pin(self, name, text):
        self.unpin_in_model(name)
        taken = self.leading(chain(text))
        assert self.ledger.pin(name, chain(text)) == len(taken)
        self.idle = [each for each in self.idle if each not in taken]
        if taken:
            self.pins[name] = taken

    @rule(name=pin_names)
    def unpin(self, name):
        self.ledger.unpin(name)
        self.unpin_in_model(name)

    def unpin_in_model(self, name):
        self.settle(self.pins.pop(name, []))

    @rule(count=counts)
    def yield_pins(self, count):
        wanted = len(self.idle) + count
        names = []
        while self.pins and len(self.idle) < wanted:
            names.append(next(iter(self.pins)))
            self.unpin_in_model(names[-1])
        assert self.ledger.yield_pins(count) == tuple(names)

    @invariant()
    def agree(self):
        ledger = self.ledger
        ledger.check()
        assert set(ledger.holders()) == self.held.keys()
        own: dict[int, Owner] = {}
        for name, held in self.held.items():
            assert ledger.pages(name) == tuple(held.table)
            assert ledger.runs(name) == page_runs(held.table)
            assert ledger.count(name) == len(held.table)
            own.update(dict.fromkeys(held.table[held.shared :], held.state))
        counts = dict.fromkeys(Owner, 0)
        for page in range(self.total):
            carried = [each for each, other in self.carrier.items() if other == page]
            if page in own:
                counts[own[page]] += 1
            elif carried:
                counts[Owner.SHARED if self.refs(carried[0]) else Owner.CACHED] += 1
            else:
                counts[Owner.FREE] += 1
        assert ledger.counts() == counts
        assert ledger.available == self.available >= 0
        assert ledger.pinned == sum(self.pinned(each) and not self.refs(each) for each in self.carrier)
        assert (ledger.asked_pages, ledger.hit_pages) == (self.asked, self.hit)

    @invariant()
    def what_is_cached_can_be_used(self):
        found = set()
        for text in TEXTS:
            hashes = chain(text)
            count = self.ledger.cached(hashes)
            found.update(hashes[:count])
            kept = [each for each in hashes[:count] if self.refs(each) or self.pinned(each)]
            assert self.ledger.need(9, hashes) == 9 - len(kept)
            idle = [self.idle.index(each) for each in hashes[:count] if each not in kept]
            assert idle == sorted(idle, reverse=True), "a head would be reclaimed before its tail"
        assert found == self.carrier.keys()


@efforts
def test_the_cache_agrees_with_plain_dictionaries(effort):
    run_state_machine_as_test(Cache, settings=effort)


def story() -> str:
    """What a ledger says to a thousand calls."""
    ledger, rng = Pages(60), random.Random(5)
    said: list[object] = []
    for step in range(1000):
        name, text = rng.choice("abcdefgh"), rng.choice(TEXTS)
        ledger.release(name)
        said.append(ledger.share(name, chain(text), Owner.PREFILLING))
        count = min(ledger.available, rng.randrange(1, 9))
        said.append(ledger.bind(name, count, Owner.PREFILLING))
        ledger.name(name, chain(text)[: ledger.count(name)])
        said.append(ledger.pin(f"session {step % 3}", chain(text)))
        said.append(ledger.yield_pins(rng.randrange(3)))
        said.append(tuple(ledger.counts().values()))
    return repr(said)


def test_another_process_with_another_hash_seed_says_the_same():
    call = "from tests.core.test_prefix import story; print(story())"
    environment = {**os.environ, "PYTHONHASHSEED": "77"}
    done = subprocess.run(
        [sys.executable, "-c", call], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == story()
