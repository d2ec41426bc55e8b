"""All machines together: routers, policies and both sides of hand-offs, over engines and a network of the test's own.

The shells here do what those of the processes do. The engine draws each token from the KV rows in its pages, so that
a wrong, stale or missing page gives a wrong token. Without faults every request is served, and soon; with faults
every request ends, no token is wrong, and no page is lost.
"""

from __future__ import annotations

import heapq
import random
import zlib
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest

from core.kv import pages_of
from core.messages import (
    Cancel,
    Fetch,
    First,
    Grant,
    Message,
    Offer,
    Prompt,
    Ready,
    Refuse,
    Release,
    Reserve,
    Taken,
    Tokens,
)
from core.pages import Owner, Pages
from core.prefix import page_hashes
from core.request import Hints, Phase, Request, Slo, Ticket
from core.sampling import Logprobs, Sampling
from core.worker import Identity, Lane, Role
from scheduler import decode_events, prefill_events
from scheduler import decode_policy as decode
from scheduler import prefill_policy as prefill
from scheduler import router_events as front
from scheduler.cost import CostModel
from scheduler.dualmap import DualMap
from scheduler.prefill_fetches import Fetches
from scheduler.router import Router, RouterConfig
from tests.cast import SHAPE, worker
from transfer import sink as taking
from transfer import source as giving

VOCABULARY = 50
PAGE = SHAPE.page_tokens
DEAR = CostModel("dear", ((0.0, 1.0, 0.0, 0.0),), ((0.1, 0.0, 0.0),))
"""To compute a token takes so long that nobody who may fetch would."""


def row(before: int, token: int) -> int:
    """The KV of a token behind the one before it."""
    return zlib.crc32(f"{before}/{token}".encode())


def next_token(rows: list[int], seed: int) -> int:
    """What the model says after these KV rows."""
    return zlib.crc32(repr((rows, seed)).encode()) % VOCABULARY


def mark(token: int) -> int:
    """Stands for the hash of the logits that gave a token."""
    return token * 7 + 1


def likely(prompt: tuple[int, ...]) -> tuple[Logprobs | None, ...]:
    """Stands for the logprobs of a prompt."""
    return (None, *(Logprobs(token, -1.0) for token in prompt[1:]))


def text(request: Request, branch: int) -> tuple[list[int], str]:
    """What the model says to a request, and why it ends."""
    tokens, rows, seed = list(request.prompt), [0], request.sampling.branch(branch).seed
    for token in tokens:
        rows.append(row(rows[-1], token))
    said: list[int] = []
    while len(said) < request.sampling.max_tokens:
        token = next_token(rows[1:], seed)
        if token in request.sampling.stop_token_ids:
            return said, "stop"
        said.append(token)
        rows.append(row(rows[-1], token))
    return said, "length"


@dataclass
class Sequence:
    """What an engine knows of a sequence."""

    tokens: list[int]
    pages: tuple[int, ...]
    sampling: Sampling
    prompt: int
    ticket: Ticket
    again: tuple[int, ...] = ()
    """Of a decode sequence what others have said, until it was repeated."""
    branch: int = 0
    prefix: tuple[int, ...] = ()

    def names(self) -> tuple[int, ...]:
        """Of all full pages, if those of the prompt have names; the newest token has no KV."""
        known = self.prefix
        return known and known + page_hashes(self.tokens[len(known) * PAGE : -1], PAGE, after=known[-1])


@dataclass
class Reading:
    """A read on its way; `settled` once it can land no more."""

    pages: tuple[int, ...]
    peer: Identity
    failed: bool = False
    settled: bool = False


class Process:
    """One FIFO and its machines, run to completion after every outside event, with one timer."""

    def __init__(self, world: World, identity: Identity):
        self.world = world
        self.me = identity
        self.alive = True
        self.machines: dict = {}
        self.queue: deque = deque()
        self.draining = False
        self.rings = 0

    def seat(self, name: str, machine, perform: Callable) -> None:
        self.machines[name] = (machine, perform)

    def post(self, name: str, event) -> None:
        if self.alive:
            self.queue.append((name, event))
            if not self.draining:
                self.drain()

    def drain(self) -> None:
        self.draining = True
        while self.queue:
            seat, event = self.queue.popleft()
            machine, perform = self.machines[seat]
            for command in machine.on(event, self.world.now):
                perform(command)
            machine.check()
        self.draining = False
        dues = [due for machine, _ in self.machines.values() if (due := machine.deadline()) is not None]
        self.rings += 1
        if dues:
            ring = self.rings
            self.world.at(max(min(dues), self.world.now), lambda: self.ring(ring))

    def ring(self, ring: int) -> None:
        """The timer; an older one than the last that was set is none."""
        if ring == self.rings and self.alive:
            for name, (machine, _) in self.machines.items():
                due = machine.deadline()
                if due is not None and due <= self.world.now:
                    self.queue.append((name, None))
            self.drain()

    def later(self, seconds: float, call: Callable[[], None]) -> None:
        """On this process's own clock: never after its death."""
        self.world.at(self.world.now + seconds, lambda: call() if self.alive else None)


class Gateway(Process):
    """A router and its clients."""

    def __init__(self, world: World, identity: Identity):
        super().__init__(world, identity)
        placement = DualMap() if world.fetches else None
        self.router = Router(identity, RouterConfig(max_queue_s=1000.0), placement)
        self.seat("router", self.router, self.perform)
        self.requests: dict[int, Request] = {}
        self.got: dict[int, list[list[int]]] = {}
        self.stops: dict[int, list[int]] = {}
        """Tokens after which a client has its stop string, for each continuation."""
        self.complete: dict[int, set[int]] = {}
        self.begun: set[int] = set()
        """Requests of which something came."""
        self.ends: dict[int, front.End] = {}

    def ask(self, request: Request) -> int:
        counter = len(self.requests) + 1
        self.requests[counter], self.complete[counter] = request, set()
        self.got[counter] = [[] for _ in range(request.sampling.n)]
        self.post("router", front.Arrived(counter, request))
        return counter

    def perform(self, command: front.RouterCommand) -> None:
        match command:
            case front.ToOne(who, message):
                self.world.send(self.me, who, message)
            case front.Deliver(counter, tokens, hashes, branch, _, told):
                wanted = self.requests[counter].sampling.prompt_logprobs is not None
                first = counter not in self.begun
                assert told == (likely(self.requests[counter].prompt) if wanted and first else ())
                self.begun.add(counter)
                assert hashes == tuple(mark(token) for token in tokens)
                assert branch not in self.complete[counter]
                got = self.got[counter][branch]
                got += tokens
                said, _ = text(self.requests[counter], branch)
                assert got == said[: len(got)], "a wrong token"
                if self.stopped(counter, branch):
                    self.post("router", front.Satisfied(counter, branch))
            case front.Complete(counter, branch, reason):
                assert counter not in self.ends
                self.completed(counter, branch, reason)
            case front.End(counter):
                assert counter not in self.ends
                self.ends[counter] = command
                if command.phase is Phase.DONE:
                    self.completed(counter, command.branch, command.reason)
                    assert len(self.complete[counter]) == self.requests[counter].sampling.n
                    self.stages_of_all(counter, command)

    def completed(self, counter: int, branch: int, reason: str) -> None:
        assert branch not in self.complete[counter], "completed twice"
        self.complete[counter].add(branch)
        if not self.stopped(counter, branch):
            assert (self.got[counter][branch], reason) == text(self.requests[counter], branch)

    def stopped(self, counter: int, branch: int) -> bool:
        return counter in self.stops and len(self.got[counter][branch]) >= self.stops[counter][branch]

    def stages_of_all(self, counter: int, end: front.End) -> None:
        """Whoever worked on a request has said for how long, also if a stop string ended it."""
        stages = [stage.name for stage in end.stages]
        gives = self.requests[counter].slo.batch  # its memory to others, and is placed again
        if self.world.calm and not gives:
            assert stages.count("prefill") == 1
            once = stages.count("decode") == 1 or (self.world.moves and stages.count("decode") > 1)
            assert once or len(self.got[counter][end.branch]) <= 1

    def heard(self, peer: Identity, message: Any) -> None:
        self.post("router", message)

    def up(self, peer: Identity) -> None:
        process = self.world.processes[peer]
        if isinstance(process, Worker):
            member = worker(peer, process.role, pages=process.room)
            member = replace(member, fetches=self.world.fetches and process.role.prefills)
            self.post("router", front.WorkerUp(replace(member, kv=process.shape, ready=not process.leaving)))

    def down(self, peer: Identity) -> None:
        self.post("router", front.WorkerDown(peer))


class Worker(Process):
    """Both shells, one source, one sink, one ledger, an engine and a transfer thread."""

    def __init__(self, world: World, identity: Identity, role: Role, pages: int):
        super().__init__(world, identity)
        self.role = role
        self.leaving = False
        self.size = world.sizes.get(identity.name, PAGE)
        self.shape = replace(SHAPE, page_tokens=self.size)
        self.ledger = Pages(pages)
        self.ledger.bind("scratch", 1, Owner.SCRATCH)
        self.room = self.ledger.available
        self.arena: list[list[int]] = [[-1] * self.size for _ in range(pages)]
        self.source, self.sink = giving.Source(self.shape, self.ledger), taking.Sink(self.shape, self.ledger)
        self.seat("source", self.source, self.give)
        self.seat("sink", self.sink, self.take)
        if role.prefills:
            config = prefill.PrefillConfig(chunk_tokens=8, max_rows=4)
            fetches = Fetches(identity, self.shape, self.ledger, DEAR) if world.fetches else None
            self.prefill = prefill.PrefillPolicy(identity, self.shape, self.ledger, config, fetches=fetches)
            self.seat("prefill", self.prefill, self.prefills)
        if role.decodes:
            self.decode = self.policy()
            self.seat("decode", self.decode, self.decodes)
        self.sequences: dict[str, Sequence] = {}
        self.jobs: deque[Callable[[], None]] = deque()
        self.busy = False
        self.cut = False
        self.reads: dict[int, Reading] = {}
        self.digesting = 0.0

    def policy(self) -> decode.DecodePolicy:
        settings = decode.DecodeConfig(max_rows=4, max_steps=1 if self.role is Role.MIXED else 6)
        return decode.DecodePolicy(self.me, self.shape, self.ledger, settings)

    # The engine's thread: one job after another; a job that takes time calls `next_job` when it is done.
    def do(self, job: Callable[[], None]) -> None:
        self.jobs.append(job)
        if not self.busy:
            self.next_job()

    def next_job(self) -> None:
        self.busy = False
        if self.jobs:
            self.busy = True
            self.jobs.popleft()()

    def at_once(self, job: Callable[[], None]) -> None:
        def run() -> None:
            job()
            self.next_job()

        self.do(run)

    def rows(self, sequence: Sequence, stop: int) -> list[int]:
        return [self.arena[sequence.pages[i // self.size]][i % self.size] for i in range(stop)]

    def write(self, sequence: Sequence, position: int) -> None:
        page, slot = divmod(position, self.size)
        assert page < len(sequence.pages), "a token without a page"
        before = self.rows(sequence, position)[-1] if position else 0
        self.arena[sequence.pages[page]][slot] = row(before, sequence.tokens[position])

    def sample(self, sequence: Sequence) -> tuple[int, str | None]:
        token = next_token(self.rows(sequence, len(sequence.tokens)), sequence.sampling.seed)
        sequence.tokens.append(token)
        if token in sequence.sampling.stop_token_ids:
            return token, "stop"
        return token, "length" if len(sequence.tokens) - sequence.prompt == sequence.sampling.max_tokens else None

    def open(
        self, name: str, ticket: Ticket, tokens: tuple[int, ...], pages: tuple[int, ...], request: Request
    ) -> None:
        assert name not in self.sequences
        sequence = Sequence(list(tokens), pages, request.sampling, len(request.prompt), ticket, prefix=request.prefix)
        self.sequences[name] = sequence

    def close(self, name: str) -> None:
        self.sequences.pop(name, None)

    # The prefill shell.
    def prefills(self, command: prefill_events.PrefillCommand) -> None:
        match command:
            case prefill_events.Answer(message):
                self.world.send(self.me, message.ticket.minter, message)
            case prefill_events.Invite(gateway, message):
                self.world.send(self.me, gateway, message)
            case prefill_events.Begin(ticket, request, pages):
                self.at_once(lambda: self.open(prefill.holder(ticket.key), ticket, request.prompt, pages, request))
            case prefill_events.RunChunk():
                self.do(lambda: self.later(self.world.dice.uniform(0.005, 0.02), lambda: self.chunk(command)))
            case prefill_events.EndSequence(key):
                self.at_once(lambda: self.close(prefill.holder(key)))
            case prefill_events.AskForSink(ticket, request, deadline):
                self.post("source", giving.AskSink(ticket, request, deadline))
            case prefill_events.SealPages(key, pages, tokens, firsts):
                self.post("source", giving.Sealed(key, pages, tokens, firsts))
            case prefill_events.WithdrawHandOff(key, reason):
                self.post("source", giving.Withdraw(key, reason))
            case prefill_events.FetchPages(ticket, prefix, deadline):
                self.post("sink", taking.AskSource(ticket, prefix, deadline))
            case prefill_events.DropFetch(key, reason):
                self.post("sink", taking.Drop(key, reason))

    def chunk(self, command: prefill_events.RunChunk) -> None:
        firsts = []
        for span in command.spans:
            sequence = self.sequences[prefill.holder(span.key)]
            for position in range(span.start, span.stop):
                self.write(sequence, position)
            if span.stop == sequence.prompt:
                for branch in range(sequence.sampling.n):
                    alone = replace(sequence, tokens=list(sequence.tokens), sampling=sequence.sampling.branch(branch))
                    token, finish = self.sample(alone)
                    firsts.append(prefill_events.Began(span.key, First(token, mark(token), branch), finish))
                    said = () if finish == "stop" else (token,)
                    asked = sequence.sampling.prompt_logprobs is not None and branch == 0
                    told = likely(tuple(sequence.tokens)) if asked else ()
                    if said or told:
                        first = Tokens(sequence.ticket, 0, said, tuple(map(mark, said)), branch, (), told)
                        self.world.send(self.me, sequence.ticket.minter, first)
        self.next_job()
        self.post("prefill", prefill_events.ChunkDone(command.run_id, tuple(firsts)))

    # The decode shell.
    def decodes(self, command: decode_events.DecodeCommand) -> None:
        match command:
            case decode_events.Answer(key, granted, reason):
                self.post("sink", taking.Decided(key, granted, reason))
            case decode_events.Run():
                self.cut = False
                self.do(lambda: self.start(command))
            case decode_events.Cut():
                self.cut = True
            case decode_events.Leave(key):
                self.at_once(lambda: self.close(key))
            case decode_events.DropHandOff(key, reason):
                self.post("sink", taking.Drop(key, reason))
            case decode_events.Tell(message):
                self.world.send(self.me, message.ticket.minter, message)

    def start(self, command: decode_events.Run) -> None:
        for join in command.joining:
            said = join.carried.tokens if join.carried is not None else (join.first.token,)
            tokens = (*join.request.prompt, *said)
            if join.copied is not None:
                source, target = join.copied
                self.arena[target] = list(self.arena[source])
            if join.key in self.sequences:
                self.sequences[join.key].pages = join.pages
                continue
            assert join.generated == len(said)
            self.open(join.key, join.ticket, tokens, join.pages, join.request)
            self.sequences[join.key].again, self.sequences[join.key].branch = said, join.first.branch
        for grow in command.growing:
            sequence = self.sequences[grow.key]
            sequence.pages = sequence.pages[: grow.first] + grow.pages
        self.later(self.world.dice.uniform(0.002, 0.01), lambda: self.step(command, 1))

    def step(self, command: decode_events.Run, steps: int) -> None:
        ended = []
        for key in command.rows:
            sequence = self.sequences[key]
            self.write(sequence, len(sequence.tokens) - 1)
            token, finish = self.sample(sequence)
            index = len(sequence.tokens) - 1 - sequence.prompt
            tokens: tuple[int, ...] = () if finish == "stop" else (token,)
            again, sequence.again = sequence.again, ()
            tokens, index = again + tokens, index - len(again)
            hashes = tuple(mark(token) for token in tokens)
            if tokens:
                told = Tokens(sequence.ticket, index, tokens, hashes, sequence.branch)
                self.world.send(self.me, sequence.ticket.minter, told)
            if finish is not None:
                generated = len(sequence.tokens) - sequence.prompt - (finish == "stop")
                stop = token if finish == "stop" else None
                ended.append(decode_events.Ended(key, finish, generated, stop, sequence.names()))
        if ended or self.cut or steps == command.steps:
            self.next_job()
            self.post("decode", decode_events.Ran(command.run_id, steps, tuple(ended)))
        else:
            self.later(self.world.dice.uniform(0.002, 0.01), lambda: self.step(command, steps + 1))

    # The hand-off shell.
    def give(self, command: giving.SourceCommand) -> None:
        match command:
            case giving.SendToSink(message):
                ticket = message.ticket
                if ticket.sink == self.me:
                    self.post("sink", message)
                elif not self.world.send(self.me, ticket.sink, message) and isinstance(message, Reserve):
                    self.post("source", Refuse(ticket, "no lane"))
            case giving.Digest(key, first_page, pages, tokens):
                self.digest(
                    first_page,
                    pages,
                    tokens,
                    lambda found: self.post("source", giving.Digested(key, first_page, found)),
                )
            case giving.GrantCame(key):
                self.post("prefill", prefill_events.Granted(key))
            case giving.HandOffEnded(key, taken, reason):
                self.post("prefill", prefill_events.HandOffOver(key, taken, reason))

    def take(self, command: taking.SinkCommand) -> None:
        match command:
            case taking.SendToSource(message):
                ticket = message.ticket
                if ticket.source == self.me:
                    self.post("source", message)
                elif not self.world.send(self.me, ticket.source, message) and isinstance(message, Fetch):
                    self.post("sink", Refuse(ticket, "no lane"))
            case taking.AskPolicy(ticket, request):
                self.post("decode", decode_events.Asked(ticket, request))
            case taking.Read():
                self.read(command)
            case taking.Fence(read_ids):
                self.later(0.01, lambda: self.fence(read_ids))
            case taking.Arrived(ticket, request, firsts):
                self.post("decode", decode_events.KvArrived(ticket, request, firsts))
            case taking.Gone(ticket, reason, recompute):
                self.post("decode", decode_events.Withdrawn(ticket, reason, recompute))
            case taking.Fetched(ticket, _, reason, pull):
                self.post(
                    "prefill", prefill_events.FetchOver(ticket.key, pull.nbytes if pull else 0, {"failed": reason})
                )

    def digest(self, first_page: int, pages: tuple[int, ...], tokens: int, tell: Callable) -> None:
        def job() -> None:
            size = self.size
            rows = [each for page in pages for each in self.arena[page]][:tokens]
            worth = [zlib.crc32(f"{each} {first_page * size + i}".encode()) << 20 for i, each in enumerate(rows)]
            tell(tuple(sum(worth[i * size : (i + 1) * size]) % 2**64 for i in range(len(pages))))

        self.digesting = max(self.digesting, self.world.now) + 0.0005
        self.later(self.digesting - self.world.now, job)

    def read(self, command: taking.Read) -> None:
        read_id, peer, pages = command.read_id, command.source, command.pages
        dice, reading = self.world.dice, Reading(pages, peer)
        self.reads[read_id] = reading

        def end() -> None:
            if reading.failed:
                return
            process = self.world.processes.get(peer)
            if isinstance(process, Worker) and process.alive and dice.random() >= self.world.faults / 20:
                reading.settled = True
                assert (command.page_tokens or self.size) == process.size
                rows = [each for theirs in pages_of(command.runs) for each in process.arena[theirs]]
                for index, mine in enumerate(pages):
                    part = rows[index * self.size : (index + 1) * self.size]
                    self.arena[mine][: len(part)] = part
                if dice.random() < self.world.faults / 20:
                    self.arena[pages[0]] = [-2] * self.size
                self.digest(
                    command.first_page,
                    pages,
                    command.tokens,
                    lambda found: self.post("sink", taking.Pulled(read_id, 0.001, found)),
                )
            else:
                self.give_up(read_id, reading)

        self.later(dice.uniform(0.001, 0.05), end)

    def give_up(self, read_id: int, reading: Reading) -> None:
        """It fails in doubt, and may land long after."""

        def land() -> None:
            if not reading.settled:
                for page in reading.pages:
                    self.arena[page] = [-3] * self.size

        reading.failed = True
        self.later(self.world.dice.uniform(0.0, 2.0), land)
        self.post("sink", taking.PullFailed(read_id, "gone", in_doubt=True))

    def fence(self, read_ids: tuple[int, ...]) -> None:
        for read_id in read_ids:
            reading = self.reads[read_id]
            if not reading.settled:
                if not reading.failed:
                    self.give_up(read_id, reading)
                reading.settled = True
                self.post("sink", taking.Fenced((read_id,)))

    # Streams.
    def heard(self, peer: Identity, message: Any) -> None:
        match message:
            case Offer() | Prompt():
                self.post("prefill", message)
            case Cancel():
                if self.role.prefills:
                    self.post("prefill", message)
                if self.role.decodes:
                    self.post("decode", message)
            case Reserve() | Ready():
                self.post("sink", message)
            case Refuse(ticket) if ticket.sink == self.me != ticket.source:
                self.post("sink", message)
            case Grant() | Refuse() | Taken() | Fetch():
                self.post("source", message)
            case Release(ticket):
                self.post("source" if ticket.source == self.me else "sink", message)

    def up(self, peer: Identity) -> None:
        """What a gateway said meanwhile was missed: both sides start anew."""
        if isinstance(self.world.processes[peer], Gateway):
            self.gateway_gone(peer)
            if "decode" in self.machines:
                self.post("decode", decode_events.GatewayCame(peer))
        elif self.world.fetches and self.role.prefills:
            self.post("prefill", Lane(peer, "wire", 1.0, 10.0))

    def down(self, peer: Identity) -> None:
        if isinstance(self.world.processes[peer], Worker):
            if self.world.fetches and self.role.prefills:
                self.post("prefill", Lane(peer, ""))
            self.post("source", giving.SinkLost(peer))
            self.post("sink", taking.SourceLost(peer))
            for read_id, reading in self.reads.items():
                if reading.peer == peer and not reading.settled and not reading.failed:
                    self.give_up(read_id, reading)
            return

        def gone() -> None:
            if not self.world.link(self.me, peer).up:
                self.gateway_gone(peer)

        self.later(3.0, gone)

    def gateway_gone(self, peer: Identity) -> None:
        for name, event in (("prefill", prefill_events.GatewayGone(peer)), ("decode", decode_events.GatewayGone(peer))):
            if name in self.machines:
                self.post(name, event)


@dataclass
class Link:
    """The stream of a pair; `epoch` counts its lives, and what was under way in an old one is lost."""

    up: bool = True
    epoch: int = 0
    last: dict[Identity, float] = field(default_factory=dict)


class World:
    """Time, the network, and what goes wrong."""

    moves = False
    """Rows move from one decode worker to another."""
    fetches = False
    """Prefill workers pull pages of prompts from who has them."""

    def __init__(
        self, seed: int, faults: float, make: Callable[..., Worker] = Worker, sizes: Mapping[str, int] | None = None
    ):
        self.dice = random.Random(seed)
        self.make = make
        self.sizes = sizes or {}
        """Tokens a page, of workers by name whose pages are not like the others'."""
        self.faults = faults
        self.calm = not faults
        """Nothing ever goes wrong: each request is prefilled once."""
        self.now = 0.0
        self.agenda: list[tuple[float, int, Callable[[], None]]] = []
        self.count = 0
        self.processes: dict[Identity, Gateway | Worker] = {}
        self.links: dict[frozenset[Identity], Link] = {}

    def at(self, when: float, call: Callable[[], None]) -> None:
        self.count += 1
        heapq.heappush(self.agenda, (when, self.count, call))

    def run(self, until: float, over: Callable[[], bool] = lambda: False) -> None:
        turns, since = 0, self.now
        while self.agenda and self.agenda[0][0] <= until and not over():
            self.now, _, call = heapq.heappop(self.agenda)
            turns, since = (turns + 1, since) if self.now == since else (0, self.now)
            assert turns < 1000, "a driver spins"
            call()
        if not over():
            self.now = until

    def link(self, one: Identity, two: Identity) -> Link:
        return self.links.setdefault(frozenset((one, two)), Link())

    def join(self, process: Gateway | Worker) -> None:
        self.processes[process.me] = process
        for other in list(self.processes.values()):
            if other is not process and other.alive:
                process.up(other.me)
                other.up(process.me)

    def send(self, sender: Identity, to: Identity, message: Message) -> bool:
        link = self.link(sender, to)
        if not link.up or not self.processes[to].alive:
            return False
        epoch, peer = link.epoch, self.processes[to]
        when = max(link.last.get(to, 0.0), self.now + self.dice.uniform(0.0005, 0.01))
        link.last[to] = when
        self.at(when, lambda: peer.heard(sender, message) if link.epoch == epoch and peer.alive else None)
        return True

    def break_link(self, one: Identity, two: Identity) -> None:
        link = self.link(one, two)
        if not link.up:
            return
        link.up, link.epoch = False, link.epoch + 1
        delays = [self.dice.uniform(0.0, 0.1) for _ in range(2)]
        for me, peer, delay in ((one, two, delays[0]), (two, one, delays[1])):
            self.processes[me].later(delay, partial(self.processes[me].down, peer))
        self.at(self.now + max(delays) + self.dice.choice([0.05, 1.0, 5.0]), lambda: self.mend(one, two))

    def mend(self, one: Identity, two: Identity) -> None:
        if self.processes[one].alive and self.processes[two].alive:
            self.link(one, two).up = True
            for me, peer in ((one, two), (two, one)):
                if isinstance(self.processes[me], Worker):
                    self.processes[me].up(peer)
            for me, peer in ((one, two), (two, one)):
                if isinstance(self.processes[me], Gateway):
                    self.processes[me].up(peer)

    def kill(self, process: Gateway | Worker) -> None:
        process.alive = False
        for other in list(self.processes.values()):
            if other.alive and self.link(process.me, other.me).up:
                self.break_link(process.me, other.me)
        again = Identity(process.me.name, process.me.incarnation + 1)
        if isinstance(process, Worker):
            new: Gateway | Worker = self.make(self, again, process.role, process.ledger.total)
        else:
            new = Gateway(self, again)
        self.at(self.now + 0.5, lambda: self.join(new))


DEPLOYMENTS = {
    "one and one": {"p": (Role.PREFILL, 1, 16), "d": (Role.DECODE, 1, 14)},
    "two and two": {"p": (Role.PREFILL, 2, 14), "d": (Role.DECODE, 2, 12)},
    "mixed": {"m": (Role.MIXED, 1, 12)},
    "two mixed and a decode worker": {"m": (Role.MIXED, 2, 12), "d": (Role.DECODE, 1, 20)},
    "one of each": {"p": (Role.PREFILL, 1, 14), "d": (Role.DECODE, 1, 14), "m": (Role.MIXED, 1, 18)},
    "unequal pages": {"p": (Role.PREFILL, 2, 14), "d": (Role.DECODE, 2, 14), "m": (Role.MIXED, 1, 18)},
}
SIZES = {"unequal pages": {"p0": 8, "p1": 2, "d0": 2, "m0": 8}}


def live(deployment: str, seed: int, faults: float) -> None:
    """Thirty requests at two gateways, enough at once to fill every arena; then silence, and a look at what is left."""
    play(World(seed, faults, sizes=SIZES.get(deployment)), DEPLOYMENTS[deployment], faults)


def play(world: World, deployment: dict[str, tuple[Role, int, int]], faults: float, longest: int = 12) -> None:
    """The same in a world of one's own, with outputs of up to so many tokens."""
    stop = 4.0
    dice = world.dice
    for letter, (role, count, pages) in deployment.items():
        for index in range(count):
            world.join(world.make(world, Identity(f"{letter}{index}", 1), role, pages))
    for index in range(2):
        world.join(Gateway(world, Identity(f"g{index}", 1)))

    def arrive() -> None:
        gateways = [each for each in world.processes.values() if isinstance(each, Gateway) and each.alive]
        if not gateways:
            return
        prompt = tuple(dice.randrange(VOCABULARY) for _ in range(dice.randint(1, 20)))
        stops = (dice.randrange(VOCABULARY),) * dice.randint(0, 1)
        length, n = dice.randint(1, longest), dice.choice((1, 1, 1, 2, 3))
        sampling = Sampling(length, stop_token_ids=stops, n=n, prompt_logprobs=dice.choice((None, None, 0)))
        gateway = dice.choice(gateways)
        slo = dice.choice((Slo(), Slo(), Slo(), Slo(batch=True), Slo(deadline_s=90.0)))
        hints = Hints(tenant=dice.choice(("", "a", "b")))
        counter = gateway.ask(Request("r", prompt, sampling, 500.0, slo, hints))
        if dice.random() < 0.15:
            gateway.stops[counter] = [dice.randint(1, 6) for _ in range(sampling.n)]
        elif dice.random() < 0.15:
            leave = front.ClientGone(counter, "left")
            gateway.later(dice.uniform(0.0, 0.5), lambda: gateway.post("router", leave))

    def trouble() -> None:
        living = [each for each in world.processes.values() if each.alive]
        if len(living) < 2:
            return
        if dice.random() < 0.3:
            world.kill(dice.choice(living))
        else:
            one, two = dice.sample(living, 2)
            world.break_link(one.me, two.me)

    for _ in range(30):
        world.at(dice.uniform(0.0, stop / 2), arrive)
    for _ in range(int(faults * 8)):
        world.at(dice.uniform(0.0, stop), trouble)
    gateways = [each for each in world.processes.values() if isinstance(each, Gateway)]
    world.run(stop)
    settle(world)
    for gateway in gateways:
        if gateway.alive and not faults:
            for counter, end in gateway.ends.items():
                if end.code != "INVALID_ARGUMENT":
                    assert end.phase in (Phase.DONE, Phase.CANCELLED), (counter, end)
                    gives = gateway.requests[counter].slo.batch
                    assert end.attempts == 1 or gives or not world.calm


def settle(world: World) -> None:
    """Silence, until every request has ended; then nothing is left of any."""
    world.faults = 0.0

    def over() -> bool:
        return all(
            len(each.router) == 0 for each in world.processes.values() if isinstance(each, Gateway) and each.alive
        )

    world.run(world.now + 60.0, over)
    assert over(), "a request hangs"
    world.run(world.now + 20.0)
    for process in world.processes.values():
        if isinstance(process, Worker) and process.alive:
            doubtful = tuple(read_id for read_id, reading in process.reads.items() if not reading.settled)
            process.fence(doubtful)
            assert process.ledger.holders() == ("scratch",), "a page leaked"
            assert not process.sequences
            assert len(process.source) == len(process.sink) == 0


@pytest.mark.parametrize("deployment", DEPLOYMENTS)
@pytest.mark.parametrize(
    "seeds", [range(6), pytest.param(range(6, 200), marks=pytest.mark.slow)], ids=["quick", "long"]
)
def test_without_faults_every_request_is_served_and_soon(deployment, seeds):
    for seed in seeds:
        live(deployment, seed, 0.0)


@pytest.mark.parametrize("deployment", DEPLOYMENTS)
@pytest.mark.parametrize(
    "seeds", [range(6), pytest.param(range(6, 200), marks=pytest.mark.slow)], ids=["quick", "long"]
)
def test_with_faults_every_request_ends_and_nothing_is_wrong_or_lost(deployment, seeds):
    for seed in seeds:
        live(deployment, seed, 1.0)
