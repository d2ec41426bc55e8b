"""Writes down what the machines of a process heard and decided, so that it can be replayed (`baton replay`).

A recording is JSON lines, which `read` reads. The first line is its head. A line with "machines" is the whole state of
machines (`core.state`): of all before the first event, and of one that is added later before the next. A line that is a
list is one event, in the order in which all machines of the process took theirs:

    [TIME, "MACHINE", EVENT, [COMMAND, ...]]        (`core.words`; the event is null where a deadline came)
    [TIME, "MACHINE", EVENT, "LocalError: ..."]     (the machine raised)

The last line is {"end": REASON}; without one the process was killed, and the last line may be cut.

Who records pays for it: on the loop a reference an event, and on a thread of its own what it takes to write. A thread
that falls behind, or a disk that is full, ends the recording, not the process. Prompts are in it, as token ids.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from core import state, words
from core.errors import LocalError, SetupError, StateError
from core.machine import Machine

log = logging.getLogger("baton.recorder")

FORMAT = "baton.recording"
VERSION = 1
LEDGER = "core.pages:Pages"
FLUSH_S = 0.25
"""A process that is killed leaves all but this much of its recording."""
MOST_EVENTS = 200_000
"""Events that may wait to be written; what they refer to stays in memory meanwhile."""


@dataclass(frozen=True, slots=True)
class Head:
    """The first line: whose recording it is."""

    process: str
    """NAME#INCARNATION."""
    build: str
    config: dict[str, Any]
    """The process's settings, as its launcher passed them on."""
    started_at: float
    """Seconds since 1970."""
    clock_at: float
    """The driver's clock at that moment."""


@dataclass(frozen=True, slots=True)
class Machines:
    """The state of machines by name, as of now; others stay as they are."""

    line: int
    document: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Took:
    """A machine took an event."""

    line: int
    number: int
    """Of events in the file, from 1 on."""
    at: float
    machine: str
    event: Any
    """In the form of `core.words`."""
    commands: list[Any] | str
    """Likewise; or what it raised."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The recording is complete up to here, and why it goes no further."""

    line: int
    reason: str


class Recorder:
    """One file; `around` puts it between a driver and a machine. SetupError if the file cannot be made."""

    def __init__(self, folder: Path, head: Head) -> None:
        self.path = folder / f"{head.process.replace('#', '-')}.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # For its owner alone: it holds what clients wrote.
            self._file = os.fdopen(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w")
        except OSError as error:
            raise SetupError(f"record: {self.path} cannot be written: {error.strerror}") from None
        self._machines: dict[str, Machine[Any, Any]] = {}
        self._fresh: list[str] = []
        """Those that were added and not written yet."""
        self._waiting: deque[tuple[float, str, Any, Any] | dict[str, Any]] = deque()
        self._waiting.append({"format": FORMAT, "version": VERSION, **_fields(head)})
        self._over = threading.Event()
        self._reason = ""
        self._failed = False
        self._thread = threading.Thread(target=self._write, name="recorder", daemon=True)
        self._thread.start()

    def around(self, name: str, machine: Machine[Any, Any]) -> Machine[Any, Any]:
        """The same machine, and all that it takes from now on is written down."""
        self._machines[name] = machine
        self._fresh.append(name)
        return Recorded(name, machine, self)

    def close(self, reason: str) -> None:
        """Write what waits, and that this is the end."""
        self._reason = self._reason or reason
        self._over.set()
        self._thread.join(10.0)

    def before(self) -> None:
        """An event is about to be taken."""
        if self._fresh:
            fresh, self._fresh = self._fresh, []
            try:
                self._waiting.append({"machines": self._states(fresh)})
            except LocalError as error:
                self._fail(f"a machine cannot be written: {error}")

    def took(self, now: float, name: str, event: Any, commands: Any) -> None:
        """It was: `commands` are a list of what was decided, or an exception."""
        if self._failed:
            return
        self._waiting.append((now, name, event, commands))
        if len(self._waiting) > MOST_EVENTS:
            self._fail(f"{MOST_EVENTS} events wait to be written")

    def _states(self, fresh: list[str]) -> dict[str, Any]:
        """Of those that are new; of all if one of these has the ledger, which is what machines share."""
        document = state.dump({name: self._machines[name] for name in fresh})
        if len(fresh) < len(self._machines) and any(kind == LEDGER for kind, *_ in document["objects"]):
            return state.dump(dict(self._machines))
        return document

    def _fail(self, why: str) -> None:
        """Serving goes first."""
        if not self._failed:
            self._failed = True
            self._reason = why
            log.error("recording ends: %s", why)
            self._over.set()

    def _write(self) -> None:
        """On the recorder's thread."""
        with contextlib.suppress(OSError), self._file as file:  # what is left in its buffer may find no room, either
            try:
                while not self._over.wait(FLUSH_S):
                    self._drain(file)
                self._drain(file)
            except Exception as error:
                self._fail(f"{type(error).__name__}: {error}")
                self._waiting.clear()
            file.write(json.dumps({"end": self._reason}) + "\n")

    def _drain(self, file: Any) -> None:
        waiting = self._waiting
        while waiting:
            entry = waiting.popleft()
            if isinstance(entry, tuple):
                now, name, event, commands = entry
                if isinstance(commands, list):
                    said: Any = [words.written(each) for each in commands]
                else:
                    said = raised(commands)
                entry = [now, name, words.written(event), said]  # type: ignore[assignment]
            file.write(json.dumps(entry, separators=(",", ":")) + "\n")
        file.flush()


class Recorded:
    """A machine whose events are written down."""

    __slots__ = ("_name", "_recorder", "check", "deadline", "machine")

    def __init__(self, name: str, machine: Machine[Any, Any], recorder: Recorder) -> None:
        self._name = name
        self._recorder = recorder
        self.machine = machine
        self.deadline = machine.deadline
        self.check = machine.check

    def on(self, event: Any, now: float) -> list[Any]:
        self._recorder.before()
        try:
            commands = self.machine.on(event, now)
        except Exception as error:
            self._recorder.took(now, self._name, event, error)
            raise
        self._recorder.took(now, self._name, event, commands)
        return commands


def raised(error: Exception) -> str:
    """What a machine raised, as a recording says it."""
    return f"{type(error).__name__}: {error}"


def read(path: Path) -> Iterator[Head | Machines | Took | Ended]:
    """A recording, line by line; StateError with the place where it is none. A cut last line is left out."""
    number = 0
    try:
        with path.open() as file:
            for line, text in enumerate(file, 1):
                try:
                    entry = json.loads(text)
                except ValueError:
                    if text.endswith("\n"):
                        raise _wrong(path, line, text, "JSON") from None
                    return
                match entry:
                    case {"format": str(), **rest} if line == 1:
                        yield _head(path, entry, rest)
                    case {"machines": dict(document)} if line > 1:
                        yield Machines(line, document)
                    case [int() | float() as at, str(name), event, list() | str() as commands] if line > 2:
                        number += 1
                        yield Took(line, number, float(at), name, event, commands)
                    case {"end": str(reason)} if line > 1:
                        yield Ended(line, reason)
                    case _:
                        raise _wrong(path, line, text, "a line of a recording")
    except (OSError, UnicodeDecodeError) as error:
        raise SetupError(f"{path}: {error}") from None


def _head(path: Path, entry: dict[str, Any], rest: dict[Any, Any]) -> Head:
    if entry["format"] != FORMAT or rest.pop("version", None) != VERSION:
        raise _wrong(path, 1, json.dumps(entry), f"{FORMAT} version {VERSION}")
    try:
        return Head(**rest)
    except TypeError:
        raise _wrong(path, 1, json.dumps(entry), "what `Head` has") from None


def _fields(head: Head) -> dict[str, Any]:
    return {field.name: getattr(head, field.name) for field in fields(head)}


def head(process: str, build: str, config: str) -> Head:
    """Of a recording that begins now; `config` is the JSON of the settings."""
    return Head(process, build, json.loads(config), time.time(), time.monotonic())


def _wrong(path: Path, line: int, got: str, want: str) -> StateError:
    return StateError(f"{path}:{line}: got {got.strip()[:80]!r}, want {want}")
