"""A workload by name, at any rate, for any seed: a shipped shape, shipped sessions, or a file.

| what | its rate counts | at another rate | `count` requests are | a seed changes |
|---|---|---|---|---|
| a shape of `generators.SHAPES` | requests | gaps are scaled | drawn (2000) | everything |
| sessions of `generators.TALKS` | sessions | begins are scaled | about drawn (2000), in whole sessions | everything |
| a file with times | requests | gaps are scaled | its first (all) | the jitter |
| one without times, or `cv` is given | requests | begins are drawn anew | drawn from it (all) | order and begins |
| a file of sessions | sessions | begins are drawn anew | about drawn, in whole sessions (all) | order and begins |
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from core.errors import LocalError, SetupError
from sim import traces
from sim.generators import SHAPES, TALKS, Shape, Talk, generate, talks
from sim.scenario import CALM, Scenario, applied
from sim.workload import Arrival, Workload, bad, groups, jitter, scale, window, with_arrivals

COUNT = 2000
"""Requests drawn from a generator, unless told otherwise."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where workloads come from."""

    name: str
    unit: str
    """What a rate counts: requests or sessions."""
    rate: float | None
    """Its own a second; None: it has none."""
    make: Callable[[float | None, int], Workload]
    """Of a rate (None: its own) and a seed."""

    def at(self, rate: float | None, seed: int, scenario: Scenario = CALM) -> Workload:
        """The workload with the scenario's rates, lengths and tenants in it; SetupError if a rate is missing."""
        if rate is None and self.rate is None:
            raise SetupError(f"rate: got none, want {self.unit} a second, because {self.name} has no times of its own")
        try:
            made = self.make(rate, seed)
            return applied(scenario, made, seed) if scenario.events else made
        except LocalError as error:
            raise SetupError(str(error)) from None


def source(
    name: str,
    *,
    count: int | None = None,
    cv: float | None = None,
    between: tuple[float, float] | None = None,
    tick_s: float | None = None,
    think_s: float | None = None,
    agent: str = "",
) -> Source:
    """The source of that name; SetupError where there is none, or where an option does not go with it.

    `between`: what a file has from one second on and before another. `tick_s`: what its stamps are rounded to.
    `think_s`: rows of a length file are turns that follow each other with this pause. `agent`: one kind of a file of
    agents.
    """
    if count is not None and count < 1:
        raise SetupError(f"requests: got {count}, want at least 1")
    if name in SHAPES or name in TALKS:
        given = {"window": between, "jitter": tick_s, "think": think_s, "agent": agent or None}
        if wrong := [option for option, value in given.items() if value is not None]:
            raise SetupError(f"{wrong[0]}: got {given[wrong[0]]!r}, want none, because {name} is no file")
        if name in SHAPES:
            shape = SHAPES[name]
            return Source(name, "requests", shape.rate, functools.partial(_shape, shape, count or COUNT, cv))
        talk = TALKS[name]
        sessions = max(1, round((count or COUNT) / talk.turns.mean))
        return Source(name, "sessions", None, functools.partial(_talk, talk, sessions, cv))
    try:
        return _file(_found(name), count, cv, between, tick_s, think_s, agent)
    except LocalError as error:
        raise SetupError(f"{name}: {error}") from None


def first(workload: Workload, count: int) -> Workload:
    """The sessions that begin first, whole, until they come to `count` requests; one without a session is its own."""
    if count > len(workload):
        raise bad("requests", count, f"at most the {len(workload)} that there are")
    kept: list[Arrival] = []
    for turns in groups(workload):
        if len(kept) >= count:
            break
        kept += turns
    kept.sort(key=lambda arrival: arrival.at_s)
    return Workload(workload.name, tuple(kept), f"{workload.source}, the first {len(kept)}")


def _found(name: str) -> Path:
    """A file of that path, a directory of recordings, or a file of that name in the folder of public traces."""
    if Path(name).is_file() or ("/" in name and Path(name).is_dir()):
        return Path(name)
    if "/" not in name and (traces.folder() / name).is_file():
        return traces.folder() / name
    known = ", ".join((*SHAPES, *TALKS))
    raise SetupError(
        f"trace: got {name!r}, want a file, one in {traces.folder()} ({traces.VARIABLE}), or one of {known}"
    )


def _file(
    path: Path,
    count: int | None,
    cv: float | None,
    between: tuple[float, float] | None,
    tick_s: float | None,
    think_s: float | None,
    agent: str,
) -> Source:
    if agent:
        read = traces.agents(path, agent)
    else:
        read = traces.read(path) if think_s is None else traces.conversations(path, think_s=think_s)
    timed = read.rate > 0 and think_s is None
    if between is not None:
        if not timed:
            raise bad("window", between, f"none, because {path.name} has no times")
        read = window(read, *between)
        if not len(read):
            raise bad("window", between, f"one in which {path.name} has requests")
    closed = any(arrival.gap_s is not None for arrival in read.arrivals)
    begins = groups(read)
    if timed and not closed and cv is None:
        kept = read if count is None else first(read, count)
        make = functools.partial(_timed, kept, tick_s)
        return Source(path.name, "requests", kept.rate or None, make)
    if tick_s is not None:
        raise bad("jitter", tick_s, "none, because begins are drawn anew")
    # As long as no other rate is asked for, sessions begin as recorded.
    own = _begins(begins) if timed else None
    sessions = None if count is None else max(1, round(count * len(begins) / len(read)))
    recorded = read if timed and cv is None and count is None else None
    make = functools.partial(_drawn, read, recorded, own, 1.0 if cv is None else cv, sessions)
    return Source(path.name, "sessions" if closed else "requests", own, make)


def _begins(sessions: Sequence[Sequence[Arrival]]) -> float | None:
    """Sessions a second."""
    times = [turns[0].at_s for turns in sessions]
    return (len(times) - 1) / (max(times) - min(times)) if max(times) > min(times) else None


def _shape(shape: Shape, count: int, cv: float | None, rate: float | None, seed: int) -> Workload:
    made = generate(shape, seed, count, cv=cv)
    return made if rate is None or made.rate == 0 else scale(made, rate)


def _talk(talk: Talk, sessions: int, cv: float | None, rate: float | None, seed: int) -> Workload:
    return talks(talk, seed, sessions, rate=rate or 0.0, cv=1.0 if cv is None else cv)


def _timed(kept: Workload, tick_s: float | None, rate: float | None, seed: int) -> Workload:
    made = kept if tick_s is None else jitter(kept, seed, tick_s)
    return made if rate is None else scale(made, rate)


def _drawn(
    read: Workload,
    recorded: Workload | None,
    own: float | None,
    cv: float,
    sessions: int | None,
    rate: float | None,
    seed: int,
) -> Workload:
    if rate is None and recorded is not None:
        return recorded
    return with_arrivals(read, rate or own or 0.0, seed=seed, cv=cv, count=sessions)
