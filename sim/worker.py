"""Processes of a simulated deployment: workers, composed as by `control/worker.py`, and gateways with their clients."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from core.errors import LocalError
from core.messages import (
    Cancel,
    CaughtUp,
    Freeness,
    Grant,
    Message,
    Offer,
    OfferMigration,
    Prompt,
    Ready,
    Refuse,
    Release,
    Reserve,
    Taken,
)
from core.pages import Pages
from core.request import Hints, Request, Slo, Ticket
from core.sampling import Sampling
from core.worker import Identity, Member, Role
from scheduler import decode_events as decoding
from scheduler import router_events as routing
from scheduler.policies import Policy
from scheduler.prefill_events import State
from scheduler.router import Router
from sim.fleet import Build
from sim.loop import Loop, Process, Seat
from sim.network import Network
from sim.outcome import Outcome, Record, outcome
from sim.shells import DecodeShell, HandOffShell, MixedShell, PrefillShell
from sim.workload import Arrival
from transfer.sink import Sink, SourceLost
from transfer.source import SinkLost, Source

NOBODY = Arrival(0.0, 1, 1)


@dataclass(slots=True, eq=False)
class World:
    """What all processes of a simulation share."""

    loop: Loop
    network: Network
    upper: Sequence[float]
    """Edges of the gaps' histogram."""
    slo: Slo
    records: dict[int, Record] = field(default_factory=dict)
    """Requests under way, by a counter that no two of them share, at whatever gateway."""


class Worker(Process):
    """One life of a worker."""

    def __init__(self, world: World, build: Build, incarnation: int, order: int, policy: Policy) -> None:
        super().__init__(world.loop, order)
        self.me = Identity(build.name, incarnation)
        self.build = build
        self.role = build.role
        self.network = world.network
        self.send = world.network.send
        """To a gateway or to another worker; False if it is known to be gone."""
        self.upper = world.upper
        self.slowness = 1.0
        self._chance = random.Random(build.name)
        self.draining = False
        self.ledger = Pages(build.pages)
        self._policy = policy
        self._world = world
        self._over = (0, 0)
        """Orders and steps of decode engines that it had before it took another role."""
        self.prefill: PrefillShell | None = None
        self.decode: DecodeShell | None = None
        self.mixed: MixedShell | None = None
        self.leaving: PrefillShell | None = None
        """Of one that decodes now: others have yet to take what it prefilled."""
        self._source, self._sink = Source(build.shape, self.ledger), Sink(build.shape, self.ledger)
        handoff = HandOffShell(self, self._source, self._sink, build.shape)
        self.handoff = handoff
        self.source_seat, self.sink_seat = handoff.source_seat, handoff.sink_seat
        self._takers: dict[type, Seat | None] = {}
        self._begin()
        self.network.peers[self.me] = self

    @property
    def moves(self) -> bool:
        """Rows may move from here to others and back."""
        return self.role is Role.DECODE and self._policy.migration is not None

    def _begin(self) -> None:
        """Make what the role needs, on the memory that there is."""
        build, policy = self.build, self._policy
        if self.role is Role.MIXED:
            self.mixed = MixedShell(self, policy.mixed(self.me, build.shape, self.ledger, build.cost), build.cost)
        if self.role is Role.PREFILL:
            self.prefill = PrefillShell(self, policy.prefill(self.me, build.shape, self.ledger, build.cost), build.cost)
        if self.role is Role.DECODE:
            self.decode = DecodeShell(self, policy.decode(self.me, build.shape, self.ledger, build.cost), build.cost)
        self._takers = self._seats_by_message()

    def _seats_by_message(self) -> dict[type, Seat | None]:
        """Who takes which messages; a `Release` is for the source or for the sink of its ticket."""
        fills = next((shell.seat for shell in (self.prefill, self.mixed) if shell is not None), None)
        decodes = self.decode.seat if self.decode is not None else None
        gives, takes = self.source_seat, self.sink_seat
        return {
            Offer: fills,
            Prompt: fills,
            Cancel: fills or decodes,
            Reserve: takes,
            OfferMigration: takes,
            Ready: takes,
            Grant: gives,
            Refuse: gives,
            CaughtUp: gives,
            Taken: gives,
            Freeness: decodes,
        }

    def turn_s(self) -> float:
        """From an order to the begin of its first step, this time."""
        return self._drawn(self.build.turns_s) if self.build.turns_s else 0.0

    def prefills(self) -> float:
        """So many times as long as the cost model says does this prefill step take."""
        vary = self.build.vary[0]
        return self.slowness * self._drawn(vary) if vary else self.slowness

    def decodes(self) -> float:
        """The same of the decode steps of an order."""
        vary = self.build.vary[1]
        return self.slowness * self._drawn(vary) if vary else self.slowness

    def _drawn(self, recorded: tuple[float, ...]) -> float:
        return recorded[int(self._chance.random() * len(recorded))]

    @property
    def prefill_seat(self) -> Seat:
        """Of the prefill policy."""
        shell = self.prefill or self.leaving
        assert shell is not None
        return shell.seat

    @property
    def decode_seat(self) -> Seat:
        """Of the decode policy."""
        assert self.decode is not None
        return self.decode.seat

    def orders(self) -> tuple[int, int]:
        """Orders that its decode engine has got, and the steps that they came to."""
        shells = [shell for shell in (self.decode, self.mixed) if shell is not None]
        runs, steps = self._over
        return runs + sum(shell.runs for shell in shells), steps + sum(shell.batch.steps for shell in shells)

    def member(self) -> Member:
        """What it says of itself."""
        build = self.build
        return Member(self.me, self.role, "", "", "sim", kv=build.shape, pages=build.pages, ready=not self.draining)

    def heard(self, message: Message) -> None:
        """A message of a gateway or of another worker."""
        seat = self._takers.get(type(message))
        if isinstance(message, Cancel) and self.leaving is not None:
            self.post(self.leaving.seat, message)  # or it is of a row that moved here
        if isinstance(message, Release):
            seat = self.source_seat if message.ticket.source == self.me else self.sink_seat
        if seat is not None:
            self.post(seat, message)

    def record(self, ticket: Ticket) -> Record:
        """Of the request that the ticket is for; one that is over already is nobody's."""
        return self._world.records.get(ticket.counter) or Record(NOBODY, self.loop.now)

    def token(self, record: Record, at_s: float | None = None) -> None:
        """A token of it was made, now unless it is told otherwise."""
        record.token(self.loop.now if at_s is None else at_s, self.upper)

    def lost(self, peer: Identity) -> None:
        """Another worker's life is over."""
        self.post(self.source_seat, SinkLost(peer))
        self.post(self.sink_seat, SourceLost(peer))
        if self.moves and self.decode is not None:
            self.post(self.decode.seat, decoding.PeerGone(peer))

    def meet(self, other: Worker) -> None:
        """Another worker is there; rows may move to it and from it."""
        if self.moves and other.moves and self.decode is not None:
            self.post(self.decode.seat, decoding.PeerCame(other.me))

    def drain(self) -> None:
        """What is here ends or moves; nothing more is taken."""
        self.draining = True
        if self.decode is not None:
            self.post(self.decode.seat, decoding.Drain())

    @property
    def empty(self) -> bool:
        """It has nothing of any request."""
        shells = [shell for shell in (self.prefill, self.decode, self.leaving) if shell is not None]
        return not (
            any(any(shell.policy.queue().values()) for shell in shells)
            or len(self._source)
            or len(self._sink)
            or self.ledger.pinned
        )

    def may_become(self, role: Role) -> bool:
        """It has nothing left to do that the other role does not: pages may still be pulled from one that decodes."""
        if role is Role.DECODE and self.prefill is not None and self.leaving is None and not self.ledger.pinned:
            return all(state is State.HANDING_OFF for state, count in self.prefill.policy.queue().items() if count)
        return self.empty

    def become(self, role: Role) -> None:
        """Take the other role, as soon as it may: same process, same memory, and so the same cached prefixes."""
        if not (self.draining and self.may_become(role)):
            raise LocalError(f"{self.me.name}: got a change of role to {role}, want a drained worker")
        self._over = self.orders()
        left = None if self.empty else self.prefill
        for shell in (self.prefill, self.decode, self.leaving):
            if shell is not None and shell is not left:
                self.unseat(shell.seat)
        self.leaving, self.prefill, self.decode = left, None, None
        self.role, self.draining = role, False
        self._begin()

    def left(self, other: Worker) -> None:
        """Another worker does not decode any more; what is here and on its way there is told apart from a loss."""
        if self.moves and self.decode is not None:
            self.post(self.decode.seat, decoding.PeerGone(other.me))

    def die(self) -> None:
        """At once; only what was sent before arrives."""
        for shell in (self.decode, self.mixed):
            if shell is not None:
                shell.die()
        self.alive = False


class Gateway(Process):
    """A router and its clients."""

    def __init__(
        self, world: World, name: str, order: int, router: Router, over: Callable[[Record, Outcome], None]
    ) -> None:
        super().__init__(world.loop, order)
        self.me = Identity(name, 1)
        self.router = router
        self._world = world
        self._over = over
        self._samplings: dict[int, Sampling] = {}
        self._seat = self.seat(router, self._perform)
        world.network.peers[self.me] = self

    def ask(
        self,
        counter: int,
        arrival: Arrival,
        prompt: tuple[int, ...],
        prefix: tuple[int, ...],
        most: int,
        timeout_s: float,
        answered: tuple[int, ...] = (),
    ) -> None:
        """A client's request, which will come to at most `most` tokens as far as anybody was told."""
        sampling = self._samplings.get(most)
        if sampling is None:
            sampling = self._samplings[most] = Sampling(most)
        self._world.records[counter] = Record(arrival, self.loop.now, answered=answered)
        hints = Hints(session=arrival.session, tenant=arrival.tenant, program_step=arrival.turn, tool=arrival.tool)
        goals = self._world.slo if arrival.slo is None else arrival.slo
        request = Request(f"r{counter}", prompt, sampling, timeout_s, goals, hints, prefix=prefix)
        self.post(self._seat, routing.Arrived(counter, request))

    def heard(self, message: Message) -> None:
        """A worker's message."""
        self.post(self._seat, message)

    def up(self, member: Member) -> None:
        """A worker can be used."""
        self.post(self._seat, routing.WorkerUp(member))

    def down(self, identity: Identity) -> None:
        """A worker is lost."""
        self.post(self._seat, routing.WorkerDown(identity))

    def divided(self, pools: routing.Divided) -> None:
        """Prefill workers are in these pools."""
        self.post(self._seat, pools)

    def _perform(self, command: routing.RouterCommand) -> None:
        match command:
            case routing.ToOne():
                self._world.network.send(command.worker, command.message)
            case routing.Deliver():
                record = self._world.records[command.counter]
                record.tokens += len(command.tokens)
                if record.ttft_s is None:
                    record.ttft_s = self.loop.now - record.arrived_s
            case routing.Complete():
                pass
            case routing.End():
                self._end(command)

    def _end(self, end: routing.End) -> None:
        world = self._world
        record = world.records.pop(end.counter)
        goals = world.slo if record.arrival.slo is None else record.arrival.slo
        found = outcome(record, end.phase, end.code, end.cached_tokens, end.attempts, self.loop.now, goals, world.upper)
        self._over(record, found)
