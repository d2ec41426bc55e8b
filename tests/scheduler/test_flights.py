"""Where a gateway's flights stand: against a list that is looked through."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from core.worker import Identity
from scheduler import flights
from scheduler.calls import Call, Flight
from scheduler.flights import Flights
from scheduler.placement import Need
from tests.cast import D1, D2, P1, P2, ask, efforts

WORKERS = [P1, P2, D1, D2]


def flight(number: int = 1) -> Flight:
    call = Call(number, ask(), 0.0, 100.0, [], False)
    return Flight(call, (0,), Need(6, 14), key=f"gateway-1/{number}")


def test_a_loss_finds_those_that_the_worker_may_have_and_no_others():
    places, one, other = Flights(), flight(1), flight(2)
    places.put(one, 1.0, P1, D1)
    places.put(other, 1.0, P2, D2)
    assert places.lose(D1) == [one]
    places.reach(other, D1)
    assert places.lose(D1) == [one, other]
    places.leave(one)
    assert places.lose(D1) == [other]
    assert places.lose(P1) == []


def test_what_broke_during_an_attempt_stays_broken_for_it_and_not_for_the_next():
    places, one = Flights(), flight()
    places.lose(D1)
    places.put(one, 1.0, P1, D1)
    assert not places.broken(one, D1)
    places.lose(D2)
    assert places.broken(one, D2), "its rows may have moved there, and are lost even if it is back"
    places.leave(one)
    places.put(one, 1.0, P1, D2)
    assert not places.broken(one, D2)


def test_old_losses_are_forgotten_and_none_that_an_attempt_has_met(monkeypatch):
    monkeypatch.setattr(flights, "_MEMORY", 4)
    places, one = Flights(), flight()
    for number in range(3):
        places.lose(Identity("decode-1", number))
    places.put(one, 1.0, P1)
    for number in range(3, 30):
        places.lose(Identity("decode-1", number))
    assert [places.broken(one, Identity("decode-1", number)) for number in range(30)] == [False] * 3 + [True] * 27
    places.leave(one)
    for number in range(30, 100):
        places.lose(Identity("decode-1", number))
    assert len(places._lost) <= 2 * 30


@dataclass
class Known:
    workers: list[Identity]
    look_at: float
    broken: set[Identity] = field(default_factory=set)


class Gateway(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.places = Flights()
        self.known: dict[int, Known] = {}
        self.made: dict[int, Flight] = {}
        self.count = 0

    @rule(workers=st.lists(st.sampled_from(WORKERS), max_size=3, unique=True), look_at=st.floats(0, 9))
    def put(self, workers, look_at):
        self.count += 1
        self.made[self.count] = flight(self.count)
        self.places.put(self.made[self.count], look_at, *workers)
        self.known[self.count] = Known(workers, look_at)

    @precondition(lambda self: self.known)
    @rule(data=st.data(), what=st.sampled_from(["reach", "look", "leave"]))
    def change(self, data, what):
        number = data.draw(st.sampled_from(sorted(self.known)))
        one, known = self.made[number], self.known[number]
        match what:
            case "reach":
                worker = data.draw(st.sampled_from(WORKERS))
                self.places.reach(one, worker)
                known.workers += [worker] * (worker not in known.workers)
            case "look":
                known.look_at = data.draw(st.floats(0, 9))
                self.places.look(one, known.look_at)
            case _:
                self.places.leave(one)
                del self.known[number]
                assert not self.places.stands(one)

    @rule(worker=st.sampled_from(WORKERS))
    def lose(self, worker):
        found = {one.call.counter for one in self.places.lose(worker)}
        assert found == {number for number, known in self.known.items() if worker in known.workers}
        for known in self.known.values():
            known.broken.add(worker)

    @rule(now=st.floats(0, 9))
    def wake(self, now):
        least = min((known.look_at for known in self.known.values()), default=float("inf"))
        assert self.places.next_look() == least
        one = self.places.due(now)
        assert (one is None) == (least > now)
        assert one is None or self.known[one.call.counter].look_at == least

    @invariant()
    def sound(self):
        self.places.check(known.look_at for known in self.known.values())
        assert [one.call.counter for one in self.places] == list(self.known)
        for number, known in self.known.items():
            one = self.made[number]
            assert self.places[one.key] is one
            assert {worker for worker in WORKERS if self.places.broken(one, worker)} == known.broken


@efforts
def test_as_a_list_that_is_looked_through(effort):
    run_state_machine_as_test(Gateway, settings=effort)


@pytest.mark.parametrize("workers", [(), (P1, P1)])
def test_a_worker_that_is_named_twice_is_one(workers):
    places, one = Flights(), flight()
    places.put(one, 1.0, *workers)
    places.check([1.0])
    assert places.at(P1) == [one] * bool(workers)
