"""The shell of a worker that computes both phases in one step: prompt chunks and decode rows in one forward.

It keeps each sequence's tokens beside the engine's, so that one whose memory was taken can be opened again.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import assert_never

from core.errors import LocalError
from core.kv import KvShape
from core.messages import First, Message, Tokens
from core.prefix import page_hashes
from core.request import Request, Ticket
from core.worker import Identity
from engine.api import Engine, Row, Sampled
from runtime.driver import Driver
from runtime.jobs import JobThread
from scheduler.learning import StepTook
from scheduler.mixed_events import (
    Answer,
    Began,
    Begin,
    Cut,
    Ended,
    EndSequence,
    Grow,
    Invite,
    Join,
    MixedCommand,
    Step,
    StepFailed,
    Stepped,
    Suspend,
    continuation,
)
from scheduler.mixed_policy import MixedPolicy

log = logging.getLogger("baton.mixed")

SEAT = "mixed"


@dataclass(slots=True)
class _Sequence:
    """The engine thread's own."""

    ticket: Ticket
    request: Request
    branch: int
    tokens: list[int]
    """All of them; the KV of the newest is not computed yet."""
    table: tuple[int, ...] = ()
    decodes: bool = False
    """It is a decode row."""

    @property
    def prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt)


@dataclass(slots=True)
class _Said:
    """What one step gave, for the loop's thread."""

    told: list[Tokens] = field(default_factory=list)
    begun: list[Began] = field(default_factory=list)
    ended: list[Ended] = field(default_factory=list)


class MixedShell:
    """Seats `policy` in `driver`; sends to gateways through `tell`. `stepped` hears what each step took."""

    def __init__(
        self,
        policy: MixedPolicy,
        driver: Driver,
        engine: Engine,
        thread: JobThread,
        tell: Callable[[Identity, Message], None],
        stepped: Callable[[StepTook], None] = lambda step: None,
    ) -> None:
        self.policy = policy
        self._driver = driver
        self._engine = engine
        self._thread = thread
        self._tell = tell
        self._stepped = stepped
        self._loop = asyncio.get_running_loop()
        self._cut = threading.Event()
        self._sequences: dict[str, _Sequence] = {}
        self.computed_tokens = 0
        driver.seat(SEAT, policy, self._perform)

    def _perform(self, command: MixedCommand) -> None:
        match command:
            case Answer(message):
                self._tell(message.ticket.minter, message)
            case Invite(gateway, message):
                self._tell(gateway, message)
            case Begin():
                self._thread.do(lambda: self._begin(command))
            case Step():
                self._cut.clear()
                self._thread.do(lambda: self._run(command))
            case Cut():
                self._cut.set()
            case Suspend(key):
                self._thread.do(lambda: self._suspend(key))
            case EndSequence(key):
                self._thread.do(lambda: self._end(key))
            case _:
                assert_never(command)

    # On the engine's thread.
    def _begin(self, command: Begin) -> None:
        """What cannot be opened fails the step that needs it."""
        request = command.request
        known = self._sequences.get(command.key)
        if known is None:
            known = _Sequence(command.ticket, request, command.branch, list(request.prompt))
            self._sequences[command.key] = known
        known.request, known.table, known.decodes = request, command.pages, False
        try:
            if len(known.tokens) != known.prompt + command.made:
                raise LocalError(f"{command.key}: got {command.made} tokens made, want {len(known.tokens)} in all")
            self._open(command.key, known)
        except Exception:
            log.exception("%s cannot be opened", command.key)

    def _open(self, key: str, known: _Sequence) -> None:
        sampling = known.request.sampling
        if len(known.tokens) > known.prompt and sampling.prompt_logprobs is not None:  # they were told
            sampling = replace(sampling, prompt_logprobs=None)
        self._engine.open(key, known.tokens, known.table, sampling, known.prompt, known.request.generated)

    def _suspend(self, key: str) -> None:
        self._sequences[key].decodes = False
        self._engine.close(key)

    def _end(self, key: str) -> None:
        self._sequences.pop(key, None)
        self._engine.close(key)

    def _run(self, command: Step) -> None:
        try:
            self._steps(command)
        except Exception as error:
            log.exception("a step failed, of %s", ", ".join(span.key for span in command.spans) or "decode rows")
            self._driver.post_threadsafe(SEAT, StepFailed(command.step_id, str(error)))

    def _steps(self, command: Step) -> None:
        """Once with spans; else until the order is used up, a sequence ends, or a cut came."""
        for grow in command.growing:
            self._grow(grow)
        for join in command.joining:
            self._join(join)
        spans = {span.key: span for span in command.spans}
        steps, said = 0, _Said()
        while steps < command.steps and not said.ended:
            if steps and self._cut.is_set():
                break
            started = self._driver.now()
            decoding = [key for key, each in self._sequences.items() if each.decodes] if command.rows else []
            if len(decoding) != command.rows:
                raise LocalError(f"step {command.step_id}: got {command.rows} rows, want the {len(decoding)} there are")
            ends = [len(self._sequences[key].tokens) for key in decoding]
            rows = [Row(span.key, span.start, span.stop) for span in command.spans]
            rows += [Row(key, end - 1, end) for key, end in zip(decoding, ends, strict=True)]
            said = _Said()
            for each in self._engine.step(rows):
                self._note(each, said, begun=each.sequence in spans)
            steps += 1
            sizes = tuple((span.stop - span.start, span.start) for span in command.spans)
            took = StepTook(sizes, len(ends), sum(ends), self._driver.now() - started)
            self._loop.call_soon_threadsafe(self._emit, said, took)
        done = Stepped(command.step_id, steps, tuple(said.begun), tuple(said.ended))
        self._driver.post_threadsafe(SEAT, done)

    def _grow(self, grow: Grow) -> None:
        """A sequence that gave pages back, and needs others in their place, is opened again with its new table."""
        known = self._sequences[grow.key]
        first = len(known.table) if grow.first is None else grow.first
        void = first < len(known.table)
        known.table = known.table[:first] + grow.pages
        if void:
            self._engine.close(grow.key)
            self._open(grow.key, known)
        else:
            self._engine.extend(grow.key, grow.pages)

    def _join(self, join: Join) -> None:
        """A continuation: its first token was kept when the prompt was complete."""
        if join.copied is not None:
            self._engine.copy(*join.copied)
        known = self._sequences[join.key]
        known.request, known.table, known.decodes = join.request, join.pages, True
        self._open(join.key, known)

    def _note(self, each: Sampled, said: _Said, *, begun: bool) -> None:
        known = self._sequences[each.sequence]
        several = known.request.sampling.n > 1
        branch = each.branch if several else known.branch
        index, stopped = each.position - known.prompt, each.finish == "stop"
        if not stopped or each.prompt_logprobs:
            told = Tokens(known.ticket, index, (), (), branch, (), each.prompt_logprobs)
            if not stopped:
                logprobs = () if each.logprobs is None else (each.logprobs,)
                told = replace(told, tokens=(each.token,), logits_hashes=(each.logits_hash,), logprobs=logprobs)
            said.told.append(told)
        if begun:
            said.begun.append(
                Began(each.sequence, First(each.token, each.logits_hash, branch, each.logprobs), each.finish)
            )
            if several:
                if each.finish is None:
                    tokens = [*known.request.prompt, each.token]
                    part = _Sequence(known.ticket, known.request, branch, tokens)
                    self._sequences[continuation(each.sequence, branch)] = part
                return
        known.tokens.append(each.token)
        known.decodes = each.finish is None
        if not begun and each.finish is not None:
            stop = each.token if stopped else None
            names = _names(known, self._engine.kv)
            said.ended.append(Ended(each.sequence, each.finish, index + (not stopped), stop, names))

    # On the loop's thread.
    def _emit(self, said: _Said, took: StepTook) -> None:
        """Tokens go to their clients before anything else is decided, or learned."""
        for each in said.told:
            self._tell(each.ticket.minter, each)
        self.computed_tokens += sum(new for new, _ in took.rows)
        self._stepped(took)


def _names(known: _Sequence, kv: KvShape) -> tuple[int, ...]:
    """Of all full pages of a sequence, if those of its prompt have names; the newest token has no KV."""
    request = known.request
    if not request.prefix:
        return ()
    # The chain goes on in the pages it began with, which may be smaller than ours.
    link = request.prefix_page_tokens or kv.page_tokens
    before = request.prefix[: known.prompt // link]
    more = known.tokens[len(before) * link : -1]
    return kv.names(before and before + page_hashes(more, link, after=before[-1]), link)
