"""The decode policy in a world that does as it pleases, and long orders against single steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from core.messages import Cancel
from scheduler.cost import Repriced
from scheduler.decode_events import GatewayGone
from scheduler.decode_policy import DecodeConfig
from tests.cast import GATEWAY, OTHER_GATEWAY, efforts
from tests.scheduler.decode_world import COST, Play, Visit, World

RULES = {
    "worst_case": DecodeConfig(max_rows=3, max_steps=4),
    "past_future": DecodeConfig(max_rows=6, max_steps=4, admission="past_future", ahead_pages=2),
    "swaps": DecodeConfig(max_rows=6, max_steps=4, admission="past_future", ahead_pages=1, host_pages=8),
}


def third(effort: settings) -> settings:
    """There are three rules."""
    return settings(effort, max_examples=effort.max_examples // 3)


class DecodeWorker(RuleBasedStateMachine):
    """A sink that ends every question once, an engine that ends every order once, gateways, and memory in doubt."""

    config = RULES["worst_case"]
    cost = None

    def __init__(self):
        super().__init__()
        self.world = World(16, self.config, self.cost)
        for _ in range(3):  # short, so that memory runs out
            self.world.machine.forecast.learn(4)

    @rule(
        prompt=st.sampled_from([1, 3, 4, 5, 8, 9, 18]),
        max_tokens=st.sampled_from([2, 7, 30, 30, 30]),
        stops_at=st.sampled_from([1, 6, 28, 99]),
        n=st.sampled_from([1, 1, 1, 1, 2, 3]),
        minter=st.sampled_from([GATEWAY, OTHER_GATEWAY]),
        timeout_s=st.sampled_from([1000.0, 1000.0, 1000.0, 3.0]),
        gap_s=st.sampled_from([0.0] * 7 + [0.25]),
        session=st.sampled_from(["", "", "a", "b", "c"]),
        alone=st.sampled_from([False] * 5 + [True]),
        batch=st.sampled_from([False] * 3 + [True]),
        count=st.integers(1, 3),
    )
    def ask(self, prompt, max_tokens, stops_at, count, **others):
        for _ in range(count):
            self.world.ask(prompt, max_tokens, stops_at, **others)

    @precondition(lambda self: any(guest.hand_off in ("asked", "promised") for guest in self.world.guests.values()))
    @rule(data=st.data(), how=st.sampled_from(["arrives", "arrives", "arrives", "pulls", "ends", "breaks"]))
    def sink(self, data, how):
        world = self.world
        guest = data.draw(st.sampled_from([g for g in world.guests.values() if g.hand_off in ("asked", "promised")]))
        if how in ("ends", "breaks"):
            world.withdraw(guest, how == "breaks")
        elif guest.hand_off == "promised":
            world.pull(guest, all_of_it=how == "arrives")

    @precondition(lambda self: any(guest.hand_off == "promised" for guest in self.world.guests.values()))
    @rule()
    def all_arrive(self):
        world = self.world
        while guest := next((guest for guest in world.guests.values() if guest.hand_off == "promised"), None):
            world.pull(guest)
            world.deliver()

    @precondition(lambda self: self.world.from_sink)
    @rule()
    def deliver(self):
        self.world.deliver()

    @rule(count=st.integers(1, 3))
    def fence(self, count):
        self.world.fence(count)

    @precondition(lambda self: self.world.guests)
    @rule(data=st.data())
    def lend(self, data):
        self.world.lend(data.draw(st.sampled_from(list(self.world.guests.values()))))

    @rule()
    def returned(self):
        self.world.returned()

    @precondition(lambda self: self.world.run is not None)
    @rule(steps=st.sampled_from([1, 2, 5, 12]))
    def step(self, steps):
        for _ in range(steps):
            if self.world.run is not None:
                self.world.turn_clock(self.world.now + 0.25)
            if self.world.run is not None:
                self.world.step()

    @precondition(lambda self: self.world.run is not None)
    @rule(sure=st.sampled_from([False] * 8 + [True]))
    def fail(self, sure):
        if sure:
            self.world.fail()

    @precondition(lambda self: any(sequence.moving for sequence in self.world.sequences.values()))
    @rule(data=st.data())
    def swapped(self, data):
        moving = [sequence for sequence in self.world.sequences.values() if sequence.moving]
        self.world.swapped(data.draw(st.sampled_from(moving)))

    @precondition(lambda self: self.world.guests)
    @rule(data=st.data(), report=st.booleans(), sure=st.sampled_from([False, True]))
    def cancel(self, data, report, sure):
        if not sure:
            return
        guest = data.draw(st.sampled_from(list(self.world.guests.values())))
        guest.reports = guest.reports or (report and not guest.unwanted)
        guest.unwanted = True
        self.world.give(Cancel(guest.ticket, "left", report))

    @precondition(lambda self: any(len(guest.rows) > 1 for guest in self.world.guests.values()))
    @rule(data=st.data())
    def cancel_branch(self, data):
        guest = data.draw(st.sampled_from([g for g in self.world.guests.values() if len(g.rows) > 1]))
        sequence = data.draw(st.sampled_from(list(guest.rows.values())))
        sequence.unwanted = True
        self.world.give(Cancel(guest.ticket, "stop string", branch=sequence.branch))

    @rule(who=st.sampled_from([None] * 6 + [GATEWAY, OTHER_GATEWAY]))
    def gateway_dies(self, who):
        if who is not None:
            for guest in self.world.guests.values():
                guest.unwanted = guest.unwanted or guest.ticket.minter == who
            self.world.give(GatewayGone(who))

    @rule(factor=st.sampled_from([0.3, 1.0, 4.0]))
    def machine_changes(self, factor):
        self.world.give(Repriced(COST.at(factor, factor)))

    @rule(seconds=st.sampled_from([0.5, 2.0]))
    def wait(self, seconds):
        self.world.turn_clock(self.world.now + seconds)

    @invariant()
    def sound(self):
        self.world.machine.check()

    def teardown(self):
        self.world.settle()


@efforts
@pytest.mark.parametrize("rule", RULES)
def test_every_request_ends_once_and_leaves_no_page(rule, effort):
    machine = type(rule, (DecodeWorker,), {"config": RULES[rule], "cost": COST if rule == "swaps" else None})
    run_state_machine_as_test(machine, settings=third(effort))


visits = st.lists(
    st.builds(
        Visit,
        at=st.integers(0, 12),
        prompt=st.integers(1, 20),
        max_tokens=st.sampled_from([9, 24, 24, 24]),
        stops_at=st.sampled_from([1, 7, 12, 40, 40, 40]),
        pull=st.integers(0, 3),
        leaves=st.sampled_from([None] * 8 + [2, 9, 14]),
        n=st.sampled_from([1, 1, 1, 1, 2]),
        gap_s=st.sampled_from([0.0, 0.0, 0.0, 0.15]),
        session=st.sampled_from(["", "", "a", "b"]),
        batch=st.sampled_from([False] * 5 + [True]),
    ),
    min_size=6,
    max_size=12,
)


@efforts
@pytest.mark.parametrize("rule", RULES)
def test_single_steps_give_the_same_decisions_at_the_same_times_as_long_orders(rule, effort):
    seen = {"binds": 0, "evicts": 0, "swaps": 0, "drops": 0, "plays": 0, "runs": 0, "single": 0}

    def run(arrivals: list[Visit], max_steps: int) -> tuple[list[tuple[float, str]], int]:
        play = Play(replace(RULES[rule], max_steps=max_steps), COST if rule == "swaps" else None, 14, 2)
        return play.play(arrivals), play.last_run

    @third(effort)
    @given(visits)
    @example([Visit(6, 9, 9, 40, 3, None, n=2, batch=True), Visit(10, 5, 9, 12, 1, None, n=2, gap_s=0.15)])  # a copy
    def compare(arrivals):
        single, orders = run(arrivals, 1)
        for max_steps in (3, 1000):
            log, fewer = run(arrivals, max_steps)
            assert log == single
        asked = {
            f"{GATEWAY}/{index + 1}.1": visit.at for index, visit in enumerate(sorted(arrivals, key=lambda v: v.at))
        }
        seen["binds"] += any(what.startswith("grants") and at > asked[what.split()[1]] for at, what in single)
        for word in ("evicts", "swaps", "drops"):
            seen[word] += any(what.startswith(word) for _, what in single)
        seen["plays"] += 1
        seen["runs"] += fewer
        seen["single"] += orders

    compare()
    assert seen["binds"] > seen["plays"] / 4, "memory was rarely short: this proved nothing"
    if rule != "worst_case":
        assert seen["evicts"] + seen["swaps"] > seen["plays"] / 10, "nothing was retired: this proved nothing"
    if rule == "swaps":
        assert seen["swaps"] > seen["plays"] / 20, "nothing was swapped: this proved nothing"
    assert seen["runs"] < 0.7 * seen["single"], "orders were not longer than steps"
