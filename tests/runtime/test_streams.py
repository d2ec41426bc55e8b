"""A stream's writer: one at a time, woken in the next turn of the loop, and never silent."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable

import pytest

from core.kv import KvShape
from core.worker import Greeting, Identity, Member, Numerics, Role
from protos.baton.v1 import worker_pb2
from protos.baton.v1.worker_pb2 import Frame
from runtime import streams
from runtime.streams import QUIET_S, SILENCE_S, Stream
from scheduler.router import RouterConfig

MEMBER = Member(
    identity=Identity("decode-0", 7),
    role=Role.DECODE,
    address="",
    metrics_address="",
    build="test",
    model="m",
    fingerprint="f",
    kv=KvShape(layers=1, kv_heads=1, head_dim=8, page_tokens=16, dtype="float32"),
    pages=4,
    context=64,
    numerics=Numerics(exact=False, dtype="float32", threads=1, cpu="none"),
    transport="zeromq",
)


class Deaf:
    """Owns a stream whose peer never says anything."""

    def opened(self, stream: Stream) -> None:
        raise AssertionError("nobody spoke")

    def heard(self, stream: Stream, frame: Frame) -> None:
        raise AssertionError("nobody spoke")

    def ended(self, stream: Stream, goodbye: bool) -> None:
        raise AssertionError("it was never opened")


async def silence() -> AsyncIterator[Iterable[Frame]]:
    await asyncio.Event().wait()
    yield []


def beat() -> Frame:
    return Frame(heartbeat=worker_pb2.Heartbeat())


class Written(list[list[str]]):
    """The messages a stream wrote, as kinds of frames; no write ends while the gate is shut."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()

    async def reach(self, count: int) -> None:
        """Wait for so many messages."""
        for _ in range(5000):
            if len(self) >= count:
                return
            await asyncio.sleep(0.001)
        raise AssertionError(f"got {len(self)} messages, want {count}")


def lived(story) -> Written:
    """What a stream wrote while `story` used it."""
    written = Written()

    async def write(batch: list[Frame]) -> None:
        written.append([frame.WhichOneof("body") or "" for frame in batch])
        await written.gate.wait()

    async def live() -> None:
        stream = Stream(write)
        task = asyncio.create_task(stream.run(Greeting(MEMBER, b"", 0), silence(), Deaf()))
        await written.reach(1)
        await story(stream, written)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(live())
    return written


def test_a_router_counts_on_the_verdict_on_who_is_quiet_when_it_comes():
    assert RouterConfig().verdict_s == pytest.approx(SILENCE_S - QUIET_S)


def test_frames_are_written_in_the_next_turn_of_the_loop():
    async def story(stream, written):
        for _ in range(3):
            await asyncio.sleep(0)
        for count in range(2, 5):
            stream.send([beat(), beat()])
            assert len(written) == count - 1
            await asyncio.sleep(0)
            assert len(written) == count
            await asyncio.sleep(0)

    assert lived(story)[1:] == [["heartbeat"] * 2] * 3


def test_what_waits_during_a_write_goes_out_together():
    async def story(stream, written):
        written.gate.clear()
        for _ in range(3):
            stream.send([beat()])
            await asyncio.sleep(0.005)
        written.gate.set()
        await written.reach(3)

    assert [len(batch) for batch in lived(story)] == [1, 1, 2]


@pytest.mark.parametrize("spoken", [False, True])
def test_a_stream_that_has_nothing_to_say_says_so(monkeypatch, spoken):
    monkeypatch.setattr(streams, "HEARTBEAT_S", 0.01)

    async def story(stream, written):
        if spoken:
            stream.send([beat()])
        await written.reach(4)

    assert lived(story)[1:4] == [["heartbeat"]] * 3


def test_goodbye_is_the_last_that_is_written():
    async def story(stream, written):
        await asyncio.sleep(0)
        stream.close("enough")
        stream.send([beat()])
        await written.reach(2)

    assert lived(story)[1:] == [["goodbye"]]


@pytest.mark.parametrize("how", ["close", "want"])
def test_nobody_is_dialled_again_when_a_cancellation_was_lost(how, monkeypatch):
    """A stream that ends by itself as it is cancelled: on Python 3.11 some of asyncio swallows that."""
    dialled = []
    monkeypatch.setattr(streams, "REDIAL_S", 0.0)

    async def live(member: Member) -> None:
        dialled.append(member.identity)
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(10.0)

    async def run() -> None:
        dials = streams.Dials(live)
        dials.want({MEMBER.identity: MEMBER})
        await asyncio.sleep(0.01)
        if how == "want":
            dials.want({})
        await asyncio.wait_for(dials.close(), 5.0)
        await asyncio.sleep(0.05)

    asyncio.run(run())
    assert dialled == [MEMBER.identity]
