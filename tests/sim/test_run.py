"""Whole simulations: every request ends, the same input gives the same digits, sessions wait, faults are survived."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import pytest

from core.errors import SetupError
from core.request import Kind, Phase, Slo
from scheduler.dualmap import DualMap, DualMapConfig
from scheduler.policies import BASELINES, BATON, policy
from sim.fleet import workers
from sim.generators import AZURE_CONV, generate
from sim.outcome import Outcome
from sim.run import Settings, Simulation, page_hashes, simulate
from sim.scenario import Link, Lose, Return, Scenario, Slow
from sim.workload import Arrival, Workload

COST = "h200-llama-3.1-8b"
SLO = Slo(0.4, 0.05)
NAMES = [each.name for each in (BATON, *BASELINES)]


def run(
    workload: Workload, spec: str = "2 prefill, 2 decode", name: str = "fcfs", kv: int | None = 100_000, **more
) -> tuple[list[Outcome], Simulation]:
    scenario = more.pop("scenario", Scenario("none"))
    outcomes: list[Outcome] = []
    found: list[Simulation] = []
    settings = Settings(**{"slo": SLO, "check_every": 50, **more})
    simulate(
        workload, workers(spec, COST, kv=kv), policy(name), settings,
        scenario=scenario, over=outcomes.append, watch=found.append,
    )  # fmt: skip
    return outcomes, found[0]


def empty(simulation: Simulation) -> None:
    """Nothing of any request is left anywhere."""
    simulation.loop.run(simulation.loop.now + 100.0)
    assert not simulation.world.records
    for gateway in simulation.gateways:
        assert len(gateway.router) == 0
    for worker in simulation.workers.values():
        assert worker.ledger.available == worker.ledger.total, worker.me
        for shell in (worker.decode, worker.mixed):
            assert shell is None or len(shell.batch) == 0


@pytest.mark.parametrize("name", NAMES)
def test_every_request_is_served_and_nothing_is_left(name):
    workload = generate(AZURE_CONV, seed=3, count=150, rate=10.0)
    outcomes, simulation = run(workload, name=name, slo=Slo(5.0, 0.05))
    assert len(outcomes) == 150
    for each in outcomes:
        assert (each.phase, each.code, each.tokens) == (Phase.DONE, "OK", each.output)
        assert each.ttft_s is not None
        assert each.ttft_s > 0
        assert each.e2e_s >= each.ttft_s + each.gap_mean_s * (each.tokens - 1) - 1e-9
    empty(simulation)


@pytest.mark.parametrize("name", NAMES)
def test_little_memory_and_many_requests_at_once(name):
    """More than the arenas hold arrives within a second; none is lost."""
    workload = generate(AZURE_CONV, seed=4, count=60, rate=60.0)
    outcomes, simulation = run(workload, name=name, kv=20_000)
    assert len(outcomes) == 60
    assert all(each.phase in (Phase.DONE, Phase.REJECTED) for each in outcomes)
    assert sum(each.phase is Phase.DONE for each in outcomes) >= 20
    empty(simulation)


@pytest.mark.parametrize("name", ["baton", "fcfs", "hrrn", "baton-migrating", "colocated-chunked"])
def test_classes_and_tenants_end_alike_and_are_told_apart(name):
    """Little memory, so that the batch class has to give some back."""
    slos = (None, Slo(batch=True), Slo(deadline_s=60.0), Slo(batch=True))
    made = generate(AZURE_CONV, seed=5, count=160, rate=40.0)
    arrivals = [
        replace(one, slo=slos[number % 4], tenant="ab"[number % 3 == 0]) for number, one in enumerate(made.arrivals)
    ]
    outcomes, simulation = run(Workload("w", tuple(arrivals)), name=name, kv=20_000, slo=Slo(20.0, 1.0))
    assert len(outcomes) == 160
    assert {each.phase for each in outcomes} <= {Phase.DONE, Phase.REJECTED}
    assert all(each.tokens == each.output for each in outcomes if each.phase is Phase.DONE)
    batch = [each for each in outcomes if each.kind is Kind.BATCH]
    assert len(batch) == 80
    assert all(each.good for each in batch if each.phase is Phase.DONE)
    assert sum(each.phase is Phase.DONE for each in batch) > 70
    late = [each for each in outcomes if each.kind is Kind.DEADLINE and each.e2e_s > 60.0]
    assert not any(each.good for each in late)
    parts = simulation.tally.parts
    assert sum(part.arrived for part in parts.values()) == 160
    for (kind, tenant), part in parts.items():
        mine = [each for each in outcomes if (each.kind, each.tenant) == (kind, tenant)]
        assert (part.arrived, part.good) == (len(mine), sum(each.good for each in mine))
        assert part.tokens == sum(each.tokens for each in mine if each.phase is Phase.DONE)
    empty(simulation)


def test_one_request_takes_the_sum_of_its_parts():
    (build, other) = workers("1 prefill, 1 decode", COST)
    settings = Settings(hop_s=0.001)
    outcomes: list[Outcome] = []
    arrivals = Workload("one", (Arrival(0.0, 1000, 11),))
    simulate(arrivals, (build, other), policy("fcfs"), settings, over=outcomes.append)
    (only,) = outcomes
    cost = build.cost
    assert only.ttft_s == pytest.approx(cost.prefill_s([(1000, 0)]) + 4 * 0.001)
    nbytes = build.shape.pages_for(1000) * build.shape.page_nbytes
    pull_s = cost.transfer_s(nbytes, 1, "rdma-400g") + 0.001  # one message of readiness
    steps_s = cost.decode_span_s(1, 1001, 10)
    assert only.e2e_s == pytest.approx(cost.prefill_s([(1000, 0)]) + 3 * 0.001 + pull_s + steps_s + 0.001)
    assert only.gap_mean_s == pytest.approx((pull_s + steps_s) / 10)
    assert only.gap_p99_s >= pull_s + cost.decode_s(1, 1001)


def test_a_rejected_request_is_a_miss():
    """Goals that nobody can meet: refused early, with a typed reason, and counted as arrived."""
    (prefill, decode) = workers("1 prefill, 1 decode", COST)
    workload = Workload("burst", tuple(Arrival(i * 1e-3, 8000, 5) for i in range(40)))
    result = simulate(workload, (prefill, decode), policy("fcfs-refusing"), Settings(slo=Slo(0.5, 0.05)))
    assert result.tally.arrived == 40
    assert result.tally.phases[Phase.REJECTED] > 0
    assert result.tally.codes["RESOURCE_EXHAUSTED"] == result.tally.phases[Phase.REJECTED]
    assert result.tally.good < 40
    assert result.tally.attainment == result.tally.good / 40


def test_turns_wait_for_the_turn_before():
    turns = tuple(
        Arrival(float(i), 500 * (i + 1), 50, session="s", turn=i, gap_s=2.0 if i < 3 else None) for i in range(4)
    )
    alone = Arrival(0.5, 300, 10)
    workload = Workload("talk", tuple(sorted((*turns, alone), key=lambda each: each.at_s)))
    outcomes, _ = run(workload)
    talk = [each for each in outcomes if each.session]
    assert [each.turn for each in talk] == [0, 1, 2, 3]
    for before, after in pairwise(talk):
        assert after.at_s == pytest.approx(before.at_s + before.e2e_s + 2.0)


def test_an_iterable_is_taken_as_it_comes():
    workload = generate(AZURE_CONV, seed=5, count=80, rate=20.0)
    taken: list[float] = []
    found: list[Simulation] = []

    def arrivals():
        for arrival in workload.arrivals:
            if found:
                taken.append(found[0].loop.now)
            yield arrival

    builds = workers("2 prefill, 2 decode", COST)
    streamed = simulate(arrivals(), builds, policy("fcfs"), Settings(slo=SLO), watch=found.append)
    whole = simulate(workload, builds, policy("fcfs"), Settings(slo=SLO))
    assert streamed.tally.ttft.cdf() == whole.tally.ttft.cdf()
    assert taken == sorted(taken)
    assert taken[-1] > 1.0, "read at once"


PRINTED = """
import json, sys
from dataclasses import asdict
from core.request import Slo
from sim.fleet import workers
from sim.generators import AZURE_CONV, generate
from scheduler.policies import policy
from sim.run import Settings, simulate
from sim.scenario import Lose, Return, Scenario
found = []
faults = (Lose(2.0, "decode-0"), Return(3.0, "decode-0")) if sys.argv[2] == "loss" else ()
simulate(
    generate(AZURE_CONV, seed=7, count=120, rate=20.0),
    workers("2 prefill, 2 decode", "h200-llama-3.1-8b", kv=60000),
    policy(sys.argv[1]), Settings(slo=Slo(0.4, 0.05), gateways=2, load_s=1.0),
    scenario=Scenario("any", faults), over=found.append,
)
print(json.dumps([asdict(each) for each in found]))
"""


@pytest.mark.parametrize("name", ["baton", "round-robin", "colocated-chunked", "with loss"])
def test_the_same_digits_in_another_process(name):
    loss = name == "with loss"
    scenario = Scenario("loss", (Lose(2.0, "decode-0"), Return(3.0, "decode-0"))) if loss else Scenario("none")
    found: list[Outcome] = []
    which = "fcfs" if loss else name
    simulate(
        generate(AZURE_CONV, seed=7, count=120, rate=20.0), workers("2 prefill, 2 decode", COST, kv=60_000),
        policy(which), Settings(slo=SLO, gateways=2, load_s=1.0), scenario=scenario, over=found.append,
    )  # fmt: skip
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", PRINTED, which, "loss" if loss else "none"]
    told = subprocess.run(
        command,
        cwd=root,
        env={"PYTHONHASHSEED": "17", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert json.loads(told) == json.loads(json.dumps([asdict(each) for each in found]))


@pytest.mark.parametrize("lost", ["decode-0", "prefill-0"])
def test_a_lost_worker_costs_a_pause_and_no_token(lost):
    workload = generate(AZURE_CONV, seed=8, count=200, rate=60.0)
    scenario = Scenario("loss", (Lose(2.0, lost), Return(2.5, lost)))
    outcomes, simulation = run(workload, scenario=scenario, load_s=0.5, slo=Slo(5.0, 0.05))
    assert len(outcomes) == 200
    assert all((each.phase, each.tokens) == (Phase.DONE, each.output) for each in outcomes)
    assert any(each.attempts > 1 for each in outcomes), "nobody was there"
    assert (
        max(each.gap_p99_s for each in outcomes if each.attempts > 1 and each.tokens > 1) > 0.025 or lost != "decode-0"
    )
    assert simulation.workers[lost].me.incarnation == 2
    empty(simulation)


def test_a_slow_worker_and_a_slow_link_are_slower():
    workload = generate(AZURE_CONV, seed=9, count=100, rate=5.0)
    plain, _ = run(workload, spec="1 prefill, 1 decode")
    slow, _ = run(workload, spec="1 prefill, 1 decode", scenario=Scenario("slow", (Slow(0.0, "decode-0", 3.0),)))
    link, _ = run(
        workload, spec="1 prefill, 1 decode", scenario=Scenario("link", (Link(0.0, factor=0.05, delay_s=0.01),))
    )
    base = sum(each.e2e_s for each in plain)
    assert sum(each.e2e_s for each in slow) > 2 * base
    assert sum(each.e2e_s for each in link) > base + 100 * 0.01


@pytest.mark.parametrize(
    ("scenario", "message"),
    [
        (Scenario("x", (Lose(1.0, "decode-9"),)), "decode-9"),
        (Scenario("x", (Link(1.0, source="nobody"),)), "nobody"),
    ],
)
def test_a_fault_of_nobody_is_refused(scenario, message):
    with pytest.raises(SetupError, match=message):
        run(generate(AZURE_CONV, seed=1, count=5, rate=5.0), scenario=scenario)


def test_max_tokens_are_what_machines_are_told():
    workload = generate(AZURE_CONV, seed=2, count=30, rate=10.0)
    asked: list[int] = []
    outcomes, simulation = run(workload, max_tokens=5)
    assert all(each.tokens == min(5, each.output) for each in outcomes)
    outcomes, _ = run(workload, max_tokens=4000)
    assert all(each.tokens == each.output for each in outcomes)
    del asked, simulation


def test_page_hashes_follow_blocks():
    one = Arrival(0.0, 1300, 1, blocks=(7, 8, 9), block_tokens=512)
    two = replace(one, prompt=1100, blocks=(7, 8, 10))
    assert page_hashes(one, 512) == (7, 8)
    a, b = page_hashes(one, 64), page_hashes(two, 64)
    assert (len(a), len(b)) == (1300 // 64, 1100 // 64)
    assert a[:16] == b[:16]
    assert not set(a[16:]) & set(b[16:])
    assert len(set(a)) == len(a)
    with pytest.raises(SetupError, match="page tokens: got 48"):
        page_hashes(one, 48)
    assert page_hashes(Arrival(0.0, 1300, 1), 64) == ()


def test_who_decodes_finds_the_answer_of_the_turn_before_and_a_prefill_worker_does_not():
    """Two turns: the second repeats prompt and answer of the first, 2,400 tokens, and adds 100."""
    blocks = tuple(range(40))
    first = Arrival(0.0, 1600, 800, blocks[:25], 64, "s", 0, 1.0)
    second = Arrival(1.0, 2500, 10, blocks, 64, "s", 1, None, 2400)
    outcomes, simulation = run(Workload("talk", (first, second)), "1 mixed", "colocated-chunked")
    assert [each.cached for each in outcomes] == [0, 2399 // 64 * 64 // 16 * 16]
    empty(simulation)
    outcomes, simulation = run(Workload("talk", (first, second)), "1 prefill, 1 decode")
    assert [each.cached for each in outcomes] == [0, 1600]
    (worker,) = [worker for worker in simulation.workers.values() if worker.decode is not None]
    crossed = 1600 + 2500 - 2399 // 64 * 64
    assert simulation.world.network.nbytes == worker.build.shape.pages_for(crossed) * worker.build.shape.page_nbytes
    empty(simulation)


def test_rows_that_outgrow_a_small_arena_are_computed_again_and_end():
    """Lengths are forecast too short: rows are evicted, and what growing rows get ahead never is what others need."""
    workload = generate(AZURE_CONV, seed=8, count=150, rate=60.0)
    outcomes, simulation = run(workload, "2 prefill, 1 decode", "baton", kv=10_000, slo=Slo(), max_tokens=2_000)
    assert all(each.code in ("OK", "INVALID_ARGUMENT") for each in outcomes)
    (policy,) = [worker.decode.policy for worker in simulation.workers.values() if worker.decode is not None]
    assert policy.evicted > 0
    empty(simulation)


def test_promises_of_scarce_memory_do_not_wait_for_each_other():
    """Prefill workers whose first in line waits for decode memory that is promised to those behind another's first."""
    workload = generate(AZURE_CONV, seed=3, count=700, rate=110.0)
    outcomes, simulation = run(
        workload, "4 prefill, 4 decode", "baton", kv=40_000, slo=Slo(0.4, 0.05), max_tokens=2_000, check_every=10_000
    )
    assert {each.code for each in outcomes} <= {"OK", "RESOURCE_EXHAUSTED", "INVALID_ARGUMENT"}
    empty(simulation)


def test_a_row_that_is_suspended_for_one_step_ends_once():
    """Two rows want a page at the same step and there is one: the newer one waits for that step alone, which is the
    last of the older one, and gets its next token from computing itself again. So it ends at the engine's step at
    which it would have ended without, and must not be told to have ended for both of its times in the batch."""
    workload = Workload("two", (Arrival(0.0, 48, 18), Arrival(0.0, 32, 60)))
    outcomes, simulation = run(workload, "1 mixed", "colocated-prefill-first", kv=128, check_every=1)
    assert [(each.code, each.tokens) for each in outcomes] == [("OK", 18), ("OK", 60)]
    (shell,) = [worker.mixed for worker in simulation.workers.values()]
    assert shell is not None
    assert shell.policy.suspensions == 1
    empty(simulation)


def test_tiny_prompts_stay_on_a_mixed_worker_while_it_has_slack():
    """Eight of them come at once, each of a tenth of its memory: it keeps five, which are half of it, though others
    have nothing to do, and the one that comes when all is over. Without that rule they go by queued tokens, in turn."""
    tiny = tuple(Arrival(i * 1e-4, 100, 900) for i in range(8))
    workload = Workload("tiny", (*tiny, Arrival(60.0, 100, 900)))
    outcomes, simulation = run(workload, "2 prefill, 2 decode, 1 mixed", "baton", kv=10_000)
    assert all((each.code, each.tokens) == ("OK", 900) for each in outcomes)
    assert all((each.source == "mixed-0") == (each.sink == "mixed-0") for each in outcomes)
    here = sorted(each.at_s for each in outcomes if each.sink == "mixed-0")
    assert here == [*(each.at_s for each in tiny[:5]), 60.0]
    assert {each.sink for each in outcomes} == {"mixed-0", "decode-0", "decode-1"}
    empty(simulation)
    never = replace(BATON, placement=lambda cost: DualMap(DualMapConfig(skip_tokens=0), cost))
    builds = workers("2 prefill, 2 decode, 1 mixed", COST, kv=10_000)
    spread: list[Outcome] = []
    simulate(workload, builds, never, Settings(slo=SLO), over=spread.append)
    assert sum(each.sink == "mixed-0" for each in spread) == 4


@pytest.mark.parametrize("name", [each for each in NAMES if not policy(each).colocated])
@pytest.mark.parametrize("spec", ["2 prefill, 1 decode, 1 mixed", "1 prefill, 2 mixed", "1 decode, 2 mixed"])
def test_mixed_workers_beside_others_keep_their_own(spec, name):
    """With little memory, and while one of them is lost and comes back."""
    workload = generate(AZURE_CONV, seed=6, count=60, rate=40.0)
    faults = Scenario("lose", (Lose(0.4, "mixed-0"), Return(0.8, "mixed-0")))
    outcomes, simulation = run(workload, spec, name, kv=16_000, slo=Slo(5.0, 0.05), scenario=faults, load_s=0.2)
    assert len(outcomes) == 60
    assert all(each.code in ("OK", "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED") for each in outcomes)
    done = [each for each in outcomes if each.code == "OK"]
    assert len(done) >= 40
    assert all(each.source == each.sink for each in done if "mixed" in each.source + each.sink)
    assert any("mixed" in each.sink for each in done)
    empty(simulation)
