"""A recording of a simulated deployment is read back to the same deployment, and predicts what it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from core import words
from core.config import GatewayConfig, WorkerConfig
from core.errors import SetupError
from core.request import Slo
from core.worker import Costs
from scheduler.cost import CostModel, Lane
from scheduler.learning import StepTook
from scheduler.policies import policy
from scheduler.roofline import LANES
from sim.deployment import _line, deployment
from sim.fleet import workers
from sim.generators import AZURE_CONV, generate
from sim.loop import Process, Seat
from sim.outcome import Outcome
from sim.predicted import SHARES, measured, predicted
from sim.run import Settings, simulate
from sim.scenario import CALM, Lose, Return, Scenario
from sim.worker import Worker

STEP_S, CHUNK_S, TOKEN_S = 0.02, 0.004, 1e-4
COST = CostModel(
    "even", ((CHUNK_S, TOKEN_S, 0.0, 0.0),), ((STEP_S, 0.0, 0.0),), (*LANES, Lane("lane", 0.003, 0.0, 0.0))
)
TURN_S, HOP_S = 0.0015, 0.0007
SLO = Slo(1.0, 0.1)
OFFSET_S = 1_700_000_000.0
"""Of the wall's clock."""
SIZES = {"chunk_tokens": 512, "max_rows": 32, "max_steps": 16}
SEATS = {"Router": "router", "PrefillPolicy": "prefill", "DecodePolicy": "decode", "MixedPolicy": "mixed"}


@dataclass
class Recorder:
    """Writes what the machines of a simulation take, as their processes would."""

    folder: Path
    name: str
    """Of the policy."""
    slow: float = 1.0
    """Steps that are told take so many times what they were predicted to."""

    def line(self, process: Any, entry: Any) -> None:
        path = self.folder / f"{process.me.name}-{process.me.incarnation:012x}.jsonl"
        if not path.exists():
            head = {"format": "baton.recording", "version": 1, "process": str(process.me), "build": "b"}
            head |= {"config": self.config(process), "started_at": OFFSET_S, "clock_at": 0.0}
            path.write_text(json.dumps(head) + "\n")
        with path.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def config(self, process: Any) -> dict[str, Any]:
        common = {"name": process.me.name, "coordinator": "", "model": "", "served_name": "", "policy": self.name}
        if isinstance(process, Worker):
            return {"process": "worker", **asdict(WorkerConfig(role=process.build.role, **common)), **SIZES}
        return {"process": "gateway", **asdict(GatewayConfig(**common))}

    def around(self, process: Any, seat: Seat) -> Callable[[Any, float], list[Any]]:
        on, kind = seat.on, type(seat.machine).__name__
        rows: dict[int, tuple[tuple[int, int], ...]] = {}

        def recorded(event: Any, now: float) -> list[Any]:
            commands = on(event, now)
            for command in commands:
                if hasattr(command, "spans"):
                    number = command.run_id if hasattr(command, "run_id") else command.step_id
                    rows[number] = tuple((span.stop - span.start, span.start) for span in command.spans)
            before, after = [], []
            match type(event).__name__:
                case "Ran":
                    before = [StepTook((), 1, 1, STEP_S * self.slow)] * event.steps
                case "Stepped" if not rows[event.step_id]:
                    before = [StepTook((), 1, 1, STEP_S * self.slow)] * event.steps
                case "Stepped":
                    raise AssertionError("mixed steps are not told here")
                case "ChunkDone":
                    sizes = rows[event.run_id]
                    after = [StepTook(sizes, 0, 0, COST.prefill_s(sizes) * self.slow)]
            for took in before:
                self.line(process, [now, "costs", words.written(took), []])
            taken = [
                now,
                SEATS.get(kind, kind.lower()),
                words.written(event),
                [words.written(each) for each in commands],
            ]
            self.line(process, taken)
            for took in after:
                self.line(process, [now, "costs", words.written(took), []])
            return commands

        return recorded


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """Simulates, and records meanwhile; returns the folder and the outcomes."""

    def run(name: str = "baton", scenario: Scenario = CALM, slow: float = 1.0, requests: int = 50, **chance):
        recorder = Recorder(tmp_path, name, slow)
        seat, member = Process.seat, Worker.member

        def watched(process, machine, perform, **more):
            made = seat(process, machine, perform, **more)
            made.on = recorder.around(process, made)  # type: ignore[assignment]
            return made

        monkeypatch.setattr(Process, "seat", watched)
        monkeypatch.setattr(
            Worker, "member", lambda self: replace(member(self), costs=Costs(COST.prefill, COST.decode))
        )
        builds = [
            replace(each, **{"cost": COST, "turns_s": (TURN_S,), **chance})
            for each in workers("2 prefill, 2 decode", "h200-llama-3.1-8b", kv=100_000)
        ]
        ends: list[Outcome] = []
        settings = Settings(slo=SLO, hop_s=HOP_S, lane="lane", lost_s=0.0, load_s=0.0)
        sized = policy(name).sized(suspends=False, **SIZES)
        load = generate(AZURE_CONV, 7, requests, rate=12.0)
        load = replace(load, arrivals=tuple(replace(each, output=min(60, each.output)) for each in load.arrivals))
        simulate(load, builds, sized, settings, scenario=scenario, over=ends.append)
        monkeypatch.setattr(Process, "seat", seat)
        monkeypatch.setattr(Worker, "member", member)
        return tmp_path, ends

    return run


@pytest.mark.parametrize("name", ["baton", "fcfs"])
def test_every_term_is_read_back_and_every_first_token_is_predicted(recorded, name):
    folder, ends = recorded(name)
    found = deployment(folder)
    assert found.policy.name == name
    assert (found.policy.prefill_config.chunk_tokens, found.policy.decode_config.max_rows) == (512, 32)
    assert found.settings.hop_s == pytest.approx(HOP_S, abs=1e-6)
    assert found.read_s == pytest.approx(0.003, abs=1e-6)
    assert found.settings.slo == SLO
    for terms in found.terms.values():
        assert terms.turn_s == pytest.approx(TURN_S, abs=1e-6)
        assert terms.pause_s == pytest.approx(0.0, abs=1e-6)
        assert (terms.prefill, terms.decode) == pytest.approx((1.0, 1.0))
    seen, said = measured(found.calls), predicted(found)
    assert said.ttft_s == pytest.approx(seen.ttft_s, abs=1e-4)
    ttfts = sorted(end.ttft_s for end in ends)
    assert seen.ttft_s == pytest.approx([ttfts[-(-int(100 * share) * len(ttfts) // 100) - 1] for share in SHARES])
    assert (said.requests, said.served, said.tokens) == (seen.requests, seen.served, seen.tokens) == (
        50, 50, sum(end.tokens for end in ends),
    )  # fmt: skip


def test_who_was_lost_and_came_back_is_lost_again(recorded):
    faults = Scenario("", (Lose(1.5, "decode-1"), Return(3.0, "decode-1"), Lose(4.0, "prefill-0")))
    folder, ends = recorded("fcfs", faults)
    found = deployment(folder)
    begin = found.calls[0].at - OFFSET_S
    assert [(type(each), each.worker) for each in found.scenario.faults] == [
        (Lose, "decode-1"), (Return, "decode-1"), (Lose, "prefill-0"),
    ]  # fmt: skip
    assert [each.at_s + begin for each in found.scenario.faults] == pytest.approx([1.5, 3.0, 4.0], abs=1e-6)
    seen, said = measured(found.calls), predicted(found)
    assert seen.again == said.again == sum(end.attempts > 1 for end in ends) > 0
    assert said.ttft_s == pytest.approx(seen.ttft_s, rel=1e-3)


def test_steps_that_took_longer_than_learned_take_so_long(recorded):
    """Told to have taken 1.25 times as long, they leave no time for turns."""
    folder, _ = recorded("fcfs", slow=1.25)
    found = deployment(folder)
    for build in found.builds:
        prefill = build.role == "prefill"
        terms = found.terms[build.name]
        assert (terms.prefill, terms.decode) == pytest.approx((1.25, 1.0) if prefill else (1.0, 1.25))
        assert terms.turn_s <= TURN_S + 1e-9
        assert build.cost.prefill_s([(100, 0)]) == pytest.approx((CHUNK_S + 100 * TOKEN_S) * terms.prefill)


def test_what_took_longer_by_chance_does_so_as_often(recorded):
    """A tenth of the turns take twenty times as long. Steps that vary, and messages, make gaps vary, too."""
    turns_s = (0.001,) * 9 + (0.020,)
    folder, _ = recorded("fcfs", requests=200, turns_s=turns_s)
    found = deployment(folder)
    decode = next(build for build in found.builds if build.role == "decode")
    assert sum(turn_s > 0.015 for turn_s in decode.turns_s) / len(decode.turns_s) == pytest.approx(0.1, abs=0.05)

    def gaps_s(hops_s=(HOP_S,), **chance):
        builds = tuple(replace(each, **chance) for each in found.builds)
        return predicted(replace(found, builds=builds, hops_s=hops_s)).gap_s

    plain = gaps_s()
    assert plain == pytest.approx(gaps_s(turns_s=turns_s), rel=0.1)
    assert gaps_s(turns_s=())[-1] < 0.9 * plain[-1]
    longer = (0.8,) * 5 + (1.2,) * 5
    assert gaps_s(turns_s=(), vary=(longer, longer))[1] == pytest.approx(1.2 * gaps_s(turns_s=())[1], rel=0.1)
    jitter = gaps_s(turns_s=(), hops_s=(0.0, 0.010))
    assert jitter[1] - gaps_s(turns_s=())[1] == pytest.approx(0.010, abs=0.002), "a quarter of the gaps are longer"


def test_the_same_digits_again(recorded):
    folder, _ = recorded()
    assert predicted(deployment(folder)) == predicted(deployment(folder))


def test_a_line_through_orders():
    assert _line([(k, 0.002 + 0.001 * k) for k in (1, 3, 7)]) == pytest.approx((0.002, 0.001))
    assert _line([(1, 0.004), (1, 0.002)]) == pytest.approx((0.003, 0.0))
    assert _line([(1, 0.0), (3, 0.004)]) == pytest.approx((0.0, 0.001)), "neither is negative"
    assert _line([]) == (0.0, 0.0)


def test_what_is_no_recorded_deployment_is_one_sentence(recorded, tmp_path):
    folder, _ = recorded("fcfs", requests=3)
    gateway = next(folder.glob("gateway-*"))
    with pytest.raises(SetupError, match="workers: got the recording of none"):
        deployment(gateway)
    for path in folder.glob("gateway-*"):
        path.unlink()
    with pytest.raises(SetupError, match="requests: got none"):
        deployment(folder)


def test_mixed_workers_of_another_policy_are_refused(recorded):
    folder, _ = recorded("fcfs", requests=3)
    for path in folder.glob("decode-0-*"):
        path.write_text(path.read_text().replace('"role": "decode"', '"role": "mixed"'))
    with pytest.raises(SetupError, match="got mixed ones under fcfs"):
        deployment(folder)
