"""gRPC as all our processes use it: channel and server options, starting a server, statuses with details."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, NoReturn

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection
from grpc_status import rpc_status

from core.errors import RequestError, SetupError

MAX_MESSAGE_NBYTES = 64 * 1024 * 1024

CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_NBYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_NBYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # A dial before the peer listens waits out the back-off; the defaults (1 s and more) are made for wide networks.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 300),
)

SERVER_OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_NBYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_NBYTES),
    ("grpc.keepalive_permit_without_calls", 1),
    # Gateways upstream ping idle channels every 30 s; the default would close the connection on them.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    # Two servers on one port would share it silently; we want to hear that it is taken.
    ("grpc.so_reuseport", 0),
)


def channel(address: str) -> grpc.aio.Channel:
    """An insecure channel with our options; loopback and trusted networks only."""
    return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)


class Parse(grpc.aio.ServerInterceptor):
    """Answers INVALID_ARGUMENT to a request that is not its message, where grpc.aio would say UNKNOWN."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming or handler.request_deserializer is None:
            return handler
        parse = handler.request_deserializer
        # The stubs describe the synchronous server's handlers; ours are coroutines and asynchronous generators.
        many: Any = handler.unary_stream
        one: Any = handler.unary_unary

        async def parsed(payload: bytes, context: grpc.aio.ServicerContext) -> Any:
            try:
                return parse(payload)
            except Exception as error:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"request: not a message of this call: {error}")

        async def stream(payload: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            async for response in many(await parsed(payload, context), context):
                yield response

        async def answer(payload: bytes, context: grpc.aio.ServicerContext) -> Any:
            return await one(await parsed(payload, context), context)

        if many is not None:
            return grpc.unary_stream_rpc_method_handler(stream, None, handler.response_serializer)
        return grpc.unary_unary_rpc_method_handler(answer, None, handler.response_serializer)


class Server:
    """A gRPC server with health and reflection, bound to `address` (port 0: any free port)."""

    def __init__(self, address: str, services: Iterable[str]) -> None:
        self.grpc = grpc.aio.server(interceptors=(Parse(),), options=SERVER_OPTIONS)
        self.health = HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self.grpc)
        self._services = ("", *services)
        reflection.enable_server_reflection((*services, "grpc.health.v1.Health", reflection.SERVICE_NAME), self.grpc)
        host = address.rpartition(":")[0]
        try:
            port = self.grpc.add_insecure_port(address)
        except RuntimeError as error:
            raise SetupError(f"address: cannot listen on {address}; is the port in use?", exit_code=4) from error
        self.address = f"{host}:{port}"

    async def start(self) -> None:
        """Serve; healthy only after `healthy(True)`."""
        await self.healthy(False)
        await self.grpc.start()

    async def healthy(self, ready: bool) -> None:
        """Report readiness of the whole process; liveness is that it answers at all."""
        from grpc_health.v1.health_pb2 import HealthCheckResponse

        state = HealthCheckResponse.SERVING if ready else HealthCheckResponse.NOT_SERVING
        for service in self._services:
            await self.health.set(service, state)
        await self.health.set("liveness", HealthCheckResponse.SERVING)
        await self.health.set("readiness", state)

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, give those running `grace_s` to end."""
        await self.health.enter_graceful_shutdown()
        await self.grpc.stop(grace_s)


def status_of(error: RequestError) -> status_pb2.Status:
    """The rich status of a refused request: RetryInfo where waiting helps, ErrorInfo always."""
    details = [error_details_pb2.ErrorInfo(reason=error.code, domain="baton")]
    packed = []
    for detail in details:
        packed.append(any_pb2.Any())
        packed[-1].Pack(detail)
    if error.retry_s is not None:
        wait = duration_pb2.Duration()
        wait.FromNanoseconds(int(error.retry_s * 1e9))
        packed.append(any_pb2.Any())
        packed[-1].Pack(error_details_pb2.RetryInfo(retry_delay=wait))
    return status_pb2.Status(code=code_pb2.Code.Value(error.code), message=error.message, details=packed)


async def refuse(context: grpc.aio.ServicerContext, error: RequestError) -> NoReturn:
    """End the call with the error's status and details; it is cancelled if its client has ended it at that moment."""
    status = rpc_status.to_status(status_of(error))
    context.set_trailing_metadata(status.trailing_metadata)
    try:
        await context.abort(status.code, status.details)
    except grpc.aio.InternalError:  # gRPC has not heard so yet, and would log this as a fault of ours
        raise asyncio.CancelledError from None
    raise AssertionError("abort returns never")
