"""The decode shell: a standing order becomes engine steps, whose tokens go straight to the gateways.

The tokens of a sequence are kept here as well as at the engine, so that one whose KV was given up can be opened again.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import assert_never

from core.errors import LocalError
from core.messages import First, Message, Tokens
from core.request import Request, Ticket
from core.worker import Identity
from engine.api import Engine, Row, Sampled
from runtime.driver import Driver
from runtime.jobs import JobThread
from scheduler.decode_events import (
    Answer,
    Cut,
    DecodeCommand,
    DropHandOff,
    Ended,
    Evict,
    Grow,
    HandOver,
    Join,
    Leave,
    OfferRow,
    Ran,
    Run,
    RunFailed,
    SealRow,
    SwapIn,
    SwapOut,
    Tell,
    TellMoved,
    TellPeer,
    WithdrawRow,
)
from scheduler.decode_policy import DecodePolicy
from transfer.sink import Decided, Drop

log = logging.getLogger("baton.decode")

SEAT = "decode"
RECOMPUTE_TOKENS = 512
"""Positions of a sequence whose KV is computed again in one step of the engine."""


@dataclass(slots=True)
class _Sequence:
    """What it takes to open a sequence, and to open it again; the engine thread's own."""

    request: Request
    tokens: list[int]
    """All of them; the KV of the newest is not computed yet."""
    table: tuple[int, ...] = ()


@dataclass(slots=True)
class _Row:
    ticket: Ticket
    prompt_tokens: int
    first: First
    first_sent: bool = False


class DecodeShell:
    """Seats `policy` in `driver`; sends to gateways through `tell`. The seat "sink" must exist."""

    def __init__(
        self,
        policy: DecodePolicy,
        driver: Driver,
        engine: Engine,
        thread: JobThread,
        tell: Callable[[Identity, Message], None],
        stepped: Callable[[int, float], None] = lambda rows, seconds: None,
    ) -> None:
        self.policy = policy
        self._driver = driver
        self._engine = engine
        self._thread = thread
        self._tell = tell
        self._stepped = stepped
        self._loop = asyncio.get_running_loop()
        self._cut = threading.Event()
        self._rows: dict[str, _Row] = {}
        self._sequences: dict[str, _Sequence] = {}
        driver.seat(SEAT, policy, self._perform)

    def _perform(self, command: DecodeCommand) -> None:
        match command:
            case Answer(key, granted, reason):
                self._driver.post("sink", Decided(key, granted, reason))
            case Run():
                for join in command.joining:
                    if join.key not in self._rows:
                        self._rows[join.key] = _Row(join.ticket, len(join.request.prompt), join.first)
                self._cut.clear()
                self._thread.do(lambda: self._run(command))
            case Cut():
                self._cut.set()
            case Leave(key):
                self._rows.pop(key, None)
                self._thread.do(lambda: self._leave(key))
            case Evict(key):
                self._thread.do(lambda: self._engine.close(key))
            case SwapOut(key) | SwapIn(key):
                raise LocalError(f"{key}: got a swap, but this worker has no host memory for KV: want host_pages = 0")
            case OfferRow() | SealRow() | HandOver() | WithdrawRow() | TellMoved() | TellPeer():
                raise LocalError(f"got {type(command).__name__}, but rows do not move between processes: no migration")
            case DropHandOff(key, reason):
                self._driver.post("sink", Drop(key, reason))
            case Tell(message):
                self._tell(message.ticket.minter, message)
            case _:
                assert_never(command)

    def _run(self, command: Run) -> None:
        """On the engine's thread."""
        try:
            self._steps(command)
        except Exception as error:
            log.exception("a step of %s failed", ", ".join(command.rows))
            self._driver.post_threadsafe(SEAT, RunFailed(command.run_id, str(error)))

    def _steps(self, command: Run) -> None:
        """Steps until the order is used up, a sequence ends, or a cut came."""
        for join in command.joining:
            self._join(join)
        for grow in command.growing:
            self._grow(grow)
        steps, ended = 0, False
        sampled: list[Sampled] = []
        while steps < command.steps and not ended:
            if steps and self._cut.is_set():
                break
            started = self._driver.now()
            ends = [(key, len(self._sequences[key].tokens)) for key in command.rows]
            sampled = self._engine.step([Row(key, end - 1, end) for key, end in ends])
            for each in sampled:
                self._sequences[each.sequence].tokens.append(each.token)
                ended = ended or each.finish is not None
            steps += 1
            self._loop.call_soon_threadsafe(self._emit, sampled, self._driver.now() - started)
        self._loop.call_soon_threadsafe(self._ran, command, steps, sampled)

    def _join(self, join: Join) -> None:
        if join.copied is not None:
            self._engine.copy(*join.copied)
        sequence = self._sequences.get(join.key)
        if sequence is None:
            tokens = [*join.request.prompt, join.first.token]
            sequence = self._sequences[join.key] = _Sequence(join.request, tokens)
        known, want = len(sequence.tokens), len(join.request.prompt) + join.generated
        if known != want:
            raise LocalError(f"{join.key} joins: got {want} tokens, want the {known} it has")
        sequence.table = join.pages
        self._open(join.key, sequence, again=join.recompute is not None)
        if join.recompute is not None:
            start, stop = join.recompute
            for at in range(start, stop, RECOMPUTE_TOKENS):
                self._engine.step([Row(join.key, at, min(at + RECOMPUTE_TOKENS, stop))])

    def _open(self, key: str, sequence: _Sequence, *, again: bool = False) -> None:
        request, sampling = sequence.request, sequence.request.sampling
        if again and sampling.prompt_logprobs is not None:  # they were told
            sampling = replace(sampling, prompt_logprobs=None)
        self._engine.open(key, sequence.tokens, sequence.table, sampling, len(request.prompt), request.generated)

    def _grow(self, grow: Grow) -> None:
        """A sequence that gave pages back, and needs others in their place, is opened again with its new table."""
        sequence = self._sequences[grow.key]
        first = len(sequence.table) if grow.first is None else grow.first
        void = first < len(sequence.table)
        sequence.table = sequence.table[:first] + grow.pages
        if void:
            self._engine.close(grow.key)
            self._open(grow.key, sequence)
        else:
            self._engine.extend(grow.key, grow.pages)

    def _leave(self, key: str) -> None:
        self._sequences.pop(key, None)
        self._engine.close(key)

    def _emit(self, sampled: list[Sampled], seconds: float) -> None:
        """The first step of a sequence repeats its first token, should the prefill worker's message be lost."""
        self._stepped(len(sampled), seconds)
        for each in sampled:
            row = self._rows.get(each.sequence)
            if row is None:
                continue
            index = each.position - row.prompt_tokens
            said: list[First | Sampled] = [] if each.finish == "stop" else [each]
            if not row.first_sent:
                row.first_sent = True
                index, said = index - 1, [row.first, *said]
            if said:
                tokens, hashes = tuple(one.token for one in said), tuple(one.logits_hash for one in said)
                logprobs = tuple(one.logprobs for one in said if one.logprobs is not None)
                self._tell(row.ticket.minter, Tokens(row.ticket, index, tokens, hashes, row.first.branch, logprobs))

    def _ran(self, command: Run, steps: int, sampled: list[Sampled]) -> None:
        ended = []
        for each in sampled:
            if each.finish is not None:
                row = self._rows[each.sequence]
                stop = each.token if each.finish == "stop" else None
                generated = each.position - row.prompt_tokens + (0 if each.finish == "stop" else 1)
                ended.append(Ended(each.sequence, each.finish, generated, stop))
        self._driver.post(SEAT, Ran(command.run_id, steps, tuple(ended)))
