"""Whole policies through JSON: at any moment of their lives the copy goes on as the original does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import rule, run_state_machine_as_test

from core.errors import StateError
from core.state import load
from scheduler.decode_policy import DecodePolicy
from scheduler.mixed_policy import MixedPolicy
from scheduler.prefill_policy import PrefillPolicy
from scheduler.router import Router
from tests.cast import efforts
from tests.scheduler.decode_world import COST, Play, Visit
from tests.scheduler.orders import ORDERS
from tests.scheduler.test_decode_machine import RULES, DecodeWorker
from tests.scheduler.test_mixed_machine import Colocated
from tests.scheduler.test_prefill_policy import PrefillWorker
from tests.scheduler.test_router import Deployment
from tests.scheduler.test_router_waiting import Crowd
from tests.scheduler.twins import doubled, written

ROOT = Path(__file__).parents[2]
sometimes = st.sampled_from([False, False, True])


def few(effort: settings, parts: int = 1) -> settings:
    """The machines have their own tests; here they are only surroundings."""
    return settings(effort, max_examples=effort.max_examples // (6 * parts))


@efforts
@pytest.mark.parametrize("rule_", RULES)
def test_a_decode_policy_goes_on_from_json(rule_, effort):
    class Restored(DecodeWorker):
        config = RULES[rule_]
        cost = COST if rule_ == "swaps" else None  # type: ignore[assignment]

        @rule(sure=sometimes)
        def restore(self, sure):
            if sure:
                self.world.machine, self.world.ledger = doubled(self.world.machine, self.world.ledger)

    run_state_machine_as_test(Restored, settings=few(effort, 3))


@efforts
@pytest.mark.parametrize("order_", ORDERS)
def test_a_prefill_policy_goes_on_from_json(order_, effort):
    class Restored(PrefillWorker):
        order = order_

        @rule(sure=sometimes)
        def restore(self, sure):
            if sure:
                self.machine, self.ledger = doubled(self.machine, self.ledger)

    run_state_machine_as_test(Restored, settings=few(effort, 4))


@efforts
def test_a_mixed_policy_goes_on_from_json(effort):
    class Restored(Colocated):
        @rule(sure=sometimes)
        def restore(self, sure):
            if sure:
                self.machine, self.ledger = doubled(self.machine, self.ledger)

    run_state_machine_as_test(Restored, settings=few(effort))


@efforts
@pytest.mark.parametrize("around", [Deployment, Crowd])
def test_a_router_goes_on_from_json(around, effort):
    class Restored(around):  # type: ignore[misc, valid-type]
        @rule(sure=sometimes)
        def restore(self, sure):
            if sure:
                self.router, _ = doubled(self.router)  # type: ignore[has-type]

    run_state_machine_as_test(Restored, settings=few(effort, 2))


VISITS = [Visit(at % 7, 3 + 5 * at % 18, 24, 7 + at % 12, at % 3, None, 1 + (at == 4)) for at in range(9)]
STOPPED_AT = 9


def half_way() -> Play:
    """A decode worker in the middle of things: rows run, wait and are retired."""
    play = Play(RULES["past_future"], None, 14, 2)
    play.invite(VISITS)
    for _ in range(STOPPED_AT):
        play.second()
    play.machine.check()  # the ledger remembers what was looked up for it
    return play


def test_another_process_reads_it_and_goes_on_alike():
    """Written here, read and written again under other hashes; then the rest of the story is told by what came back."""
    play = half_way()
    before = written(play.machine)
    assert any(kind.startswith("scheduler.decode_rows:") for kind, *_ in before["objects"])
    code = "import json, sys; from core.state import *; from scheduler.decode_policy import DecodePolicy;"
    code += "print(json.dumps(dump(load(json.load(sys.stdin), DecodePolicy))))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "4711"}
    ran = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(before), capture_output=True, text=True, env=environment
    )
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == before
    again = half_way()
    again.machine = load(json.loads(ran.stdout), DecodePolicy)
    again.ledger = again.machine._ledger
    assert again.finish() == play.finish()


def test_what_was_written_stays_as_it_was():
    play = half_way()
    before = json.dumps(written(play.machine))
    document = json.loads(before)
    load(document, DecodePolicy)
    assert json.dumps(document) == before == json.dumps(written(play.machine))


@pytest.mark.parametrize("kind", [MixedPolicy, PrefillPolicy, Router])
def test_another_kind_of_machine_is_refused(kind):
    with pytest.raises(StateError, match=f"root: got DecodePolicy, want {kind.__name__}"):
        load(written(half_way().machine), kind)


def test_a_machine_that_is_not_sound_is_refused():
    document = written(half_way().machine)
    (batch,) = [each for each in document["objects"] if each[0] == "scheduler.decode_rows:Batch"]
    batch[1]["bound"] += 1
    with pytest.raises(StateError, match="DecodePolicy is not sound: AssertionError"):
        load(document, DecodePolicy)
    del batch[1]["bound"]
    with pytest.raises(StateError, match="not sound: AttributeError"):
        load(document, DecodePolicy)
