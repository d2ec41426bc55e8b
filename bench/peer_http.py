"""As much of HTTP/1.1 as a benchmark's client and proxy need, over asyncio's streams.

Connections are kept between calls, and every part of a body is handed on as soon as it has come. There is so little of
it because what a client and a proxy spend on the cores that they share with two engines would count against the peer.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

MOST_HEAD = 1 << 16
LAST_CHUNK = b"0\r\n\r\n"


class Broken(Exception):
    """The other end left in the middle, or speaks no HTTP."""


@dataclass(slots=True)
class Head:
    """The first line of a request or an answer, in its three words, and the header fields by lower-case name."""

    words: tuple[str, str, str]
    fields: dict[str, str]

    @property
    def nbytes(self) -> int:
        """Of the body, where that is said."""
        return int(self.fields.get("content-length", "0"))

    @property
    def chunked(self) -> bool:
        """Whether the body comes in chunks."""
        return "chunked" in self.fields.get("transfer-encoding", "")

    @property
    def keeps(self) -> bool:
        """Whether the connection is there for another call afterwards."""
        return self.fields.get("connection", "").lower() != "close"


async def read_head(reader: asyncio.StreamReader) -> Head | None:
    """The next head, None if the other end left before it began; raises Broken."""
    try:
        raw = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise Broken("left within a head") from None
        return None
    except (asyncio.LimitOverrunError, ConnectionError) as error:
        raise Broken(str(error)) from None
    first, *lines = raw.decode("latin-1").rstrip("\r\n").split("\r\n")
    words = first.split(" ", 2)
    if len(words) < 2:
        raise Broken(f"no HTTP: {first[:80]!r}")
    fields = {}
    for line in lines:
        name, _, value = line.partition(":")
        fields[name.strip().lower()] = value.strip()
    return Head((words[0], words[1], words[2] if len(words) == 3 else ""), fields)


async def read_parts(reader: asyncio.StreamReader, head: Head) -> AsyncIterator[bytes]:
    """The body as it comes, chunk by chunk; raises Broken if the other end leaves before its end."""
    try:
        if not head.chunked:
            if head.nbytes:
                yield await reader.readexactly(head.nbytes)
            return
        while True:
            line = await reader.readuntil(b"\r\n")
            nbytes = int(line.split(b";")[0], 16)
            data = await reader.readexactly(nbytes + 2)
            if not nbytes:
                return
            yield data[:-2]
    except (asyncio.IncompleteReadError, ConnectionError):
        raise Broken("left within a body") from None
    except (asyncio.LimitOverrunError, ValueError) as error:
        raise Broken(f"no chunk: {error}") from None


def message(first: str, body: bytes = b"", **fields: str) -> bytes:
    """A whole request or answer with a body of known length."""
    lines = [first, f"content-length: {len(body)}", *(f"{name.replace('_', '-')}: {fields[name]}" for name in fields)]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + body


def chunk(data: bytes) -> bytes:
    """One chunk of a body."""
    return b"%x\r\n%s\r\n" % (len(data), data)


@dataclass(slots=True)
class Answer:
    """A server's answer, its body not yet read."""

    head: Head
    reader: asyncio.StreamReader
    whole: bool = False
    """Once the body was read to its end."""

    @property
    def status(self) -> int:
        """Such as 200."""
        return int(self.head.words[1])

    async def parts(self) -> AsyncIterator[bytes]:
        """The body as it comes; raises Broken."""
        async for data in read_parts(self.reader, self.head):
            yield data
        self.whole = True

    async def body(self) -> bytes:
        """All of the body; raises Broken."""
        return b"".join([data async for data in self.parts()])


@dataclass(slots=True)
class Pool:
    """Connections to one server, kept between calls."""

    address: str
    """host:port."""
    _spare: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = field(default_factory=list)

    @contextlib.asynccontextmanager
    async def call(self, path: str, body: bytes = b"", method: str = "POST") -> AsyncIterator[Answer]:
        """One call. Who leaves the block before the body's end closes the connection, which tells the server.

        Raises Broken where the server cannot be reached or leaves.
        """
        request = message(f"{method} {path} HTTP/1.1", body, host=self.address, content_type="application/json")
        head, reader, writer = await self._begin(request)
        answer = Answer(head, reader)
        try:
            yield answer
        finally:
            if answer.whole and head.keeps:
                self._spare.append((reader, writer))
            else:
                writer.close()

    async def _begin(self, request: bytes) -> tuple[Head, asyncio.StreamReader, asyncio.StreamWriter]:
        """Send, and read the answer's head; a kept connection that the server had closed meanwhile is no failure."""
        host, _, port = self.address.rpartition(":")
        while True:
            kept = bool(self._spare)
            try:
                reader, writer = self._spare.pop() if kept else await asyncio.open_connection(host, int(port))
            except OSError as error:
                raise Broken(f"{self.address}: {error.strerror or error}") from None
            try:
                writer.write(request)
                head = await read_head(reader)
            except BaseException as error:
                writer.close()
                if kept and isinstance(error, Broken):
                    continue
                raise
            if head is not None:
                return head, reader, writer
            writer.close()
            if not kept:
                raise Broken(f"{self.address} left without an answer")

    def close(self) -> None:
        """Close all that are kept."""
        for _, writer in self._spare:
            writer.close()
        self._spare.clear()
