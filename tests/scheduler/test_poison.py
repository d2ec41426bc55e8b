"""Requests that workers crash with: who is suspected, tried alone and refused, and who never is."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from core import state
from core.messages import Accept, Cancel, Failed, Finished, First, Handed, Prompt, Tokens
from core.pages import Owner, Pages
from core.request import Phase
from core.sampling import Sampling
from core.worker import Identity, ProcessEnded, Role
from scheduler.decode_events import Asked, KvArrived, Leave, Ran, Run, RunFailed
from scheduler.decode_policy import TURN_STEPS, DecodeConfig, DecodePolicy
from scheduler.poison import KEPT, Loss, Poison, Presence, Suspicion, crashes, suspicion
from scheduler.prefill_events import Began, ChunkDone, Granted, HandOffOver, RunChunk, State
from scheduler.prefill_policy import PrefillConfig, PrefillPolicy
from scheduler.router import Router, RouterConfig
from scheduler.router_events import Arrived, Deliver, End, ToOne, WorkerDown, WorkerUp
from tests.cast import D1, D2, GATEWAY, P1, P2, SHAPE, ask, ticket, worker
from tests.scheduler.test_prefill_policy import offer

WORKERS = (P1, P2, D1, D2)
NONE, ALONE, POISONOUS = Suspicion
SURE, OPEN = float("-inf"), 5.0
"""Whether there may still be another word, at 4 s."""


def presence(crashed: bool, until: float, alone: bool = False) -> Presence:
    return Presence(Loss(D1, crashed, until), alone)


CRASH, STOP, MAYBE = (True, SURE), (False, SURE), (True, OPEN)


@pytest.mark.parametrize(
    ("seen", "fate", "certain"),
    [
        ([], NONE, 4.0),
        ([CRASH], NONE, 4.0),
        ([MAYBE], NONE, 4.0),
        ([STOP, STOP, STOP], NONE, 4.0),
        ([CRASH, STOP], NONE, 4.0),
        ([CRASH, CRASH], ALONE, 4.0),
        ([CRASH, MAYBE], ALONE, OPEN),
        ([MAYBE, MAYBE], ALONE, OPEN),
        ([CRASH, CRASH, MAYBE], ALONE, 4.0),
        ([CRASH, CRASH, CRASH], ALONE, 4.0),
        ([CRASH, CRASH, (*CRASH, True)], POISONOUS, 4.0),
        ([CRASH, CRASH, (*MAYBE, True)], POISONOUS, OPEN),
        ([CRASH, CRASH, (*STOP, True)], ALONE, 4.0),
        ([CRASH, (*CRASH, True)], ALONE, 4.0),
        ([CRASH, (*CRASH, True), MAYBE], POISONOUS, OPEN),
    ],
)
def test_what_becomes_of_whom(seen, fate, certain):
    assert suspicion([presence(*each) for each in seen], 4.0) == (fate, certain)


def test_a_broken_stream_is_a_crash_unless_somebody_knows_better():
    poison = Poison(word_s=0.5)
    loss = poison.lost(D1, True, 1.0)
    assert (loss.crashed, loss.until) == (True, 1.5)
    assert poison.told(D1, False) is loss
    assert (loss.crashed, loss.until) == (False, SURE)
    assert poison.told(D1, True) is loss
    assert loss.crashed, "a later word counts"
    quiet = poison.lost(D2, False, 1.0)
    assert (quiet.crashed, quiet.until) == (False, 1.0), "a goodbye is believed at once"
    assert poison.back(D2) is quiet
    assert poison.back(P1) is None
    assert poison.told(P1, False) is None
    early = poison.lost(P1, True, 2.0)
    assert (early.crashed, early.until) == (False, 2.0), "the word came before the end was noticed"
    assert crashes([Presence(loss, False), Presence(early, False)]) == [D1]
    for number in range(2 * KEPT):
        poison.lost(Identity("decode-9", number), True, 3.0)
        poison.told(Identity("decode-8", number), True)
        poison.check()


class Scene:
    """One request at a gateway whose workers crash and come back."""

    def __init__(self, request=None, **settings):
        self.machine = Router(GATEWAY, RouterConfig(**settings))
        self.now = 0.0
        self.prompts: list[Prompt] = []
        self.got: list[int] = []
        self.ends: list[End] = []
        for who in WORKERS:
            self.up(who)
        self.request = request or ask(max_tokens=20)
        self.give(Arrived(1, self.request))

    def give(self, event) -> None:
        commands = self.machine.on(event, self.now)
        for command in commands:
            match command:
                case ToOne(_, Prompt() as prompt):
                    self.prompts.append(prompt)
                case ToOne(_, Cancel()) | Deliver():
                    pass
                case ToOne():
                    self.give(Accept(command.message.ticket))
                case End():
                    self.ends.append(command)
        self.machine.check()

    def up(self, who: Identity) -> None:
        self.give(WorkerUp(worker(who, Role(who.name.partition("-")[0]))))

    def wait(self, seconds: float) -> None:
        """Whatever is due until then."""
        until = self.now + seconds
        while (due := self.machine.deadline()) is not None and due <= until:
            self.now = max(self.now, due)
            self.give(None)
        self.now = until

    @property
    def ticket(self):
        return self.prompts[-1].ticket

    def first(self) -> None:
        """The prompt is computed, the KV on its way."""
        self.give(Tokens(self.ticket, 0, (100,)))

    def decode(self) -> None:
        """The sink has it."""
        self.give(Tokens(self.ticket, 0, (100,)))
        self.give(Tokens(self.ticket, 0, (100, 101)))

    def crash(self, who: Identity | None = None, how: bool = True, word: bool | None = True) -> None:
        """A worker goes, the sink if none is named, and another life of it comes."""
        who = who or self.ticket.sink
        self.give(WorkerDown(who, how))
        if word is not None:
            self.give(ProcessEnded(who, word))
        self.up(Identity(who.name, who.incarnation + 256))


def test_two_crashes_make_it_alone_and_a_third_ends_it():
    scene = Scene()
    for alone in (False, False, True):
        assert scene.prompts[-1].request.alone == alone
        assert scene.prompts[-1].second is None or not alone, "no second worker is to crash with it"
        scene.decode()
        scene.crash()
    (end,) = scene.ends
    assert (end.phase, end.code, end.poisonous, end.attempts) == (Phase.FAILED, "INTERNAL", True, 3)
    assert end.reason == "poisonous: present at 3 crashes, the last alone (decode-1, decode-2, decode-1)"
    assert len(scene.prompts) == 3
    assert (len(scene.machine), scene.machine.deadline()) == (0, None)


def test_a_request_that_is_innocent_ends_alone():
    scene = Scene()
    for _ in range(2):
        scene.decode()
        scene.crash()
    assert scene.prompts[-1].request.alone
    scene.decode()
    scene.give(Finished(scene.ticket, "stop", 2, decoded=True))
    scene.give(Handed(scene.ticket, ()))
    assert [(end.phase, end.poisonous) for end in scene.ends] == [(Phase.DONE, False)]


@pytest.mark.parametrize(
    ("how", "word"),
    [(False, None), (False, False), (True, False)],
    ids=["goodbye or silence", "a stop that said goodbye", "a stop that did not"],
)
def test_stops_are_not_counted(how, word):
    scene = Scene(max_attempts=9)
    for _ in range(7):
        scene.decode()
        scene.crash(how=how, word=word)
    assert not any(prompt.request.alone for prompt in scene.prompts)
    assert (len(scene.prompts), scene.ends) == (8, [])


def test_a_crash_that_said_goodbye_counts_when_it_is_known():
    scene = Scene()
    for _ in range(2):
        scene.decode()
        scene.crash(how=False, word=True)
    scene.decode()
    scene.crash(how=False, word=True)
    assert scene.prompts[1].request.alone is False
    assert scene.prompts[2].request.alone is False, "it was placed before the word came"
    assert scene.prompts[3].request.alone


def test_it_waits_for_the_word_only_where_that_matters():
    scene = Scene()
    scene.decode()
    scene.crash(word=None)
    assert len(scene.prompts) == 2, "one crash makes no difference"
    scene.wait(10.0)
    scene.decode()
    scene.crash(word=None)
    assert len(scene.prompts) == 2
    (stands,) = scene.machine.standing()
    assert stands.waits_for == "to be placed again: its last attempt failed"
    scene.wait(0.4)
    assert len(scene.prompts) == 2
    scene.wait(0.2)
    assert scene.prompts[2].request.alone, "nobody said that it was stopped"


@pytest.mark.parametrize("crashed", [False, True])
def test_a_word_that_was_waited_for_places_it_at_once(crashed):
    scene = Scene()
    scene.decode()
    scene.crash()
    scene.decode()
    key = scene.ticket
    scene.crash(word=None)
    assert len(scene.prompts) == 2
    scene.give(ProcessEnded(key.sink, crashed))
    assert [prompt.request.alone for prompt in scene.prompts] == [False, False, crashed]


def test_a_late_word_corrects_what_was_believed():
    scene = Scene()
    scene.decode()
    scene.crash()
    scene.decode()
    key = scene.ticket
    scene.crash(word=None)
    scene.wait(1.0)
    assert scene.prompts[-1].request.alone
    scene.give(ProcessEnded(key.sink, False))
    scene.decode()
    scene.crash()
    assert scene.prompts[-1].request.alone, "two crashes, one of them alone"
    scene.decode()
    scene.crash()
    assert scene.ends[0].poisonous


def test_the_same_life_on_a_new_stream_has_not_crashed():
    scene = Scene()
    for _ in range(4):
        scene.decode()
        sink = scene.ticket.sink
        scene.give(WorkerDown(sink, True))
        scene.up(sink)
    assert [prompt.request.alone for prompt in scene.prompts] == [False] * 5, "placed at once each time"


def test_a_prefill_worker_counts_from_the_prompt_to_the_end_of_the_hand_over():
    scene = Scene()
    scene.crash(scene.ticket.source)
    scene.first()
    scene.crash(scene.ticket.source)
    assert scene.prompts[-1].request.alone
    scene.decode()
    scene.crash(scene.ticket.source)
    assert scene.ends == [], "it had handed over"


def test_who_was_only_offered_was_not_there():
    machine = Router(GATEWAY, RouterConfig())
    for who in WORKERS:
        machine.on(WorkerUp(worker(who, Role(who.name.partition("-")[0]))), 0.0)
    (sent,) = machine.on(Arrived(1, ask()), 0.0)
    for life in range(3):
        who = sent.worker
        (sent,) = machine.on(WorkerDown(who, True), 0.0)
        machine.on(ProcessEnded(who, True), 0.0)
        machine.on(WorkerUp(worker(Identity(who.name, life), Role.PREFILL)), 0.0)
    (prompt,) = machine.on(Accept(sent.message.ticket), 0.0)
    assert not prompt.message.request.alone


def test_sinks_count_as_soon_as_the_kv_may_be_there():
    scene = Scene()
    scene.crash(D1)  # nothing was on its way
    assert len(scene.prompts) == 1
    scene.first()
    scene.crash(scene.ticket.sink)
    scene.crash(scene.prompts[-1].second)  # where the prefill worker turned then
    scene.give(Failed(scene.ticket, "UNAVAILABLE", "no decode worker took it"))
    scene.wait(1.0)
    assert [prompt.request.alone for prompt in scene.prompts] == [False, True]


def test_a_sink_may_be_heard_of_later_than_the_prefill_worker_that_it_fails():
    scene = Scene()
    scene.give(WorkerDown(P2))
    for alone in (False, False, True):
        assert scene.prompts[-1].request.alone == alone
        scene.first()
        sink = scene.ticket.sink
        scene.give(Failed(scene.ticket, "UNAVAILABLE", "no decode worker took it"))
        scene.crash(sink)
        scene.wait(2.0)
    assert [end.poisonous for end in scene.ends] == [True]
    assert len(scene.prompts) == 3


def test_a_step_that_raises_counts_for_all_that_it_had():
    scene = Scene()
    for alone in (False, False, True):
        assert scene.prompts[-1].request.alone == alone
        scene.give(Failed(scene.ticket, "INTERNAL", "the engine failed: boom"))
        scene.wait(2.0)
    (end,) = scene.ends
    assert end.poisonous
    assert end.reason.startswith("poisonous: present at 3 crashes")


def test_continuations_are_each_alone():
    scene = Scene(replace(ask(), sampling=Sampling(8, n=3)))
    for _ in range(2):
        assert len(scene.prompts[-1].request.prompt) == 6
        scene.crash(scene.ticket.source)
    apart = scene.prompts[2:]
    assert [(prompt.request.alone, prompt.request.sampling.n) for prompt in apart] == [(True, 1)] * 2
    assert len({prompt.ticket.source for prompt in apart}) == 2, "two workers of each phase, one for each"
    scene.give(Tokens(apart[0].ticket, 0, (100, 101)))
    assert scene.prompts[4:] == [], "there is a prefill worker for the third, but no decode worker"
    scene.give(Finished(apart[0].ticket, "stop", 2, decoded=True))
    scene.give(Handed(apart[0].ticket, ()))
    (last,) = scene.prompts[4:]
    assert last.request.alone
    scene.crash(last.ticket.source)
    assert [end.poisonous for end in scene.ends] == [True], "one that is poisonous ends the request"


def test_two_that_are_suspected_are_never_tried_at_one_worker():
    scene = Scene()
    scene.give(WorkerDown(P2))
    scene.give(WorkerDown(D2))
    scene.give(Arrived(2, ask(max_tokens=20)))
    for _ in range(2):
        (there,) = [post.identity for post in scene.machine._workers.prefills]
        scene.crash(there)
    assert [(prompt.ticket.counter, prompt.request.alone) for prompt in scene.prompts[4:]] == [(1, True)]
    waits = [each.waits_for for each in scene.machine.standing() if each.state == "queued"]
    assert waits == ["a worker that is not trying another one alone"]
    scene.decode()
    assert scene.prompts[-1].ticket.counter == 1, "its decode worker is the only one"
    scene.give(WorkerDown(D1, True))
    scene.give(ProcessEnded(D1, True))
    scene.up(D2)
    assert [(end.counter, end.poisonous) for end in scene.ends] == [(1, True)]
    assert (scene.prompts[-1].ticket.counter, scene.prompts[-1].request.alone) == (2, True)


def test_whoever_waits_for_a_worker_is_refused_when_the_word_comes():
    scene = Scene()
    for _ in range(2):
        scene.decode()
        scene.crash()
    scene.decode()
    sink = scene.ticket.sink
    scene.give(WorkerDown(next(post.identity for post in scene.machine._workers.decodes if post.identity != sink)))
    scene.give(WorkerDown(sink, True))
    assert scene.machine.missing() == "no decode worker is ready"
    assert scene.ends == []
    scene.give(ProcessEnded(sink, True))
    assert [end.poisonous for end in scene.ends] == [True]


# Prefill workers.
def prompted(machine: PrefillPolicy, counter: int, prompt: int, *, alone: bool = False) -> list:
    machine.on(offer(counter, prompt, wait_s=1e6), 0.0)
    commands = machine.on(Prompt(ticket(counter), replace(ask(prompt), alone=alone)), 0.0)
    machine.check()
    return commands


def runs(commands) -> list[list[int]]:
    """Which requests are in the steps."""
    return [
        [int(span.key.rpartition("/")[2].partition(".")[0]) for span in command.spans]
        for command in commands
        if isinstance(command, RunChunk)
    ]


def finish(machine: PrefillPolicy, run: RunChunk) -> list:
    begun = [Began(span.key, First(7)) for span in run.spans if span.stop == machine._requests[span.key].prompt_tokens]
    commands = machine.on(ChunkDone(run.run_id, tuple(begun)), 0.0)
    machine.check()
    return commands


def test_its_chunks_and_the_orders_steps_take_turns():
    machine = PrefillPolicy(P1, SHAPE, Pages(100), PrefillConfig(chunk_tokens=8, max_rows=4, ungranted_share=1.0))
    commands = prompted(machine, 1, 20)
    for counter, alone in ((2, True), (3, False), (4, True), (5, False)):
        prompted(machine, counter, 20, alone=alone)
    seen = runs(commands)
    while run := next((each for each in commands if isinstance(each, RunChunk)), None):
        commands = finish(machine, run)
        seen += runs(commands)
    assert seen == [[1], [2], [1], [2], [1, 3], [2], [3], [4], [3], [4], [5], [4], [5], [5]]


def test_what_it_lacks_of_memory_nobody_else_takes_before_it():
    machine = PrefillPolicy(P1, SHAPE, Pages(10), PrefillConfig(chunk_tokens=8, max_rows=4, ungranted_share=1.0))
    (_, _, run) = prompted(machine, 1, 24)
    prompted(machine, 2, 24, alone=True)
    for counter in (3, 4, 5):
        prompted(machine, counter, 4)
    for counter in (1, 2):
        machine.on(Granted(ticket(counter).key), 0.0)
    while run is not None:
        commands = finish(machine, run)
        run = next((each for each in commands if isinstance(each, RunChunk)), None)
        assert runs(commands) in ([[1]], [])
    assert machine.queue()[State.QUEUED] == 4, "those that were small enough did not pass it"
    commands = machine.on(HandOffOver(ticket(1).key, True), 0.0)
    assert runs(commands) == [[2]]


# Decode workers.
class Decoder:
    """A decode policy whose engine does what it is told."""

    def __init__(self, pages: int = 100):
        self.ledger = Pages(pages)
        self.machine = DecodePolicy(D1, SHAPE, self.ledger, DecodeConfig(max_steps=16))
        self.run: Run | None = None
        self.commands: list = []

    def give(self, event) -> list:
        self.commands = self.machine.on(event, 0.0)
        self.machine.check()
        for command in self.commands:
            if isinstance(command, Run):
                self.run = command
        return self.commands

    def come(self, counter: int, *, alone: bool = False, max_tokens: int = 40) -> None:
        request = replace(ask(max_tokens=max_tokens), alone=alone)
        self.give(Asked(ticket(counter), request))
        self.ledger.bind(ticket(counter).key, 2, Owner.PULLING)
        self.ledger.move(ticket(counter).key, Owner.DECODING)
        self.give(KvArrived(ticket(counter), request, (First(7),)))

    def step(self) -> tuple[list[int], int]:
        """The whole order; who was in it and for how many steps."""
        run, self.run = self.run, None
        assert run is not None
        self.give(Ran(run.run_id, run.steps))
        return [int(key.rpartition("/")[2].partition(".")[0]) for key in run.rows], run.steps


def test_its_orders_and_the_batchs_take_turns():
    decoder = Decoder()
    decoder.come(1)
    decoder.come(2, alone=True)
    decoder.come(3)
    decoder.come(4, alone=True)
    assert decoder.step() == ([1], 16), "it was out before"
    turns = [decoder.step() for _ in range(4)]
    assert turns == [([2], TURN_STEPS), ([1, 3], TURN_STEPS)] * 2


def test_nobody_can_take_its_memory_and_it_runs_on_by_itself():
    decoder = Decoder(pages=12)
    decoder.come(1, alone=True, max_tokens=39)
    assert decoder.ledger.count(ticket(1).key) == 12, "all that it may come to"
    decoder.give(Asked(ticket(2), ask()))
    assert [decoder.step() for _ in range(3)] == [([1], 16), ([1], 16), ([1], 6)]


def test_a_step_of_it_that_raises_hurts_nobody_else():
    decoder = Decoder()
    decoder.come(1)
    decoder.come(2, alone=True)
    decoder.step()
    assert decoder.run is not None
    assert decoder.run.rows == (ticket(2).key,)
    commands = decoder.give(RunFailed(decoder.run.run_id, "boom"))
    failed = [c.message for c in commands if hasattr(c, "message")]
    assert [(each.ticket, each.code) for each in failed] == [(ticket(2), "INTERNAL")]
    assert Leave(ticket(2).key) in commands
    assert decoder.step() == ([1], 16)
    assert decoder.ledger.count(ticket(2).key) == 0


def test_who_is_cancelled_leaves_with_the_order_that_is_out():
    decoder = Decoder()
    decoder.come(1)
    decoder.come(2, alone=True)
    decoder.step()
    decoder.give(Cancel(ticket(1), "left"))
    assert [type(command).__name__ for command in decoder.commands] == ["Cut"], "it runs, but not in this order"
    decoder.step()
    assert decoder.step() == ([2], 16)
    decoder.give(Cancel(ticket(2), "left"))
    decoder.step()
    assert decoder.ledger.holders() == ()


def test_the_state_of_all_of_it_is_json():
    scene = Scene()
    scene.decode()
    scene.crash()
    scene.decode()
    key = scene.ticket
    scene.crash(word=None)
    copy = state.load(json.loads(json.dumps(state.dump(scene.machine))), Router)
    copy.check()
    word = ProcessEnded(key.sink, True)
    assert copy.on(word, scene.now) == scene.machine.on(word, scene.now)
    decoder = Decoder()
    decoder.come(1)
    decoder.come(2, alone=True)
    decoder.step()
    again = state.load(json.loads(json.dumps(state.dump(decoder.machine))), DecodePolicy)
    assert decoder.run is not None
    ran = Ran(decoder.run.run_id, decoder.run.steps)
    assert again.on(ran, 0.0) == decoder.machine.on(ran, 0.0)
