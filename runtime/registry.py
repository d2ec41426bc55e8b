"""A process's tie to the coordinator: registers, renews, watches; serving goes on while the coordinator is away."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

import grpc

from core.errors import RemoteError, SetupError
from core.worker import Member, Part, ProcessEnded
from protos.baton.v1 import registry_pb2, registry_pb2_grpc
from runtime import rpc, wire

log = logging.getLogger("baton.registry")


class Registry:
    """Keeps `member()` registered, calls `changed` with every new membership, and `ended` once with each process's end.

    `member` is asked at each heartbeat, so readiness and lanes travel within `heartbeat_s`, or at once after `renew`.
    `mapped` is called before `changed`, with a worker's part of the transfer map and all that are listed.
    """

    def __init__(
        self,
        address: str,
        member: Callable[[], Member],
        changed: Callable[[tuple[Member, ...]], None],
        ended: Callable[[ProcessEnded], None] = lambda ended: None,
        mapped: Callable[[Part, tuple[Member, ...]], None] | None = None,
    ) -> None:
        self._address = address
        self._member = member
        self._changed = changed
        self._ended = ended
        self._mapped = mapped
        self._version = 0
        """Of the map that we were told last."""
        self._told: set[ProcessEnded] = set()
        self._soon = asyncio.Event()
        self._channel = rpc.channel(address)
        self._stub = registry_pb2_grpc.RegistryServiceStub(self._channel)

    def renew(self) -> None:
        """Send a heartbeat now: something about us changed."""
        self._soon.set()

    async def run(self) -> None:
        """Until cancelled; raises SetupError if the coordinator turns us away."""
        watching = asyncio.create_task(self._watch())
        try:
            while True:
                heartbeat_s = await self._register()
                await self._heartbeats(heartbeat_s)
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

    async def leave(self) -> None:
        """Deregister and hang up; a coordinator that is away is not waited for."""
        with contextlib.suppress(grpc.RpcError):
            request = registry_pb2.DeregisterRequest(identity=str(self._member().identity))
            await self._stub.Deregister(request, timeout=1.0)
        await self._channel.close()

    async def _register(self) -> float:
        while True:
            request = registry_pb2.RegisterRequest(
                member=wire.registry_member(self._member()), map_version=self._version
            )
            try:
                response = await self._stub.Register(request, timeout=5.0)
                return float(response.heartbeat_s)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
                    raise SetupError(f"the coordinator refused: {error.details()}", exit_code=6) from error
                log.info("coordinator %s: %s", self._address, error.code().name)
                await asyncio.sleep(0.2)

    async def _heartbeats(self, heartbeat_s: float) -> None:
        """Until the coordinator does not know us any more."""
        while True:
            self._soon.clear()
            member = self._member()
            request = registry_pb2.HeartbeatRequest(
                identity=str(member.identity),
                ready=member.ready,
                lanes=[wire.registry_lane(lane) for lane in member.lanes],
                costs=wire.registry_costs(member.costs),
            )
            try:
                await self._stub.Heartbeat(request, timeout=5.0)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.NOT_FOUND:
                    return
                log.info("heartbeat: %s", error.code().name)
            with contextlib.suppress(
                TimeoutError
            ):  # `wait_for` of Python 3.11 would swallow a cancel that meets `renew`
                async with asyncio.timeout(heartbeat_s):
                    await self._soon.wait()

    async def _watch(self) -> None:
        said = ""
        while True:
            try:
                me = str(self._member().identity) if self._mapped is not None else ""
                async for response in self._stub.Watch(registry_pb2.WatchRequest(identity=me)):
                    said = ""
                    members = tuple(wire.member_from(member) for member in response.members)
                    if self._mapped is not None and response.HasField("part"):
                        part = wire.part_from(response.part)
                        self._version = part.version
                        self._mapped(part, members)
                    self._changed(members)
                    ends = [wire.ended_from(each) for each in response.ended]
                    for end in ends:
                        if end not in self._told:
                            self._ended(end)
                    self._told = set(ends)
            except (grpc.aio.AioRpcError, RemoteError) as error:
                why = error.code().name if isinstance(error, grpc.aio.AioRpcError) else str(error)
                if why != said:  # five times a second while a coordinator is away
                    log.info("watch ended: %s", why)
                said = why
            except Exception:
                log.exception("a change of membership was not taken")
            await asyncio.sleep(0.2)
