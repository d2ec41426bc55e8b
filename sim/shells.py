"""What commands of a worker's policies cost: engine steps that take the cost model's time, and nothing else.

The counterparts of `prefill/shell.py`, `decode/shell.py` and `control/handoff.py`. An engine here knows one thing that
no policy does: how many tokens a request will come to.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, assert_never

import transfer.sink as taking
import transfer.source as giving
from core.errors import LocalError
from core.kv import KvShape
from core.messages import Carried, First, Refuse, Reserve, Tokens
from core.request import Request, Ticket
from scheduler import decode_events as decoding
from scheduler import mixed_events as mixing
from scheduler import prefill_events as filling
from scheduler.cost import CostModel
from scheduler.decode_policy import DecodePolicy
from scheduler.mixed_policy import MixedPolicy
from scheduler.prefill_policy import PrefillPolicy
from sim.batch import Batch, remaining
from sim.loop import Kind, Seat

if TYPE_CHECKING:
    from sim.worker import Worker

HOST = "host"
"""The lane between a device and its host's memory."""
LAYERS = 32
"""A prefill step can be stopped between two layers; this many of equal length are assumed."""


class _Step:
    """One prefill step on the engine."""

    __slots__ = ("command", "ends_at", "seconds", "started_at")

    def __init__(self, command: filling.RunChunk, seconds: float, now: float) -> None:
        self.command = command
        self.seconds = seconds
        self.started_at = now
        self.ends_at = now + seconds


class PrefillShell:
    """Performs a prefill policy's commands; steps can be stopped between layers and go on later."""

    def __init__(self, worker: Worker, policy: PrefillPolicy, cost: CostModel) -> None:
        self._worker = worker
        self._cost = cost
        self._open: dict[str, tuple[Ticket, Request]] = {}
        self._steps: dict[int, _Step] = {}
        self._held: dict[int, filling.RunChunk] = {}
        """Suspended steps."""
        self._left_s: dict[int, float] = {}
        """What they still take."""
        self.policy = policy
        self.computed_tokens = 0
        self.busy_s = 0.0
        self.seat: Seat = worker.seat(policy, self._perform)

    def _perform(self, command: filling.PrefillCommand) -> None:
        worker = self._worker
        match command:
            # What comes with every request is matched by its class alone: taking it apart costs as much as doing it.
            case filling.Answer():
                message = command.message
                worker.send(message.ticket.minter, message)
            case filling.RunChunk():
                seconds = self._cost.prefill_s([(span.stop - span.start, span.start) for span in command.spans])
                self._start(_Step(command, seconds * worker.prefills() + worker.turn_s(), worker.loop.now))
            case filling.SealPages():
                sealed = giving.Sealed(command.key, command.pages, command.tokens, command.firsts)
                worker.post(worker.source_seat, sealed)
            case filling.AskForSink():
                asked = giving.AskSink(command.ticket, command.request, command.deadline)
                worker.post(worker.source_seat, asked)
            case filling.Begin():
                ticket = command.ticket
                self._open[ticket.key] = ticket, command.request
                worker.record(ticket).source = worker.me.name
            case filling.EndSequence():
                self._open.pop(command.key, None)
            case filling.Invite():
                worker.send(command.gateway, command.message)
            case filling.Suspend(run_id):
                self._suspend(run_id)
            case filling.Resume(run_id):
                self._start(_Step(self._held.pop(run_id), self._left_s.pop(run_id), worker.loop.now))
            case filling.WithdrawHandOff(key, reason):
                worker.post(worker.source_seat, giving.Withdraw(key, reason))
            case filling.FetchPages() | filling.DropFetch():
                raise LocalError(f"simulated workers fetch no pages: got {command}")
            case _:
                assert_never(command)

    def _start(self, step: _Step) -> None:
        self._steps[step.command.run_id] = step
        self._worker.loop.at(step.ends_at, Kind.STEP, self._worker.order, self._end, step)

    def _suspend(self, run_id: int) -> None:
        """At the end of the layer that is being computed; too late for the last one."""
        step, loop = self._steps.get(run_id), self._worker.loop
        if step is None:
            return
        layer_s = step.seconds / LAYERS
        layers = math.floor((loop.now - step.started_at) / layer_s) + 1 if layer_s else LAYERS
        if layers < LAYERS:
            loop.at(step.started_at + layers * layer_s, Kind.STEP, self._worker.order, self._suspended, step)

    def _suspended(self, step: _Step) -> None:
        worker, run_id = self._worker, step.command.run_id
        if not worker.alive or self._steps.get(run_id) is not step:
            return
        del self._steps[run_id]
        self._held[run_id] = step.command
        self._left_s[run_id] = step.ends_at - worker.loop.now
        self.busy_s += step.seconds - self._left_s[run_id]
        worker.post(self.seat, filling.Suspended(run_id))

    def _end(self, step: _Step) -> None:
        worker, command = self._worker, step.command
        if not worker.alive or self._steps.get(command.run_id) is not step:
            return
        del self._steps[command.run_id]
        self.busy_s += step.seconds
        begun = []
        for span in command.spans:
            self.computed_tokens += span.stop - span.start
            ticket, request = self._open[span.key]
            if span.stop == len(request.prompt):
                record = worker.record(ticket)
                worker.token(record)
                finish = "length" if remaining(record, request) == 1 else None
                begun.append(filling.Began(span.key, First(0), finish))
                worker.send(ticket.minter, Tokens(ticket, 0, (0,)))
        worker.post(self.seat, filling.ChunkDone(command.run_id, tuple(begun)))


class DecodeShell:
    """Performs a decode policy's commands: a standing order is one wait, to its end or to the first row's."""

    def __init__(self, worker: Worker, policy: DecodePolicy, cost: CostModel) -> None:
        self._worker = worker
        self._cost = cost
        self.batch = Batch(worker, cost)
        self._run: tuple[int, int] | None = None
        """The order under way, and at how many steps it ends."""
        self._host_s = 0.0
        """When the lane to host memory is free."""
        self.policy = policy
        self.runs = 0
        self.seat: Seat = worker.seat(policy, self._perform)

    def _perform(self, command: decoding.DecodeCommand) -> None:
        worker = self._worker
        match command:
            case decoding.Run():
                self._begin(command)
            case decoding.Tell():
                message = command.message
                worker.send(message.ticket.minter, message)
            case decoding.Answer():
                worker.post(worker.sink_seat, taking.Decided(command.key, command.granted, command.reason))
            case decoding.Leave() | decoding.Evict():
                self.batch.leave(command.key)
            case decoding.Cut(run_id):
                self._cut(run_id)
            case decoding.SwapOut(key, pages):
                self.batch.leave(key)
                self._swap(decoding.SwappedOut(key), len(pages))
            case decoding.SwapIn(key, pages):
                self._swap(decoding.SwappedIn(key), len(pages))
            case decoding.DropHandOff(key, reason):
                worker.post(worker.sink_seat, taking.Drop(key, reason))
            case decoding.TellMoved(moved):
                worker.send(moved.ticket.minter, moved)
            case decoding.OfferRow(offer, deadline):
                worker.post(worker.source_seat, giving.AskToMove(offer, deadline))
            case decoding.SealRow(key, pages, tokens):
                worker.post(worker.source_seat, giving.Sealed(key, pages, tokens))
            case decoding.HandOver(row, key, pages, tokens, stages):
                carried = Carried((0,) * self.batch.generated(row), stages)
                self.batch.leave(row)
                worker.post(worker.source_seat, giving.Sealed(key, pages, tokens, (First(0),), carried))
            case decoding.WithdrawRow(key, reason):
                worker.post(worker.source_seat, giving.Withdraw(key, reason))
            case decoding.TellPeer(peer, news):
                worker.send(peer, news)
            case _:
                assert_never(command)

    def _begin(self, command: decoding.Run) -> None:
        batch = self.batch
        extra_s = 0.0
        for join in command.joining:
            said = 0 if join.carried is None else len(join.carried.tokens)
            batch.join(join.key, join.ticket, join.request, join.generated, said)
            if join.recompute is not None:
                start, stop = join.recompute
                extra_s += self._cost.prefill_s([(stop - start, start)]) * self._worker.slowness
        batch.begin(self._worker.loop.now + self._worker.turn_s() + extra_s)
        self.runs += 1
        self._until(command.run_id, min(batch.steps + command.steps, batch.first_end()))

    def die(self) -> None:
        """Tokens of steps that were over have gone out."""
        self.batch.die(self._worker.loop.now, None if self._run is None else self._run[1])

    def _swap(self, done: decoding.SwappedOut | decoding.SwappedIn, pages: int) -> None:
        worker = self._worker
        seconds = self._cost.transfer_s(pages * worker.build.shape.page_nbytes, 1, HOST)
        self._host_s = max(self._host_s, worker.loop.now) + seconds
        worker.loop.at(self._host_s, Kind.READ, worker.order, self._swapped, done)

    def _swapped(self, done: decoding.SwappedOut | decoding.SwappedIn) -> None:
        self._worker.post(self.seat, done)

    def _until(self, run_id: int, steps: int) -> None:
        worker = self._worker
        self._run = order = (run_id, steps)
        worker.loop.at(self.batch.time_of(steps), Kind.STEP, worker.order, self._end, order)

    def _cut(self, run_id: int) -> None:
        """At the first step end later than now."""
        if self._run is not None and self._run[0] == run_id:
            upto = self._run[1]
            steps = self.batch.steps_by(self._worker.loop.now, upto) + 1
            if steps < upto:
                self._until(run_id, steps)

    def _end(self, order: tuple[int, int]) -> None:
        worker, batch = self._worker, self.batch
        if not worker.alive or self._run != order:
            return
        self._run = None
        before = batch.steps
        ended = []
        for key, row in batch.advance(order[1]):
            batch.say(row)
            ended.append(decoding.Ended(key, "length", row.generated, prefix=row.record.answered))
        worker.post(self.seat, decoding.Ran(order[0], batch.steps - before, tuple(ended)))


class MixedShell:
    """Performs a mixed policy's commands: prompt chunks and decode rows in one step, on the same engine."""

    def __init__(self, worker: Worker, policy: MixedPolicy, cost: CostModel) -> None:
        self._worker = worker
        self._cost = cost
        self.batch = Batch(worker, cost)
        self._open: dict[str, tuple[Ticket, Request, int]] = {}
        """Sequences whose prompt, and the tokens made of it before, are being computed."""
        self._order: tuple[mixing.Step, int] | None = None
        """The order under way, and at how many steps of the batch it ends."""
        self.policy = policy
        self.runs = 0
        self.computed_tokens = 0
        self.busy_s = 0.0
        self.seat: Seat = worker.seat(policy, self._perform)

    def _perform(self, command: mixing.MixedCommand) -> None:
        match command:
            case mixing.Answer(message):
                self._worker.send(message.ticket.minter, message)
            case mixing.Invite(gateway, message):
                self._worker.send(gateway, message)
            case mixing.Begin(key, ticket, request, _, made):
                self._open[key] = ticket, request, made
                record = self._worker.record(ticket)
                record.source = record.sink = self._worker.me.name
            case mixing.Step():
                self._begin(command)
            case mixing.Cut(step_id):
                self._cut(step_id)
            case mixing.Suspend(key) | mixing.EndSequence(key):
                self._open.pop(key, None)
                self.batch.leave(key)
            case _:
                assert_never(command)

    def _begin(self, command: mixing.Step) -> None:
        worker, batch = self._worker, self.batch
        now = worker.loop.now
        for join in command.joining:
            batch.join(join.key, join.ticket, join.request, join.generated)
        self.runs += 1
        if command.spans:
            rows = [(span.stop - span.start, span.start) for span in command.spans]
            batched = len(batch) if command.rows else 0
            seconds = self._cost.step_s(rows, batched, batch.context if batched else 0) * worker.prefills()
            self._wait(command, batch.steps, now + worker.turn_s() + seconds)
        else:
            batch.begin(now + worker.turn_s())
            steps = min(batch.steps + command.steps, batch.first_end())
            self._wait(command, steps, batch.time_of(steps))

    def die(self) -> None:
        """Tokens of steps that were over have gone out."""
        order = self._order
        self.batch.die(self._worker.loop.now, None if order is None or order[0].spans else order[1])

    def _wait(self, command: mixing.Step, steps: int, until_s: float) -> None:
        self._order = order = (command, steps)
        self._worker.loop.at(until_s, Kind.STEP, self._worker.order, self._end, order)

    def _cut(self, step_id: int) -> None:
        if self._order is not None and self._order[0].step_id == step_id and not self._order[0].spans:
            command, upto = self._order
            steps = self.batch.steps_by(self._worker.loop.now, upto) + 1
            if steps < upto:
                self._wait(command, steps, self.batch.time_of(steps))

    def _end(self, order: tuple[mixing.Step, int]) -> None:
        worker, batch, command = self._worker, self.batch, order[0]
        if not worker.alive or self._order != order:
            return
        self._order = None
        before, now = batch.steps, worker.loop.now
        if not command.spans:
            finished = batch.advance(order[1])
        else:
            finished = batch.advance_once(now) if command.rows and len(batch) else []
        ended = []
        for key, row in finished:
            batch.say(row)
            ended.append(mixing.Ended(key, "length", row.generated, prefix=row.record.answered))
        begun = tuple(began for span in command.spans if (began := self._spanned(span)) is not None)
        steps = 1 if command.spans else batch.steps - before
        worker.post(self.seat, mixing.Stepped(command.step_id, steps, begun, tuple(ended)))

    def _spanned(self, span: mixing.Span) -> mixing.Began | None:
        """Positions were computed; with the last of them comes the next token."""
        worker = self._worker
        self.computed_tokens += span.stop - span.start
        ticket, request, made = self._open[span.key]
        if span.stop < len(request.prompt) + made:
            return None
        del self._open[span.key]
        record = worker.record(ticket)
        worker.token(record)
        worker.send(ticket.minter, Tokens(ticket, made, (0,)))
        finish = "length" if remaining(record, request) <= made + 1 else None
        if finish is None:
            self.batch.join(span.key, ticket, request, made + 1)
        return mixing.Began(span.key, First(0), finish)


class HandOffShell:
    """Performs the commands of a source and a sink; digests are all alike and cost nothing beside the read."""

    def __init__(self, worker: Worker, source: giving.Source, sink: taking.Sink, shape: KvShape) -> None:
        self._worker = worker
        self._page_nbytes = shape.page_nbytes
        self.source_seat = worker.seat(source, self._give, alone=True)
        self.sink_seat = worker.seat(sink, self._take, alone=True)

    def _give(self, command: giving.SourceCommand) -> None:
        worker = self._worker
        match command:
            case giving.SendToSink():
                message = command.message
                if not worker.send(message.ticket.sink, message) and isinstance(message, Reserve):
                    worker.post(self.source_seat, Refuse(message.ticket, "no lane"))
            case giving.Digest():
                digested = giving.Digested(command.key, command.first_page, (0,) * len(command.pages))
                worker.post(self.source_seat, digested)
            case giving.GrantCame():
                worker.post(worker.prefill_seat, filling.Granted(command.key))
            case giving.HandOffEnded():
                over = filling.HandOffOver(command.key, command.taken, command.reason, command.taken_s)
                worker.post(worker.prefill_seat, over)
            case giving.SendOffer(offer):
                if not worker.send(offer.ticket.sink, offer):
                    worker.post(self.source_seat, Refuse(offer.ticket, "no lane"))
            case giving.MoveAsked(key):
                worker.post(worker.decode_seat, decoding.MoveAsked(key))
            case giving.MoveEnded(key, taken, sure, reason):
                worker.post(worker.decode_seat, decoding.MoveEnded(key, taken, sure, reason))
            case giving.FetchEnded():
                pass
            case _:
                assert_never(command)

    def _take(self, command: taking.SinkCommand) -> None:
        worker = self._worker
        match command:
            case taking.SendToSource():
                worker.send(command.message.ticket.source, command.message)
            case taking.AskPolicy():
                worker.post(worker.decode_seat, decoding.Asked(command.ticket, command.request, command.offer))
            case taking.Read():
                worker.network.read(
                    command.source,
                    worker.me,
                    len(command.pages) * self._page_nbytes,
                    len(command.runs),
                    worker.order,
                    self._pulled,
                    command,
                )
            case taking.Fence(read_ids):
                worker.post(self.sink_seat, taking.Fenced(read_ids))
            case taking.Arrived():
                arrived = decoding.KvArrived(command.ticket, command.request, command.firsts, (), command.carried)
                worker.post(worker.decode_seat, arrived)
            case taking.AskForMore(caught_up):
                worker.send(caught_up.ticket.source, caught_up)
            case taking.Gone(ticket, reason, recompute):
                worker.post(worker.decode_seat, decoding.Withdrawn(ticket, reason, recompute))
            case taking.Fetched():
                pass  # nobody here asks for it
            case _:
                assert_never(command)

    def _pulled(self, command: taking.Read) -> None:
        worker = self._worker
        if worker.network.reachable(command.source):
            worker.post(self.sink_seat, taking.Pulled(command.read_id, 0.0, (0,) * len(command.pages)))
