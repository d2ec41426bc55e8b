"""Ends of calls: with a status and its details, or with nobody there to hear them."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import grpc
import pytest

from core.errors import RequestError
from runtime import rpc


def ended(deed) -> grpc.StatusCode:
    """How a call ends of which the handler does this to its context."""

    async def run() -> grpc.StatusCode:
        async def answer(payload: bytes, context: grpc.aio.ServicerContext):
            yield b""
            await deed(context)

        server = grpc.aio.server()
        handlers = {"Ask": grpc.unary_stream_rpc_method_handler(answer)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Test", handlers),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                stub: Any = channel.unary_stream("/test.Test/Ask")
                call = stub(b"", timeout=0.5)
                assert await call.read() == b""
                return await call.code()
        finally:
            await server.stop(0.0)

    return asyncio.run(run())


def test_a_refusal_is_the_status_of_the_call():
    async def deed(context):
        await rpc.refuse(context, RequestError("RESOURCE_EXHAUSTED", "later", retry_s=3.0))

    assert ended(deed) is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("known", [False, True])
def test_a_refusal_that_nobody_hears_any_more_is_no_fault(caplog, known):
    """The client's deadline may end the call while the refusal is being sent; gRPC tells that only a little later."""

    class Over:
        def set_trailing_metadata(self, metadata):
            pass

        async def abort(self, code, details):
            raise grpc.aio.InternalError("Failed")

    async def deed(context):
        if known:
            over: Any = Over()
            await rpc.refuse(over, RequestError("UNAVAILABLE", "nobody is there"))
        else:
            await Over().abort(None, "")

    with caplog.at_level(logging.ERROR):
        assert ended(deed) is not grpc.StatusCode.OK
    assert bool(caplog.records) is not known, "without `refuse` it is logged"
