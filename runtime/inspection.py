"""What a process says of itself to an operator: the shell of `standing`, `trace` and `debug` (inspect.proto)."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable
from typing import Any

import grpc

from core.pages import Pages
from core.standing import Standing, Stands
from protos.baton.v1 import inspect_pb2, inspect_pb2_grpc
from runtime import debug
from runtime.driver import Driver

log = logging.getLogger("baton.inspection")

SERVICE = "baton.v1.InspectService"


class Inspection(inspect_pb2_grpc.InspectServiceServicer):
    """Asks the machines of one driver; changes nothing.

    `more`: requests that no machine has, by the name of who has them. `trace`: of a request by the client's name,
    gateways only. `ledger`: of a worker, once it has one. `here_only`: clients share the address.
    """

    def __init__(
        self,
        name: str,
        driver: Driver,
        *,
        more: Callable[[], Iterable[tuple[str, Standing]]] = lambda: (),
        trace: Callable[[str], inspect_pb2.TraceResponse | None] = lambda request_id: None,
        ledger: Callable[[], Pages | None] = lambda: None,
        here_only: bool = False,
    ) -> None:
        self._name = name
        self.driver = driver
        self._more = more
        self._trace = trace
        self._ledger = ledger
        self._here_only = here_only

    def requests(self) -> list[tuple[str, Standing]]:
        """Every request of the process with the machine that has it."""
        machines = self.driver.machines.items()
        asked = [
            (name, each) for name, machine in machines if isinstance(machine, Stands) for each in machine.standing()
        ]
        return [*asked, *self._more()]

    def document(self) -> dict[str, Any]:
        """What `debug` answers."""
        return debug.document(self._name, self.driver.machines, self._ledger())

    def to_log(self) -> None:
        """The same in the log, a line for each part."""
        document = self.document()
        for part in ("threads", "tasks", "machines", "pages"):
            log.info("%s: %s", part, json.dumps(document[part]))

    async def GetRequests(
        self, request: inspect_pb2.GetRequestsRequest, context: grpc.aio.ServicerContext
    ) -> inspect_pb2.GetRequestsResponse:
        await self._allow(context)
        now = self.driver.now()
        return inspect_pb2.GetRequestsResponse(
            identity=self._name, requests=[_standing(name, each, now) for name, each in self.requests()]
        )

    async def Trace(
        self, request: inspect_pb2.TraceRequest, context: grpc.aio.ServicerContext
    ) -> inspect_pb2.TraceResponse:
        await self._allow(context)
        found = self._trace(request.request_id)
        if found is None:
            await context.abort(
                grpc.StatusCode.NOT_FOUND, f"request_id: got {request.request_id!r}, which is not known"
            )
            raise AssertionError("abort returns never")
        return found

    async def Debug(
        self, request: inspect_pb2.DebugRequest, context: grpc.aio.ServicerContext
    ) -> inspect_pb2.DebugResponse:
        await self._allow(context)
        return inspect_pb2.DebugResponse(document=json.dumps(self.document()))

    async def _allow(self, context: grpc.aio.ServicerContext) -> None:
        if self._here_only and not here(context.peer()):
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "ask from the machine that this gateway runs on")


def here(peer: str) -> bool:
    """Whether gRPC's name of a peer is that of one on this machine's loopback."""
    kind, _, address = peer.partition(":")
    host = address.rpartition(":")[0].replace("%5B", "[").replace("%5D", "]").strip("[]")
    if kind == "ipv4" or host.startswith("::ffff:"):
        return host.removeprefix("::ffff:").startswith("127.")
    return kind == "unix" or (kind == "ipv6" and host == "::1")


def _standing(machine: str, each: Standing, now: float) -> inspect_pb2.Standing:
    said = inspect_pb2.Standing(
        key=each.key,
        request_id=each.request,
        machine=machine,
        state=each.state,
        age_s=now - each.since,
        waits_for=each.waits_for,
        owner=each.owner,
        tokens=each.tokens,
    )
    if each.until < math.inf:
        said.left_s = each.until - now
    return said
