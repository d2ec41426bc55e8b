"""The ledger: against a plain model under any sequence of calls, and by hand where pages should lie together."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from core.errors import LocalError
from core.free import FreeRuns, joined, numbers
from core.kv import PageRun, page_runs
from core.pages import Owner, Pages
from tests.cast import QUICK, efforts

STATES = [Owner.PREFILLING, Owner.PULLING, Owner.DECODING]


def test_a_new_ledger_is_all_free():
    ledger = Pages(5)
    assert (ledger.available, ledger.promised, ledger.holders()) == (5, 0, ())
    assert ledger.counts() == {state: 5 if state is Owner.FREE else 0 for state in Owner}


@pytest.mark.parametrize("total", [0, -1])
def test_an_arena_without_pages_is_refused(total):
    with pytest.raises(LocalError, match="want at least 1"):
        Pages(total)


def test_a_promise_lowers_what_others_may_take_but_holds_no_page():
    ledger = Pages(10)
    ledger.promise("a", 7, Owner.PULLING)
    assert (ledger.available, ledger.promised, ledger.pages("a")) == (3, 7, ())
    with pytest.raises(LocalError, match="at most 3"):
        ledger.bind("b", 4, Owner.PREFILLING)
    assert ledger.holders() == ("a",)
    assert ledger.bind("a", 2, Owner.PULLING) == (0, 1)
    assert (ledger.available, ledger.promised) == (3, 5)


def test_a_bind_may_go_beyond_its_promise_while_there_is_room():
    ledger = Pages(10)
    ledger.promise("a", 2, Owner.PULLING)
    ledger.bind("a", 5, Owner.PULLING)
    assert (ledger.available, ledger.promised) == (5, 0)


def test_unpromising_keeps_the_pages():
    ledger = Pages(10)
    ledger.promise("a", 6, Owner.PULLING)
    ledger.bind("a", 2, Owner.PULLING)
    ledger.unpromise("a")
    assert (ledger.available, len(ledger.pages("a"))) == (8, 2)
    ledger.unpromise("nobody")


def test_a_move_takes_pages_and_promise_along_in_one_call():
    ledger = Pages(10)
    ledger.promise("a", 4, Owner.PULLING)
    ledger.bind("a", 3, Owner.PULLING)
    ledger.move("a", Owner.IN_DOUBT, to="b")
    assert (ledger.pages("a"), len(ledger.pages("b")), ledger.promised) == ((), 3, 1)
    assert ledger.counts()[Owner.IN_DOUBT] == 3
    assert ledger.release("b") == 3
    assert (ledger.available, ledger.release("b")) == (10, 0)


@pytest.mark.parametrize(
    "call",
    [
        lambda ledger: ledger.promise("a", -1, Owner.PULLING),
        lambda ledger: ledger.promise("a", 99, Owner.PULLING),
        lambda ledger: ledger.promise("a", 1, Owner.DECODING),
        lambda ledger: ledger.bind("a", -1, Owner.PULLING),
        lambda ledger: ledger.bind("new", 99, Owner.PULLING),
        lambda ledger: ledger.bind("a", 1, Owner.DECODING),
        lambda ledger: ledger.move("new", Owner.DECODING),
        lambda ledger: ledger.move("a", Owner.DECODING, to="b"),
    ],
)
def test_a_call_that_cannot_be_honoured_raises_and_changes_nothing(call):
    ledger = Pages(10)
    ledger.promise("a", 2, Owner.PULLING)
    ledger.bind("a", 1, Owner.PULLING)
    ledger.bind("b", 1, Owner.DECODING)
    before = picture(ledger)
    with pytest.raises(LocalError):
        call(ledger)
    assert picture(ledger) == before
    ledger.check()


def test_pages_come_from_behind_the_last_one_then_from_the_tightest_run_then_from_the_longest():
    ledger = Pages(20)
    for name, count in [("a", 3), ("b", 4), ("c", 2), ("d", 2), ("e", 9)]:
        ledger.bind(name, count, Owner.DECODING)
    for name in "bd":
        ledger.release(name)
    assert ledger.bind("two", 2, Owner.DECODING) == (9, 10)
    ledger.release("two")
    assert ledger.bind("a", 1, Owner.DECODING) == (3,)
    assert ledger.bind("five", 5, Owner.DECODING) == (4, 5, 6, 9, 10)


def test_freed_neighbours_become_one_run_again():
    ledger = Pages(9)
    for name in "abc":
        ledger.bind(name, 3, Owner.DECODING)
    for name in "acb":
        ledger.release(name)
    assert ledger.bind("all", 9, Owner.DECODING) == tuple(range(9))


def plainly(free: set[int], count: int, after: int | None) -> list[int]:
    """Pages in the order of preference that `FreeRuns.take` promises, found by looking at all runs."""
    taken: list[int] = []
    while len(taken) < count:
        runs, need = page_runs(sorted(free - set(taken))), count - len(taken)
        behind = [run for run in runs if run.start == after and not taken]
        fitting = sorted((run.count, run.start) for run in runs if run.count >= need)
        longest = sorted((-run.count, run.start) for run in runs)
        start = behind[0].start if behind else (fitting or longest)[0][1]
        length = next(run.count for run in runs if run.start == start)
        taken += range(start, start + min(need, length))
    return taken


@given(st.sets(st.integers(0, 59), min_size=1), st.integers(0, 59), st.none() | st.integers(0, 60), st.randoms())
@settings(QUICK, max_examples=300)
def test_free_runs_are_taken_in_the_order_of_preference_and_given_back_in_any_order(free, count, after, rng):
    count = min(count, len(free))
    space = FreeRuns(60)
    space.take(60)
    pages = list(free)
    rng.shuffle(pages)
    for some in (pages[::2], pages[1::2]):
        space.give(joined(some))
        space.check()
    assert numbers(space.runs()) == tuple(sorted(free))
    taken = space.take(count, after)
    assert list(numbers(taken)) == plainly(free, count, after)
    space.check()
    space.give(taken)
    space.check()
    assert space.runs() == tuple(joined(sorted(free)))


def test_a_table_is_numbers_and_runs_of_neighbours():
    ledger = Pages(20)
    for name, count in [("a", 3), ("b", 1), ("a", 2), ("c", 1), ("a", 1)]:
        ledger.bind(name, count, Owner.DECODING)
    assert ledger.pages("a") == (0, 1, 2, 4, 5, 7)
    assert ledger.runs("a") == (PageRun(0, 3), PageRun(4, 2), PageRun(7, 1))
    assert ledger.count("a") == 6
    assert (ledger.pages("x"), ledger.runs("x"), ledger.count("x")) == ((), (), 0)


@pytest.mark.parametrize(("count", "left"), [(0, 6), (1, 5), (2, 4), (3, 3), (5, 1), (6, 0), (9, 0)])
def test_trimming_frees_the_end_of_a_table_and_leaves_its_promise(count, left):
    ledger = Pages(20)
    ledger.promise("a", 8, Owner.DECODING)
    for name, more in [("a", 3), ("b", 1), ("a", 2), ("c", 1), ("a", 1)]:
        ledger.bind(name, more, Owner.DECODING)
    assert ledger.trim("a", count) == 6 - left
    assert ledger.pages("a") == (0, 1, 2, 4, 5, 7)[:left]
    assert (ledger.available, ledger.promised) == (16 - left, 2)
    ledger.check()
    assert len(ledger.bind("a", 18 - left, Owner.DECODING)) == 18 - left
    ledger.check()


@dataclass
class Held:
    state: Owner
    pages: list[int] = field(default_factory=list)
    promised: int = 0


def picture(ledger: Pages) -> object:
    return (
        {holder: ledger.pages(holder) for holder in ledger.holders()},
        ledger.counts(),
        ledger.available,
        ledger.promised,
    )


class Ledger(RuleBasedStateMachine):
    """Every call on the ledger and on a dictionary that knows no runs."""

    names = st.sampled_from("abcd")
    counts = st.integers(-1, 9)
    states = st.sampled_from(STATES)

    def __init__(self):
        super().__init__()
        self.ledger = Pages(24)
        self.model: dict[str, Held] = {}

    @property
    def free(self) -> set[int]:
        return set(range(24)) - {page for held in self.model.values() for page in held.pages}

    @property
    def available(self) -> int:
        return len(self.free) - sum(held.promised for held in self.model.values())

    def honoured(self, possible: bool, call) -> object:
        if possible:
            return call()
        before = picture(self.ledger)
        with pytest.raises(LocalError):
            call()
        assert picture(self.ledger) == before
        return None

    def agrees(self, name: str, state: Owner) -> bool:
        return name not in self.model or self.model[name].state is state

    @rule(name=names, count=counts, state=states)
    def promise(self, name, count, state):
        possible = 0 <= count <= self.available and self.agrees(name, state)
        self.honoured(possible, lambda: self.ledger.promise(name, count, state))
        if possible:
            self.model.setdefault(name, Held(state)).promised += count

    @rule(name=names)
    def unpromise(self, name):
        self.ledger.unpromise(name)
        if name in self.model:
            self.model[name].promised = 0

    @rule(name=names, count=counts, state=states)
    def bind(self, name, count, state):
        held = self.model.get(name, Held(state))
        possible = 0 <= count <= held.promised + self.available and self.agrees(name, state)
        free = self.free
        pages = self.honoured(possible, lambda: self.ledger.bind(name, count, state))
        if not possible:
            return
        assert isinstance(pages, tuple)
        assert len(pages) == len(set(pages)) == count
        assert set(pages) <= free
        if not held.pages and count:
            runs = page_runs(sorted(free))
            fitting = [run.count for run in runs if run.count >= count]
            if fitting:
                assert len(page_runs(pages)) == 1
                assert next(run.count for run in runs if run.start <= pages[0] < run.stop) == min(fitting)
        self.model.setdefault(name, held)
        held.pages += pages
        held.promised -= min(count, held.promised)

    @rule(name=names, to=st.sampled_from(["a", "b", "x", None]), state=states)
    def move(self, name, to, state):
        target = to or name
        possible = name in self.model and (target == name or target not in self.model)
        self.honoured(possible, lambda: self.ledger.move(name, state, to=to))
        if possible:
            self.model[target] = self.model.pop(name)
            self.model[target].state = state

    @rule(name=st.sampled_from("abcdx"))
    def release(self, name):
        held = self.model.pop(name, None)
        assert self.ledger.release(name) == (len(held.pages) if held else 0)

    @invariant()
    def agree(self):
        self.ledger.check()
        assert set(self.ledger.holders()) == self.model.keys()
        for name, held in self.model.items():
            assert self.ledger.pages(name) == tuple(held.pages)
        assert self.ledger.available == self.available
        assert self.ledger.promised == sum(held.promised for held in self.model.values())
        counts = self.ledger.counts()
        assert counts.pop(Owner.FREE) == len(self.free)
        for state, count in counts.items():
            assert count == sum(len(held.pages) for held in self.model.values() if held.state is state)


@efforts
def test_the_ledger_agrees_with_a_plain_dictionary(effort):
    run_state_machine_as_test(Ledger, settings=effort)


def test_what_is_kept_is_so_many_in_all():
    ledger = Pages(10)
    ledger.keep("a", 4, Owner.DECODING)
    ledger.keep("a", 7, Owner.DECODING)
    assert (ledger.promised, ledger.available) == (7, 3)
    with pytest.raises(LocalError, match="got 11 pages, want at most 10"):
        ledger.keep("a", 11, Owner.DECODING)
    with pytest.raises(LocalError, match="want the same state"):
        ledger.keep("a", 1, Owner.PULLING)
    ledger.bind("a", 5, Owner.DECODING)
    assert (ledger.count("a"), ledger.promised) == (5, 2)
    ledger.keep("a", 0, Owner.DECODING)
    assert (ledger.count("a"), ledger.promised, ledger.available) == (5, 0, 5)
    ledger.release("a")
    ledger.keep("a", 3, Owner.DECODING)
    ledger.keep("a", 0, Owner.DECODING)
    assert ledger.holders() == ()
    ledger.check()
