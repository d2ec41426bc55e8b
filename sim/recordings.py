"""Recordings of live gateways as workloads: who asked when, for how much, and got how much (`baton up --record`).

Only the router's events and commands are looked at: WorkerUp (for the tokens of a page), Arrived, Deliver. What decides
nothing here is not read, so a recording of another version of the code is a workload all the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.errors import SetupError
from core.request import Slo
from sim.workload import Arrival, Workload, blocks_of

FORMAT = "baton.recording"

WORKER_UP = "scheduler.router_events:WorkerUp"
WORKER_DOWN = "scheduler.router_events:WorkerDown"
ARRIVED = "scheduler.router_events:Arrived"
DELIVER = "scheduler.router_events:Deliver"
END = "scheduler.router_events:End"


@dataclass(slots=True)
class Call:
    """One recorded request, and what its gateway saw of it. Times are on the wall's clock, in seconds: gateways of
    several machines share no other."""

    at: float
    prompt: int
    most: int
    prefix: tuple[int, ...]
    session: str
    tenant: str
    page_tokens: int
    slo: Slo
    timeout_s: float
    tokens: dict[int, int] = field(default_factory=dict)
    """Delivered, by continuation."""
    first_at: float | None = None
    gaps: list[float] = field(default_factory=list)
    """Between tokens of one continuation; tokens that came together have gaps of 0."""
    last_at: dict[int, float] = field(default_factory=dict)
    """Of the newest token, by continuation."""
    phase: str = ""
    """How it ended; empty: the recording ends before."""
    attempts: int = 1

    def got(self, at: float, branch: int, count: int) -> None:
        """So many tokens were delivered."""
        self.tokens[branch] = self.tokens.get(branch, 0) + count
        if self.first_at is None:
            self.first_at = at
        if branch in self.last_at:
            self.gaps.append(at - self.last_at[branch])
        self.gaps += [0.0] * (count - 1)
        self.last_at[branch] = at


def is_recording(first: str) -> bool:
    """Whether a file with this first line is one."""
    return first.startswith("{") and f'"{FORMAT}"' in first[:200]


def recorded(path: Path) -> Workload:
    """The requests of one gateway's recording, or of all gateways' in a directory; the first comes at 0 s.

    A request's output is what its client got (of several continuations the longest), or, if it got nothing, the most
    that it asked for. Sessions are kept by name, with their times as recorded: nothing waits for anything. Prompts that
    begin alike do so here by their pages' hashes; the part of a prompt that fills no page is nobody else's.
    """
    return workload(path, calls_of(path))


def files(path: Path) -> list[Path]:
    """The recordings of a directory, or the one."""
    return sorted(path.glob("*.jsonl")) if path.is_dir() else [path]


def calls_of(path: Path) -> list[Call]:
    """All requests of the gateways, in order of arrival; SetupError where there are none."""
    found = [call for each in files(path) for call in _calls(each)]
    if not found:
        raise SetupError(f"{path}: requests: got none, want at least one, as in the recording of a gateway")
    found.sort(key=lambda call: call.at)
    return found


def workload(path: Path, calls: list[Call], *, asked: bool = False) -> Workload:
    """What `recorded` returns, of calls in order of arrival; `asked`: with what each client asked for, too."""
    begin = calls[0].at
    ids: dict[int, int] = {}
    turns: dict[str, int] = {}
    arrivals = []
    fresh = 0
    for call in calls:
        page_tokens = call.page_tokens if call.prefix else 0
        want = blocks_of(call.prompt, page_tokens)
        known = [ids.setdefault(each, len(ids)) for each in call.prefix[:want]]
        rest = want - len(known)
        # Beside the hashes' own numbers, which are as many as there are hashes at most.
        blocks = (*known, *(2**40 + fresh + at for at in range(rest)))
        fresh += rest
        turn = turns.get(call.session, 0)
        if call.session:
            turns[call.session] = turn + 1
        output = max(call.tokens.values(), default=0) or call.most
        arrivals.append(
            Arrival(
                call.at - begin,
                call.prompt,
                output,
                blocks,
                page_tokens,
                session=call.session,
                turn=turn,
                tenant=call.tenant,
                most=call.most if asked else 0,
                slo=call.slo if asked else None,
            )
        )
    return Workload(path.name.partition(".")[0], tuple(arrivals), path.name)


def _calls(path: Path) -> list[Call]:
    """Of one gateway, in order of arrival; none where the recording is of another process."""
    calls: list[Call] = []
    live: dict[int, Call] = {}
    page_tokens = 0
    clock_s = 0.0
    for where, entry in lines(path):
        try:
            if where == 1:
                clock_s = float(entry["started_at"]) - float(entry["clock_at"])
            if not isinstance(entry, list) or entry[1] != "router":
                continue
            at, _, event, commands = entry
            kind = event and event["@"]
            if kind == WORKER_UP:
                kv = event["member"]["kv"]
                page_tokens = int(kv["page_tokens"]) if kv else page_tokens
            elif kind == ARRIVED:
                call = _arrived(at + clock_s, event["request"], page_tokens)
                live[event["counter"]] = call
                calls.append(call)
            for command in commands if isinstance(commands, list) else ():
                known = live.get(command["counter"]) if command["@"] in (DELIVER, END) else None
                if known is None:
                    continue
                if command["@"] == END:
                    _, known.phase = command["phase"]["enum"]
                    known.attempts = command["attempts"]
                elif command["tokens"]:
                    known.got(at + clock_s, command["branch"], len(command["tokens"]))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise SetupError(f"{path}:{where}: got no line of a gateway's recording: {error!r}") from None
    return calls


def _arrived(at: float, request: dict[str, Any], page_tokens: int) -> Call:
    hints, sampling, slo = request["hints"], request["sampling"], request["slo"]
    prefix = tuple(request["prefix"])
    return Call(
        at,
        len(request["prompt"]),
        int(sampling["max_tokens"]),
        prefix if page_tokens else (),
        hints["session"],
        hints["tenant"],
        page_tokens,
        Slo(slo["ttft_s"], slo["gap_s"], slo.get("deadline_s", 0.0), slo.get("batch", False)),
        float(request["timeout_s"]),
    )


def lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Line numbers and documents; the last line of a killed process may be cut, and is left out."""
    try:
        with path.open() as file:
            for number, text in enumerate(file, 1):
                try:
                    entry = json.loads(text)
                except ValueError:
                    if text.endswith("\n"):
                        raise SetupError(f"{path}:{number}: line: got {text[:80]!r}, want JSON") from None
                    return
                if number == 1 and not is_recording(text):
                    raise SetupError(f"{path}:1: format: got {text[:80]!r}, want {FORMAT}")
                yield number, entry
    except (OSError, UnicodeDecodeError) as error:
        raise SetupError(f"{path}: {error}") from None
