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
from sim.workload import Arrival, Workload, blocks_of

FORMAT = "baton.recording"

WORKER_UP = "scheduler.router_events:WorkerUp"
ARRIVED = "scheduler.router_events:Arrived"
DELIVER = "scheduler.router_events:Deliver"


@dataclass(slots=True)
class _Call:
    at: float
    """On the wall's clock, in seconds: gateways of several machines share no other."""
    prompt: int
    most: int
    prefix: tuple[int, ...]
    session: str
    tenant: str
    page_tokens: int
    tokens: dict[int, int] = field(default_factory=dict)
    """Delivered, by continuation."""


def is_recording(first: str) -> bool:
    """Whether a file with this first line is one."""
    return first.startswith("{") and f'"{FORMAT}"' in first[:200]


def recorded(path: Path) -> Workload:
    """The requests of one gateway's recording, or of all gateways' in a directory; the first comes at 0 s.

    A request's output is what its client got (of several continuations the longest), or, if it got nothing, the most
    that it asked for. Sessions are kept by name, with their times as recorded: nothing waits for anything. Prompts that
    begin alike do so here by their pages' hashes; the part of a prompt that fills no page is nobody else's.
    """
    paths = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    calls = [call for each in paths for call in _calls(each)]
    if not calls:
        raise SetupError(f"{path}: requests: got none, want at least one, as in the recording of a gateway")
    calls.sort(key=lambda call: call.at)
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
            )
        )
    return Workload(path.name.partition(".")[0], tuple(arrivals), path.name)


def _calls(path: Path) -> list[_Call]:
    """Of one gateway, in order of arrival; none where the recording is of another process."""
    calls: list[_Call] = []
    live: dict[int, _Call] = {}
    page_tokens = 0
    clock_s = 0.0
    for where, entry in _lines(path):
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
                if command["@"] == DELIVER and command["counter"] in live:
                    tokens = live[command["counter"]].tokens
                    branch = command["branch"]
                    tokens[branch] = tokens.get(branch, 0) + len(command["tokens"])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise SetupError(f"{path}:{where}: got no line of a gateway's recording: {error!r}") from None
    return calls


def _arrived(at: float, request: dict[str, Any], page_tokens: int) -> _Call:
    hints, sampling = request["hints"], request["sampling"]
    prefix = tuple(request["prefix"])
    return _Call(
        at,
        len(request["prompt"]),
        int(sampling["max_tokens"]),
        prefix if page_tokens else (),
        hints["session"],
        hints["tenant"],
        page_tokens,
    )


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
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
