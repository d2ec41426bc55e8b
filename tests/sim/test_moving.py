"""Simulated deployments whose running rows move: a worker is emptied, a tight one is relieved, and nothing is lost."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from core.errors import SetupError
from core.request import Phase, Slo
from scheduler.decode_migrating import MigratingPolicy
from scheduler.migration import MigrationConfig
from scheduler.policies import Policy, policy
from sim.fleet import workers
from sim.generators import AZURE_CONV, generate
from sim.loop import Kind
from sim.outcome import Outcome
from sim.run import Settings, Simulation, simulate
from sim.scenario import Drain, Lose, Scenario, Slow, read
from sim.workload import Arrival, Workload
from tests.sim.test_run import empty

COST = "h200-llama-3.1-8b"
DRAINS = """
name = "drain"
about = "a decode worker is to be taken away"

[[event]]
kind = "drain"
at_s = 5
worker = "decode-0"
"""


def run(
    workload: Workload, spec: str, of: Policy, kv: int, *events, **more
) -> tuple[list[Outcome], Simulation, dict[str, float]]:
    outcomes: list[Outcome] = []
    found: list[Simulation] = []
    left: dict[str, float] = {}

    def watch(simulation: Simulation) -> None:
        """When each worker, once drained, is empty."""
        found.append(simulation)

        def look(_: object) -> None:
            for name, worker in simulation.workers.items():
                if worker.decode is not None and worker.draining and not any(worker.decode.policy.queue().values()):
                    left.setdefault(name, simulation.loop.now)
            if simulation.loop.now < 60:
                simulation.loop.at(simulation.loop.now + 0.01, Kind.FAULT, 0, look)

        simulation.loop.at(0.0, Kind.FAULT, 0, look)

    made = events[0] if events and isinstance(events[0], Scenario) else Scenario("some", tuple(events))
    settings = Settings(**{"slo": Slo(2.0, 0.05), "check_every": 20, **more})
    simulate(workload, workers(spec, COST, kv=kv), of, settings, scenario=made, over=outcomes.append, watch=watch)
    return outcomes, found[0], left


def movers(simulation: Simulation) -> dict[str, MigratingPolicy]:
    found = {name: worker.decode.policy for name, worker in simulation.workers.items() if worker.decode}
    return {name: each for name, each in found.items() if isinstance(each, MigratingPolicy)}


def moving(name: str = "baton", **how) -> Policy:
    return replace(policy(name), migration=MigrationConfig(**how))


def served(outcomes: list[Outcome], count: int) -> None:
    """All of them, with neither a token too few nor one too many, placed once."""
    assert len(outcomes) == count
    for each in outcomes:
        assert (each.phase, each.tokens, each.attempts) == (Phase.DONE, each.output, 1)


def test_a_draining_worker_is_empty_at_once_and_no_token_is_lost_or_repeated(tmp_path):
    file = tmp_path / "drain.toml"
    file.write_text(DRAINS)
    workload = generate(AZURE_CONV, seed=3, count=150, rate=20.0)
    spec = "2 prefill, 3 decode"
    outcomes, simulation, left = run(workload, spec, moving(), 100_000, read(file))
    served(outcomes, 150)
    waited, _, later = run(workload, spec, policy("baton"), 100_000, read(file))
    served(waited, 150)
    assert left["decode-0"] < 5.3
    assert later["decode-0"] > 6.0
    given = {name: each.moves.given for name, each in movers(simulation).items()}
    assert given["decode-0"] > 3
    assert given["decode-1"] == given["decode-2"] == 0, "nobody else was short"
    # A row stands still for the last pages only: no gap is longer than a few steps.
    assert max(each.gap_p99_s for each in outcomes) <= max(0.02, max(each.gap_p99_s for each in waited))
    empty(simulation)


def test_a_tight_worker_gives_rows_instead_of_computing_them_again():
    """One worker gets, by turns, all requests that are much longer than those before let one expect."""
    short = [Arrival(index * 0.05, 300, 40 + index % 20) for index in range(120)]
    mixed = [Arrival(8.0 + index * 0.05, 300, 40 if index % 2 else 1200) for index in range(80)]
    workload = Workload("drift", (*short, *mixed))
    still = replace(policy("round-robin"), decode_config=policy("baton").decode_config)
    found = {}
    for of in (still, replace(still, migration=MigrationConfig())):
        outcomes, simulation, _ = run(workload, "2 prefill, 2 decode", of, 24_000, max_tokens=2000)
        served(outcomes, 200)
        empty(simulation)
        decoders = [worker.decode.policy for worker in simulation.workers.values() if worker.decode]
        found[of.migration is not None] = sum(each.evicted for each in decoders)
        if of.migration:
            assert sum(each.moves.given for each in movers(simulation).values()) >= 10
    assert found[False] >= 10
    assert found[True] <= found[False] / 5


@pytest.mark.parametrize("who", ["decode-0", "decode-1"])
@pytest.mark.parametrize("at_s", [5.0, 5.003, 5.006, 5.012, 5.02])
def test_whoever_dies_while_rows_move_all_are_served(who, at_s):
    workload = generate(AZURE_CONV, seed=3, count=80, rate=20.0)
    events = (Slow(0.5, "decode-2", 1.5), Drain(5.0 - 1e-6, "decode-0"), Lose(at_s, who))
    outcomes, simulation, _ = run(workload, "2 prefill, 3 decode", moving(), 100_000, *events)
    assert all((each.phase, each.tokens) == (Phase.DONE, each.output) for each in outcomes)
    empty(simulation)


def test_results_of_those_who_do_not_ask_for_it_are_those_of_before():
    """Rows that could move and have no reason to change nothing."""
    workload = generate(AZURE_CONV, seed=5, count=60, rate=5.0)
    runs = [run(workload, "1 prefill, 2 decode", of, 200_000)[0] for of in (policy("baton"), moving(below_steps=0))]
    assert runs[0] == runs[1]
    assert all(a.at_s <= b.at_s for a, b in pairwise(sorted(runs[0], key=lambda each: each.at_s)))


def test_only_decode_workers_drain():
    with pytest.raises(SetupError, match="drain: got 'prefill-0', want a decode worker"):
        run(Workload("one", (Arrival(0.0, 10, 2),)), "1 prefill, 1 decode", moving(), 10_000, Drain(1.0, "prefill-0"))


def test_orders_of_any_length_move_the_same_rows_at_the_same_times():
    short = [Arrival(index * 0.05, 300, 40 + index % 20) for index in range(60)]
    mixed = [Arrival(4.0 + index * 0.05, 300, 40 if index % 2 else 900) for index in range(50)]
    workload = Workload("drift", (*short, *mixed))
    found = []
    for steps in (1, 1000):
        decode = replace(policy("baton").decode_config, max_steps=steps)
        of = replace(policy("round-robin"), decode_config=decode, migration=MigrationConfig())
        outcomes, simulation, _ = run(
            workload, "2 prefill, 2 decode", of, 14_000, Drain(9.0, "decode-0"), max_tokens=2000
        )
        decoders = [worker.decode for worker in simulation.workers.values() if worker.decode]
        found.append((outcomes, [(each.moves.given, each.evicted) for each in movers(simulation).values()]))
        runs = sum(each.runs for each in decoders)
        assert (runs > 4000) == (steps == 1)
    assert found[0] == found[1]
    assert found[0][1][0][0] > 5
