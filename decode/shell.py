"""The decode shell: a standing order becomes engine steps, whose tokens go straight to the gateways.

The tokens of a sequence are kept here as well as at the engine, so that one whose KV was given up can be opened again,
and one that moves to another worker takes them along.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import assert_never

from core.errors import LocalError
from core.messages import Carried, First, Freeness, Message, Tokens
from core.prefix import page_hashes
from core.request import Request, Ticket
from core.sampling import Logprobs
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
    SwappedIn,
    SwappedOut,
    Tell,
    TellMoved,
    TellPeer,
    WithdrawRow,
)
from scheduler.decode_policy import DecodePolicy
from scheduler.learning import StepTook
from transfer.sink import Decided, Drop
from transfer.source import AskToMove, Sealed, Withdraw

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
    branch: int
    hashes: list[int]
    """Of the logits that gave what was generated; zeros where the engine does not hash them."""
    logprobs: list[Logprobs]
    """Of what was generated, if they were asked for."""
    table: tuple[int, ...] = ()


@dataclass(slots=True)
class _Row:
    ticket: Ticket
    prompt_tokens: int
    branch: int
    before: Carried | None
    """What was generated elsewhere, until it is said again with the first step."""


def _before(join: Join) -> Carried:
    """What a sequence that is new here has generated elsewhere: the first token, or all of one that has moved."""
    if join.carried is not None:
        return join.carried
    first = join.first
    told = () if first.logprobs is None else (first.logprobs,)
    return Carried((first.token,), (), (first.logits_hash,), told)


class DecodeShell:
    """Seats `policy` in `driver`; sends to gateways through `tell`, and to other decode workers through `tell_peer`.

    The seat "sink" must exist, and "source" where rows move.
    """

    def __init__(
        self,
        policy: DecodePolicy,
        driver: Driver,
        engine: Engine,
        thread: JobThread,
        tell: Callable[[Identity, Message], None],
        stepped: Callable[[StepTook], None] = lambda step: None,
        tell_peer: Callable[[Identity, Freeness], object] = lambda peer, message: None,
    ) -> None:
        self.policy = policy
        self._driver = driver
        self._engine = engine
        self._thread = thread
        self._tell = tell
        self._stepped = stepped
        self._tell_peer = tell_peer
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
                        prompt = len(join.request.prompt)
                        self._rows[join.key] = _Row(join.ticket, prompt, join.first.branch, _before(join))
                self._cut.clear()
                self._thread.do(lambda: self._run(command))
            case Cut():
                self._cut.set()
            case Leave(key):
                self._rows.pop(key, None)
                self._thread.do(lambda: self._leave(key))
            case Evict(key):
                self._thread.do(lambda: self._engine.close(key))
            case SwapOut(key, pages):
                self._thread.do(lambda: self._swap_out(key, pages))
            case SwapIn(key, pages):
                self._thread.do(lambda: self._swap_in(key, pages))
            case OfferRow(offer, deadline):
                self._driver.post("source", AskToMove(offer, deadline))
            case SealRow(key, pages, tokens):
                self._driver.post("source", Sealed(key, pages, tokens))
            case HandOver():
                stopped_at = self._driver.now()
                self._thread.do(lambda: self._hand_over(command, stopped_at))
            case WithdrawRow(key, reason):
                self._driver.post("source", Withdraw(key, reason))
            case TellPeer(peer, news):
                self._tell_peer(peer, news)
            case DropHandOff(key, reason):
                self._driver.post("sink", Drop(key, reason))
            case Tell(message) | TellMoved(message):
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
                self._note(self._sequences[each.sequence], each)
                ended = ended or each.finish is not None
            steps += 1
            took = StepTook((), len(ends), sum([end for _, end in ends]), self._driver.now() - started)
            self._loop.call_soon_threadsafe(self._emit, sampled, took)
        names = {each.sequence: self._names(self._sequences[each.sequence]) for each in sampled if each.finish}
        self._loop.call_soon_threadsafe(self._ran, command, steps, sampled, names)

    def _join(self, join: Join) -> None:
        if join.copied is not None:
            self._engine.copy(*join.copied)
        sequence = self._sequences.get(join.key)
        if sequence is None:
            before = _before(join)
            tokens = [*join.request.prompt, *before.tokens]
            hashes = list(before.logits_hashes or (0,) * len(before.tokens))
            sequence = _Sequence(join.request, tokens, join.first.branch, hashes, list(before.logprobs))
            self._sequences[join.key] = sequence
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

    @staticmethod
    def _note(sequence: _Sequence, sampled: Sampled) -> None:
        sequence.tokens.append(sampled.token)
        sequence.hashes.append(sampled.logits_hash)
        if sampled.logprobs is not None:
            sequence.logprobs.append(sampled.logprobs)

    def _names(self, sequence: _Sequence) -> tuple[int, ...]:
        """Of all full pages of a sequence, if those of its prompt have names; the newest token has no KV."""
        request = sequence.request
        if not request.prefix:
            return ()
        # The chain goes on in the pages it began with, which may be smaller than ours.
        kv = self._engine.kv
        link = request.prefix_page_tokens or kv.page_tokens
        known = request.prefix[: len(request.prompt) // link]
        more = sequence.tokens[len(known) * link : -1]
        return kv.names(known and known + page_hashes(more, link, after=known[-1]), link)

    def _hand_over(self, command: HandOver, stopped_at: float) -> None:
        """Stop a sequence, and announce all of it; its tokens stay, should it come back."""
        sequence = self._sequences[command.row]
        if len(sequence.tokens) != command.tokens + 1:
            got, want = command.tokens, len(sequence.tokens) - 1
            raise LocalError(f"{command.row} is handed over: got {got} tokens with KV, want the {want} it has")
        self._engine.close(command.row)
        said = tuple(sequence.tokens[len(sequence.request.prompt) :])
        hashes = tuple(sequence.hashes) if any(sequence.hashes) else ()
        first = First(said[-1], sequence.hashes[-1], sequence.branch)
        stopped_s = self._driver.now() - stopped_at
        carried = Carried(said, command.stages, hashes, tuple(sequence.logprobs), stopped_s)
        sealed = Sealed(command.key, command.pages, command.tokens, (first,), carried)
        self._driver.post_threadsafe("source", sealed)

    def _swap_out(self, key: str, pages: tuple[int, ...]) -> None:
        """Its tokens stay, as when it is evicted."""
        self._engine.swap_out(key, pages)
        self._driver.post_threadsafe(SEAT, SwappedOut(key))

    def _swap_in(self, key: str, pages: tuple[int, ...]) -> None:
        self._engine.swap_in(key, pages)
        self._driver.post_threadsafe(SEAT, SwappedIn(key))

    def _leave(self, key: str) -> None:
        self._sequences.pop(key, None)
        self._engine.close(key)

    def _emit(self, sampled: list[Sampled], took: StepTook) -> None:
        """The first step of a sequence repeats what another worker said, whose message may be late or lost."""
        for each in sampled:
            row = self._rows.get(each.sequence)
            if row is None:
                continue
            index = each.position - row.prompt_tokens
            tokens: tuple[int, ...] = ()
            hashes: tuple[int, ...] = ()
            logprobs: tuple[Logprobs, ...] = ()
            if each.finish != "stop":
                tokens, hashes = (each.token,), (each.logits_hash,)
                logprobs = () if each.logprobs is None else (each.logprobs,)
            if (before := row.before) is not None:
                row.before, index = None, index - len(before.tokens)
                hashes = (before.logits_hashes or (0,) * len(before.tokens)) + hashes
                tokens, logprobs = before.tokens + tokens, before.logprobs + logprobs
            if tokens:
                self._tell(row.ticket.minter, Tokens(row.ticket, index, tokens, hashes, row.branch, logprobs))
        self._stepped(took)  # tokens go first: what is learned of a step takes longer than they do

    def _ran(self, command: Run, steps: int, sampled: list[Sampled], names: Mapping[str, tuple[int, ...]]) -> None:
        ended = []
        for each in sampled:
            if each.finish is not None:
                row = self._rows[each.sequence]
                stop = each.token if each.finish == "stop" else None
                generated = each.position - row.prompt_tokens + (0 if each.finish == "stop" else 1)
                ended.append(Ended(each.sequence, each.finish, generated, stop, names[each.sequence]))
        self._driver.post(SEAT, Ran(command.run_id, steps, tuple(ended)))
