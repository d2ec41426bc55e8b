"""Events and commands through JSON: what comes back is equal, and what nobody wrote is refused in one sentence."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import namedtuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core import messages
from core.errors import LocalError, StateError
from core.kv import PageRun
from core.messages import Carried, First, Message, Offer, Prompt, Ready, Reserve, Tokens
from core.request import Phase, Request, Stage, Ticket
from core.sampling import Logprobs, Sampling
from core.words import read, written
from core.worker import Identity, Lane, Role
from scheduler.decode_events import Join, Ran, Run
from scheduler.router_events import Deliver, End, ToOne, WorkerUp
from tests.cast import D1, D2, P1, QUICK, ask, ticket, worker

numbers = st.integers(-(2**70), 2**70)
rows = st.lists(numbers, max_size=4).map(tuple)
names = st.text(max_size=4)
reals = st.floats(allow_nan=False)
tickets = st.builds(
    Ticket, st.builds(Identity, names, numbers), numbers, numbers, st.just(P1), st.builds(Identity, names, numbers)
)
samplings = st.builds(Sampling, st.integers(1, 9), temperature=st.floats(0, 2), seed=st.integers(0, 2**64 - 1))
requests = st.builds(Request, names, rows, samplings, reals, generated=numbers, prefix=rows)
stages = st.builds(Stage, names, names, reals, st.dictionaries(names, names, max_size=2))
logprobs = st.builds(Logprobs, numbers, reals, rows, st.lists(reals, max_size=2).map(tuple))
firsts = st.builds(First, numbers, numbers, numbers, st.none() | logprobs)
said = st.one_of(
    st.builds(Prompt, tickets, requests, st.none() | st.just(D2)),
    st.builds(Tokens, tickets, numbers, rows, rows, logprobs=st.lists(logprobs, max_size=2).map(tuple)),
    st.builds(Ready, tickets, numbers, st.just((PageRun(1, 2),)), rows, st.lists(firsts, max_size=2).map(tuple)),
    st.builds(Carried, rows, st.lists(stages, max_size=2).map(tuple)),
    st.builds(Offer, tickets, numbers, numbers, reals, prefix=rows),
    st.builds(End, numbers, st.sampled_from(Phase), names, names, st.none() | reals),
)


def again(value):
    """Through a file."""
    return read(json.loads(json.dumps(written(value), allow_nan=False)))


@given(said)
@settings(QUICK, max_examples=20)
def test_what_is_written_comes_back_equal(value):
    back = again(value)
    assert back == value
    assert type(back) is type(value)
    assert written(back) == written(value)


@pytest.mark.parametrize(
    "value",
    [
        None,
        Ran(3, 2),
        ToOne(D1, Prompt(ticket(), ask(), D2)),
        WorkerUp(worker(D1, Role.DECODE)),
        Run(1, ("a", "b"), (Join("a", ticket(), ask(), First(1), (0, 1)),), (), 7),
        Deliver(1, (7, 8), (1, 2), 0, (Logprobs(7, -0.5, (7, 9), (-0.5, -1.0)),)),
        Lane(P1, "ucx", 1.5, 2.5),
        Reserve(ticket(), dataclasses.replace(ask(), timeout_s=math.inf)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_machines_hear_and_say_comes_back(value):
    assert again(value) == value
    assert type(again(value)) is type(value)


def test_a_ticket_has_its_key_again_and_a_number_json_has_not_got_survives():
    assert again(ticket(5)).key == ticket(5).key
    assert again(-math.inf) == -math.inf
    assert again(2**64 - 1) == 2**64 - 1
    assert again((1, (2, "x"), None, True)) == (1, (2, "x"), None, True)
    assert again({"a": (1,)}) == {"a": (1,)}
    assert again([1, D1]) == [1, D1]
    assert again(frozenset({D1, D2})) == {D1, D2}
    assert json.dumps(written(frozenset({D1, D2}))) == json.dumps(written(frozenset({D2, D1})))


@pytest.mark.parametrize("value", [object(), open, dataclasses.make_dataclass("Here", ["x"])(1), Ran, b"x"])
def test_what_has_no_place_in_a_machine_cannot_be_written(value):
    with pytest.raises(LocalError, match="words: got"):
        written((1, value))


Here = namedtuple("Here", ["x"])


def test_a_named_tuple_of_another_room_cannot_be_written():
    with pytest.raises(LocalError, match="want a class of the pure rooms"):
        written(Here(1))


@pytest.mark.parametrize(
    ("document", "sentence"),
    [
        ({"@": "os:system"}, "want a value's class of the pure rooms"),
        ({"@": "core.nothing:Ran"}, "want a value's class"),
        ({"@": "core.messages:quick_init"}, "want a value's class"),
        ({"@": "core.errors:LocalError"}, "want a value's class"),
        ({"@": "scheduler.decode_policy:DecodePolicy"}, "want a value's class"),
        ({"@": "core.messages:PageRun"}, "want a value's class"),
        ({"@": 7}, "want a value's class"),
        ({"@": "scheduler.decode_events:Ran", "run_id": 1}, "scheduler.decode_events:Ran: got"),
        ({"@": "scheduler.decode_events:Ran", "run_id": 1, "steps": 1, "more": 1}, "scheduler.decode_events:Ran: got"),
        ({"enum": ["scheduler.decode_events:Ran", 1]}, "want an enum"),
        ({"enum": ["core.request:Phase", "asleep"]}, "want a value"),
        ({"float": "x"}, "want a value"),
        ({"what": []}, "want a value"),
        ({"set": 1}, "want a value"),
        ({}, "want a value"),
    ],
)
def test_what_nobody_wrote_is_refused_in_one_sentence(document, sentence):
    with pytest.raises(StateError, match=sentence) as error:
        read([1, document])
    assert "\n" not in str(error.value)


def test_every_message_has_a_place_in_a_recording():
    """A class that is added to the protocol must be one that is found again by its name."""
    for each in Message.__args__:
        assert getattr(messages, each.__name__) is each
