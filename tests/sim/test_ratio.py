"""A simulated deployment whose workers change roles: nothing is lost, caches stay, and it follows its traffic."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from core.errors import SetupError
from core.request import Phase, Slo
from core.worker import Role
from scheduler.policies import Policy, policy
from scheduler.ratio import RatioConfig
from scheduler.ratio_events import Act, Bounds, Candidate, Pinned, Ratio, Why, explain
from scheduler.split import Because, SplitConfig
from sim.coordinator import Control, Coordinator, changed
from sim.fleet import workers
from sim.generators import AZURE_CONV, generate
from sim.loop import Kind
from sim.outcome import Outcome
from sim.recent import Lengths
from sim.run import Settings, Simulation, page_hashes, simulate
from sim.scenario import Lose, Return, Scenario
from sim.whatif import WhatIf, feasible, judge, laps
from sim.workload import Arrival
from tests.sim.test_run import empty

COST = "h200-qwen2.5-32b"
SETTINGS = Settings(slo=Slo(2.0, 0.05), check_every=50)
QUICK = RatioConfig(period_s=10.0, window_s=10.0, least_requests=10)
SMALL = Control(QUICK, report_s=2.5, think_s=0.5)


def small(name: str = "baton-migrating", rows: int = 8) -> Policy:
    """Decode workers of few rows, so that few requests fill them."""
    found = policy(name)
    return replace(found, decode_config=replace(found.decode_config, max_rows=rows))


def steady(rate: float, seconds: float, prompt: int, output: int, since_s: float = 0.0) -> list[Arrival]:
    return [Arrival(since_s + index / rate, prompt, output) for index in range(round(rate * seconds))]


def run(
    arrivals: list[Arrival], spec: str, control: Control | None, which: Policy, *pins: tuple[float, Ratio], **more
) -> tuple[list[Outcome], Simulation]:
    outcomes: list[Outcome] = []
    found: list[Simulation] = []

    def watch(simulation: Simulation) -> None:
        found.append(simulation)
        for at_s, ratio in pins:
            assert isinstance(simulation.coordinator, Coordinator)
            simulation.loop.at(at_s, Kind.FAULT, 0, simulation.coordinator.tell, Pinned(ratio))

    simulate(
        arrivals, workers(spec, COST, kv=60_000), which, SETTINGS,
        control=control, over=outcomes.append, watch=watch, **more,
    )  # fmt: skip
    return outcomes, found[0]


def ratio(simulation: Simulation) -> Ratio:
    roles = [worker.role for worker in simulation.workers.values()]
    return Ratio(roles.count(Role.PREFILL), roles.count(Role.DECODE))


def decisions(simulation: Simulation) -> list:
    assert isinstance(simulation.coordinator, Coordinator)
    return simulation.coordinator.decisions


@pytest.mark.parametrize(
    "name",
    ["baton-migrating", *(pytest.param(name, marks=pytest.mark.slow) for name in ("baton", "fcfs"))],
)
def test_workers_change_roles_under_load_and_nothing_is_lost(name):
    arrivals = steady(4.0, 90.0, 900, 60)
    pins = ((5.0, Ratio(3, 1)), (45.0, Ratio(1, 3)))
    outcomes, simulation = run(arrivals, "2 prefill, 2 decode", SMALL, small(name), *pins)
    assert ratio(simulation) == Ratio(1, 3)
    assert sum(each.chosen.act is not Act.KEEP for each in decisions(simulation)) == 3
    assert all(each.why is Why.PINNED for each in decisions(simulation) if each.chosen.act is not Act.KEEP)
    assert len(outcomes) == len(arrivals)
    for each in outcomes:
        assert (each.phase, each.tokens, each.attempts) == (Phase.DONE, each.output, 1)
    assert all(worker.me.incarnation == 1 for worker in simulation.workers.values())
    empty(simulation)


def test_a_worker_keeps_its_cache_when_it_changes_its_role():
    blocks = tuple(range(1, 65))
    arrivals = [Arrival(float(at), 1024, 8, blocks, 16) for at in range(60)]
    outcomes, simulation = run(arrivals, "1 prefill, 2 decode", SMALL, small(), (15.0, Ratio(2, 1)))
    assert ratio(simulation) == Ratio(2, 1)
    flipped = next(worker for worker in simulation.workers.values() if worker.role is not worker.build.role)
    assert flipped.me.name == "decode-0"
    assert flipped.ledger.cached(page_hashes(arrivals[0], 16)) == 64
    assert sum(not each.cached for each in outcomes) == 1, "what it decoded it need not prefill"


def test_it_follows_its_traffic_and_a_static_ratio_does_not():
    arrivals = steady(6.0, 60.0, 4000, 20) + steady(12.0, 90.0, 100, 80, since_s=60.0)
    attained = {}
    for name, control in (("adaptive", SMALL), ("static", None)):
        outcomes, simulation = run(arrivals, "3 prefill, 1 decode", control, small())
        late = [each for each in outcomes if each.at_s >= 100.0]
        attained[name] = sum(each.good for each in late) / len(late)
        if control is not None:
            assert ratio(simulation) == Ratio(1, 3)
            flips = [each for each in decisions(simulation) if each.chosen.act is not Act.KEEP]
            assert [each.chosen.act for each in flips] == [Act.TO_DECODE] * 2
            assert all(60.0 < each.at_s < 100.0 for each in flips)
    assert attained["adaptive"] > 0.8
    assert attained["static"] < 0.5


@pytest.mark.slow
def test_a_worker_that_dies_in_the_middle_of_a_flip_is_replaced_by_what_is_left():
    arrivals = steady(4.0, 80.0, 900, 100)
    for at_s in (10.3, 10.6):
        scenario = Scenario("dies", (Lose(at_s, "decode-1"), Return(30.0, "decode-1")))
        outcomes, simulation = run(
            arrivals, "2 prefill, 2 decode", SMALL, small(rows=16), (9.0, Ratio(3, 1)), scenario=scenario
        )
        assert len(outcomes) == len(arrivals)
        assert all(each.phase in (Phase.DONE, Phase.REJECTED) for each in outcomes)
        assert not [each for each in decisions(simulation) if each.why is Why.UNDER_WAY and each.at_s > 40.0]
        assert sum(ratio(simulation)) == 4
        empty(simulation)


@pytest.mark.slow
def test_workers_are_added_and_given_back():
    arrivals = steady(9.0, 60.0, 4000, 20) + steady(0.5, 160.0, 4000, 20, since_s=60.0)
    control = replace(SMALL, bounds=Bounds(least_workers=2, most_workers=4))
    outcomes, simulation = run(arrivals, "1 prefill, 1 decode", control, small())
    acts = [each.chosen.act for each in decisions(simulation) if each.chosen.act is not Act.KEEP]
    assert acts[0] is Act.ADD_PREFILL
    assert explain(decisions(simulation)[0]).startswith("decision 2 at 10.5 s: ask for one more worker (add prefill)")
    assert any(act.removes for act in acts)
    assert sum(ratio(simulation)) < 4
    assert all(each.phase in (Phase.DONE, Phase.REJECTED) for each in outcomes)
    assert len(outcomes) == len(arrivals)
    empty(simulation)


def test_goals_that_no_worker_meets_are_said_to_be_so():
    arrivals = steady(2.0, 40.0, 30_000, 20)
    control = replace(SMALL, bounds=Bounds(most_workers=20))
    _, simulation = run(arrivals, "2 prefill, 2 decode", control, small())
    assert any(each.why is Why.INFEASIBLE for each in decisions(simulation))
    assert ratio(simulation) == Ratio(2, 2)


def test_mixed_workers_have_no_ratio():
    with pytest.raises(SetupError, match="mixed workers"):
        run(steady(1.0, 5.0, 10, 10), "2 mixed", SMALL, small())


def test_divided_prefill_workers_serve_everything():
    arrivals = list(generate(AZURE_CONV, seed=2, count=200, rate=8.0).arrivals)
    control = Control(None, SplitConfig(), report_s=2.5)
    outcomes, simulation = run(arrivals, "4 prefill, 2 decode", control, policy("baton-split"))
    assert isinstance(simulation.coordinator, Coordinator)
    assert simulation.coordinator.divisions
    short, long = (
        set(pool) for pool in (simulation.coordinator.divisions[-1].short, simulation.coordinator.divisions[-1].long)
    )
    assert short | long == {f"prefill-{number}" for number in range(4)}
    assert all(each.phase is Phase.DONE for each in outcomes)
    if len({(each.short, each.long) for each in simulation.coordinator.divisions}) == 1:
        assert all((each.source in short) == (each.prompt <= 512) for each in outcomes)
    empty(simulation)


@pytest.mark.parametrize("adapts", [None, QUICK])
def test_workers_move_to_the_pool_that_has_more_to_do_and_back_and_more_are_good(adapts):
    """First many short prompts, then long ones; beside it the ratio may adapt, too."""
    short = steady(90.0, 20.0, 400, 2) + steady(20.0, 20.0, 200, 2, since_s=20.0)
    long = steady(1.0, 20.0, 4000, 2) + steady(5.0, 20.0, 8000, 2, since_s=20.0)
    arrivals = sorted(short + long, key=lambda each: each.at_s)
    good = {}
    for name, split in (("moves", SplitConfig(cooldown_s=5.0)), ("stays", SplitConfig(floor=1e9))):
        control = Control(adapts, split, report_s=2.5, think_s=0.5)
        outcomes, simulation = run(arrivals, "4 prefill, 2 decode", control, policy("baton-split"))
        assert isinstance(simulation.coordinator, Coordinator)
        reasons = [each.because for each in simulation.coordinator.divisions]
        assert {Because.SHORT, Because.LONG} <= {*reasons} if name == "moves" else reasons == [Because.BEGUN]
        good[name] = sum(each.good for each in outcomes)
        empty(simulation)
    assert good["moves"] > good["stays"] + 50


# What if.
def test_the_better_candidate_scores_better():
    fleet = list(workers("3 prefill, 1 decode", COST, kv=60_000))
    arrivals = steady(12.0, 25.0, 100, 80)
    keep, flip = Candidate(Act.KEEP, Ratio(3, 1)), Candidate(Act.TO_DECODE, Ratio(1, 3), steps=2)
    scores = [judge(arrivals, 25.0, list(changed(fleet, each)), small(), SETTINGS).good for each in (keep, flip)]
    assert scores[1] > 0.95 > 0.7 > scores[0]


def test_candidates_change_whom_they_name_first():
    fleet = list(workers("2 prefill, 2 decode", COST))
    named = Candidate(Act.TO_PREFILL, Ratio(3, 1), named_worker("decode-1"))
    roles = {each.name: each.role for each in changed(fleet, named)}
    assert roles["decode-1"] is Role.PREFILL
    assert roles["decode-0"] is Role.DECODE
    added = list(changed(fleet, Candidate(Act.ADD_DECODE, Ratio(2, 3))))
    assert [each.role for each in added].count(Role.DECODE) == 3
    assert len({each.name for each in added}) == 5
    removed = list(changed(fleet, Candidate(Act.REMOVE_PREFILL, Ratio(1, 2), named_worker("prefill-0"))))
    assert [each.name for each in removed] == ["prefill-1", "decode-0", "decode-1"]


def named_worker(name: str):
    from core.worker import Identity

    return Identity(name, 1)


def test_laps_repeat_the_traffic_with_blocks_of_their_own():
    arrivals = [Arrival(0.0, 32, 4, (1, 2), 16, session="a", turn=3), Arrival(5.0, 16, 4, (1,), 16)]
    found = list(laps(arrivals, 10.0, 2.0, 10.0))
    assert [each.at_s for each in found] == [0.0, 2.5, 5.0, 7.5]
    assert found[0].blocks[0] == found[1].blocks[0]
    assert not set(found[0].blocks) & set(found[2].blocks)
    assert all(not each.session for each in found)


def test_what_cannot_be_met_alone_is_counted():
    fleet = workers("1 prefill, 1 decode", COST)
    assert feasible([Arrival(0.0, 1000, 10), Arrival(0.0, 100_000, 10)], fleet, SETTINGS) == 0.5
    tight = replace(SETTINGS, slo=Slo(2.0, 0.001))
    assert feasible([Arrival(0.0, 1000, 10)], fleet, tight) == 0.0
    shared = [Arrival(float(number), 100_000, 10, blocks=tuple(range(50)), block_tokens=2000) for number in range(4)]
    assert feasible(shared, fleet, SETTINGS) == 0.75, "all but the first find it cached"
    assert feasible([Arrival(0.0, 100_000, 10, session="s", turn=3, history=99_000)], fleet, SETTINGS) == 1.0


def test_more_than_the_most_are_not_judged():
    fleet = workers("2 prefill, 2 decode", COST)
    assert judge(steady(5.0, 20.0, 100, 10), 20.0, fleet, small(), SETTINGS, WhatIf(most=30)).requests == 30


def test_as_a_rule_all_that_came_within_the_window_are_judged():
    """Too few are one wave of those that are taken in and refused together, and any ratio may look good."""
    fleet, window_s = workers("2 prefill, 2 decode", COST), RatioConfig().window_s
    assert judge(steady(40.0, window_s, 100, 10), window_s, fleet, small(), SETTINGS).requests == 1000


# How long outputs are.
def test_a_life_table_of_ended_outputs_is_their_distribution():
    table = Lengths([(0, tokens, True) for tokens in (10, 20, 30, 40)])
    assert table.mean == pytest.approx(25.0)
    assert [table.drawn(0, share) for share in (0.0, 0.24, 0.26, 0.51, 0.76)] == [10, 10, 20, 30, 40]
    assert [table.drawn(15, share) for share in (0.1, 0.4, 0.9)] == [20, 30, 40]
    assert table.drawn(40, 0.5) == 80, "longer than any that ended: as long again"


def test_those_that_go_on_make_outputs_longer():
    ended = [(0, 10, True)] * 5
    assert Lengths(ended).mean == pytest.approx(10.0)
    assert Lengths([*ended, *[(0, 100, False)] * 5]).mean == pytest.approx(0.5 * 10 + 0.5 * 200)


def test_who_had_passed_a_length_before_the_window_says_nothing_of_it():
    table = Lengths([(0, 10, True), (0, 10, True), *[(90, 100, False)] * 50, (90, 95, True)])
    assert table.drawn(0, 0.99) == 10
    assert table.drawn(92, 0.001) == 95
    assert table.drawn(92, 0.5) == 200


def test_a_few_long_ones_of_the_time_before_do_not_say_how_long_the_new_ones_are():
    """A hundred run that have come since traffic changed; the longest that ends is one of three from before."""
    new = [(0, made, False) for made in range(401, 501)] + [(0, 300, True)] * 5
    table = Lengths([*new, (2900, 3000, True), (2900, 3010, False), (2950, 3020, True)])
    assert table.drawn(450, 0.5) == pytest.approx(2 * 500, rel=0.05)
    assert table.mean < 1100
    assert table.drawn(3010, 0.5) == 6020
    few = Lengths([(0, 10, True), (0, 20, True), (0, 3000, True)])
    assert few.drawn(20, 0.5) == 3000, "of three, one is not few"


def test_without_any_there_is_a_guess():
    assert Lengths([]).drawn(0, 0.5) == Lengths([]).mean == 256


def story() -> str:
    arrivals = steady(6.0, 30.0, 4000, 20) + steady(12.0, 30.0, 100, 80, since_s=30.0)
    _, simulation = run(arrivals, "3 prefill, 1 decode", SMALL, small())
    return json.dumps([explain(each) for each in decisions(simulation)])


def test_another_process_with_another_hash_seed_decides_the_same():
    root = str(Path(__file__).resolve().parents[2])
    script = "from tests.sim.test_ratio import story; print(story())"
    environment = {"PYTHONHASHSEED": "4711", "PYTHONPATH": root}
    found = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=root, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == story()


def test_full_decode_workers_refuse_instead_of_making_everybody_late():
    """Twice of what they can take: before, four of five came late."""
    arrivals = steady(16.0, 100.0, 400, 600)
    outcomes: list[Outcome] = []
    builds = workers("2 prefill, 2 decode", COST, kv=60_000)
    simulate(arrivals, builds, small(rows=128), SETTINGS, over=outcomes.append)
    after = [each for each in outcomes if each.at_s >= 50.0]
    assert sum(each.good for each in after) > 0.4 * len(after)
    assert all(each.phase in (Phase.DONE, Phase.REJECTED) for each in outcomes)
    firsts = [each.ttft_s for each in outcomes if each.ttft_s is not None]
    assert sum(first_s > 2.0 for first_s in firsts) < 0.15 * len(firsts), "in line when the workers became full"


def test_a_worker_decodes_while_others_have_yet_to_pull_what_it_prefilled():
    """The decode worker is full: what the one that flips has prefilled waits there for half a minute."""
    arrivals = [*steady(8.0, 5.5, 400, 600), Arrival(60.0, 400, 8)]
    policy = small(rows=128)
    seen: list[tuple[float, int]] = []

    class Watched(Coordinator):
        def up(self, worker):
            super().up(worker)
            if worker.leaving is not None:
                seen.append((self.loop.now, sum(worker.leaving.policy.queue().values())))

    outcomes: list[Outcome] = []
    found: list[Simulation] = []

    def watch(simulation: Simulation) -> None:
        found.append(simulation)
        assert isinstance(simulation.coordinator, Coordinator)
        simulation.loop.at(8.0, Kind.FAULT, 0, simulation.coordinator.tell, Pinned(Ratio(1, 2)))

    settings = replace(SETTINGS, slo=Slo(60.0, 0.05))
    simulate(
        arrivals, workers("2 prefill, 1 decode", COST, kv=30_000), policy, settings,
        control=lambda simulation: Watched(simulation, SMALL), over=outcomes.append, watch=watch,
    )  # fmt: skip
    (simulation,) = found
    ((at_s, waiting),) = seen
    assert at_s < 15.0
    assert waiting > 0
    assert ratio(simulation) == Ratio(1, 2)
    assert all((each.phase, each.tokens, each.attempts) == (Phase.DONE, each.output, 1) for each in outcomes)
    empty(simulation)
