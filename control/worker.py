"""A worker: both shells, one source, one sink, one ledger, one engine thread, one transfer thread, one loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import assert_never

import grpc

from control import costs
from control.handoff import HandOffShell
from control.peers import Gateways, Peers
from core.config import WorkerConfig, weights
from core.errors import LocalError, RemoteError, SetupError
from core.kv import PageRun
from core.messages import Cancel, Message, Offer, OfferMigration, Prompt, Readiness, Reserve, ToPeer
from core.pages import Owner, Pages
from core.worker import Costs, Greeting, Identity, Lane, Member, Numerics, Role, Use, fell_back
from decode.mixed_shell import MixedShell
from decode.shell import DecodeShell
from engine.api import Engine
from kernels import native
from prefill.shell import PrefillShell
from protos.baton.v1 import inspect_pb2_grpc, worker_pb2, worker_pb2_grpc
from runtime import inspection, rpc
from runtime.driver import Driver
from runtime.inspection import Inspection
from runtime.jobs import JobThread
from runtime.metrics import RATIOS, Gauges, Metrics
from runtime.registry import Registry
from scheduler import decode_events, policies, prefill_events
from scheduler.cost import QUANTILES, CostModel, Repriced
from scheduler.decode_migrating import MigratingPolicy
from scheduler.drain import Begun, Drain, DrainCommand, Drained, Look, Looked
from scheduler.lanes import (
    Answered,
    Broke,
    DeclareAway,
    DeclareUp,
    Drop,
    Lanes,
    LanesCommand,
    LanesConfig,
    Made,
    Make,
    Met,
    NotMade,
    Parted,
)
from scheduler.learning import Announce, Learning, LearningCommand, StepTook
from scheduler.migration import MigrationConfig
from scheduler.past_future import PastFuture
from scheduler.policies import Policy
from transfer import thread_events as lanes
from transfer.digest import Sums
from transfer.sink import Sink
from transfer.source import Source
from transfer.thread import TransferThread
from transfer.transport import ReadDone, ReadFailed, ReadFenced, Transport

log = logging.getLogger("baton.worker")

SERVICE = "baton.v1.WorkerService"
ENGINE_NICE = 10
"""On a core that it shares with the loop and the transfer thread, the engine waits: they are never busy long."""
LAST_TOKENS = 256
"""Of KV that a row which moves may leave for its last stage, while which it stands still: 16 of Llumnix's blocks."""
LANES = LanesConfig()
"""When a lane that failed is made again."""
SCRATCH_NBYTES = 4 * 2**20
"""Most bytes of the arena kept for lane probes."""


def make_transport(kind: str, me: Identity) -> Transport:
    """The transport of that name; called on the transfer thread."""
    if kind == "nixl":
        from transfer.nixl import Nixl

        return Nixl(str(me))
    from transfer.zeromq import ZeroMq

    return ZeroMq(str(me))


def _sums() -> Sums | None:
    """The native loop of digests, where there is a compiler."""
    try:
        return native.page_sums()
    except native.NativeMissing as why:
        log.info("digests by numpy: %s", why)
        return None


class Worker(worker_pb2_grpc.WorkerServiceServicer):
    """One worker process's inside. `bug` is called when it should end because of a fault of our own.

    `transport` makes the lane of a kind, on the transfer thread; `cost` says what steps take, on the engine's.
    """

    def __init__(
        self,
        config: WorkerConfig,
        me: Identity,
        build: str,
        load: Callable[[WorkerConfig], tuple[Engine, Numerics, str, int]],
        bug: Callable[[BaseException], None],
        transport: Callable[[str, Identity], Transport] = make_transport,
        cost: Callable[[WorkerConfig, Engine, Numerics, str, int], CostModel] = costs.cost,
    ) -> None:
        self._config = config
        self._policy = policies.live(config.policy).weighing(weights(config.tenants))
        self._cost = cost
        self._me = me
        self._build = build
        self._load = load
        self._make_transport = transport
        self._bug = self._fault
        self._report = bug
        self._sound = True
        self._leaving = False
        self._loop = asyncio.get_running_loop()
        self._tasks: list[asyncio.Task[None]] = []
        self._engine_thread = JobThread("engine", self._fault, ENGINE_NICE)
        self._driver = Driver(self._fault, check=config.check)
        self._server = rpc.Server(config.listen, [SERVICE, inspection.SERVICE])
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(self, self._server.grpc)
        self.inspection = Inspection(str(me), self._driver, ledger=lambda: getattr(self, "_ledger", None))
        inspect_pb2_grpc.add_InspectServiceServicer_to_server(self.inspection, self._server.grpc)
        self._metrics = Metrics(self._gauges)
        self._step_s = self._metrics.histogram("decode_step_seconds", "Engine time of one decode step.")
        wrong = "Engine time of a step over what the cost model had predicted."
        self._error = self._metrics.histogram("step_cost_ratio", wrong, ("phase",), RATIOS)
        spent = "Engine time of steps."
        self._spent = self._metrics.counter("step_measured_seconds", spent, ("phase",))
        self._expected = self._metrics.counter("step_predicted_seconds", f"{spent} As predicted.", ("phase",))
        self._healthy = False
        self._lag_s = 0.0
        self.address = self._server.address
        self.metrics_address = ""

    async def start(self) -> None:
        """Load the model, register the arena, serve, join the deployment; returns when registered is under way."""
        config, role = self._config, self._config.role
        self.metrics_address = self._metrics.serve(config.listen.rpartition(":")[0])
        engine, numerics, fingerprint, context, cost = await self._loaded()
        self._engine = engine
        self._ledger = Pages(engine.pages)
        scratch = max(1, min(SCRATCH_NBYTES // engine.kv.page_nbytes, engine.pages // 20))
        self._ledger.bind("scratch", scratch, Owner.SCRATCH)
        self._scratch = PageRun(0, scratch)
        self._lanes: dict[Identity, Lane] = {}
        self._readers: dict[Identity, Lane] = {}
        self._addresses: dict[Identity, str] = {}
        self._fallen: set[Identity] = set()
        """Whose pages UCX reads over TCP, though they are on this host."""
        opened: asyncio.Future[lanes.Opened] = self._loop.create_future()
        self._opened = opened
        self._transfer = TransferThread(
            lambda: self._make_transport(config.transport, self._me),
            engine.arena,
            engine.kv.page_nbytes,
            lambda event: self._post_threadsafe(event),
            engine.kv,
            await asyncio.to_thread(_sums),
        )
        self._transfer.start()
        metadata = (await opened).metadata
        self._base = Member(
            identity=self._me,
            role=role,
            address=self.address,
            metrics_address=self.metrics_address,
            build=self._build,
            model=config.served_name,
            fingerprint=fingerprint,
            kv=engine.kv,
            pages=self._ledger.available,
            context=context,
            numerics=numerics,
            transport=config.transport,
            migrates=config.migrate and role is Role.DECODE,
            fetches=config.fetch and role.prefills,
            costs=Costs(cost.prefill, cost.decode),
            grammar=engine.grammar,
            group=config.group,
        )
        self._greeting = Greeting(self._base, metadata, scratch)
        self._seat(engine, role, cost)
        await self._server.start()
        self._registry = Registry(config.coordinator, self.member, self._members_changed, mapped=self._peers.mapped)
        self._tasks = [asyncio.create_task(self._registered()), asyncio.create_task(self._watch_lag())]
        if role is Role.MIXED:
            self._driver.post("lanes", Met(self._me))
        log.info("serving %s on %s: %d pages of %d tokens", role, self.address, engine.pages, engine.kv.page_tokens)

    def _seat(self, engine: Engine, role: Role, cost: CostModel) -> None:
        driver, ledger = self._driver, self._ledger
        self._learning = Learning(cost)
        driver.seat("costs", self._learning, self._reprice)
        self._ways = Lanes(LANES)
        driver.seat("lanes", self._ways, self._lay)
        self._gateways = Gateways(self._base, driver, self._gateway_came, self._gateway_heard, self._gateway_lost)
        self._peers = Peers(
            self._base,
            self._greeting,
            driver,
            self._peer_opened,
            self._peer_heard,
            self._peer_lost,
            self._peer_hushed,
            lay=lambda peer: driver.post("lanes", Met(peer)),
            lift=lambda peer: driver.post("lanes", Parted(peer)),
            turned=self._turned,
            busy=lambda peer: self._handoff.busy(peer),
        )
        self._map = self._peers.ways
        self._handoff = HandOffShell(
            self._me,
            Source(engine.kv, self._ledger),
            Sink(engine.kv, self._ledger),
            driver,
            self._transfer,
            self._send_peer,
            self._lanes.get,
            lambda: any("tcp" in lane.transport for lane in self._readers.values()),
            moves=self._base.migrates,
            fetches=self._base.fetches,
            away=self._ways.away,
            pulls=self._map.pulls,
            serves=self._map.serves,
        )
        self._prefill: PrefillShell | None = None
        self._decode: DecodeShell | None = None
        self._mixed: MixedShell | None = None
        if self._policy.colocated:
            mixed = self._of_role(engine, role).mixed(self._me, engine.kv, ledger, cost)
            tell, thread = self._gateways.tell, self._engine_thread
            self._mixed = MixedShell(mixed, driver, engine, thread, tell, self._stepped)
            return
        if role.prefills:
            fetches = self._base.fetches
            prefill = self._of_role(engine, role).prefill(self._me, engine.kv, ledger, cost, fetch=fetches)
            tell, preempt = self._gateways.tell, self._config.preempt
            self._prefill = PrefillShell(prefill, driver, engine, self._engine_thread, tell, self._stepped, preempt)
        if role.decodes:
            self._decode = DecodeShell(
                self._of_role(engine, role).decode(self._me, engine.kv, ledger, cost),
                driver,
                engine,
                self._engine_thread,
                self._gateways.tell,
                self._stepped,
                self._send_peer,
            )

    def _of_role(self, engine: Engine, role: Role) -> Policy:
        """The deployment's policy as this worker and its engine run it."""
        config = self._config
        policy = self._policy.sized(
            chunk_tokens=config.chunk_tokens,
            max_rows=config.max_rows,
            # Else its prompts wait for the running order.
            max_steps=1 if role is Role.MIXED and not self._policy.colocated else config.max_steps,
            suspends=config.preempt,
            host_pages=engine.host_pages,
        )
        bounds = MigrationConfig(
            config.migrate_below_steps,
            config.migrate_above_steps,
            last_pages=max(1, LAST_TOKENS // engine.kv.page_tokens),
        )
        return replace(policy, migration=bounds if self._base.migrates else None)

    def _stepped(self, step: StepTook) -> None:
        """A step is over: say how far off its prediction was, and learn from it."""
        phase = "prefill" if step.rows else "decode"
        predicted_s = self._learning.cost.step_s(step.rows, step.batch, step.context)
        self._spent.labels(phase).inc(step.seconds)
        self._expected.labels(phase).inc(predicted_s)
        if predicted_s > 0:
            self._error.labels(phase).observe(step.seconds / predicted_s)
        if step.batch:
            self._step_s.observe(step.seconds)
        self._driver.post("costs", step)

    def _reprice(self, command: LearningCommand) -> None:
        """Steps take another time than the policies here, or those who choose workers, have been told."""
        match command:
            case Repriced():
                for seat, shell in (("prefill", self._prefill), ("decode", self._decode), ("mixed", self._mixed)):
                    if shell is not None:
                        self._driver.post(seat, command)
            case Announce(cost):
                log.info("steps: %s", costs.said(cost))
                self._base = replace(self._base, costs=Costs(cost.prefill, cost.decode))
                self._registry.renew()
            case _:
                assert_never(command)

    async def drain(self) -> None:
        """Take nothing more and give running rows away, as long as somebody may take them and it does not take long."""
        policy = self._decode.policy if self._decode is not None else None
        if not isinstance(policy, MigratingPolicy) or not self._sound:
            return
        self._leaving = True
        self._changed()
        self._driver.post("decode", decode_events.Drain())
        given = policy.moves.given
        drained = self._loop.create_future()

        def perform(command: DrainCommand) -> None:
            match command:
                case Look():
                    self._driver.post("drain", Looked(self._sound and policy.giving()))
                case Drained():
                    drained.set_result(None)
                case _:
                    assert_never(command)

        self._driver.seat("drain", Drain(), perform)
        self._driver.post("drain", Begun())
        await drained
        left = sum(policy.queue().values())
        log.info("drained: %d rows moved, %d requests are left", policy.moves.given - given, left)

    async def stop(self, reason: str) -> None:
        """Give running rows away if there is somebody to take them, say goodbye to everybody and end."""
        if hasattr(self, "_registry"):
            await self.drain()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if hasattr(self, "_registry"):
            await self._registry.leave()
            # Gateways first: they place our requests elsewhere before a peer's loss makes them fail here.
            self._gateways.close(reason, fault=not self._sound)
            await asyncio.sleep(0.05)
            await self._peers.close(reason)
            self._driver.close()
            await self._server.stop(0.2)
            await self._loop.run_in_executor(None, self._transfer.close)
            await self._loop.run_in_executor(None, self._engine_thread.close)
        self._metrics.close()

    def member(self) -> Member:
        """What we tell the coordinator now."""
        lanes = tuple(self._lanes[source] for source in sorted(self._lanes))
        return replace(self._base, ready=self._ready(), lanes=lanes)

    async def Session(
        self, request_iterator: AsyncIterator[worker_pb2.SessionRequest], context: grpc.aio.ServicerContext
    ) -> None:
        await self._gateways.accept(request_iterator, context, self._greeting)

    async def Peer(
        self, request_iterator: AsyncIterator[worker_pb2.PeerRequest], context: grpc.aio.ServicerContext
    ) -> None:
        await self._peers.accept(request_iterator, context)

    async def _loaded(self) -> tuple[Engine, Numerics, str, int, CostModel]:
        """The engine, made on its own thread, and what its steps take."""
        done: asyncio.Future[tuple[Engine, Numerics, str, int, CostModel]] = self._loop.create_future()

        def job() -> None:
            try:
                found = self._load(self._config)
                loaded = *found, self._cost(self._config, *found)
            except Exception as error:
                self._loop.call_soon_threadsafe(done.set_exception, error)
            else:
                self._loop.call_soon_threadsafe(done.set_result, loaded)

        self._engine_thread.do(job)
        return await done

    async def _registered(self) -> None:
        try:
            await self._registry.run()
        except SetupError as error:
            self._bug(error)

    async def _watch_lag(self) -> None:
        """How late the loop wakes, as a gauge."""
        while True:
            due = self._loop.time() + 0.1
            await asyncio.sleep(0.1)
            self._lag_s = self._loop.time() - due

    def _fault(self, error: BaseException) -> None:
        """A fault of our own: nobody should wait for what our policies still do."""
        self._sound = False
        self._report(error)

    def _ready(self) -> bool:
        """Weights are loaded by now; a worker alone cannot hand over, so its lane must have been measured, too.

        Lanes over which rows move, or pages are fetched, are no part of that: it serves without.
        """
        role = self._config.role
        if self._leaving:
            return False
        if role is Role.MIXED:
            return self._me in self._lanes
        if role is Role.PREFILL:
            return any(self._map.serves(peer, Use.HAND_OFF) for peer in self._readers)
        return any(self._map.pulls(peer, Use.HAND_OFF) for peer in self._lanes)

    def _met(self, peer: Identity) -> None:
        """Rows can move once either has measured its way to read the other's pages."""
        if peer in self._lanes and peer in self._readers and self._map.pulls(peer, Use.MOVE):
            self._handoff.met(peer)

    def _reach(self, lane: Lane) -> None:
        """Pages can be fetched over a lane from now on, or not any more."""
        if self._base.fetches and (not lane.transport or self._map.pulls(lane.source, Use.FETCH)):
            self._driver.post("prefill", lane)

    def _turned(self, peer: Identity) -> None:
        """The transfer map allows other things with a peer than before."""
        if not self._map.pulls(peer, Use.MOVE):
            self._handoff.parted(peer)
        self._met(peer)
        away = peer not in self._lanes or not self._map.pulls(peer, Use.FETCH)
        self._reach(Lane(peer, "") if away else self._lanes[peer])
        self._changed()

    def _changed(self) -> None:
        """Readiness or lanes changed: tell those who route."""
        self._registry.renew()
        if self._ready() != self._healthy:
            self._healthy = self._ready()
            self._gateways.tell_all(Readiness(self._me, self._healthy))
            log.info("ready" if self._healthy else f"not ready: {'leaving' if self._leaving else 'no measured lane'}")
            self._health_task = asyncio.create_task(self._server.healthy(self._healthy))

    # Gateways.
    def _gateway_heard(self, gateway: Identity, message: Message) -> None:
        if not isinstance(message, Offer | Prompt | Cancel):
            raise RemoteError(f"{gateway} sent {type(message).__name__}")
        if message.ticket.minter != gateway:
            raise RemoteError(f"ticket of {message.ticket.minter} came from {gateway}")
        if self._mixed is not None:
            self._driver.post("mixed", message)
            return
        match message:
            case Offer() | Prompt():
                if self._prefill is None:
                    raise RemoteError(f"{gateway} offers a prompt to a {self._config.role} worker")
                if isinstance(message, Prompt):
                    self._engine.prepare(message.request.sampling)
                self._driver.post("prefill", message)
            case Cancel():
                if self._prefill is not None:
                    self._driver.post("prefill", message)
                if self._decode is not None:
                    self._driver.post("decode", message)

    def _gateway_came(self, gateway: Identity) -> None:
        self._gateways.tell(gateway, Readiness(self._me, self._healthy))
        if self._decode is not None:
            self._driver.post("decode", decode_events.GatewayCame(gateway))

    def _gateway_lost(self, gateway: Identity) -> None:
        if self._mixed is not None:
            self._driver.post("mixed", prefill_events.GatewayGone(gateway))
        if self._prefill is not None:
            self._driver.post("prefill", prefill_events.GatewayGone(gateway))
        if self._decode is not None:
            self._driver.post("decode", decode_events.GatewayGone(gateway))

    # Peers.
    def _send_peer(self, peer: Identity, message: ToPeer) -> bool:
        return self._peers.send(peer, message)

    def _peer_opened(self, greeting: Greeting) -> None:
        self._transfer.boost(1.0)

    def _lay(self, command: LanesCommand) -> None:
        """Do what is decided about the lanes that we read over."""
        peer = command.peer
        match command:
            case Make(_, attempt):
                greeting = self._greeting if peer == self._me else self._peers.greeting(peer)
                if greeting is not None:  # else its loss is about to be told
                    ours, theirs = self._scratch, PageRun(0, greeting.scratch_pages)
                    kv, size = greeting.member.kv, self._engine.kv.page_tokens
                    if kv is None or kv.page_tokens == size:
                        ours = theirs = PageRun(0, min(ours.count, theirs.count))
                    self._transfer.connect(str(peer), greeting.transport_metadata, attempt)
                    self._transfer.probe(str(peer), ours, theirs, kv.page_tokens if kv is not None else size)
            case Drop():
                self._transfer.disconnect(str(peer))
            case DeclareUp(_, lane):
                self._lanes[peer] = lane
                how = "" if self._ways.measured(peer) else ", as it was before it broke"
                log.info(
                    "lane from %s: %s, %.2f GB/s, %.0f us%s",
                    peer, lane.transport, lane.gbytes_per_s, lane.latency_us, how,
                )  # fmt: skip
                self._warn()
                self._peers.tell_lane(peer, lane)
                self._met(peer)
                self._reach(lane)
                self._changed()
            case DeclareAway():
                del self._lanes[peer]
                self._peers.tell_lane(peer, Lane(peer, ""))
                self._handoff.parted(peer)
                self._reach(Lane(peer, ""))
                self._changed()
            case _:
                assert_never(command)

    def _peer_heard(self, peer: Identity, message: ToPeer | Lane) -> None:
        if isinstance(message, Lane):
            if message.transport:
                self._readers[peer] = message
                self._met(peer)
            elif self._readers.pop(peer, None) is not None:
                log.warning("%s cannot read from here for now", peer)
                self._transfer.boost(LANES.most_s + 1.0)  # it is about to measure its lane anew
                self._handoff.parted(peer)
            self._changed()
        else:
            if isinstance(message, Reserve | OfferMigration):
                self._engine.prepare(message.request.sampling)
            self._handoff.heard(peer, message)

    def _peer_lost(self, peer: Identity, reason: str) -> None:
        log.warning("lost %s: %s", peer, reason)
        # First, so that the fence which the loss asks for does not make a lane to it anew.
        self._driver.post("lanes", Parted(peer))
        self._handoff.lost(peer)
        self._readers.pop(peer, None)
        self._changed()

    def _peer_hushed(self, peer: Identity, quiet: bool) -> None:
        if self._prefill is not None:
            self._driver.post("prefill", prefill_events.PeerQuiet(peer, quiet))

    # Transfer thread.
    def _post_threadsafe(self, event: lanes.Event) -> None:
        try:
            self._loop.call_soon_threadsafe(self._transferred, event)
        except RuntimeError:
            if not self._loop.is_closed():
                raise

    def _transferred(self, event: lanes.Event) -> None:
        match event:
            case lanes.Opened():
                self._opened.set_result(event)
            case lanes.OpenFailed(reason):
                self._opened.set_exception(SetupError(f"transport {self._config.transport}: {reason}", exit_code=7))
            case lanes.LaneAnswered(peer, attempt):
                self._driver.post("lanes", Answered(Identity.parse(peer), attempt))
            case lanes.LaneProbed(peer, gbytes_per_s, latency_us, transports, attempt):
                source = Identity.parse(peer)
                measured = Lane(source, transports, gbytes_per_s, latency_us)
                self._driver.post("lanes", Made(source, attempt, measured))
            case lanes.ConnectFailed(peer, reason, attempt):
                self._complain(peer, attempt, reason)
                self._driver.post("lanes", NotMade(Identity.parse(peer), attempt))
            case lanes.ProbeFailed(peer, reason, doubtful, read_id, attempt):
                self._complain(peer, attempt, reason)
                if doubtful is not None:
                    self._transfer.fence((read_id,))
                self._driver.post("lanes", NotMade(Identity.parse(peer), attempt))
            case lanes.LaneBroke(peer, reason, attempt):
                log.warning("lane from %s broke: %s", peer, reason)
                self._driver.post("lanes", Broke(Identity.parse(peer), attempt))
            case lanes.Closed(error):
                if error:
                    self._bug(LocalError(f"transfer thread: {error}"))
            case lanes.Digested() | lanes.DigestFailed() | lanes.Pulled() | ReadFailed() | ReadFenced():
                self._handoff.completed(event)
            case lanes.Connected() | ReadDone():
                pass

    def _complain(self, peer: str, attempt: int, reason: str) -> None:
        identity = Identity.parse(peer)
        there = self._ways.tries(identity, attempt) and (identity == self._me or self._peers.has(identity))
        level = logging.WARNING if self._ways.was_up(identity) else logging.ERROR  # like one that breaks
        log.log(level if there else logging.INFO, "lane from %s: %s", peer, reason)

    def _members_changed(self, members: tuple[Member, ...]) -> None:
        kept = {who: where for who, where in self._addresses.items() if self._peers.has(who)}
        self._addresses = kept | {member.identity: member.address for member in members}
        self._peers.members_changed(members)
        self._warn()

    def _fell_back(self, peer: Identity) -> bool:
        """Whether UCX took TCP for this lane on one host. Where a peer is, only the coordinator's list says."""
        where = self.address if peer == self._me else self._addresses.get(peer, "")
        return fell_back(self._lanes[peer].transport, self.address, where)

    def _warn(self) -> None:
        """Say it of each lane once, as soon as it is measured and its peer listed."""
        fallen = {peer for peer in self._lanes if self._fell_back(peer)}
        for peer in sorted(fallen - self._fallen):
            how = self._lanes[peer].transport
            log.warning("lane from %s: %s, though it is on this host: UCX cannot read its memory", peer, how)
        self._fallen = fallen

    def _gauges(self) -> Gauges:
        yield "loop_lag_seconds", "How late the event loop woke last.", {}, self._lag_s
        if not hasattr(self, "_registry"):
            return
        for state, count in self._ledger.counts().items():
            yield "pages", "KV pages by owner state.", {"state": state}, float(count)
        yield "pages_promised", "KV pages promised and not bound.", {}, float(self._ledger.promised)
        prefix = {"asked": self._ledger.asked_pages, "hit": self._ledger.hit_pages}
        for what, count in (prefix | {"reclaimed": self._ledger.reclaimed_pages}).items():
            yield "prefix_pages", "Pages of prompts that were looked for, found, and given up.", {"what": what}, count
        yield "pages_pinned", "Cached pages kept for sessions.", {}, float(self._ledger.pinned)
        if self._prefill is not None:
            for where, count in self._prefill.policy.queue().items():
                yield "requests", "Requests by phase and state.", {"phase": "prefill", "state": where}, float(count)
            yield "prefill_tokens", "Prompt tokens computed.", {}, float(self._prefill.computed_tokens)
            yield "prefill_suspensions", "Prefill steps suspended.", {}, float(self._prefill.policy.suspensions)
            if (fetches := self._prefill.policy.fetches) is not None:
                for outcome, count in {"fetched": fetches.fetched, "failed": fetches.failed}.items():
                    yield "fetches", "Pulls of prompts' pages from other workers.", {"outcome": outcome}, float(count)
                yield "fetched_bytes", "KV bytes of prompts pulled from others.", {}, float(fetches.fetched_nbytes)
        if self._decode is not None:
            for state_, count in self._decode.policy.queue().items():
                yield "requests", "Requests by phase and state.", {"phase": "decode", "state": state_}, float(count)
            policy = self._decode.policy
            host = {"used": self._engine.host_pages_used, "all": self._engine.host_pages}
            for what, count in host.items():
                yield "host_pages", "KV pages in host memory, those in use and all.", {"what": what}, float(count)
            for how, count in {"swapped": policy.swapped, "evicted": policy.evicted}.items():
                yield "rows_retired", "Rows whose memory was taken, by what became of their KV.", {"how": how}, count
            yield "recomputed_tokens", "Positions computed again at decode.", {}, float(policy.recomputed_tokens)
            if isinstance(policy, MigratingPolicy):
                moves = policy.moves
                yield "rows_offered", "Running rows offered to others.", {"outcome": "moved"}, float(moves.given)
                yield "rows_offered", "Running rows offered to others.", {"outcome": "stayed"}, float(moves.stayed)
                yield "freeness_steps", "Steps until memory is used up.", {}, policy.freeness()
            yield "promises_revoked", "Promises of memory that were taken back.", {}, float(policy.revoked)
            rule = policy.admission
            if isinstance(rule, PastFuture):
                for by, count in {"lengths": rule.quick, "peak": rule.peaks}.items():
                    yield "admissions", "Promises of memory, by what showed that it suffices.", {"by": by}, float(count)
        if self._mixed is not None:
            mixed = self._mixed.policy
            for stands, count in mixed.queue().items():
                yield "requests", "Requests by phase and state.", {"phase": "mixed", "state": stands}, float(count)
            yield "prefill_tokens", "Prompt tokens computed.", {}, float(self._mixed.computed_tokens)
            yield (
                "rows_retired",
                "Rows whose memory was taken, by what became of their KV.",
                {"how": "evicted"},
                (float(mixed.suspensions)),
            )
        for phase in ("prefill", "decode"):
            for quantile in QUANTILES:
                labels = {"phase": phase, "quantile": f"{quantile:g}"}
                margin = self._learning.cost.margin(phase, quantile)
                yield (
                    "step_cost_margin",
                    "By how much steps exceed predictions.",
                    labels,
                    margin,
                )
        steps = {"learned": self._learning.learned, "outlier": self._learning.outliers}
        for what, count in steps.items():
            yield "step_cost_samples", "Steps that the cost model learned from.", {"what": what}, float(count)
        for peer, lane in self._lanes.items():
            labels = {"source": peer.name, "transport": lane.transport}
            yield "lane_gbytes_per_second", "Measured speed of a lane.", labels, lane.gbytes_per_s
            yield "lane_latency_seconds", "Measured latency of a lane.", labels, lane.latency_us / 1e6
            fell = float(peer in self._fallen)
            yield "lane_fallback", "1: UCX reads over TCP from a worker of the same host.", labels, fell
        yield "transfer_map_version", "Of who may pull KV from whom.", {}, float(self._map.version)
        yield "ways", "Workers that this one exchanges KV with.", {}, float(len(self._map))
        yield "lanes_remade", "Lanes that broke and were made anew.", {}, float(self._ways.remade)
        yield "pulled_bytes", "KV bytes pulled.", {}, float(self._handoff.pulled_nbytes)
        yield "digest_mismatches", "Pages that differed from their digest.", {}, float(self._handoff.sink.mismatches)
        ignored = {"source": self._handoff.source.ignored, "sink": self._handoff.sink.ignored}
        for machine, count in ignored.items():
            yield "ignored_messages", "Late or unknown messages.", {"machine": machine}, float(count)
