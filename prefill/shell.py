"""The prefill shell: the prefill policy's commands become engine calls, and their ends become events."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import assert_never

from core.errors import LocalError
from core.messages import First, Message, Tokens
from core.request import Request, Ticket
from core.worker import Identity
from engine.api import Engine, Row, Sampled, Step
from runtime.driver import Driver
from runtime.jobs import JobThread
from scheduler.learning import StepTook
from scheduler.prefill_events import (
    Answer,
    AskForSink,
    Began,
    Begin,
    ChunkDone,
    ChunkFailed,
    DropFetch,
    EndSequence,
    FetchPages,
    Invite,
    PrefillCommand,
    Resume,
    RunChunk,
    SealPages,
    Suspend,
    Suspended,
    WithdrawHandOff,
)
from scheduler.prefill_policy import PrefillPolicy, holder
from transfer.sink import AskSource, Drop
from transfer.source import AskSink, Sealed, Withdraw

log = logging.getLogger("baton.prefill")

SEAT = "prefill"


class PrefillShell:
    """Seats `policy` in `driver`; sends to gateways through `tell`. The seat "source" must exist, and "sink" where
    the policy fetches.

    With `preempt` steps can be suspended; without, a `Suspend` is answered by the end of the step.
    `stepped` hears what each step took, after the policy has.
    """

    def __init__(
        self,
        policy: PrefillPolicy,
        driver: Driver,
        engine: Engine,
        thread: JobThread,
        tell: Callable[[Identity, Message], None],
        stepped: Callable[[StepTook], None] = lambda step: None,
        preempt: bool = False,
    ) -> None:
        self.policy = policy
        self._driver = driver
        self._engine = engine
        self._thread = thread
        self._tell = tell
        self._stepped = stepped
        self._preempt = preempt
        self._stop = 0
        """The run that is to stop; others do not obey."""
        self._suspended: tuple[RunChunk, Step, float] | None = None
        """With the seconds it has computed; the engine thread's own."""
        self._loop = asyncio.get_running_loop()
        self._tickets: dict[str, Ticket] = {}
        self.computed_tokens = 0
        driver.seat(SEAT, policy, self._perform)

    def _perform(self, command: PrefillCommand) -> None:
        match command:
            case Answer(message):
                self._tell(message.ticket.minter, message)
            case Invite(gateway, message):
                self._tell(gateway, message)
            case Begin(ticket, request, pages):
                name = holder(ticket.key)
                self._tickets[ticket.key] = ticket
                prompt = len(request.prompt)
                self._thread.do(lambda: self._open(name, request, pages, prompt))
            case RunChunk():
                self._thread.do(lambda: self._run(command))
            case Suspend(run_id):
                self._stop = run_id
            case Resume(run_id):
                self._stop = 0
                self._thread.do(lambda: self._resume(run_id))
            case EndSequence(key):
                self._tickets.pop(key, None)
                self._thread.do(lambda: self._engine.close(holder(key)))
            case AskForSink(ticket, request, deadline):
                self._driver.post("source", AskSink(ticket, request, deadline))
            case SealPages(key, pages, tokens, firsts):
                self._driver.post("source", Sealed(key, pages, tokens, firsts))
            case WithdrawHandOff(key, reason):
                self._driver.post("source", Withdraw(key, reason))
            case FetchPages(ticket, prefix, deadline):
                self._driver.post("sink", AskSource(ticket, prefix, deadline))
            case DropFetch(key, reason):
                self._driver.post("sink", Drop(key, reason))
            case _:
                assert_never(command)

    def _run(self, command: RunChunk, step: Step | None = None, spent_s: float = 0.0) -> None:
        """On the engine's thread; `step` is one that goes on, after `spent_s` of computing."""
        rows = [Row(holder(span.key), span.start, span.stop) for span in command.spans]
        sampled: list[Sampled] | None
        try:
            began = self._driver.now()
            if self._preempt:
                step = step or self._engine.begin(rows)
                sampled = step.run(lambda: self._stop == command.run_id)
            else:
                sampled = self._engine.step(rows)
            spent_s += self._driver.now() - began
        except Exception as error:
            log.exception("a step of %s failed", ", ".join(span.key for span in command.spans))
            self._driver.post_threadsafe(SEAT, ChunkFailed(command.run_id, str(error)))
            return
        if sampled is not None:
            self._loop.call_soon_threadsafe(self._done, command, sampled, spent_s)
            return
        assert step is not None
        if self._suspended is not None:
            raise LocalError(f"run {command.run_id} stopped, and run {self._suspended[0].run_id} had: want one of them")
        self._suspended = command, step, spent_s
        self._driver.post_threadsafe(SEAT, Suspended(command.run_id))

    def _resume(self, run_id: int) -> None:
        """On the engine's thread."""
        if self._suspended is None or self._suspended[0].run_id != run_id:
            got = None if self._suspended is None else self._suspended[0].run_id
            raise LocalError(f"run {run_id} is to go on, want the suspended one, which is {got}")
        command, step, spent_s = self._suspended
        self._suspended = None
        self._run(command, step, spent_s)

    def _open(self, name: str, request: Request, pages: tuple[int, ...], prompt: int) -> None:
        """On the engine's thread; what cannot be opened fails the step that needs it."""
        try:
            self._engine.open(name, request.prompt, pages, request.sampling, prompt, request.generated)
        except Exception:
            log.exception("%s cannot be opened", name)

    def _done(self, command: RunChunk, sampled: list[Sampled], seconds: float) -> None:
        """First tokens go to their clients before anything else is decided."""
        rows = tuple((span.stop - span.start, span.start) for span in command.spans)
        keys = {holder(span.key): span.key for span in command.spans}
        self.computed_tokens += sum(span.stop - span.start for span in command.spans)
        begun = []
        for each in sampled:
            key = keys[each.sequence]
            first = First(each.token, each.logits_hash, each.branch, each.logprobs)
            begun.append(Began(key, first, each.finish))
            prompt = each.prompt_logprobs
            if each.finish != "stop" or prompt:
                ticket = self._tickets[key]
                told = Tokens(ticket, 0, (), (), each.branch, (), prompt)
                if each.finish != "stop":
                    logprobs = () if each.logprobs is None else (each.logprobs,)
                    told = replace(told, tokens=(each.token,), logits_hashes=(each.logits_hash,), logprobs=logprobs)
                self._tell(ticket.minter, told)
        self._driver.post(SEAT, ChunkDone(command.run_id, tuple(begun)))
        self._stepped(StepTook(rows, 0, 0, seconds))
