"""Faults by rule: a transport that wraps another one and damages, fails, delays or throttles what it reads.

A `Rule` names an event ("read": a read is posted; "done": its end is about to be told; "send Ready", "hear Grant" and
their like are `tests/live/faulty.py`'s), which of its occurrences, and what happens then. Rules of a running process
are replaced through a file, and each one that acts leaves a line in another, so that a test can say that what it meant
to happen did happen. A lane of so many bytes a second needs no rule: it is the transport's `bytes_per_s`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from core.errors import BatonError, LocalError
from core.kv import PageRun
from transfer.transport import Arena, Completion, ReadDone, ReadFailed, ReadFenced, Span, Transport

FAULTS = "BATON_TEST_FAULTS"
"""The environment variable that names the file with the workers' rules."""
LANE = "BATON_TEST_LANE"
"""The environment variable with their lanes' bytes a second."""
TRANSPORT_DEEDS = ("flip", "fail", "break", "doubt", "delay", "stall", "kill")
"""What a rule can do to a read.

flip: one bit of what was read is wrong. fail: nothing is read, and the target holds noise. break: the same, and nothing
is read of this peer any more until it is connected anew. doubt: as fail, but in doubt, and the noise lands `seconds`
later, at 0 never, unless the read is fenced before. delay: it is told `seconds` after it was posted. stall: it begins
`seconds` later, with the bytes that the source has then. kill: the process is killed.
"""
MESSAGE_DEEDS = ("drop", "delay", "twice", "kill")
"""What a rule can do to a message: lose it, hold it for `seconds`, deliver it twice, kill the process."""
STEP_DEEDS = ("abort", "raise", "kill")
"""What a rule can do in a step of the engine: crash the process, raise, kill the process as somebody else would."""


@dataclass(frozen=True, slots=True)
class Rule:
    """What happens at an event: at its `nth` occurrence since the rule is there, and the `times - 1` after that."""

    at: str
    do: str
    nth: int = 1
    times: int = 1
    seconds: float = 0.0
    """How late, of what is late; of "kill": how long after the event."""


LANDED = Rule("late", "land")
"""Not a rule: the noise of a read in doubt was written."""


class Rules:
    """The rules of one worker, and how often each was asked."""

    def __init__(self, rules: Sequence[Rule] = (), acted: Callable[[Rule], None] = lambda rule: None) -> None:
        self.acted = acted
        """Is told of each rule that acts, and of what lands late."""
        self.put(rules)

    def put(self, rules: Sequence[Rule]) -> None:
        """Replace them; all counts begin anew."""
        self._rules = tuple(rules)
        self._seen = [0] * len(self._rules)

    def on(self, event: str) -> list[Rule]:
        """The rules that act now."""
        found = []
        for number, rule in enumerate(self._rules):
            if rule.at == event:
                self._seen[number] += 1
                if rule.nth <= self._seen[number] < rule.nth + rule.times:
                    self.acted(rule)
                    found.append(rule)
        return found


class FileRules(Rules):
    """Those of worker `name` in a file that a test may replace at any time; the file beside it is told what acted."""

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name
        self._version = (0, 0)
        self._lock = threading.Lock()
        super().__init__((), self._note)

    def on(self, event: str) -> list[Rule]:
        """From any thread."""
        with self._lock:
            with contextlib.suppress(FileNotFoundError):
                found = self._path.stat()
                version = (found.st_ino, found.st_mtime_ns)
                if version != self._version:
                    self._version = version
                    self.put([Rule(**each) for each in json.loads(self._path.read_text()).get(self._name, ())])
            return super().on(event)

    def _note(self, rule: Rule) -> None:
        with acted(self._path).open("a") as file:
            file.write(f"{self._name}: {rule.do} at {rule.at}\n")


def acted(path: Path) -> Path:
    """Where workers whose rules are in `path` say what acted."""
    return path.with_suffix(".acted")


def write(path: Path, rules: Mapping[str, Sequence[Rule]]) -> None:
    """Give workers new rules, by their names, from their next event on; what acted is forgotten."""
    acted(path).write_text("")
    fresh = path.with_suffix(f".{time.monotonic_ns()}")
    fresh.write_text(json.dumps({name: [asdict(rule) for rule in each] for name, each in rules.items()}))
    fresh.replace(path)


def kill(after_s: float = 0.0) -> None:
    """End this process as a crash would: at once, or while it goes on."""
    if after_s:
        threading.Timer(after_s, kill).start()
    else:
        os.kill(os.getpid(), signal.SIGKILL)


@dataclass(slots=True)
class _Read:
    peer: str
    targets: list[tuple[int, int]]
    """Bytes of our arena: from, to."""
    posted: float
    begins: float
    due: float
    """Not told before this."""
    begin: Callable[[], None]
    begun: bool = False
    flipped: bool = False
    done: ReadDone | None = None


@dataclass(slots=True)
class _Late:
    targets: list[tuple[int, int]]
    lands: float


@dataclass(slots=True)
class Faulty:
    """`inner`, with the faults of `rules`, as a lane of `bytes_per_s`. Keeps the contract of `Transport`.

    Only reads with positive ids have events: a worker's own probes are never damaged, but they are throttled.
    """

    inner: Transport
    rules: Rules = field(default_factory=Rules)
    bytes_per_s: float = math.inf
    clock: Callable[[], float] = time.monotonic
    _arena: Arena | None = None
    _reads: dict[int, _Read] = field(default_factory=dict)
    _late: dict[int, _Late] = field(default_factory=dict)
    _ended: list[Completion] = field(default_factory=list)
    _free_at: float = 0.0
    _severed: set[str] = field(default_factory=set)
    """Peers whose lanes are broken."""
    _untold: list[tuple[str, str]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.inner.name

    def register(self, memory: memoryview, unit_nbytes: int) -> None:
        self.inner.register(memory, unit_nbytes)
        self._arena = Arena(memory, unit_nbytes)

    def metadata(self) -> bytes:
        return self.inner.metadata()

    def connect(self, peer: str, metadata: bytes) -> None:
        self.inner.connect(peer, metadata)

    def disconnect(self, peer: str) -> None:
        self.inner.disconnect(peer)
        self._severed.discard(peer)
        self._untold = [each for each in self._untold if each[0] != peer]
        for read_id, read in list(self._reads.items()):
            if read.peer == peer and (read.done or not read.begun):
                self._fail(read_id, "disconnected")

    def read(
        self,
        read_id: int,
        peer: str,
        source: Sequence[PageRun],
        target: Sequence[PageRun],
        nbytes: int | None = None,
    ) -> None:
        unit = self._mine().unit_nbytes
        targets = [(run.start * unit, run.stop * unit) for run in target]
        if nbytes is not None:
            targets = _first(targets, nbytes)
        self._begin(read_id, peer, targets, lambda: self.inner.read(read_id, peer, source, target, nbytes))

    def read_spans(self, read_id: int, peer: str, spans: Sequence[Span]) -> None:
        targets = [(span.target, span.target + span.nbytes) for span in spans]
        self._begin(read_id, peer, targets, lambda: self.inner.read_spans(read_id, peer, spans))

    def poll(self) -> list[Completion]:
        now = self.clock()
        for read_id, read in list(self._reads.items()):
            if not read.begun and read.begins <= now:
                try:
                    self._go(read, now)
                except BatonError as error:
                    self._fail(read_id, str(error))
        for completion in self.inner.poll():
            if isinstance(completion, ReadDone):
                self._reads[completion.read_id].done = completion
            else:
                self._reads.pop(completion.read_id, None)
                self._ended.append(completion)
        for read_id, late in list(self._late.items()):
            if late.lands <= now:
                self._noise(read_id, late.targets)
                self.rules.acted(LANDED)
                del self._late[read_id]
                self._ended.append(ReadFenced(read_id))
        now = self.clock()
        for read_id, read in list(self._reads.items()):
            if read.done and read.due <= now:
                self._tell(read_id, read, read.done, now)
        ended, self._ended = self._ended, []
        return ended

    def broken(self) -> list[tuple[str, str]]:
        untold, self._untold = self._untold, []
        return untold + [each for each in self.inner.broken() if each[0] not in self._severed]

    def abandon(self, read_id: int) -> None:
        read = self._reads.get(read_id)
        if read is not None and (read.done or not read.begun):
            self._fail(read_id, "abandoned")
        else:
            self.inner.abandon(read_id)

    def fence(self, read_ids: Sequence[int]) -> None:
        others = []
        for read_id in read_ids:
            read = self._reads.get(read_id)
            if self._late.pop(read_id, None):
                self._ended.append(ReadFenced(read_id))
            elif read is not None and (read.done or not read.begun):
                self._fail(read_id, "abandoned")
            else:
                others.append(read_id)
        if others:
            self.inner.fence(others)

    def in_doubt(self) -> frozenset[int]:
        return self.inner.in_doubt() | self._late.keys()

    def transports(self, peer: str) -> str:
        return self.inner.transports(peer)

    def immediate(self, peer: str) -> bool:
        return math.isinf(self.bytes_per_s) and self.inner.immediate(peer)

    @property
    def busy(self) -> bool:
        late = any(math.isfinite(each.lands) for each in self._late.values())
        return bool(self.inner.busy or self._reads or self._ended or late)

    @property
    def more(self) -> bool:
        return self.inner.more

    def fds(self) -> tuple[int, ...]:
        return self.inner.fds()

    def close(self) -> None:
        self.inner.close()
        self._reads.clear()
        self._late.clear()
        self._ended.clear()
        self._arena = None

    def _mine(self) -> Arena:
        if self._arena is None:
            raise LocalError("transport: no arena is registered")
        return self._arena

    def _begin(self, read_id: int, peer: str, targets: list[tuple[int, int]], begin: Callable[[], None]) -> None:
        if read_id in self._reads or read_id in self._late:
            raise LocalError(f"read: id {read_id} is in flight already")
        now = self.clock()
        read = _Read(peer, targets, now, now, now, begin)
        if peer in self._severed:
            self._ended.append(ReadFailed(read_id, "the lane was broken", in_doubt=False))
            return
        for rule in self.rules.on("read") if read_id > 0 else ():
            match rule.do:
                case "flip":
                    read.flipped = True
                case "delay":
                    read.due = now + rule.seconds
                case "stall":
                    read.begins = now + rule.seconds
                case "fail":
                    self._noise(read_id, targets)
                    self._ended.append(ReadFailed(read_id, "a fault was injected", in_doubt=False))
                    return
                case "break":
                    self._severed.add(peer)
                    self._untold.append((peer, "the lane was broken"))
                    self._noise(read_id, targets)
                    self._ended.append(ReadFailed(read_id, "the lane was broken", in_doubt=False))
                    for other_id, other in list(self._reads.items()):
                        if other.peer == peer and (other.done or not other.begun):
                            self._fail(other_id, "the lane was broken")
                    return
                case "doubt":
                    self._late[read_id] = _Late(targets, now + rule.seconds if rule.seconds else math.inf)
                    self._ended.append(ReadFailed(read_id, "a fault was injected", in_doubt=True))
                    return
                case "kill":
                    kill(rule.seconds)
                case _:
                    raise LocalError(f"rule: got {rule.do!r} of a read, want one of {TRANSPORT_DEEDS}")
        if read.begins <= now:
            self._go(read, now)
        self._reads[read_id] = read

    def _go(self, read: _Read, now: float) -> None:
        """Post it, and give it its time on the lane behind those before it."""
        read.begin()
        read.begun = True
        nbytes = sum(stop - start for start, stop in read.targets)
        self._free_at = max(self._free_at, now) + nbytes / self.bytes_per_s
        read.due = max(read.due, self._free_at)

    def _tell(self, read_id: int, read: _Read, done: ReadDone, now: float) -> None:
        for rule in self.rules.on("done") if read_id > 0 else ():
            if rule.do != "kill":
                raise LocalError(f"rule: got {rule.do!r} of a read that is done, want 'kill'")
            kill(rule.seconds)
        del self._reads[read_id]
        if read.flipped:
            start, stop = read.targets[0]
            draw = random.Random(read_id)
            self._mine().bytes[draw.randrange(start, min(stop, start + self._mine().unit_nbytes))] ^= (
                1 << draw.randrange(8)
            )
        self._ended.append(replace(done, seconds=now - read.posted) if read.due > read.posted else done)

    def _fail(self, read_id: int, reason: str) -> None:
        del self._reads[read_id]
        self._ended.append(ReadFailed(read_id, reason, in_doubt=False))

    def _noise(self, seed: int, targets: list[tuple[int, int]]) -> None:
        draw = np.random.default_rng(seed)
        for start, stop in targets:
            self._mine().bytes[start:stop] = np.frombuffer(draw.bytes(stop - start), np.uint8)


def _first(targets: list[tuple[int, int]], nbytes: int) -> list[tuple[int, int]]:
    """The first `nbytes` bytes of these ranges."""
    found = []
    for start, stop in targets:
        if nbytes > 0:
            found.append((start, min(stop, start + nbytes)))
            nbytes -= stop - start
    return found
