"""A recorded deployment, as the simulator runs it again: who worked, by which policy, how fast, and what went wrong.

A directory that `baton up --record` wrote has a file for each life of each process. Of the gateways' is read who asked
for what, which workers were there from when to when, and what each says of itself; of the workers' files what their
steps, their orders and their reads took. Nothing of what was delivered is looked at here, so what is predicted from it
(`sim/predicted.py`) is not what was measured, said again.

| term | is | of |
|---|---|---|
| steps | the model that it learned last, times measured / predicted over all its steps, by phase | a worker |
| turn, pause | a + b * steps, by least squares: an order's time from decision to end, less its steps' | a worker |
| chance | each order's steps and turn: drawn from what all of its phase took, over what is said of them | a worker |
| hop | from an offer's or an answer's sending to its taking | all |
| read | from a prompt's end, where memory was promised by then, until all of its KV is verified, less a hop | all |

The last two are means of all but the longest hundredth. Pauses between steps are part of the simulated steps. What a
read takes has digests, polling and the memory's speed in it, and is the same for all reads.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from core import words
from core.errors import SetupError, StateError
from core.kv import KvShape
from core.worker import Identity, Member, Role
from scheduler.cost import CostModel, Lane
from scheduler.migration import MigrationConfig
from scheduler.policies import Policy, policy
from scheduler.roofline import LANES
from sim.fleet import Build
from sim.recordings import FORMAT, WORKER_DOWN, WORKER_UP, Call, calls_of, files, lines, workload
from sim.run import Settings
from sim.scenario import Fault, Lose, Return, Scenario
from sim.workload import Workload

T = TypeVar("T")

LANE = "recorded"
DRAWN = 1000
"""What varies is drawn from so many that were recorded, or some more."""
GAP_RATIO = 1.01
"""Edges of the gaps' histogram: percentiles are to be compared to a percent."""

STEP_TOOK = "scheduler.learning:StepTook"
REPRICED = "scheduler.cost:Repriced"
CHUNK, CHUNK_DONE = "scheduler.prefill_events:RunChunk", "scheduler.prefill_events:ChunkDone"
ANSWER = "scheduler.prefill_events:Answer"
SUSPEND = "scheduler.prefill_events:Suspend"
RUNS = {"scheduler.decode_events:Run": "run_id", "scheduler.mixed_events:Step": "step_id"}
RANS = {"scheduler.decode_events:Ran": "run_id", "scheduler.mixed_events:Stepped": "step_id"}
"""Orders whose steps are told before their end, and the field that numbers them."""
OFFER, ACCEPT = "core.messages:Offer", "core.messages:Accept"
SEALED, GRANT, ARRIVED = "transfer.source:Sealed", "core.messages:Grant", "transfer.sink:Arrived"


@dataclass(slots=True)
class _Life:
    """What one worker process wrote."""

    config: dict[str, Any]
    learned: CostModel | None = None
    steps: list[tuple[tuple[tuple[int, int], ...], int, int, float]] = field(default_factory=list)
    """Rows, batch, context and seconds."""
    turns: list[tuple[int, float]] = field(default_factory=list)
    """Steps of an order, and its time less theirs."""


@dataclass(slots=True)
class _Seen:
    """When things happened whose other end is in another file; on the wall's clock."""

    sent: dict[tuple[Any, ...], float] = field(default_factory=dict)
    taken: dict[tuple[Any, ...], float] = field(default_factory=dict)
    """Messages, by what they are."""
    sealed: dict[str, float] = field(default_factory=dict)
    """Prompts that were computed to their end, by the ticket's key, as the next two."""
    granted: dict[str, float] = field(default_factory=dict)
    arrived: dict[str, float] = field(default_factory=dict)

    def hops(self) -> list[float]:
        """Of all messages whose both ends are known."""
        return [max(0.0, self.taken[what] - at) for what, at in self.sent.items() if what in self.taken]

    def reads(self) -> list[float]:
        """From the prompt's end to the KV's arrival, of those whose memory was promised by then."""
        return [
            self.arrived[key] - at
            for key, at in self.sealed.items()
            if key in self.arrived and self.granted.get(key, math.inf) <= at
        ]


@dataclass(frozen=True, slots=True)
class Terms:
    """What a worker's own recording says."""

    prefill: float
    decode: float
    """Measured over predicted seconds of all its steps, of the model that it learned last; 1 without any."""
    turn_s: float
    """From an order to its first step."""
    pause_s: float
    """Between the steps of an order."""


@dataclass(frozen=True, slots=True)
class Deployment:
    """What `sim.run.simulate` takes, and what of it was measured between the steps."""

    calls: tuple[Call, ...]
    workload: Workload
    builds: tuple[Build, ...]
    policy: Policy
    settings: Settings
    scenario: Scenario
    terms: dict[str, Terms]
    """By worker."""
    read_s: float


def deployment(path: Path) -> Deployment:
    """The deployment that a directory of recordings is of; SetupError where it is none that can be run again."""
    calls = calls_of(path)
    seen = _Seen()
    lives: dict[str, list[_Life]] = {}
    members: dict[str, Member] = {}
    changes: list[tuple[float, str, bool]] = []
    gateways: list[dict[str, Any]] = []
    for each in files(path):
        reading = lines(each)
        head = next(reading, (1, None))[1]
        if not isinstance(head, dict):
            raise SetupError(f"{each}:1: got an empty file, want a {FORMAT}")
        kind, offset_s = head["config"].get("process"), head["started_at"] - head["clock_at"]
        try:
            if kind == "gateway":
                found = _gateway(reading, offset_s, members, seen)
                changes = found if not gateways else changes  # they all see the same workers
                gateways.append(head["config"])
            elif kind == "worker":
                name = head["process"].partition("#")[0]
                lives.setdefault(name, []).append(_worker(reading, head["config"], offset_s, seen))
        except (KeyError, TypeError, ValueError, IndexError, StateError) as error:
            raise SetupError(f"{each}: got a recording of another version of the code: {error!r}") from None
    names = [name for name in members if name in lives]
    if not names:
        raise SetupError(f"{path}: workers: got the recording of none, want the directory that all processes wrote to")
    chosen = _policy(path, [lives[name][0].config for name in names], gateways[0])
    hop_s = _typical(seen.hops())
    read_s = max(0.0, _typical(seen.reads()) - hop_s)
    lane = Lane(LANE, read_s, 0.0, 0.0)
    builds, terms = [], {}
    for name in sorted(names):
        build, terms[name] = _build(members[name], lives[name], lane)
        builds.append(build)
    if len({build.shape.page_tokens for build in builds}) > 1:
        raise SetupError(f"{path}: page_tokens: got workers with pages of unequal size, which the simulator has not")
    if len(found_groups := sorted({members[name].group for name in names})) > 1:
        known = ", ".join(map(repr, found_groups))
        raise SetupError(f"{path}: group: got workers of {known}, want one group: the simulator has no others")
    begin = calls[0].at
    settings = Settings(
        slo=_commonest(call.slo for call in calls),
        gateways=len(gateways),
        lane=LANE,
        hop_s=hop_s,
        lost_s=0.0,
        load_s=0.0,
        timeout_s=_commonest(call.timeout_s for call in calls),
        gap_ratio=GAP_RATIO,
    )
    return Deployment(
        tuple(calls),
        workload(path, calls, asked=True),
        tuple(builds),
        chosen,
        settings,
        Scenario("as recorded", tuple(_faults(changes, {build.name for build in builds}, begin, calls[-1].at))),
        terms,
        read_s,
    )


def _gateway(
    reading: Iterator[tuple[int, Any]], offset_s: float, members: dict[str, Member], seen: _Seen
) -> list[tuple[float, str, bool]]:
    """When which worker came and went; fills `members` with what they said last."""
    changes: list[tuple[float, str, bool]] = []
    there: dict[str, int] = {}
    for _, entry in reading:
        if not isinstance(entry, list) or entry[1] != "router":
            continue
        at, event, commands = entry[0] + offset_s, entry[2], entry[3]
        kind = event and event["@"]
        if kind == WORKER_UP:
            member = words.read(event["member"])
            who = member.identity
            if member.kv is not None:
                members[who.name] = member
            if member.ready and there.get(who.name) != who.incarnation:
                there[who.name] = who.incarnation
                changes.append((at, who.name, True))
        elif kind == WORKER_DOWN:
            who = words.read(event["identity"])
            if there.get(who.name) == who.incarnation:
                del there[who.name]
                changes.append((at, who.name, False))
        elif kind == ACCEPT:
            seen.taken[ACCEPT, *_ticket(event["ticket"])] = at
        for command in commands if isinstance(commands, list) else ():
            message = command.get("message")
            if message and message["@"] == OFFER:
                seen.sent[OFFER, *_ticket(message["ticket"])] = at
    return changes


def _worker(reading: Iterator[tuple[int, Any]], config: dict[str, Any], offset_s: float, seen: _Seen) -> _Life:
    life, began = _Life(config), dict[tuple[str, Any], float]()
    """When what is under way began."""
    spent_s = 0.0
    """By the steps since the last order was given."""
    chunk_s: float | None = None
    """How long the chunk took whose step is told next; None: it is none to learn from."""
    for _, entry in reading:
        if not isinstance(entry, list):
            continue
        at, machine, event, commands = entry
        kind = event["@"] if event else ""
        if kind == STEP_TOOK:
            took_s = event["seconds"]
            life.steps.append((tuple(map(tuple, event["rows"])), event["batch"], event["context"], took_s))
            spent_s += took_s
            if event["rows"] and chunk_s is not None:
                life.turns.append((1, chunk_s - took_s))
        elif kind == CHUNK_DONE:
            start = began.pop((CHUNK, event["run_id"]), None)
            chunk_s = None if start is None else at - start
        elif kind in RANS and (start := began.pop((machine, event[RANS[kind]]), None)) is not None:
            life.turns.append((event["steps"], at - start - spent_s))
        elif kind == SEALED and event["firsts"] and event["carried"] is None:
            seen.sealed[event["key"]] = at + offset_s
        elif kind == GRANT:
            seen.granted[_key(event["ticket"])] = at + offset_s
        elif kind == OFFER:
            seen.taken[OFFER, *_ticket(event["ticket"])] = at + offset_s
        for command in commands if isinstance(commands, list) else ():
            said = command["@"]
            if said in RUNS:
                spent_s = 0.0
                if all(join["recompute"] is None for join in command["joining"]):
                    began[machine, command[RUNS[said]]] = at
            elif said == CHUNK:
                began[CHUNK, command["run_id"]] = at
            elif said == SUSPEND:
                began.pop((CHUNK, command["run_id"]), None)
            elif said == ARRIVED:
                seen.arrived[_key(command["ticket"])] = at + offset_s
            elif said == REPRICED:
                life.learned = words.read(command["cost"])
            elif said == ANSWER and command["message"]["@"] == ACCEPT:
                seen.sent[ACCEPT, *_ticket(command["message"]["ticket"])] = at + offset_s
    return life


def _policy(path: Path, all_of: Sequence[dict[str, Any]], gateway: dict[str, Any]) -> Policy:
    """As the processes sized it, by the settings of all workers."""
    worker = all_of[0]
    named = policy(worker["policy"])
    if not named.colocated and any(each["role"] == Role.MIXED for each in all_of):
        raise SetupError(
            f"{path}: workers: got mixed ones under {named.name}, want prefill and decode workers: a simulated mixed "
            "one computes both phases in one step"
        )
    chosen = named.sized(
        chunk_tokens=worker["chunk_tokens"],
        max_rows=worker["max_rows"],
        max_steps=worker["max_steps"],
        suspends=worker["preempt"],
    )
    moves = MigrationConfig(worker["migrate_below_steps"], worker["migrate_above_steps"]) if worker["migrate"] else None
    waits = replace(chosen.router_config, max_queue_s=gateway["max_queue_s"])
    return replace(chosen, router_config=waits, migration=moves)


def _build(member: Member, lives: list[_Life], lane: Lane) -> tuple[Build, Terms]:
    """A worker whose steps take what its own took."""
    assert isinstance(member.kv, KvShape)
    name = member.identity.name
    learned = next((life.learned for life in reversed(lives) if life.learned is not None), None)
    if learned is None:
        if member.costs is None:
            raise SetupError(f"{name}: got no word of what its steps take, want the recording of a worker that learned")
        learned = CostModel(name, member.costs.prefill, member.costs.decode)
    steps_of: dict[str, list[tuple[float, float]]] = {"prefill": [], "decode": []}
    """What they took, and what is said of them."""
    for life in lives:
        for rows, batch, context, took_s in life.steps:
            if (said_s := learned.step_s(rows, batch, context)) > 0:
                steps_of["prefill" if rows else "decode"].append((took_s, said_s))
    ratios = {
        phase: sum([took_s for took_s, _ in both]) / sum([said_s for _, said_s in both]) if both else 1.0
        for phase, both in steps_of.items()
    }
    turns = [each for life in lives for each in life.turns]
    turn_s, pause_s = _line(turns)
    measured = learned.at(ratios["prefill"], ratios["decode"])
    decode = tuple((fixed_s + pause_s, row_s, token_s) for fixed_s, row_s, token_s in measured.decode)
    cost = replace(measured, decode=decode, lanes=(*LANES, lane))
    terms = Terms(ratios["prefill"], ratios["decode"], turn_s, pause_s)
    turns_s = _few([max(0.0, took_s - pause_s * steps) for steps, took_s in turns])
    vary = tuple(_few([took_s / (said_s * ratios[phase]) for took_s, said_s in steps_of[phase]]) for phase in ratios)
    return Build(name, member.role, cost, member.kv, member.pages, turns_s=turns_s, vary=(vary[0], vary[1])), terms


def _faults(changes: list[tuple[float, str, bool]], names: set[str], begin: float, end: float) -> Iterator[Fault]:
    """Workers that were lost and that came back between the first request and the last."""
    there = {name for at, name, up in changes if at <= begin and up}
    for name in sorted(names - there):
        yield Lose(0.0, name)
    for at, name, up in sorted(changes):
        if name in names and begin < at <= end:
            yield Return(at - begin, name) if up else Lose(at - begin, name)


def _key(ticket: dict[str, Any]) -> str:
    """As `Ticket.key` has it."""
    minter = ticket["minter"]
    return f"{Identity(minter['name'], minter['incarnation'])}/{ticket['counter']}.{ticket['attempt']}"


def _ticket(ticket: dict[str, Any]) -> tuple[Any, ...]:
    """What no two tickets share."""
    minter = ticket["minter"]
    return minter["name"], minter["incarnation"], ticket["counter"], ticket["attempt"], ticket["source"]["name"]


def _typical(values: Iterable[float]) -> float:
    """The mean of all but the longest hundredth, of which some waited for what had died."""
    known = sorted(values)
    return statistics.fmean(known[: math.ceil(0.99 * len(known))]) if known else 0.0


def _line(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """(a, b) of a + b * x, by least squares, neither below 0."""
    if not points:
        return 0.0, 0.0
    xs, ys = [float(x) for x, _ in points], [y for _, y in points]
    x, y = statistics.fmean(xs), statistics.fmean(ys)
    spread = sum((each - x) ** 2 for each in xs)
    if not spread:
        return max(0.0, y), 0.0
    slope = sum((each - x) * (other - y) for each, other in zip(xs, ys, strict=True)) / spread
    if y < slope * x:
        return 0.0, max(0.0, y / x)
    return max(0.0, y - max(0.0, slope) * x), max(0.0, slope)


def _few(recorded: list[float]) -> tuple[float, ...]:
    """Some of them, evenly, ascending."""
    return tuple(sorted(recorded)[:: max(1, len(recorded) // DRAWN)])


def _commonest(values: Iterable[T]) -> T:
    return Counter(values).most_common(1)[0][0]
