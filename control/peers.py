"""A worker's streams: to its gateways, which dial it, and to the workers it may hand over to or take from."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import assert_never, cast

import grpc

from core.errors import RemoteError
from core.messages import Message, ToPeer
from core.worker import Greeting, Identity, Lane, Member, Part, Role, Way
from protos.baton.v1 import worker_pb2, worker_pb2_grpc
from protos.baton.v1.worker_pb2 import Frame
from runtime import rpc, streams, wire
from runtime.driver import Driver
from runtime.streams import QUIET_S, SILENCE_S, Dials, Stream
from scheduler.alike import stranger
from scheduler.liveness import Connected, Disconnected, Heard, Liveness, Lost, Quiet
from scheduler.ways import Close, Lay, Lift, Look, Looked, Opened, Parted, Told, Turn, Ways, WaysCommand

log = logging.getLogger("baton.peers")


class Gateways:
    """The streams that gateways opened to this worker. A gateway that is gone for 3 s is lost."""

    def __init__(
        self,
        me: Member,
        driver: Driver,
        came: Callable[[Identity], None],
        heard: Callable[[Identity, Message], None],
        lost: Callable[[Identity], None],
    ) -> None:
        self._me = me
        self._driver = driver
        self._came = came
        self._heard = heard
        self._lost = lost
        self._streams: dict[Identity, Stream] = {}
        driver.seat("gateways", Liveness(silence_s=SILENCE_S, grace_s=3.0), self._perform)

    def tell(self, gateway: Identity, message: Message) -> None:
        """Send a message if the gateway is there; if not, its requests are about to be cancelled anyway."""
        stream = self._streams.get(gateway)
        if stream is not None:
            stream.send(wire.frames(message))

    def tell_all(self, message: Message) -> None:
        """Send a message to every gateway."""
        for gateway in self._streams:
            self.tell(gateway, message)

    async def accept(
        self,
        requests: AsyncIterator[worker_pb2.SessionRequest],
        context: grpc.aio.ServicerContext,
        greeting: Greeting,
    ) -> None:
        """Serve one stream that a gateway opened."""
        await streams.accepted(requests, context, worker_pb2.SessionResponse, greeting, self)

    def close(self, reason: str, *, fault: bool = False) -> None:
        """Say goodbye to all; with a `fault` of our own they take it as a loss."""
        for stream in self._streams.values():
            stream.close(reason, fault=fault)

    def opened(self, stream: Stream) -> None:
        assert stream.peer is not None
        member = stream.peer.member
        if member.role is not Role.GATEWAY:
            raise RemoteError(f"role: got {member.role} on a gateway's stream")
        if (why := stranger(self._me, member)) is not None:
            raise RemoteError(why)
        self._streams.pop(member.identity, None)
        self._driver.post("gateways", Connected(member.identity))
        self._streams[member.identity] = stream
        self._came(member.identity)

    def heard(self, stream: Stream, frame: Frame) -> None:
        assert stream.peer is not None
        gateway = stream.peer.member.identity
        self._driver.post("gateways", Heard(gateway))
        if frame.WhichOneof("body") != "heartbeat":
            message = stream.reader.message(frame)
            if message is not None:
                self._heard(gateway, message)

    def ended(self, stream: Stream, goodbye: bool) -> None:
        assert stream.peer is not None
        gateway = stream.peer.member.identity
        if self._streams.get(gateway) is stream:
            del self._streams[gateway]
            self._driver.post("gateways", Disconnected(gateway, goodbye))

    def _perform(self, command: Lost) -> None:
        log.info("gateway %s is lost: %s", command.identity, command.reason)
        stream = self._streams.pop(command.identity, None)
        if stream is not None:
            # Its requests are cancelled: it must hear so, and place them again, instead of waiting for tokens.
            stream.close(f"you are lost to us: {command.reason}")
        self._lost(command.identity)


class Peers:
    """One stream to every worker that the transfer map lets exchange KV with us. Its seat is "ways".

    Of two, the one whose name sorts first dials. `lay` and `lift` have lanes made and given up; `turned` hears with
    whom other things may be begun than before; `busy` says whether something that was begun with a peer still runs.
    """

    def __init__(
        self,
        me: Member,
        greeting: Greeting,
        driver: Driver,
        opened: Callable[[Greeting], None],
        heard: Callable[[Identity, ToPeer | Lane], None],
        lost: Callable[[Identity, str], None],
        hushed: Callable[[Identity, bool], None],
        lay: Callable[[Identity], None],
        lift: Callable[[Identity], None],
        turned: Callable[[Identity], None],
        busy: Callable[[Identity], bool],
    ) -> None:
        self._me = me
        self._greeting = greeting
        self._driver = driver
        self.ways = Ways(me)
        self._lay = lay
        self._lift = lift
        self._turned = turned
        self._busy = busy
        self._opened = opened
        self._heard = heard
        self._lost = lost
        self._hushed = hushed
        self._streams: dict[Identity, Stream] = {}
        self._wanted: dict[Identity, Member] = {}
        self._said: tuple[Way, ...] = ()
        """By the map that was logged last."""
        self._dials = Dials(self._dial)
        driver.seat("peers", Liveness(silence_s=SILENCE_S, grace_s=0.0, quiet_s=QUIET_S), self._perform)
        driver.seat("ways", self.ways, self._go)

    def mapped(self, part: Part, members: tuple[Member, ...]) -> None:
        """The coordinator says who may exchange KV with us."""
        self._driver.post("ways", Told(part, tuple([member.identity for member in members])))
        if part.ways != self._said:
            self._said = part.ways
            log.info("transfer map %d: %s", part.version, ", ".join(way.peer.name for way in part.ways) or "nobody")

    def members_changed(self, members: tuple[Member, ...]) -> None:
        """The coordinator's list changed. A peer that the list lost is kept while its stream stands."""
        wanted = {m.identity: m for m in members if self.ways.wanted(m.identity) and self._me.identity < m.identity}
        kept = {who: member for who, member in self._wanted.items() if who in self._streams}
        self._wanted = {**kept, **wanted}
        self._dials.want(self._wanted)

    def has(self, peer: Identity) -> bool:
        """True while a stream to the peer stands."""
        return peer in self._streams

    def greeting(self, peer: Identity) -> Greeting | None:
        """What the peer said first, None if no stream to it stands."""
        stream = self._streams.get(peer)
        return stream.peer if stream is not None else None

    def send(self, peer: Identity, message: ToPeer) -> bool:
        """Send a message; False if there is no stream to the peer."""
        stream = self._streams.get(peer)
        if stream is None:
            return False
        stream.send(wire.frames(message))
        return True

    def tell_lane(self, peer: Identity, lane: Lane) -> None:
        """Tell a peer what we measured reading from it."""
        stream = self._streams.get(peer)
        if stream is not None:
            stream.send([wire.lane_frame(lane)])

    async def accept(self, requests: AsyncIterator[worker_pb2.PeerRequest], context: grpc.aio.ServicerContext) -> None:
        """Serve one stream that a peer opened."""
        await streams.accepted(requests, context, worker_pb2.PeerResponse, self._greeting, self)

    async def close(self, reason: str) -> None:
        """Say goodbye to all."""
        for stream in self._streams.values():
            stream.close(reason)
        await asyncio.sleep(0.05)
        await self._dials.close()

    def opened(self, stream: Stream) -> None:
        assert stream.peer is not None
        member = stream.peer.member
        if (why := self.ways.refusal(member)) is not None:
            raise RemoteError(why)
        if member.identity in self._streams:
            raise RemoteError(f"{member.identity} has a stream already")
        self._streams[member.identity] = stream
        self._driver.post("peers", Connected(member.identity))
        self._opened(stream.peer)
        self._driver.post("ways", Opened(member))

    def heard(self, stream: Stream, frame: Frame) -> None:
        assert stream.peer is not None
        peer = stream.peer.member.identity
        self._driver.post("peers", Heard(peer))
        match frame.WhichOneof("body"):
            case "heartbeat":
                pass
            case "lane":
                self._heard(peer, wire.lane_from(frame.lane))
            case _:
                message = stream.reader.message(frame)
                if not isinstance(message, ToPeer):
                    raise RemoteError(f"{peer} sent {type(message).__name__}")
                self._heard(peer, message)

    def ended(self, stream: Stream, goodbye: bool) -> None:
        assert stream.peer is not None
        peer = stream.peer.member.identity
        if self._streams.get(peer) is stream:
            del self._streams[peer]
            self._driver.post("peers", Disconnected(peer, goodbye))

    async def _dial(self, member: Member) -> None:
        channel = rpc.channel(member.address)
        try:
            stub = worker_pb2_grpc.WorkerServiceStub(channel)
            call = cast("Callable[[], grpc.aio.StreamStreamCall]", stub.Peer)
            await streams.dialled(call, worker_pb2.PeerRequest, self._greeting, self)
        finally:
            await channel.close()

    def _perform(self, command: Lost | Quiet) -> None:
        if isinstance(command, Quiet):
            self._hushed(command.identity, command.quiet)
            return
        stream = self._streams.pop(command.identity, None)
        if stream is not None:
            stream.close(f"you are lost to us: {command.reason}")
        self._lost(command.identity, command.reason)
        self._hushed(command.identity, False)
        if command.identity in self.ways:
            self._driver.post("ways", Parted(command.identity))

    def _go(self, command: WaysCommand) -> None:
        peer = command.peer
        match command:
            case Lay():
                self._lay(peer)
            case Lift():
                self._lift(peer)
            case Turn():
                self._turned(peer)
            case Look():
                self._driver.post("ways", Looked(peer, self._busy(peer)))
            case Close(_, reason):
                log.info("closing the stream to %s: %s", peer, reason)
                self._wanted.pop(peer, None)
                self._dials.leave(peer)
                if (stream := self._streams.get(peer)) is not None:
                    stream.close(reason)
            case _:
                assert_never(command)
