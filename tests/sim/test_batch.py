"""A decode engine that jumps over steps does what one that takes each of them does."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest

from core.messages import Tokens
from core.request import Request, Ticket
from core.sampling import Sampling
from core.worker import Identity
from scheduler.cost import CostModel
from sim.batch import Batch, remaining
from sim.gaps import GapLog, edges
from sim.outcome import Record
from sim.workload import Arrival

COST = CostModel("test", ((0.01, 1e-4, 0.0, 0.0),), ((0.005, 1e-4, 1e-6), (0.001, 0.0, 4e-6)))
ME = Identity("decode-0", 1)


@dataclass
class Host:
    """What a batch wants of its worker."""

    upper: tuple[float, ...] = edges(0.01)
    me: Identity = ME
    slowness: float = 1.0
    records: dict[int, Record] = field(default_factory=dict)
    said: list[Tokens] = field(default_factory=list)

    def decodes(self) -> float:
        return self.slowness

    def record(self, ticket: Ticket) -> Record:
        return self.records[ticket.counter]

    def token(self, record: Record, at_s: float) -> None:
        record.token(at_s, self.upper)

    def send(self, to: Identity, message: Tokens) -> bool:
        self.said.append(message)
        return True


def ticket(counter: int) -> Ticket:
    return Ticket(Identity("gateway-0", 1), counter, 1, ME, ME)


def request(prompt: int, output: int) -> Request:
    return Request("r", (0,) * prompt, Sampling(output), 100.0)


@pytest.mark.parametrize("seed", range(30))
def test_jumps_are_steps(seed):
    """Rows join, leave and come back at the same steps; times, gaps and tokens agree with a walk over every step."""
    dice = random.Random(seed)
    host: Any = Host()
    batch = Batch(host, COST)
    now, counter = 0.0, 0
    rows: dict[str, dict[str, Any]] = {}
    for _ in range(12):
        for _ in range(dice.randint(0 if rows else 1, 3)):
            counter += 1
            prompt, output = dice.randint(1, 3000), dice.randint(2, 60)
            record = host.records[counter] = Record(Arrival(0.0, prompt, output), 0.0)
            sent = now - dice.uniform(0.0, 0.05)
            record.token(sent, host.upper)
            asked = request(prompt, output)
            batch.join(str(counter), ticket(counter), asked, 1)
            rows[str(counter)] = {
                "request": asked, "context": prompt + 1, "left": output - 1, "said": 1, "gaps": [], "last": sent,
                "record": record,
            }  # fmt: skip
        batch.begin(now)
        most = min(row["left"] for row in rows.values())
        assert batch.first_end() == batch.steps + most
        steps = dice.randint(1, most)
        upto = batch.steps + steps
        expected = now
        for _ in range(steps):
            expected += COST.decode_s(len(rows), sum(row["context"] for row in rows.values()))
            for row in rows.values():
                row["context"] += 1
                row["left"] -= 1
                row["gaps"].append(expected - row["last"])
                row["last"] = expected
        assert batch.time_of(upto) == pytest.approx(expected, rel=1e-12)
        assert batch.steps_by((batch.time_of(upto) + batch.time_of(upto - 1)) / 2, upto) == upto - 1
        assert batch.steps_by(batch.time_of(upto), upto + 5) == upto
        now = batch.time_of(upto)
        finished = batch.advance(upto)
        assert sorted(key for key, _ in finished) == sorted(key for key, row in rows.items() if row["left"] == 0)
        for key, ended in finished:
            batch.say(ended)
            batch.leave(key)
            mine = rows.pop(key)
            message = host.said.pop()
            assert (message.index, message.index + len(message.tokens)) == (mine["said"], 1 + len(mine["gaps"]))
            log = GapLog(host.upper)
            for seconds in mine["gaps"]:
                log.add(seconds)
            assert mine["record"].gaps is not None
            moved = sum(abs(a - b) for a, b in zip(mine["record"].gaps, log.mark(), strict=True))
            assert moved <= 2, "more than one gap in a neighbouring bucket, which rounding may do"
            assert mine["record"].sent_s == now
        if not rows:
            now += 1.0
        elif dice.random() < 0.3:
            gone = dice.choice(sorted(rows))
            batch.leave(gone)
            if dice.random() < 0.5:  # its memory is taken and given back before the next step
                mine = rows[gone]
                mine["said"] = 1 + len(mine["gaps"])
                batch.join(gone, ticket(int(gone)), mine["request"], mine["said"])
            else:
                rows.pop(gone)
    assert len(batch) == len(rows)


def test_one_who_comes_back_to_end_at_the_same_step_ends_once():
    host: Any = Host()
    batch = Batch(host, COST)
    host.records[1] = Record(Arrival(0.0, 10, 5), 0.0)
    host.records[1].token(0.0, host.upper)
    for _ in range(3):
        batch.join("1", ticket(1), request(10, 5), 1)
        batch.leave("1")
    batch.join("1", ticket(1), request(10, 5), 1)
    assert batch.first_end() == 4
    batch.begin(0.0)
    assert [key for key, _ in batch.advance(4)] == ["1"]


def test_one_who_leaves_before_a_step_was_never_there():
    host: Any = Host()
    batch = Batch(host, COST)
    for counter in (1, 2):
        host.records[counter] = Record(Arrival(0.0, 10, 5), 0.0)
        host.records[counter].token(0.0, host.upper)
        batch.join(str(counter), ticket(counter), request(10, 5), 1)
    batch.leave("1")
    batch.begin(0.0)
    assert [key for key, _ in batch.advance(4)] == ["2"]
    assert host.records[1].gaps is None


def test_a_slow_worker_takes_its_factor():
    host: Any = Host()
    batch = Batch(host, COST)
    host.records[1] = Record(Arrival(0.0, 10, 50), 0.0)
    host.records[1].token(0.0, host.upper)
    batch.join("1", ticket(1), request(10, 50), 1)
    batch.begin(0.0)
    once = batch.time_of(4)
    batch.advance(4)
    host.slowness = 3.0
    batch.begin(once)
    assert batch.time_of(5) - once == pytest.approx(3 * COST.decode_s(1, 15))


def test_what_is_left_of_a_request():
    record = Record(Arrival(0.0, 10, 50), 0.0)
    assert remaining(record, request(10, 80)) == 50
    assert remaining(record, request(10, 20)) == 20
    again = Request("r", (0,) * 30, Sampling(60), 100.0, generated=20)
    assert remaining(record, again) == 30
