"""The proxy before the peer's two servers: a prompt goes to the first, and with what that says about KV to the second.

    python -m bench.peer_proxy PREFILL DECODE    (host:port each; the first line of its output is where it listens)

It does what vLLM's connector asks of a proxy and no more: the prefill server gets the request with one token to make
and ``do_remote_decode``, answers with where the KV lies, and the decode server gets the request with that. Nothing is
tried again and nobody stands in for who does not answer: 502 then, or, once tokens have come, an end in mid-stream. A
client that leaves is passed on at once, because what it was owed would be computed for nobody.

``GET /times`` gives, and forgets, what it measured of each request that got a token: seconds from the request to the
prefill server's answer, and from there to the decode server's first bytes, which is the hand-over.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from bench.peer_http import LAST_CHUNK, MOST_HEAD, Answer, Broken, Pool, chunk, message, read_head, read_parts

REMOTE_DECODE = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
"""What makes the prefill server keep the KV for somebody else."""
STREAM = (
    b"HTTP/1.1 200 OK\r\n"
    b"content-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)  # fmt: skip


def first_leg(request: dict[str, Any]) -> dict[str, Any]:
    """The request that the prefill server gets."""
    leg = {**request, "max_tokens": 1, "stream": False, "kv_transfer_params": REMOTE_DECODE}
    if "min_tokens" in leg:
        leg["min_tokens"] = 1
    leg.pop("stream_options", None)
    return leg


def second_leg(request: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
    """The request that the decode server gets, once the prefill server has answered."""
    return {**request, "kv_transfer_params": answer["kv_transfer_params"]}


@dataclass(slots=True)
class Proxy:
    """Serves completions through two servers."""

    prefill: Pool
    decode: Pool
    times: list[tuple[float, float]] = field(default_factory=list)
    """Of each request that got a token: (prefill_s, hand_over_s)."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One client's connection, until it leaves or is left."""
        try:
            while (head := await read_head(reader)) is not None:
                body = b"".join([data async for data in read_parts(reader, head)])
                if head.words[0] == "GET":
                    found, self.times = self.times, []
                    writer.write(message("HTTP/1.1 200 OK", json.dumps(found).encode()))
                    continue
                work = asyncio.create_task(self._complete(json.loads(body), writer))
                gone = asyncio.create_task(reader.read(1))  # a client says nothing while it is answered
                try:
                    await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
                    if not work.done() or not await work:
                        return
                finally:
                    for task in (work, gone):
                        task.cancel()
                    await asyncio.gather(work, gone, return_exceptions=True)
        except (Broken, ConnectionError):
            pass
        finally:
            writer.close()

    async def _complete(self, request: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
        """One completion; False if its client's connection is of no use any more."""
        asked = time.perf_counter()
        path = "/v1/completions"
        began = False
        try:
            async with self.prefill.call(path, json.dumps(first_leg(request)).encode()) as answer:
                found = await answer.body()
                if answer.status != 200:
                    return _refuse(writer, "prefill", answer, found)
            prefilled = time.perf_counter()
            leg = json.dumps(second_leg(request, json.loads(found))).encode()
            async with self.decode.call(path, leg) as answer:
                if answer.status != 200:
                    return _refuse(writer, "decode", answer, await answer.body())
                async for data in answer.parts():
                    if not began:
                        began = True
                        self.times.append((prefilled - asked, time.perf_counter() - prefilled))
                        writer.write(STREAM)
                    writer.write(chunk(data))
                    await writer.drain()
                if not began:
                    raise Broken("no token came")
                writer.write(LAST_CHUNK)
                return True
        except Broken as error:
            if began:  # an answer has one head, and the end of this one is missing
                return False
            writer.write(message("HTTP/1.1 502 Bad Gateway", json.dumps({"error": str(error)}).encode()))
            return True


def _refuse(writer: asyncio.StreamWriter, who: str, answer: Answer, found: bytes) -> bool:
    text = json.dumps({"error": f"{who} server: {answer.status} {found[:500].decode(errors='replace')}"})
    writer.write(message("HTTP/1.1 502 Bad Gateway", text.encode()))
    return True


async def serve(prefill: str, decode: str) -> None:
    """Listen on any free port of loopback, say which, and serve for ever."""
    proxy = Proxy(Pool(prefill), Pool(decode))
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0, limit=MOST_HEAD)
    host, port = server.sockets[0].getsockname()
    print(f"{host}:{port}", flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], sys.argv[2]))
