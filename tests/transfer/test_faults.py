"""The faulty transport keeps a transport's contract without faults, as a slow lane, and injects what its rules say."""

from __future__ import annotations

import numpy as np
import pytest

from core.kv import PageRun
from tests.transfer.conformance import UNIT, Conformance, Worker
from tests.transfer.faults import LANDED, Faulty, FileRules, Rule, Rules, acted, write
from tests.transfer.peer import arena, pattern
from transfer.inprocess import InProcess
from transfer.transport import ReadDone, ReadFailed, ReadFenced


class TestFaultless(Conformance):
    """A decorator without rules."""

    kind = "faultless"


class Clock:
    """A time that stands until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Pair:
    """A sink that reads pages of a source through a faulty transport."""

    def __init__(self, *rules: Rule, bytes_per_s: float = float("inf")) -> None:
        self.acted: list[Rule] = []
        self.clock = Clock()
        self.source = Worker("inprocess", "source#01", seed=1)
        self.sink = Worker("faultless", "sink#02")
        assert isinstance(self.sink.transport, Faulty)
        self.faulty = self.sink.transport
        self.faulty.rules = Rules(rules, self.acted.append)
        self.faulty.clock = self.clock
        self.faulty.bytes_per_s = bytes_per_s
        self.faulty.connect("source#01", self.source.transport.metadata())

    def read(self, count: int = 2, target: int = 8) -> int:
        return self.sink.read("source#01", [PageRun(0, count)], [PageRun(target, count)])

    def polled(self, seconds: float = 0.0):
        self.clock.now += seconds
        return self.faulty.poll()

    def wrong(self, count: int = 2, target: int = 8) -> int:
        """Bits that differ from the source's."""
        want = np.stack([pattern(1, page, UNIT) for page in range(count)])
        return int(np.unpackbits(self.sink.bytes[target : target + count] ^ want).sum())


def test_a_flip_is_one_bit_of_the_read_that_the_rule_names():
    pair = Pair(Rule("read", "flip", nth=2))
    for wrong in (0, 1, 0):
        pair.read()
        (done,) = pair.polled()
        assert isinstance(done, ReadDone)
        assert pair.wrong() == wrong
    assert len(pair.acted) == 1


def test_the_same_fault_is_the_same_bit():
    found = []
    for _ in range(2):
        pair = Pair(Rule("read", "flip"))
        pair.read()
        pair.polled()
        found.append(pair.sink.bytes.copy())
    assert np.array_equal(found[0], found[1])


def test_a_failed_read_leaves_noise():
    pair = Pair(Rule("read", "fail"))
    who = pair.read()
    assert pair.polled() == [ReadFailed(who, "a fault was injected", in_doubt=False)]
    assert pair.wrong() > UNIT
    assert not pair.faulty.busy


def test_a_broken_lane_fails_every_read_until_it_is_connected_anew():
    pair = Pair(Rule("read", "stall", seconds=5.0), Rule("read", "break", nth=2))
    stalled, who = pair.read(), pair.read()
    ends = pair.polled()
    assert ends == [ReadFailed(each, "the lane was broken", in_doubt=False) for each in (who, stalled)]
    assert pair.faulty.broken() == [("source#01", "the lane was broken")]
    assert pair.faulty.broken() == []
    again = pair.read()
    assert pair.polled() == [ReadFailed(again, "the lane was broken", in_doubt=False)]
    pair.faulty.disconnect("source#01")
    pair.faulty.connect("source#01", pair.source.transport.metadata())
    pair.read()
    assert isinstance(pair.polled()[0], ReadDone)
    assert pair.wrong() == 0
    assert not pair.faulty.busy


def test_a_read_in_doubt_lands_late_and_only_then_is_fenced():
    pair = Pair(Rule("read", "doubt", seconds=3.0))
    who = pair.read()
    assert pair.polled() == [ReadFailed(who, "a fault was injected", in_doubt=True)]
    assert pair.faulty.in_doubt() == {who}
    pair.sink.bytes[:] = 0
    assert pair.polled(2.9) == []
    assert not pair.sink.bytes.any()
    assert pair.polled(0.1) == [ReadFenced(who)]
    assert pair.acted[1:] == [LANDED]
    assert pair.sink.bytes[8:10].any()
    assert not pair.sink.bytes[:8].any()
    assert not pair.sink.bytes[10:].any()
    assert not pair.faulty.in_doubt()


@pytest.mark.parametrize("seconds", [0.0, 3.0])
def test_a_fence_keeps_it_from_landing(seconds):
    pair = Pair(Rule("read", "doubt", seconds=seconds))
    who = pair.read()
    pair.polled()
    pair.sink.bytes[:] = 0
    pair.faulty.fence([who])
    assert pair.polled() == [ReadFenced(who)]
    assert pair.polled(10.0) == []
    assert not pair.sink.bytes.any()


def test_a_delayed_read_has_its_bytes_of_before_and_a_stalled_one_those_of_after():
    for deed, stale in (("delay", False), ("stall", True)):
        pair = Pair(Rule("read", deed, seconds=1.0))
        pair.read()
        assert pair.polled() == []
        pair.source.bytes[:] = 7
        assert pair.polled(0.9) == []
        (done,) = pair.polled(0.2)
        assert isinstance(done, ReadDone)
        assert (pair.sink.bytes[8:10] == 7).all() == stale


def test_a_stalled_read_delays_no_other():
    pair = Pair(Rule("read", "stall", seconds=1000.0))
    stalled = pair.read()
    other = pair.read(1, 20)
    assert [done.read_id for done in pair.polled()] == [other]
    pair.faulty.fence([stalled])
    assert [done.read_id for done in pair.polled()] == [stalled]


@pytest.mark.parametrize("end", ["abandon", "fence", "disconnect"])
@pytest.mark.parametrize("deed", ["delay", "stall"])
def test_a_late_read_that_is_given_up_ends_at_once(deed, end):
    pair = Pair(Rule("read", deed, seconds=1.0))
    who = pair.read()
    pair.polled()
    match end:
        case "abandon":
            pair.faulty.abandon(who)
        case "fence":
            pair.faulty.fence([who])
        case _:
            pair.faulty.disconnect("source#01")
    (ended,) = pair.polled()
    assert isinstance(ended, ReadFailed)
    assert not ended.in_doubt
    pair.sink.bytes[:] = 0
    assert pair.polled(10.0) == []
    assert not pair.sink.bytes.any()


def test_a_slow_lane_takes_as_long_as_its_bytes():
    """Reads share it: the second is told when both have had their time."""
    pair = Pair(bytes_per_s=2 * UNIT)
    first, second = pair.read(2), pair.read(4, 16)
    assert pair.polled(0.9) == []
    (done,) = pair.polled(0.2)
    assert isinstance(done, ReadDone)
    assert done.read_id == first
    assert done.seconds == pytest.approx(1.1)
    assert pair.polled(1.8) == []
    (done,) = pair.polled(0.2)
    assert done.read_id == second
    pair.clock.now += 100.0
    pair.read(2)
    assert pair.polled(0.9) == []
    assert len(pair.polled(0.2)) == 1


def test_probes_have_no_faults():
    pair = Pair(Rule("read", "fail"))
    pair.faulty.read(-1, "source#01", [PageRun(0, 1)], [PageRun(0, 1)])
    assert isinstance(pair.polled()[0], ReadDone)
    assert not pair.acted


def test_rules_of_a_file_are_replaced_and_tell_what_they_did(tmp_path):
    path = tmp_path / "rules"
    rules, other = FileRules(path, "sink"), FileRules(path, "other")
    assert rules.on("read") == []
    flip = Rule("read", "flip", nth=2, times=2)
    write(path, {"sink": [flip]})
    assert [rules.on("read") for _ in range(4)] == [[], [flip], [flip], []]
    assert other.on("read") == []
    assert acted(path).read_text() == "sink: flip at read\n" * 2
    write(path, {"sink": [flip]})
    assert [rules.on("read") for _ in range(2)] == [[], [flip]]
    write(path, {})
    assert rules.on("read") == []
    assert acted(path).read_text() == ""


def test_an_inner_failure_passes():
    inner = Worker("inprocess", "source#01", seed=1)
    faulty = Faulty(InProcess("sink#02"))
    faulty.register(arena(4, UNIT), UNIT)
    faulty.connect("source#01", inner.transport.metadata())
    inner.transport.close()
    faulty.read(1, "source#01", [PageRun(0, 1)], [PageRun(0, 1)])
    (ended,) = faulty.poll()
    assert isinstance(ended, ReadFailed)
    assert not faulty.busy
