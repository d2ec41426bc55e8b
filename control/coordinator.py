"""The coordinator process: the shell of `scheduler.membership`, as a gRPC service."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

import grpc

from core.config import CoordinatorConfig
from core.errors import RemoteError
from protos.baton.v1 import inspect_pb2_grpc, registry_pb2, registry_pb2_grpc
from runtime import inspection, rpc, wire
from runtime.driver import Driver
from runtime.inspection import Inspection
from runtime.metrics import Gauges, Metrics
from scheduler.membership import (
    Admitted,
    Joining,
    Left,
    Membership,
    MembershipCommand,
    Publish,
    Renewed,
    Turned,
    Unknown,
)

log = logging.getLogger("baton.coordinator")

SERVICE = "baton.v1.RegistryService"


class Coordinator(registry_pb2_grpc.RegistryServiceServicer):
    """Answers the registry's calls from the membership machine; holds nothing else."""

    def __init__(self, config: CoordinatorConfig) -> None:
        self._config = config
        self._membership = Membership(config.lease_s)
        self._driver = Driver()
        self._driver.seat("membership", self._membership, self._perform)
        self._verdict: MembershipCommand | None = None
        self._watchers: set[asyncio.Event] = set()
        self._closing = False
        self._metrics = Metrics(self._gauges)
        self._server = rpc.Server(config.listen, [SERVICE, inspection.SERVICE])
        registry_pb2_grpc.add_RegistryServiceServicer_to_server(self, self._server.grpc)
        self.inspection = Inspection(config.name, self._driver)
        inspect_pb2_grpc.add_InspectServiceServicer_to_server(self.inspection, self._server.grpc)
        self.address = self._server.address
        self.metrics_address = self._metrics.serve(config.listen.rpartition(":")[0])

    async def start(self) -> None:
        """Serve."""
        await self._server.start()
        await self._server.healthy(True)

    async def stop(self, reason: str) -> None:
        """Hang up: those who watch are told that it is over, reachable or not."""
        self._closing = True
        for watcher in self._watchers:
            watcher.set()
        self._driver.close()
        await self._server.stop(0.2)
        self._metrics.close()

    def _perform(self, command: MembershipCommand) -> None:
        if isinstance(command, Publish):
            names = ", ".join(m.identity.name for m in command.members)
            log.info("membership %d, transfer map %d: %s", command.epoch, self._membership.map_version, names)
            for watcher in self._watchers:
                watcher.set()
        else:
            self._verdict = command

    def _ask(self, event: Joining | Renewed) -> MembershipCommand | None:
        self._verdict = None
        self._driver.post("membership", event)
        return self._verdict

    async def Register(
        self, request: registry_pb2.RegisterRequest, context: grpc.aio.ServicerContext
    ) -> registry_pb2.RegisterResponse:
        try:
            verdict = self._ask(Joining(wire.member_from(request.member), request.map_version))
        except RemoteError as error:
            log.warning("turned %r away: %s", request.member.identity[:99], error)
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        match verdict:
            case Turned(identity, reason):
                log.warning("turned %s away: %s", identity, reason)
                await context.abort(grpc.StatusCode.FAILED_PRECONDITION, reason)
            case Admitted():
                return registry_pb2.RegisterResponse(heartbeat_s=self._config.lease_s / 3.5)
        await context.abort(grpc.StatusCode.INTERNAL, "registration was not decided")
        raise AssertionError("abort returns never")

    async def Heartbeat(
        self, request: registry_pb2.HeartbeatRequest, context: grpc.aio.ServicerContext
    ) -> registry_pb2.HeartbeatResponse:
        try:
            lanes = tuple(wire.lane_from(lane) for lane in request.lanes)
            costs = wire.costs_from(request.costs) if request.HasField("costs") else None
            identity = wire.identity(request.identity)
        except RemoteError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        if isinstance(self._ask(Renewed(identity, request.ready, lanes, costs)), Unknown):
            await context.abort(grpc.StatusCode.NOT_FOUND, f"{request.identity} is not registered")
        return registry_pb2.HeartbeatResponse()

    async def Deregister(
        self, request: registry_pb2.DeregisterRequest, context: grpc.aio.ServicerContext
    ) -> registry_pb2.DeregisterResponse:
        try:
            self._driver.post("membership", Left(wire.identity(request.identity)))
        except RemoteError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        return registry_pb2.DeregisterResponse()

    async def ReportEnd(
        self, request: registry_pb2.ReportEndRequest, context: grpc.aio.ServicerContext
    ) -> registry_pb2.ReportEndResponse:
        try:
            self._driver.post("membership", wire.ended_from(request.ended))
        except RemoteError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        return registry_pb2.ReportEndResponse()

    async def Watch(
        self, request: registry_pb2.WatchRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[registry_pb2.WatchResponse]:
        try:
            who = wire.identity(request.identity) if request.identity else None
        except RemoteError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        changed = asyncio.Event()
        self._watchers.add(changed)
        try:
            while not self._closing:
                changed.clear()
                members = [wire.registry_member(member) for member in self._membership.members]
                ended = [wire.registry_ended(each) for each in self._membership.ended]
                part = self._membership.part(who) if who is not None else None
                yield registry_pb2.WatchResponse(
                    members=members,
                    epoch=self._membership.epoch,
                    ended=ended,
                    part=wire.registry_part(part) if part is not None else None,
                )
                await changed.wait()
        finally:
            self._watchers.discard(changed)

    def _gauges(self) -> Gauges:
        yield "transfer_map_version", "Of who may pull KV from whom.", {}, float(self._membership.map_version)
        members = self._membership.members
        for role in sorted({member.role for member in members}):
            ready = [member.ready for member in members if member.role is role]
            yield "members", "Registered processes.", {"role": role, "ready": "true"}, float(sum(ready))
            yield "members", "Registered processes.", {"role": role, "ready": "false"}, float(len(ready) - sum(ready))
