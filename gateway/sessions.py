"""The gateway's streams to all workers: dialled as the registry names them, and up once ready."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace

from core.errors import RemoteError
from core.messages import Accept, Failed, Finished, Handed, Moved, Readiness, Reject, SlotFree, Tokens, ToWorker
from core.worker import Greeting, Identity, Member, Role
from protos.baton.v1 import worker_pb2, worker_pb2_grpc
from protos.baton.v1.worker_pb2 import Frame
from runtime import rpc, streams, wire
from runtime.driver import Driver
from runtime.streams import QUIET_S, SILENCE_S, Dials, Stream
from scheduler.alike import stranger
from scheduler.liveness import Connected, Disconnected, Heard, Liveness, Lost, Quiet
from scheduler.router_events import WorkerDown, WorkerQuiet, WorkerUp

log = logging.getLogger("baton.sessions")


class Sessions:
    """One stream to every worker. Tells the router which workers can be used. Its seat is "workers"."""

    def __init__(self, greeting: Greeting, driver: Driver, changed: Callable[[], None]) -> None:
        self._greeting = greeting
        self._driver = driver
        self._changed = changed
        self._members: dict[Identity, Member] = {}
        self._streams: dict[Identity, Stream] = {}
        self._up: dict[Identity, Member] = {}
        self._ready: dict[Identity, bool] = {}
        """As they say themselves, which is newer than what the coordinator has heard."""
        self._dials = Dials(self._dial)
        driver.seat("workers", Liveness(silence_s=SILENCE_S, grace_s=0.0, quiet_s=QUIET_S), self._perform)

    @property
    def members(self) -> tuple[Member, ...]:
        """The last membership heard of."""
        return tuple(self._members.values())

    def members_changed(self, members: tuple[Member, ...]) -> None:
        """The coordinator's list changed. A worker that the list lost is kept while its stream stands."""
        self._members = {member.identity: member for member in members}
        workers = {identity: member for identity, member in self._members.items() if member.role is not Role.GATEWAY}
        kept = {identity: self._up[identity] for identity in self._streams.keys() & self._up.keys()}
        self._dials.want({**kept, **workers})
        for identity in list(self._streams):
            self._settle(identity)

    def tell(self, worker: Identity, message: ToWorker) -> None:
        """Send a message if the worker is there; if not, the router is about to hear that it is lost."""
        stream = self._streams.get(worker)
        if stream is not None:
            stream.send(wire.frames(message))

    async def close(self, reason: str) -> None:
        """Say goodbye to all."""
        for stream in self._streams.values():
            stream.close(reason)
        await asyncio.sleep(0.05)
        await self._dials.close()

    def opened(self, stream: Stream) -> None:
        assert stream.peer is not None
        member = stream.peer.member
        if (why := stranger(self._greeting.member, member)) is not None:
            raise RemoteError(why)
        self._streams[member.identity] = stream
        self._driver.post("workers", Connected(member.identity))
        self._settle(member.identity)

    def heard(self, stream: Stream, frame: Frame) -> None:
        assert stream.peer is not None
        worker = stream.peer.member.identity
        self._driver.post("workers", Heard(worker))
        if frame.WhichOneof("body") == "heartbeat":
            return
        message = stream.reader.message(frame)
        if isinstance(message, SlotFree | Readiness) and message.worker != worker:
            raise RemoteError(f"{worker} speaks of {message.worker}")
        if isinstance(message, Readiness):
            self._ready[worker] = message.ready
            self._settle(worker)
            return
        if not isinstance(message, Accept | Reject | Tokens | Handed | Finished | Failed | SlotFree | Moved):
            raise RemoteError(f"{worker} sent {type(message).__name__}")
        self._driver.post("router", message)

    def ended(self, stream: Stream, goodbye: bool) -> None:
        assert stream.peer is not None
        worker = stream.peer.member.identity
        if self._streams.get(worker) is stream:
            del self._streams[worker]
            self._driver.post("workers", Disconnected(worker, goodbye))

    async def _dial(self, member: Member) -> None:
        channel = rpc.channel(member.address)
        try:
            stub = worker_pb2_grpc.WorkerServiceStub(channel)
            await streams.dialled(stub.Session, worker_pb2.SessionRequest, self._greeting, self)
        finally:
            await channel.close()

    def _settle(self, identity: Identity, *, crashed: bool = False) -> None:
        """Tell the router what changed: a worker is up while its stream stands, ready or not."""
        member = self._members.get(identity) or self._up.get(identity)
        if identity not in self._streams:
            self._ready.pop(identity, None)
            if self._up.pop(identity, None) is not None:
                self._driver.post("router", WorkerDown(identity, crashed))
                self._changed()
            return
        if member is not None:
            member = replace(member, ready=self._ready.get(identity, member.ready))
        if member is not None and self._up.get(identity) != member:
            self._up[identity] = member
            self._driver.post("router", WorkerUp(member))
            self._changed()

    def _perform(self, command: Lost | Quiet) -> None:
        if isinstance(command, Quiet):
            log.info("%s %s", command.identity, "is quiet" if command.quiet else "is heard again")
            self._driver.post("router", WorkerQuiet(command.identity, command.quiet))
            return
        log.warning("lost %s: %s", command.identity, command.reason)
        stream = self._streams.pop(command.identity, None)
        if stream is not None:
            stream.close(f"you are lost to us: {command.reason}")
        self._settle(command.identity, crashed=command.crashed)
