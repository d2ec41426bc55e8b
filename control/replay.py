"""`baton replay`: gives the machines of a recording the same events, and compares what they decide."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core import state, words
from core.errors import SetupError, StateError
from core.machine import Machine
from runtime.recorder import Ended, Head, Machines, Took, raised, read

SHOWN = 2000
"""Characters of an event or a command that are shown."""


@dataclass(frozen=True, slots=True)
class Difference:
    """The first event after which a machine decided otherwise than recorded."""

    took: Took
    command: int
    """Which of its commands, from 0 on."""
    recorded: Any
    """In the form of `core.words`; None where none was recorded, a sentence where the machine raised."""
    replayed: Any

    def lines(self) -> list[str]:
        """For people."""
        took = self.took
        event = "its deadline" if took.event is None else _short(took.event)
        return [
            f"event {took.number} (line {took.line}), {took.machine} at {took.at:.6f} s: {event}",
            f"  command {self.command} recorded: {_short(self.recorded)}",
            f"  command {self.command} replayed: {_short(self.replayed)}",
        ]


@dataclass(slots=True)
class Replay:
    """What came of one recording."""

    path: Path
    process: str = ""
    events: Counter[str] = field(default_factory=Counter)
    """By machine."""
    commands: int = 0
    ended: str | None = None
    """Why the recording goes no further; None if the process was killed."""
    difference: Difference | None = None

    def document(self) -> dict[str, Any]:
        """For `-o json`."""
        said = {
            "recording": str(self.path),
            "process": self.process,
            "events": dict(self.events),
            "commands": self.commands,
            "ended": self.ended,
            "same": self.difference is None,
        }
        different = self.difference
        if different is not None:
            took = different.took
            said["difference"] = {
                "event_number": took.number,
                "line": took.line,
                "machine": took.machine,
                "at": took.at,
                "event": took.event,
                "command": different.command,
                "recorded": different.recorded,
                "replayed": different.replayed,
            }
        return said


def replayed(path: Path) -> Replay:
    """Replay one recording up to its first difference; StateError if it is none, or one of other code.

    Machines of a process are replayed together, in the order in which they took their events, because some share a
    ledger. Each begins with the recorded state: so it has its settings, whatever the defaults are by now.
    """
    done = Replay(path)
    machines: dict[str, Machine[Any, Any]] = {}
    for entry in read(path):
        match entry:
            case Head():
                done.process = entry.process
            case Machines(line, document):
                machines |= _made(path, line, document)
            case Ended(_, reason):
                done.ended = reason
            case Took():
                machine = machines.get(entry.machine)
                if machine is None:
                    raise StateError(f"{path}:{entry.line}: got an event of {entry.machine}, which was not written")
                done.events[entry.machine] += 1
                done.difference = _difference(entry, _again(path, machine, entry))
                if done.difference is not None:
                    return done
                done.commands += len(entry.commands) if isinstance(entry.commands, list) else 0
    if not done.process:
        raise StateError(f"{path}: got an empty file, want a recording")
    return done


def replay(names: list[str], *, as_json: bool) -> int:
    """Replay recordings, or all of a directory; exit code 1 where a decision differs."""
    paths = [path for name in names for path in _found(Path(name))]
    done = []
    for path in paths:
        try:
            done.append(replayed(path))
        except StateError as error:
            raise SetupError(str(error)) from None
        if not as_json:
            print("\n".join(_lines(done[-1])))
    if as_json:
        print(json.dumps({"replays": [each.document() for each in done]}))
    return 1 if any(each.difference for each in done) else 0


def _found(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    paths = sorted(path.glob("*.jsonl"))
    if not paths:
        raise SetupError(f"{path}: got a directory without *.jsonl, want one with recordings")
    return paths


def _made(path: Path, line: int, document: dict[str, Any]) -> dict[str, Machine[Any, Any]]:
    try:
        machines: dict[str, Machine[Any, Any]] = state.load(document, dict)
        for machine in machines.values():
            machine.check()
    except Exception as error:  # what lacks an attribute is found when somebody looks for it
        why = f"{type(error).__name__}: {error}"
        raise StateError(f"{path}:{line}: {why}; it was written by another version of the code") from None
    return machines


def _again(path: Path, machine: Machine[Any, Any], took: Took) -> list[Any] | str:
    """What the machine decides now, or raises."""
    try:
        event = words.read(took.event)
    except StateError as error:
        raise StateError(f"{path}:{took.line}: {error}") from None
    try:
        commands = machine.on(event, took.at)
    except Exception as error:
        return raised(error)
    return [words.written(each) for each in commands]


def _difference(took: Took, now: list[Any] | str) -> Difference | None:
    before = took.commands
    if before == now:
        return None
    if isinstance(before, str) or isinstance(now, str):
        return Difference(took, 0, before, now)
    command = next((at for at, pair in enumerate(zip(before, now, strict=False)) if pair[0] != pair[1]), None)
    if command is None:
        command = min(len(before), len(now))
    return Difference(took, command, _nth(before, command), _nth(now, command))


def _nth(commands: list[Any], at: int) -> Any:
    return commands[at] if at < len(commands) else None


def _lines(done: Replay) -> list[str]:
    events = sum(done.events.values())
    if done.difference is not None:
        return [f"{done.path}: differs", *(f"  {line}" for line in done.difference.lines())]
    by = ", ".join(f"{name} {count:,}" for name, count in sorted(done.events.items()))
    if not events:
        return [f"{done.path}: holds no event; {done.ended or 'the process was killed'}"]
    end = "" if done.ended == "the process ended" else f"; {done.ended or 'the process was killed'}"
    return [f"{done.path}: the same, {events:,} events ({by}) and {done.commands:,} commands{end}"]


def _short(value: Any) -> str:
    text = "nothing" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text)} characters)"
