"""A recorded deployment, as the simulator runs it again: who worked, by which policy, how fast, and what went wrong.

A directory that `baton up --record` wrote has a file for each life of each process. Of the gateways' is read who asked
for what, which workers were there from when to when, and what each says of itself; of the workers' files what their
steps, their orders and their reads took. Nothing of what was delivered is looked at here, so what is predicted from it
(`sim/predicted.py`) is not what was measured, said again.

| term | is | of |
|---|---|---|
| steps | the model that the worker learned last, times measured / predicted over all its steps, by phase | a worker |
| hop | the median from an offer's or an answer's sending to its taking | all |
| turn | the mean of an order's time from decision to end, less that of its steps | all |
| read | the median from asking for a read until it is verified, and of asking for digests | all |
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from core import words
from core.errors import SetupError, StateError
from core.kv import KvShape
from core.worker import Member, Role
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
GAP_RATIO = 1.01
"""Edges of the gaps' histogram: percentiles are to be compared to a percent."""

STEP_TOOK = "scheduler.learning:StepTook"
REPRICED = "scheduler.cost:Repriced"
CHUNK, CHUNK_DONE = "scheduler.prefill_events:RunChunk", "scheduler.prefill_events:ChunkDone"
SUSPEND = "scheduler.prefill_events:Suspend"
RUN, RAN = "scheduler.decode_events:Run", "scheduler.decode_events:Ran"
OFFER, ACCEPT = "core.messages:Offer", "core.messages:Accept"
READ, PULLED = "transfer.sink:Read", "transfer.sink:Pulled"
DIGEST, DIGESTED = "transfer.source:Digest", "transfer.source:Digested"


@dataclass(slots=True)
class _Life:
    """What one worker process wrote."""

    config: dict[str, Any]
    learned: CostModel | None = None
    steps: list[tuple[tuple[tuple[int, int], ...], int, int, float]] = field(default_factory=list)
    """Rows, batch, context and seconds."""
    turns: list[float] = field(default_factory=list)
    reads: list[float] = field(default_factory=list)
    digests: list[float] = field(default_factory=list)


@dataclass(slots=True)
class _Hops:
    """When messages were sent and taken, by what they are; files are read one after the other, in any order."""

    sent: dict[tuple[Any, ...], float] = field(default_factory=dict)
    taken: dict[tuple[Any, ...], float] = field(default_factory=dict)

    @property
    def seconds(self) -> list[float]:
        """Of all whose both ends are known."""
        return [self.taken[what] - at for what, at in self.sent.items() if what in self.taken]


@dataclass(frozen=True, slots=True)
class Deployment:
    """What `sim.run.simulate` takes, and what of it was measured between the steps."""

    calls: tuple[Call, ...]
    workload: Workload
    builds: tuple[Build, ...]
    policy: Policy
    settings: Settings
    scenario: Scenario
    ratios: dict[str, dict[str, float]]
    """Measured over predicted seconds of all steps, by worker and phase: of the model that was learned last."""
    read_s: float


def deployment(path: Path) -> Deployment:
    """The deployment that a directory of recordings is of; SetupError where it is none that can be run again."""
    calls = calls_of(path)
    hops = _Hops()
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
                seen = _gateway(reading, offset_s, members, hops)
                changes = seen if not gateways else changes  # they all see the same workers
                gateways.append(head["config"])
            elif kind == "worker":
                name = head["process"].partition("#")[0]
                lives.setdefault(name, []).append(_worker(reading, head["config"], offset_s, hops))
        except (KeyError, TypeError, ValueError, IndexError, StateError) as error:
            raise SetupError(f"{each}: got a recording of another version of the code: {error!r}") from None
    names = [name for name in members if name in lives]
    if not names:
        raise SetupError(f"{path}: workers: got the recording of none, want the directory that all processes wrote to")
    chosen = _policy(path, lives[names[0]][0].config, gateways[0])
    read_s = _median(each for name in names for life in lives[name] for each in life.reads)
    read_s += _median(each for name in names for life in lives[name] for each in life.digests)
    lane = Lane(LANE, read_s, 0.0, 0.0)
    builds, ratios = [], {}
    for name in sorted(names):
        build, ratios[name] = _build(members[name], lives[name], lane)
        builds.append(build)
    if len({build.shape.page_tokens for build in builds}) > 1:
        raise SetupError(f"{path}: page_tokens: got workers with pages of unequal size, which the simulator has not")
    begin = calls[0].at
    turns = [each for name in names for life in lives[name] for each in life.turns]
    settings = Settings(
        slo=_commonest(call.slo for call in calls),
        gateways=len(gateways),
        lane=LANE,
        hop_s=max(0.0, _median(hops.seconds)),
        turn_s=statistics.fmean(turns) if turns else 0.0,
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
        ratios,
        read_s,
    )


def _gateway(
    reading: Iterator[tuple[int, Any]], offset_s: float, members: dict[str, Member], hops: _Hops
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
            hops.taken[ACCEPT, *_ticket(event["ticket"])] = at
        for command in commands if isinstance(commands, list) else ():
            message = command.get("message")
            if message and message["@"] == OFFER:
                hops.sent[OFFER, *_ticket(message["ticket"])] = at
    return changes


def _worker(reading: Iterator[tuple[int, Any]], config: dict[str, Any], offset_s: float, hops: _Hops) -> _Life:
    life, began = _Life(config), dict[tuple[str, Any], float]()
    """When what is under way began."""
    spent_s = 0.0
    """By the steps of the decode order under way."""
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
            spent_s += took_s if event["batch"] else 0.0
            if event["rows"] and chunk_s is not None:
                life.turns.append(max(0.0, chunk_s - took_s))
        elif kind == CHUNK_DONE:
            start = began.pop((CHUNK, event["run_id"]), None)
            chunk_s = None if start is None else at - start
        elif kind == RAN and (start := began.pop((RUN, event["run_id"]), None)) is not None:
            life.turns.append(max(0.0, at - start - spent_s))
        elif kind == PULLED and (start := began.pop((READ, event["read_id"]), None)) is not None:
            life.reads.append(at - start)
        elif kind == DIGESTED and (start := began.pop((DIGEST, _part(event)), None)) is not None:
            life.digests.append(at - start)
        elif kind == OFFER:
            hops.taken[OFFER, *_ticket(event["ticket"])] = at + offset_s
        for command in commands if isinstance(commands, list) else ():
            said = command["@"]
            if said == RUN:
                spent_s = 0.0
                if all(join["recompute"] is None for join in command["joining"]):
                    began[RUN, command["run_id"]] = at
            elif said == CHUNK:
                began[CHUNK, command["run_id"]] = at
            elif said == SUSPEND:
                began.pop((CHUNK, command["run_id"]), None)
            elif said == READ:
                began[READ, command["read_id"]] = at
            elif said == DIGEST:
                began[DIGEST, _part(command)] = at
            elif said == REPRICED:
                life.learned = words.read(command["cost"])
            elif machine == "prefill" and said.endswith(":Answer") and command["message"]["@"] == ACCEPT:
                hops.sent[ACCEPT, *_ticket(command["message"]["ticket"])] = at + offset_s
    return life


def _policy(path: Path, worker: dict[str, Any], gateway: dict[str, Any]) -> Policy:
    """As the processes sized it."""
    if worker["role"] == Role.MIXED:
        raise SetupError(
            f"{path}: workers: got mixed ones, want prefill and decode workers: those do both phases in one step only "
            "in the simulator"
        )
    chosen = policy(worker["policy"]).sized(
        chunk_tokens=worker["chunk_tokens"],
        max_rows=worker["max_rows"],
        max_steps=worker["max_steps"],
        suspends=worker["preempt"],
    )
    moves = MigrationConfig(worker["migrate_below_steps"], worker["migrate_above_steps"]) if worker["migrate"] else None
    waits = replace(chosen.router_config, max_queue_s=gateway["max_queue_s"])
    return replace(chosen, router_config=waits, migration=moves)


def _build(member: Member, lives: list[_Life], lane: Lane) -> tuple[Build, dict[str, float]]:
    """A worker whose steps take what its own took."""
    assert isinstance(member.kv, KvShape)
    name = member.identity.name
    learned = next((life.learned for life in reversed(lives) if life.learned is not None), None)
    if learned is None:
        if member.costs is None:
            raise SetupError(f"{name}: got no word of what its steps take, want the recording of a worker that learned")
        learned = CostModel(name, member.costs.prefill, member.costs.decode)
    sums = {"prefill": [0.0, 0.0], "decode": [0.0, 0.0]}
    for life in lives:
        for rows, batch, context, took_s in life.steps:
            both = sums["prefill" if rows else "decode"]
            both[0] += took_s
            both[1] += learned.step_s(rows, batch, context)
    ratios = {phase: took_s / said_s if said_s > 0 else 1.0 for phase, (took_s, said_s) in sums.items()}
    cost = replace(learned.at(ratios["prefill"], ratios["decode"]), lanes=(*LANES, lane))
    return Build(name, member.role, cost, member.kv, member.pages), ratios


def _faults(changes: list[tuple[float, str, bool]], names: set[str], begin: float, end: float) -> Iterator[Fault]:
    """Workers that were lost and that came back between the first request and the last."""
    there = {name for at, name, up in changes if at <= begin and up}
    for name in sorted(names - there):
        yield Lose(0.0, name)
    for at, name, up in sorted(changes):
        if name in names and begin < at <= end:
            yield Return(at - begin, name) if up else Lose(at - begin, name)


def _part(digest: dict[str, Any]) -> tuple[Any, ...]:
    """Which pages of a hand-off."""
    return digest["key"], digest["first_page"]


def _ticket(ticket: dict[str, Any]) -> tuple[Any, ...]:
    """What no two tickets share."""
    minter = ticket["minter"]
    return minter["name"], minter["incarnation"], ticket["counter"], ticket["attempt"], ticket["source"]["name"]


def _median(values: Iterable[float]) -> float:
    known = list(values)
    return statistics.median(known) if known else 0.0


def _commonest(values: Iterable[T]) -> T:
    return Counter(values).most_common(1)[0][0]
