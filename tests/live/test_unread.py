"""A client that never reads its response is hung up on, and costs nobody else anything."""

from __future__ import annotations

import asyncio
import contextlib
import logging

import grpc

from control import process
from core.config import GatewayConfig
from core.worker import Identity
from gateway import gateway as front
from tests.live.asks import case
from tests.live.cluster import MODEL, Client, Reply, until
from tests.live.test_streams import SMALL_WINDOW

UNREAD = case(20, 400, 1, forever=True, request_id="unread")
BESIDE = case(30, 600, 2, forever=True)


def test_a_client_that_never_reads_is_hung_up_on(live, reference, monkeypatch, caplog):
    """The gateway runs in this process, with less patience, before the deployment's workers."""
    monkeypatch.setattr(front, "UNREAD_S", 0.3)
    caplog.set_level(logging.INFO, "baton.gateway")
    bugs: list[BaseException] = []
    config = GatewayConfig("impatient", live.deployment.coordinator, str(live.model), MODEL, check=True)

    async def run():
        gateway = process.make(config, Identity(config.name, 1), bugs.append)
        await gateway.start()
        try:
            await asyncio.to_thread(until, lambda: live.health(gateway.address) == "SERVING", "it serves")
            async with Client(gateway.address, SMALL_WINDOW) as hung, Client(gateway.address) as client:
                first = Reply()
                call = hung.stub.Generate(UNREAD.request)
                first.take(await call.read())
                beside = asyncio.create_task(client.generate(BESIDE.request))
                for _ in range(400):
                    again = await client.generate(UNREAD.request)
                    if again.code != "ALREADY_EXISTS":
                        break
                    await asyncio.sleep(0.05)
                rest = Reply()
                with contextlib.suppress(grpc.RpcError):
                    while (message := await call.read()) is not grpc.aio.EOF:
                        rest.take(message)
                rest.code, rest.details = (await call.code()).name, await call.details()
                return first, rest, again, await beside
        finally:
            await gateway.stop("the test is over")

    first, rest, again, beside = asyncio.run(run())
    assert (rest.code, rest.details) == ("ABORTED", "the response was not read within 0.3 s of its end")
    tokens = first.tokens + rest.tokens
    assert tokens == reference.tokens(UNREAD.prompt, UNREAD.sampling)[: len(tokens)]
    UNREAD.check(again, reference)
    BESIDE.check(beside, reference)
    hung_up = [record for record in caplog.records if "does not read" in record.message]
    assert [record.request for record in hung_up] == ["unread"]
    assert not bugs
