"""One bidirectional stream between two of our processes: greeting first, one writer, heartbeats, goodbye.

Two concurrent writes kill a grpc.aio stream, so all frames go through one writer, which sends whatever waits as one
gRPC message. A stream that ends without Goodbye is a loss; the accepting side cannot tell a killed peer otherwise.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Protocol

import grpc

from core.errors import RemoteError
from core.worker import Greeting, Identity, Member
from protos.baton.v1 import worker_pb2
from protos.baton.v1.worker_pb2 import Frame
from runtime import wire

log = logging.getLogger("baton.streams")

HEARTBEAT_S = 0.25
QUIET_S = 0.8
"""Three missed heartbeats and a little: a peer so quiet gets nothing new from who can do without it."""
SILENCE_S = 3.5
"""A peer this silent is lost: longer than any stall of a busy process."""
MESSAGE_FRAMES = 512
"""Most frames in one gRPC message."""
MESSAGE_NBYTES = 2**20
"""A message is closed when it has grown to this; one frame may be larger."""
QUEUE_FRAMES = 200_000
"""A peer that lets this many frames wait is not reading: its stream is ended."""


REDIAL_S = 0.1


class Ears(Protocol):
    """What the owner of streams hears."""

    def opened(self, stream: Stream) -> None:
        """The greeting came and was accepted. Raise RemoteError to refuse it; the peer is told why."""
        ...

    def heard(self, stream: Stream, frame: Frame) -> None:
        """A frame came; heartbeats too."""
        ...

    def ended(self, stream: Stream, goodbye: bool) -> None:
        """An opened stream is over; called once."""
        ...


class Stream:
    """One end of a stream. `peer` is known once `opened` was called."""

    def __init__(self, write: Callable[[list[Frame]], Awaitable[None]]) -> None:
        self._write = write
        self._queue: deque[Frame] = deque()
        self._waiting: asyncio.Future[None] | None = None
        self._closing: str | None = None
        self.peer: Greeting | None = None
        self.reader = wire.Reader()
        self.broken = False

    def send(self, frames: Iterable[Frame]) -> None:
        """Queue frames for the one writer; dropped if the stream is over, as a cable would."""
        if self.broken or self._closing is not None:
            return
        self._queue.extend(frames)
        if len(self._queue) > QUEUE_FRAMES:
            log.warning("a peer does not read: %d frames wait, ending its stream", len(self._queue))
            self.broken = True
        self._wake()

    def close(self, reason: str, *, fault: bool = False) -> None:
        """Send what waits, then Goodbye, then end; with a `fault` of our own the peer takes it as a loss."""
        if self._closing is None:
            self._queue.append(Frame(goodbye=worker_pb2.Goodbye(reason=reason, fault=fault)))
            self._closing = reason
            self._wake()

    async def run(self, greeting: Greeting, incoming: AsyncIterator[Iterable[Frame]], ears: Ears) -> None:
        """Live until either side ends; never raises but for cancellation."""
        self._queue.appendleft(wire.hello(greeting))
        writer = asyncio.create_task(self._writing())
        reader = asyncio.create_task(self._reading(incoming, ears))
        goodbye = False
        try:
            done, _ = await asyncio.wait({writer, reader}, return_when=asyncio.FIRST_COMPLETED)
            if reader in done:
                goodbye = reader.result()
            elif self._closing is not None:
                # We said goodbye; hear what the peer still has to say, but do not wait for it for long.
                # Not by `wait_for`, which on Python 3.11 loses a cancellation that comes with the reader's end.
                await asyncio.wait({reader}, timeout=1.0)
                goodbye = True
        finally:
            self.broken = True
            for task in (writer, reader):
                task.cancel()
            if self.peer is not None:
                ears.ended(self, goodbye or self._closing is not None)
            await asyncio.gather(writer, reader, return_exceptions=True)

    async def _writing(self) -> None:
        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
            while not self.broken:
                if not self._queue:
                    if self._closing is not None:
                        return
                    await self._wait()
                    continue
                await self._write(self._batch())

    async def _wait(self) -> None:
        """Until a frame waits, ours if nobody's came in time. Woken in the next turn of the loop: `asyncio.wait_for`
        around an event takes three, each of them behind whatever else is due."""
        loop = asyncio.get_running_loop()
        self._waiting = loop.create_future()
        beat = loop.call_later(HEARTBEAT_S, self._beat)
        try:
            await self._waiting
        finally:
            self._waiting = None
            beat.cancel()

    def _beat(self) -> None:
        self._queue.append(Frame(heartbeat=worker_pb2.Heartbeat()))
        self._wake()

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def _batch(self) -> list[Frame]:
        """What waits, as much as one message should carry."""
        batch: list[Frame] = []
        nbytes = 0
        while self._queue and len(batch) < MESSAGE_FRAMES and nbytes < MESSAGE_NBYTES:
            batch.append(self._queue.popleft())
            nbytes += batch[-1].ByteSize()
        return batch

    async def _reading(self, incoming: AsyncIterator[Iterable[Frame]], ears: Ears) -> bool:
        """True if the peer said goodbye, and not because of a fault of its own."""
        try:
            async for batch in incoming:
                for frame in batch:
                    kind = frame.WhichOneof("body")
                    if kind == "goodbye":
                        log.info("%s says goodbye: %s", self._name(), frame.goodbye.reason)
                        return not frame.goodbye.fault
                    if self.peer is None:
                        self.peer = wire.greeting(frame)
                        try:
                            ears.opened(self)
                        except RemoteError:
                            self.peer = None
                            raise
                    else:
                        ears.heard(self, frame)
        except RemoteError as error:
            log.warning("%s: %s", self._name(), error)
            self.close(str(error))
            await asyncio.sleep(0.2)
        except (grpc.RpcError, grpc.aio.BaseError, asyncio.InvalidStateError):
            pass  # broken, or our own server has ended while the peer still spoke
        except Exception:
            # A fault of ours in what a frame led to: this stream ends, which its peer takes as a loss; no other does.
            log.exception("ending the stream of %s", self._name())
        return False

    def _name(self) -> str:
        return str(self.peer.member.identity) if self.peer else "a peer"


async def dialled(
    stream_method: Callable[[], grpc.aio.StreamStreamCall],
    request: type,
    greeting: Greeting,
    ears: Ears,
) -> None:
    """Open a stream as the dialling side and live on it; returns when it is over."""
    call = stream_method()

    async def write(batch: list[Frame]) -> None:
        await call.write(request(frames=batch))

    async def incoming() -> AsyncIterator[Iterable[Frame]]:
        async for message in call:
            yield message.frames

    stream = Stream(write)
    try:
        await stream.run(greeting, incoming(), ears)
    finally:
        call.cancel()


async def accepted(
    requests: AsyncIterator[worker_pb2.SessionRequest | worker_pb2.PeerRequest],
    context: grpc.aio.ServicerContext,
    response: type,
    greeting: Greeting,
    ears: Ears,
) -> None:
    """Live on a stream that a peer opened; returns when it is over, and with it the RPC."""

    async def write(batch: list[Frame]) -> None:
        await context.write(response(frames=batch))

    async def incoming() -> AsyncIterator[Iterable[Frame]]:
        async for message in requests:
            yield message.frames

    stream = Stream(write)
    await stream.run(greeting, incoming(), ears)


class Dials:
    """Keeps one dialled stream to every member that is wanted, redialling until it is not wanted any more."""

    def __init__(self, live: Callable[[Member], Awaitable[None]]) -> None:
        self._live = live
        self._tasks: dict[Identity, asyncio.Task[None]] = {}
        self._leaving: set[asyncio.Task[None]] = set()

    def want(self, members: dict[Identity, Member]) -> None:
        """Dial those that are new, hang up on those that are gone."""
        for identity in [identity for identity in self._tasks if identity not in members]:
            self._tasks.pop(identity).cancel()
        for identity, member in members.items():
            if identity not in self._tasks:
                self._tasks[identity] = asyncio.create_task(self._keep(member))

    def leave(self, identity: Identity) -> None:
        """Dial it no more once the stream that stands has ended by itself."""
        task = self._tasks.pop(identity, None)
        if task is not None:
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)

    async def close(self) -> None:
        """Hang up on everybody."""
        tasks = [*self._tasks.values(), *self._leaving]
        self._tasks.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _keep(self, member: Member) -> None:
        task = asyncio.current_task()
        while self._tasks.get(member.identity) is task:  # also if a cancellation was lost on its way
            try:
                await self._live(member)
            except Exception:
                log.exception("the stream to %s failed", member.identity)
            await asyncio.sleep(REDIAL_S)
