"""Prompts that wait for pages of others: who asks whom, what it costs the rest, and what is left when it fails."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule, run_state_machine_as_test

from core.errors import LocalError
from core.messages import Accept, Cancel, Failed, First, Handed, Holding, Offer, Prompt
from core.pages import Owner, Pages
from core.request import Stage, Ticket
from core.worker import Identity, Lane
from scheduler.cost import Repriced
from scheduler.prefill_events import (
    Answer,
    AskForSink,
    Began,
    Begin,
    ChunkDone,
    DropFetch,
    EndSequence,
    FetchOver,
    FetchPages,
    GatewayGone,
    HandOffOver,
    RunChunk,
    SealPages,
    Span,
    State,
    Suspend,
)
from scheduler.prefill_fetches import Fetches
from scheduler.prefill_policy import PrefillConfig, PrefillPolicy
from tests.cast import D1, D2, P1, P2, SHAPE, ask, efforts, ticket
from tests.scheduler.orders import ORDERS, SLOW
from tests.scheduler.test_prefill_policy import Job, PrefillWorker
from tests.scheduler.twins import doubled

NAMES = (11, 12, 13, 14, 15, 16)
QUICK, FAR = 1.0, 1e-9
"""GB/s of a lane over which pages come at once, and of one over which a page takes 64 s."""


def lane(source: Identity = D1, gbytes_per_s: float = QUICK) -> Lane:
    return Lane(source, "wire", gbytes_per_s, 10.0)


def fetches(*lanes: Lane, here: int = 0, pages: int = 40) -> Fetches:
    """Of a worker that has so many pages of what is asked for, and where a token takes 0.1 s."""
    ledger = Pages(pages)
    ledger.bind("before", here, Owner.DECODING)
    ledger.name("before", NAMES[:here])
    ledger.release("before")
    made = Fetches(P1, SHAPE, ledger, SLOW)
    for each in lanes:
        made.reach(each)
    return made


HAS = (Holding(D1, 24),)


@pytest.mark.parametrize(
    ("made", "holdings", "first_s", "want"),
    [
        (fetches(), HAS, 2.0, None),
        (fetches(lane()), (), 2.0, None),
        (fetches(lane()), HAS, 2.0, (D1, 6)),
        (fetches(lane(), here=4), HAS, 2.0, (D1, 6)),
        (fetches(lane(), here=6), HAS, 2.0, None),
        (fetches(lane()), (Holding(D1, 11),), 2.0, (D1, 2)),
        (fetches(lane(), here=2), (Holding(D1, 11),), 2.0, None),
        (fetches(lane(), pages=3), HAS, 2.0, (D1, 3)),
        (fetches(lane(gbytes_per_s=FAR)), HAS, 2.0, None),
        (fetches(lane(gbytes_per_s=FAR)), HAS, 9999.0, (D1, 6)),  # it waits for so long in any case
        (fetches(lane(), Lane(D1, "")), HAS, 2.0, None),
        (fetches(lane(), Lane(D1, ""), lane()), HAS, 2.0, (D1, 6)),
        (fetches(lane(gbytes_per_s=0.0)), HAS, 2.0, None),
        (fetches(lane(D2)), HAS, 2.0, None),
        (fetches(replace(lane(), latency_us=5e6)), HAS, 2.0, (D1, 6)),
        (fetches(lane(D2), lane()), (*HAS, Holding(D2, 12)), 2.0, (D1, 6)),
        (fetches(lane(D2), lane(gbytes_per_s=FAR)), (*HAS, Holding(D2, 12)), 2.0, (D2, 3)),
    ],
)
def test_who_is_asked_for_what(made, holdings, first_s, want):
    """Of a prompt of 26 tokens; a page of four is computed in 0.4 s."""
    asked = made.ask("a", 26, NAMES, holdings, first_s, 1.0)
    made.check({"a"} if want else set())
    assert len(made) == (want is not None)
    if want is None:
        assert asked is None
        return
    (command,) = asked
    source, pages = want
    assert command.ticket == Ticket(P1, 1, 1, source, P1)
    assert command.prefix == NAMES[:pages]
    assert made.source("a") == source.name


def test_a_fetch_is_of_use_until_computing_would_have_been_as_good():
    made = fetches(lane())
    (command,) = made.ask("a", 26, NAMES, HAS, 3.6, 1.0) or []
    # 2.6 s are its own work, of which 2.3 s are saved: two tokens are left, which take 0.3 s as all steps do at least.
    assert command.deadline == pytest.approx(1.0 + 1.0 + 2.3)


def test_who_begins_alike_waits_for_the_same_pages():
    made = fetches(lane())
    (command,) = made.ask("a", 26, NAMES, HAS, 2.0, 1.0) or []
    assert made.ask("b", 14, (*NAMES[:2], 99), HAS, 2.0, 1.0) == []
    made.check({"a", "b"})
    assert made.over(FetchOver(command.ticket.key, 64)) == ("a", "b")
    made.check(set())
    assert (made.fetched, made.failed, made.fetched_nbytes, len(made)) == (1, 0, 64, 0)


def test_what_nobody_waits_for_is_dropped_and_can_be_asked_for_again():
    made = fetches(lane())
    (first,) = made.ask("a", 26, NAMES, HAS, 2.0, 1.0) or []
    made.ask("b", 26, NAMES, HAS, 2.0, 1.0)
    assert made.drop("a", "left") == []
    assert made.drop("b", "left") == [DropFetch(first.ticket.key, "left")]
    assert made.drop("b", "left") == []
    (second,) = made.ask("c", 26, NAMES, HAS, 2.0, 1.0) or []
    made.check({"c"})
    assert made.over(FetchOver(first.ticket.key, 0)) == ()
    made.check({"c"})
    assert made.over(FetchOver(second.ticket.key, 0)) == ("c",)
    assert (made.fetched, made.failed) == (0, 1)
    with pytest.raises(LocalError, match="want one that was asked for"):
        made.over(FetchOver(second.ticket.key, 0))


def test_a_lane_that_is_used_counts_as_busy():
    """Pages for the second would come behind those for the first."""
    made = fetches(lane(gbytes_per_s=7e-7), lane(D2, gbytes_per_s=7e-7))
    (first,) = made.ask("a", 26, NAMES, (*HAS, Holding(D2, 24)), 2.0, 1.0) or []
    (second,) = made.ask("b", 26, tuple(-name for name in NAMES), (Holding(D1, 24), Holding(D2, 24)), 2.0, 1.0) or []
    assert {first.ticket.source, second.ticket.source} == {D1, D2}


def test_a_faster_worker_computes_what_a_slower_one_fetches():
    made = fetches(lane(gbytes_per_s=1e-6))
    made.reprice(SLOW.at(0.01))
    assert made.ask("a", 26, NAMES, HAS, 0.026, 1.0) is None
    made.reprice(SLOW)
    assert made.ask("a", 26, NAMES, HAS, 2.0, 1.0) is not None


# In the policy.
KEY = ticket(1).key
LONG = replace(ask(26), prefix=NAMES)


def policy() -> PrefillPolicy:
    ledger = Pages(40)
    made = PrefillPolicy(
        P1, SHAPE, ledger, PrefillConfig(chunk_tokens=64, ungranted_share=1.0), None, Fetches(P1, SHAPE, ledger, SLOW)
    )
    made.on(lane(), 0.0)
    return made


def waiting(machine: PrefillPolicy, counter: int = 1) -> FetchPages:
    """Prompt `counter` waits for its pages."""
    this = ticket(counter)
    assert machine.on(Offer(this, 26, 8, 9.0, prefix=NAMES), 0.0) == [Answer(Accept(this, 0, 0.0))]
    (command,) = machine.on(Prompt(this, LONG, None, HAS), 0.5)
    machine.check()
    assert isinstance(command, FetchPages)
    return command


def bring(machine: PrefillPolicy, fetch: FetchPages, now: float, pages: int = 6) -> list:
    """What the sink does, and says."""
    ledger = machine._ledger
    ledger.bind("fetch", pages, Owner.PULLING)
    ledger.name("fetch", fetch.prefix[:pages])
    ledger.release("fetch")
    return machine.on(FetchOver(fetch.ticket.key, pages * SHAPE.page_nbytes, {"from": "decode-1"}), now)


def test_a_prompt_whose_pages_come_computes_the_rest():
    machine = policy()
    fetch = waiting(machine)
    assert machine.queue()[State.FETCHING] == 1
    (standing,) = machine.standing()
    assert (standing.state, standing.waits_for) == ("fetching", "pages of its prompt from decode-1")
    assert machine.deadline() == 100.5, "nothing is due: the fetch has a deadline of its own"
    commands = bring(machine, fetch, 1.0)
    assert commands == [
        AskForSink(ticket(), LONG, 100.5),
        Begin(ticket(), LONG, machine._ledger.pages(f"prefill {KEY}")),
        RunChunk(1, (Span(KEY, 24, 26),)),
    ]
    machine.check()
    assert [type(each) for each in machine.on(ChunkDone(1, (Began(KEY, First(7)),)), 2.0)] == [SealPages]
    stages = (
        Stage("fetch", "prefill-1", 1.0, {"from": "decode-1"}),
        Stage("batch_wait", "prefill-1", 0.0),
        Stage("prefill", "prefill-1", 1.0, {"tokens": "26", "chunks": "1", "cached": "24"}),
        Stage("handing_off", "prefill-1", 0.5, {"ready_to_taken_s": "0.000000"}),
    )
    done = machine.on(HandOffOver(KEY, taken=True), 2.5)
    assert done == [Answer(Handed(ticket(), stages, cached_tokens=24)), EndSequence(KEY)]


def test_others_go_on_while_pages_come():
    machine = policy()
    fetch = waiting(machine)
    machine.on(Offer(ticket(2), 6, 1, 9.0), 0.6)
    commands = machine.on(Prompt(ticket(2), ask(6, 1)), 0.6)
    assert commands[-1] == RunChunk(1, (Span(ticket(2).key, 0, 6),))
    assert bring(machine, fetch, 0.7) == [AskForSink(ticket(), LONG, 100.5)]
    machine.check()


def test_what_does_not_come_is_computed():
    machine = policy()
    fetch = waiting(machine)
    commands = machine.on(FetchOver(fetch.ticket.key, 0, {"failed": "deadline"}), 1.0)
    assert commands[-1] == RunChunk(1, (Span(KEY, 0, 26),))
    machine.on(ChunkDone(1, (Began(KEY, First(7)),)), 2.0)
    (handed, _) = machine.on(HandOffOver(KEY, taken=True), 2.5)
    assert handed.message.cached_tokens == 0
    assert handed.message.stages[0] == Stage("fetch", "prefill-1", 1.0, {"failed": "deadline"})


def test_an_urgent_prompt_whose_pages_came_suspends_a_long_step():
    ledger = Pages(40)
    config = PrefillConfig(chunk_tokens=6, max_rows=3, ungranted_share=1.0, preempt=True)
    made = PrefillPolicy(P1, SHAPE, ledger, config, ORDERS["dual queue"](6, 3, SLOW), Fetches(P1, SHAPE, ledger, SLOW))
    made.on(lane(), 0.0)
    short = replace(ask(6), prefix=(11,))
    made.on(Offer(ticket(1), 6, 8, 0.9, prefix=(11,)), 0.0)
    (fetch,) = made.on(Prompt(ticket(1), short, None, (Holding(D1, 4),)), 0.0)
    assert isinstance(fetch, FetchPages)
    made.on(Offer(ticket(2), 20, 8, 9.0), 0.0)
    assert [type(each) for each in made.on(Prompt(ticket(2), ask(20)), 0.0)][-1] is RunChunk
    assert [type(each) for each in bring(made, fetch, 0.01, 1)][-1] is Suspend


@pytest.mark.parametrize(
    "event", [Cancel(ticket(1), "left"), Cancel(ticket(1), "left", True), GatewayGone(ticket(1).minter), None]
)
def test_who_leaves_while_pages_come_leaves_nothing(event):
    machine = policy()
    fetch = waiting(machine)
    commands = machine.on(event, 200.0 if event is None else 1.0)
    reason = "deadline" if event is None else commands[-1].reason
    late = [Answer(Failed(ticket(1), "DEADLINE_EXCEEDED", "ended while fetching"))] if event is None else []
    assert commands == [*late, DropFetch(fetch.ticket.key, reason)]
    machine.check()
    assert (sum(machine.queue().values()), machine.deadline()) == (0, None)
    assert bring(machine, fetch, 300.0) == []
    machine.check()
    assert (machine._ledger.holders(), machine._ledger.cached(NAMES)) == ((), 6), "what came is kept"


def test_without_fetches_nobody_waits():
    machine = PrefillPolicy(P1, SHAPE, Pages(40), PrefillConfig(chunk_tokens=64, ungranted_share=1.0))
    assert machine.on(lane(), 0.0) == []
    machine.on(Offer(ticket(), 26, 8, 9.0, prefix=NAMES), 0.0)
    assert machine.on(Prompt(ticket(), LONG, None, HAS), 0.5)[-1] == RunChunk(1, (Span(KEY, 0, 26),))
    with pytest.raises(LocalError, match="want none without fetches"):
        machine.on(FetchOver("x", 0), 1.0)


def test_a_policy_with_fetches_goes_on_from_a_document():
    machine = policy()
    fetch = waiting(machine)
    both, _ = doubled(machine, machine._ledger)
    for event in (Repriced(SLOW.at(2.0)), FetchOver(fetch.ticket.key, 0, {"failed": "x"}), lane(P2)):
        both.on(event, 1.0)
        both.check()
    for counter in (2, 3):
        this = ticket(counter)
        both.on(Offer(this, 26, 8, 99.0, prefix=tuple(name + 100 for name in NAMES)), 2.0)
        request = replace(LONG, prefix=tuple(name + 100 for name in NAMES))
        both.on(Prompt(this, request, None, (*HAS, Holding(P2, 24))), 2.0)
    both.on(Cancel(ticket(2), "left"), 2.0)
    assert both.queue()[State.FETCHING] == 1


# Whatever may come.
class FetchingWorker(PrefillWorker):
    """The same world, and sinks that end every fetch once, with any number of pages."""

    def __init__(self):
        super().__init__()
        config, order = self.machine._config, ORDERS[self.order](6, 3, SLOW)
        self.machine = PrefillPolicy(P1, SHAPE, self.ledger, config, order, Fetches(P1, SHAPE, self.ledger, SLOW))
        self.wanted: dict[str, FetchPages] = {}
        self.dropped: set[str] = set()
        self.most = 0
        self.give(lane())

    def perform(self, command) -> None:
        match command:
            case FetchPages(this, prefix, deadline):
                assert this.sink == P1
                assert deadline > self.now
                assert self.ledger.cached(prefix) < len(prefix)
                self.wanted[this.key] = command
                self.most = max(self.most, len(self.wanted))
            case DropFetch(key):
                assert key in self.wanted
                assert key not in self.dropped
                self.dropped.add(key)
            case _:
                super().perform(command)

    def send(self, job: Job) -> None:
        """Everybody may have any part of it; who waits for pages is in no line yet."""
        self.line += 1
        job.deadline, job.prompted, job.place = self.now + job.request.timeout_s, True, self.line
        holdings = (Holding(D1, 4 * (self.line % 4)), Holding(D2, 4 * (self.line % 7)))
        self.give(Prompt(job.ticket, job.request, job.second, holdings))
        for key in self.machine.fetches._for:
            self.jobs[key].place = 1_000_000

    @rule(who=st.sampled_from([D1, D2]), there=st.booleans())
    def reach(self, who, there):
        self.give(lane(who) if there else Lane(who, ""))

    @precondition(lambda self: self.wanted)
    @rule(data=st.data(), pages=st.integers(0, 7))
    def fetched(self, data, pages):
        self.end_fetch(data.draw(st.sampled_from(list(self.wanted))), pages)

    def end_fetch(self, key: str, pages: int) -> None:
        fetch = self.wanted.pop(key)
        self.dropped.discard(key)
        here = self.ledger.share("fetch", fetch.prefix, Owner.PULLING)
        new = min(pages, len(fetch.prefix) - here, self.ledger.available)
        for page, name in zip(self.ledger.bind("fetch", new, Owner.PULLING), fetch.prefix[here:], strict=False):
            self.written[page] = name
        self.ledger.name("fetch", fetch.prefix[: here + new])
        self.ledger.release("fetch")
        for waits in self.machine.fetches._fetches[key].waiting:
            self.line += 1
            self.jobs[waits].place = self.line
        self.give(FetchOver(key, new * SHAPE.page_nbytes, {"from": "x"}))

    def teardown(self):
        self.ledger.release("neighbour")
        self.turn_clock(self.now)
        for job in list(self.jobs.values()):
            if job.answer == "Accept" and not job.prompted:
                self.send(job)
        for key in list(self.wanted):
            self.end_fetch(key, 7)
        super().teardown()
        assert self.machine.fetches is not None
        assert not len(self.machine.fetches)


@efforts
@pytest.mark.parametrize("order", ["measured", "dual queue"])
def test_every_accepted_request_ends_once_whatever_becomes_of_its_pages(order, effort):
    machine = type(order, (FetchingWorker,), {"order": order})
    run_state_machine_as_test(machine, settings=settings(effort, max_examples=effort.max_examples // 4))


def story() -> list[str]:
    """What a policy says to a few prompts, some of which begin alike."""
    machine, said = policy(), []
    machine.on(lane(D2, 1e-6), 0.0)
    fetched: list[FetchPages] = []
    for counter in range(1, 12):
        prefix = tuple(100 * (counter % 4) + page for page in range(6))
        this, request = ticket(counter), replace(LONG, prefix=prefix)
        said += machine.on(Offer(this, 26, 8, 99.0, prefix=prefix), counter / 10)
        holdings = (Holding(D2, 24), Holding(D1, 8 * (counter % 3)))
        commands = machine.on(Prompt(this, request, None, holdings), counter / 10)
        fetched += [command for command in commands if isinstance(command, FetchPages)]
        said += commands
    said += machine.on(Cancel(ticket(3), "left"), 2.0)
    for fetch in fetched:
        said += machine.on(FetchOver(fetch.ticket.key, 0), 3.0)
    return [str(each) for each in said]


def test_other_hash_seeds_decide_the_same():
    root = Path(__file__).parents[2]
    script = f"from {__name__} import story; print('\\n'.join(story()))"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "4711")
    }
    assert outputs == {"\n".join(story()) + "\n"}
    assert "FetchPages" in outputs.pop()
