"""Scenarios: the files that ship, what they do to a workload, and how a wrong one is refused."""

from __future__ import annotations

import itertools
import math
import tomllib
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import LocalError, SetupError
from sim.generators import ARXIV, generate
from sim.scenario import (
    SHIPPED,
    Lengths,
    Link,
    Lose,
    Rate,
    Return,
    Scenario,
    Slow,
    Tenant,
    applied,
    parse,
    read,
    shipped,
)
from sim.workload import Arrival, Workload, quantile

NAMES = sorted(path.stem for path in SHIPPED.glob("*.toml"))


def even(count: int, **other) -> Workload:
    """One request a second."""
    return Workload("even", tuple(Arrival(float(at), 100, 40, **other) for at in range(count)), "made")


def test_the_shipped_scenarios_are_read() -> None:
    assert NAMES == ["drain", "drift-and-burst", "load-step", "worker-loss"]
    assert [shipped(name).name for name in NAMES] == NAMES
    assert shipped("worker-loss").faults == (
        Lose(60.0, "decode-0"),
        Return(90.0, "decode-0"),
        Slow(150.0, "prefill-1", 3.0, 210.0),
    )
    assert shipped("load-step").events == (Rate(60.0, 2.0, 180.0), Link(100.0, 0.25, 0.002, until_s=140.0))
    assert shipped("load-step").faults == (Link(100.0, 0.25, 0.002, until_s=140.0),)
    assert shipped("drift-and-burst").events == (
        Lengths(60.0, 240.0, prompt=4.0, output=0.5),
        Tenant(120.0, 150.0, "code", "azure-code", 10.0),
    )
    with pytest.raises(SetupError, match="got 'x', want one of drain, drift-and-burst, load-step, worker-loss"):
        shipped("x")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("name = ", "want a TOML file"),
        ("", "name: got None, want a text that is not empty"),
        ('name = ""', "name: got '', want a text that is not empty"),
        ('name = "a"\nabout = 1', "about: got 1, want a text"),
        ('name = "a"\nevents = 1', "events: got 1, want only name, about and event"),
        ('name = "a"\n[event]\nat_s = 1', "want tables, each below [[event]]"),
        ('name = "a"\n[[event]]\nat_s = 1', "event 1: kind: got None, want one of lose, return, drain, slow, link"),
        ('name = "a"\n[[event]]\nkind = ["lose"]', "event 1: kind: got ['lose'], want one of lose"),
        ("lose", "event 1 (lose): at_s: got None, want a value"),
        ("lose at_s=1", "event 1 (lose): worker: got None, want a value"),
        ("lose at_s=1 worker=1", "event 1 (lose): worker: got 1, want a text"),
        ("lose at_s=1 worker=''", "event 1 (lose): worker: got '', want a text that is not empty"),
        ("lose at_s='1' worker='w'", "event 1 (lose): at_s: got '1', want a number"),
        ("lose at_s=true worker='w'", "event 1 (lose): at_s: got True, want a number"),
        ("lose at_s=-1 worker='w'", "event 1 (lose): at_s: got -1.0, want a finite time"),
        ("lose at_s=nan worker='w'", "event 1 (lose): at_s: got nan, want a finite time"),
        (f"lose at_s={10**400} worker='w'", "event 1 (lose): at_s: got 'an integer too large', want a number"),
        (f"lose at_s={'9' * 5000} worker='w'", "want a TOML file"),
        ("lose at_s=1 worker='w' factor=2", "event 1 (lose): factor: got 2, want only at_s, worker"),
        ("return at_s=1 worker='w'", "worker: got 'w', want one that was lost before 1 s"),
        ("slow at_s=1 worker='w' factor=0", "event 1 (slow): factor: got 0.0, want a finite number above 0"),
        ("slow at_s=1 worker='w' factor=inf", "event 1 (slow): factor: got inf"),
        ("slow at_s=1 worker='w' factor=2 until_s=1", "until_s: got 1.0, want a time after at_s, 1"),
        ("link at_s=1 factor=2", "event 1 (link): factor: got 2.0, want above 0, at most 1"),
        ("link at_s=1 delay_s=-1", "event 1 (link): delay_s: got -1.0, want a finite time"),
        ("rate at_s=1", "event 1 (rate): factor: got None"),
        ("lengths at_s=1 until_s=inf", "event 1 (lengths): until_s: got inf, want a finite time, when the drift"),
        ("lengths at_s=1 until_s=2 prompt=0", "event 1 (lengths): prompt: got 0.0"),
        ("tenant at_s=1 until_s=2 tenant='t' shape='x' rate=1", "event 1 (tenant): shape: got 'x', want one of moon"),
        ("tenant at_s=1 until_s=inf tenant='t' shape='arxiv' rate=1", "event 1 (tenant): until_s: got inf"),
        ("tenant at_s=1 until_s=2 tenant='t' shape='arxiv' rate=0", "event 1 (tenant): rate: got 0.0"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path, text, sentence) -> None:
    kind, _, rest = text.partition(" ")
    if kind in ("lose", "return", "slow", "link", "rate", "lengths", "tenant"):
        text = "\n".join(['name = "a"', "[[event]]", f'kind = "{kind}"', *rest.split()])
    path = tmp_path / "s.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SetupError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}: ")
    assert sentence in str(error.value)


def test_a_worker_is_lost_and_returns_in_turns() -> None:
    lose, back = {"kind": "lose", "at_s": 1, "worker": "w"}, {"kind": "return", "at_s": 2, "worker": "w"}
    assert len(parse({"name": "a", "event": [back, lose, {**lose, "at_s": 3}]}).events) == 3
    with pytest.raises(LocalError, match="worker: got 'w', want one that is not lost already"):
        parse({"name": "a", "event": [lose, {**lose, "at_s": 1.5}, back]})
    with pytest.raises(LocalError, match="at_s: got 1, want at least 2, the event before's"):
        Scenario("a", (Rate(2, 2), Rate(1, 2)))


def test_a_load_step_keeps_all_requests_and_moves_them() -> None:
    found = applied(shipped("load-step"), even(400), 1)
    a_minute = Counter(int(arrival.at_s // 60) for arrival in found.arrivals)
    assert [a_minute[minute] for minute in range(5)] == [60, 120, 120, 60, 40]
    assert len(found) == 400


@given(
    st.lists(st.tuples(st.floats(0, 100), st.floats(0.1, 100), st.floats(0.1, 10)), max_size=4),
    st.lists(st.floats(0, 300), max_size=30).map(sorted),
)
def test_any_rates_keep_order_and_count(steps, at_s) -> None:
    events = sorted((Rate(at, factor, at + length) for at, length, factor in steps), key=lambda event: event.at_s)
    workload = Workload("w", tuple(Arrival(at, 1 + index, 1) for index, at in enumerate(at_s)))
    found = applied(Scenario("a", tuple(events)), workload, 1)
    assert [arrival.prompt for arrival in found.arrivals] == [arrival.prompt for arrival in workload.arrivals]
    if not events:
        assert found.arrivals == workload.arrivals


def test_rates_that_overlap_multiply() -> None:
    found = applied(Scenario("a", (Rate(10, 2), Rate(20, 3, 30))), even(200), 1)
    tens = Counter(int(arrival.at_s // 10) for arrival in found.arrivals)
    assert [tens[ten] for ten in range(4)] == [10, 20, 60, 20]


def test_lengths_drift_and_stay() -> None:
    workload = even(400, blocks=(0, 1), block_tokens=64)
    found = applied(Scenario("a", (Lengths(100, 300, prompt=4, output=0.25),)), workload, 1).arrivals
    assert [found[at].prompt for at in (0, 100, 200, 300, 399)] == [100, 100, 200, 400, 400]
    assert [found[at].output for at in (0, 100, 200, 300, 399)] == [40, 40, 20, 10, 10]
    assert all(later.prompt >= earlier.prompt for earlier, later in itertools.pairwise(found))
    fresh = [id_ for arrival in found[102:] for id_ in arrival.blocks[1:]]
    assert all(arrival.blocks[0] == 0 for arrival in found)
    assert len(set(fresh)) == len(fresh)
    assert not {0, 1} & set(fresh)


def test_a_burst_adds_its_tenants_requests_and_no_others() -> None:
    workload = generate(ARXIV, 1, 300, rate=1)
    scenario = Scenario("a", (Rate(0, 2), Tenant(50, 90, "t", "azure-code", 10)))
    found = applied(scenario, workload, 5)
    burst = [arrival for arrival in found.arrivals if arrival.tenant == "t"]
    assert len(burst) == pytest.approx(400, abs=60)
    assert all(50 <= arrival.at_s < 90 for arrival in burst)
    assert 1000 < quantile(sorted(arrival.prompt for arrival in burst), 0.5) < 2200
    others = [(arrival.prompt, arrival.output) for arrival in found.arrivals if not arrival.tenant]
    assert others == [(arrival.prompt, arrival.output) for arrival in workload.arrivals]
    assert applied(scenario, workload, 5) == found != applied(scenario, workload, 6)


def test_a_burst_of_nothing_changes_nothing() -> None:
    workload = even(10)
    assert applied(Scenario("a", (Tenant(1, 1.001, "t", "arxiv", 0.001),)), workload, 1).arrivals == workload.arrivals


def test_until_may_be_left_out_or_infinite() -> None:
    text = 'name="a"\n[[event]]\nkind="slow"\nat_s=1\nworker="w"\nfactor=2\n'
    assert parse(tomllib.loads(text)) == parse(tomllib.loads(text + "until_s=inf\n"))
    assert parse(tomllib.loads(text)).events == (Slow(1.0, "w", 2.0, math.inf),)
