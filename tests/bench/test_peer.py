"""The comparison with vLLM, without vLLM: proxy and clients against servers that speak alike, and the arithmetic."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import signal
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from bench import peer_env, peer_faults
from bench.peer_faults import disturb
from bench.peer_http import LAST_CHUNK, Broken, Pool, chunk, message, read_head, read_parts
from bench.peer_load import Ask, Lost, Sample, Seen, asks, closed, follow, joined, opened, quantile
from bench.peer_proxy import REMOTE_DECODE, STREAM, Proxy
from bench.peer_sides import completion
from bench.peer_vllm import Found, Run, offered

PARAMS = {"do_remote_prefill": True, "remote_engine_id": "p", "remote_block_ids": [3, 4]}
ASK = Ask((5, 6, 7), 4)


@dataclass
class Fake:
    """A server that answers completions by `reply`; keeps what it was asked, and notes who left it."""

    reply: Callable[[Fake, dict[str, Any], asyncio.StreamWriter], Any]
    asked: list[dict[str, Any]] = field(default_factory=list)
    connections: int = 0
    came: asyncio.Event = field(default_factory=asyncio.Event)
    left: asyncio.Event = field(default_factory=asyncio.Event)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while (head := await read_head(reader)) is not None:
                body = b"".join([data async for data in read_parts(reader, head)])
                self.asked.append(json.loads(body))
                self.came.set()
                work = asyncio.create_task(self.reply(self, self.asked[-1], writer))
                gone = asyncio.create_task(reader.read(1))
                await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not work.done():
                    self.left.set()
                    work.cancel()
                    return
                gone.cancel()
                await asyncio.gather(gone, return_exceptions=True)
                if await work:
                    return
        finally:
            writer.close()


async def keeps(fake: Fake, request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    writer.write(message("HTTP/1.1 200 OK", json.dumps({"kv_transfer_params": PARAMS}).encode()))


def event(tokens: list[int]) -> bytes:
    return b"data: " + json.dumps({"choices": [{"text": "", "token_ids": tokens}]}).encode() + b"\n\n"


async def streams(fake: Fake, request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    """Tokens 0, 1, 2 ..., in chunks that respect no event's borders."""
    text = b"".join(event([token]) for token in range(request["max_tokens"])) + b"data: [DONE]\n\n"
    writer.write(STREAM)
    for at in range(0, len(text), 33):
        writer.write(chunk(text[at : at + 33]))
        await asyncio.sleep(0)
    writer.write(LAST_CHUNK)


async def breaks(fake: Fake, request: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
    writer.write(STREAM + chunk(event([0, 1])))
    return True


async def stalls(fake: Fake, request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(60)


async def begins(fake: Fake, request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    writer.write(STREAM + chunk(event([0])))
    await asyncio.sleep(60)


async def refuses(fake: Fake, request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    writer.write(message("HTTP/1.1 500 Internal Server Error", b"no"))


async def complains(fake: Fake, request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    writer.write(STREAM + chunk(event([0])) + chunk(b'data: {"error": "engine died"}\n\n') + LAST_CHUNK)


@dataclass
class Through:
    """The proxy before two fake servers, and a client of it."""

    prefill: Fake
    decode: Fake
    proxy: Proxy
    pool: Pool
    name: str = "fake"

    async def stream(self, ask: Ask) -> AsyncIterator[list[int]]:
        async for tokens in completion(self.pool, ask):
            yield tokens


@contextlib.asynccontextmanager
async def through(prefill=keeps, decode=streams, listens: bool = True) -> AsyncIterator[Through]:
    fakes = Fake(prefill), Fake(decode)
    servers = [await asyncio.start_server(fake.serve, "127.0.0.1", 0) for fake in fakes]
    addresses = ["{}:{}".format(*server.sockets[0].getsockname()) for server in servers]
    if not listens:
        servers[1].close()
    proxy = Proxy(Pool(addresses[0]), Pool(addresses[1]))
    front = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    found = Through(*fakes, proxy, Pool("{}:{}".format(*front.sockets[0].getsockname())))
    try:
        yield found
    finally:
        for pool in (found.pool, proxy.prefill, proxy.decode):
            pool.close()
        for server in (*servers, front):
            server.close()


def test_the_prompt_goes_to_prefill_and_what_that_says_of_its_kv_to_decode():
    async def run():
        async with through() as side:
            seen = [await follow(side, Seen(ASK)) for _ in range(3)]
            async with side.pool.call("/times", method="GET") as answer:
                times = json.loads(await answer.body())
            async with side.pool.call("/times", method="GET") as answer:
                again = json.loads(await answer.body())
            return side, seen, times, again

    side, seen, times, again = asyncio.run(run())
    assert all(each.good and len(each.times) == 4 for each in seen), [each.why for each in seen]
    want = {"prompt": [5, 6, 7], "ignore_eos": True, "temperature": 0.0}
    for leg in (side.prefill.asked[0], side.decode.asked[0]):
        assert leg | want == leg
    first, second = side.prefill.asked[0], side.decode.asked[0]
    assert (first["max_tokens"], first["min_tokens"], first["stream"]) == (1, 1, False)
    assert first["kv_transfer_params"] == REMOTE_DECODE
    assert (second["max_tokens"], second["min_tokens"], second["stream"]) == (4, 4, True)
    assert second["kv_transfer_params"] == PARAMS
    assert len(times) == 3
    assert all(prefill_s > 0 and hand_over_s > 0 for prefill_s, hand_over_s in times)
    assert again == []
    assert side.prefill.connections == side.decode.connections == 1, "connections are kept between requests"


def test_a_decode_server_that_dies_in_mid_stream_is_a_lost_request_and_no_second_answer():
    async def run():
        async with through(decode=breaks) as side:
            seen = await follow(side, Seen(ASK))
            side.decode.reply = streams
            return seen, await follow(side, Seen(ASK))

    seen, after = asyncio.run(run())
    assert not seen.good
    assert len(seen.times) == 2
    assert seen.why == "left within a body"
    assert after.good, after.why


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ({"decode": refuses}, "502: .*decode server: 500 no"),
        ({"prefill": refuses}, "502: .*prefill server: 500 no"),
        ({"listens": False}, "502: .*"),
        ({"decode": complains}, "in mid-stream: engine died"),
    ],
)
def test_what_a_server_refuses_is_lost_and_the_proxy_serves_on(how, why):
    async def run():
        async with through(**how) as side:
            with pytest.raises(Lost, match=why):
                async for _ in side.stream(ASK):
                    pass
            side.prefill.reply, side.decode.reply = keeps, streams
            asked = len(side.decode.asked)
            return asked, await follow(side, Seen(ASK))

    asked, after = asyncio.run(run())
    assert asked == (0 if "prefill" in how or "listens" in how else 1)
    assert after.good == ("listens" not in how)


@pytest.mark.parametrize(
    ("how", "who"), [({"prefill": stalls}, "prefill"), ({"decode": stalls}, "decode"), ({"decode": begins}, "decode")]
)
def test_who_leaves_is_told_to_the_server_that_works_for_him(how, who):
    async def run():
        async with through(**how) as side:
            client = asyncio.create_task(follow(side, Seen(ASK)))
            await asyncio.wait_for(getattr(side, who).came.wait(), 60)
            client.cancel()
            await asyncio.wait_for(getattr(side, who).left.wait(), 60)
            side.prefill.reply, side.decode.reply = keeps, streams
            return await follow(side, Seen(ASK))

    assert asyncio.run(run()).good


def test_a_client_that_leaves_after_some_tokens_is_no_loss():
    async def run():
        async with through(decode=begins) as side:
            seen = await follow(side, Seen(ASK), leave_after=1)
            await asyncio.wait_for(side.decode.left.wait(), 60)
            return seen

    seen = asyncio.run(run())
    assert seen.left
    assert not seen.why


@pytest.mark.parametrize("reset", [False, True])
def test_a_kept_connection_that_the_server_closed_is_made_anew(reset):
    async def run():
        async def once(fake, request, writer):
            await keeps(fake, request, writer)
            if reset:
                await writer.drain()
                await asyncio.sleep(0.02)
                peer = writer.get_extra_info("socket")
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return True

        async with through(prefill=once) as side:
            seen = []
            for _ in range(3):
                seen.append(await follow(side, Seen(ASK)))
                await asyncio.sleep(0.1)
            return seen, side.prefill.connections

    seen, connections = asyncio.run(run())
    assert all(each.good for each in seen)
    assert connections == 3


@pytest.mark.parametrize(
    "text", [b"HTTP/1.1 200 OK\r\ncontent-le", b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nab"]
)
def test_a_torn_message_is_broken(text):
    async def run():
        reader = asyncio.StreamReader()
        reader.feed_data(text)
        reader.feed_eof()
        if head := await read_head(reader):
            async for _ in read_parts(reader, head):
                pass

    with pytest.raises(Broken, match="left within"):
        asyncio.run(run())


# ------------------------------------------------------------------------------------------------ requests and figures


def test_a_case_says_all_of_its_requests():
    found = asks("100m open", 200, 32000, rate=5.0)
    assert found == asks("100m open", 200, 32000, rate=5.0)
    assert found != asks("20m open", 200, 32000, rate=5.0)
    assert [ask.prompt for ask in asks("x", 9, 500, rate=3.0)] == [ask.prompt for ask in asks("x", 9, 500, rate=6.0)]
    assert all(32 <= len(ask.prompt) <= 1024 and 32 <= ask.max_tokens <= 64 for ask in found)
    assert 200 < sum(len(ask.prompt) for ask in found) / 200 < 400
    assert all(a.due_s < b.due_s for a, b in pairwise(found))
    assert 30 < found[-1].due_s < 50
    assert not any(ask.due_s for ask in asks("100m c1", 20, 32000))


@dataclass
class Paced:
    """A side whose every token takes `step_s`, and that holds KV while it streams; `dead` ends and refuses streams."""

    step_s: float = 0.001
    name: str = "paced"
    live: int = 0
    most: int = 0
    dead: bool = False
    leaks: int = 0
    lapses: int = 0
    restarts: int = 0
    signals: list[tuple[str, signal.Signals]] = field(default_factory=list)

    async def stream(self, ask: Ask) -> AsyncIterator[list[int]]:
        if self.dead:
            raise Lost("502")
        life, self.live = len(self.signals), self.live + 1
        self.most = max(self.most, self.live)
        try:
            for token in range(ask.max_tokens):
                await asyncio.sleep(self.step_s)
                if len(self.signals) > life:
                    raise Lost("broken")
                yield [token]
        finally:
            self.live -= 1

    def signal(self, role: str, number: signal.Signals) -> None:
        self.signals.append((role, number))
        self.dead = number in (signal.SIGKILL, signal.SIGSTOP)

    def restart(self, role: str) -> None:
        self.restarts += 1
        self.dead = False

    def held(self) -> float:
        return self.live + self.leaks

    def lapsed(self) -> float:
        return self.lapses * self.restarts


def test_so_many_clients_have_one_request_each():
    side = Paced()
    sample = asyncio.run(closed(side, [Ask((1,), 5)] * 10, 3))
    assert side.most == 3
    assert len(sample.good) == 10
    assert sample.tokens_per_s == pytest.approx(50 / sample.wall_s)
    assert sample.requests_per_s == pytest.approx(10 / sample.wall_s)


def test_open_requests_come_at_their_times_whatever_became_of_others():
    class Patient(Paced):
        all_asked = asyncio.Barrier(4)

        async def stream(self, ask: Ask) -> AsyncIterator[list[int]]:
            await self.all_asked.wait()
            yield [0]

    began = time.perf_counter()
    sample = asyncio.run(opened(Patient(), [Ask((1,), 1, at * 0.03) for at in range(4)]))
    assert all(seen.asked - began >= at * 0.03 - 0.002 for at, seen in enumerate(sample.seen))
    assert len(sample.good) == 4, "nobody gets a token before all have asked"


def test_a_client_loses_patience():
    seen = asyncio.run(follow(Paced(step_s=0.05), Seen(Ask((1,), 100)), timeout_s=0.12))
    assert seen.why == "not done within 0.12 s"
    assert not seen.good


def test_too_few_tokens_are_a_loss():
    class Short(Paced):
        async def stream(self, ask: Ask) -> AsyncIterator[list[int]]:
            yield [1, 2]

    seen = asyncio.run(follow(Short(), Seen(Ask((1,), 3))))
    assert seen.why == "got 2 tokens, want 3"


def seen(*times: float) -> Seen:
    return Seen(Ask((1,), len(times)), 10.0, [10.0 + at for at in times])


def test_figures_of_a_run():
    first, second = Sample([seen(0.1, 0.9, 1.0, 1.2)], 2.0), Sample([seen(0.2, 0.25, 0.35, 0.65)], 1.0)
    lost = Seen(ASK, 10.0, [10.1], why="broken")
    second.seen.append(lost)
    figures = Run([first, second], foreign=0.02).figures()
    ms = {name: value for name, (value, unit, higher) in figures.items() if unit == "ms"}
    assert ms["TTFT p50"] == pytest.approx(200)
    assert ms["TTFT p99"] == pytest.approx(200)
    assert ms["gap p99"] == pytest.approx(300)
    assert ms["gap p50"] == pytest.approx(200), "gaps after the second token: 100, 200, 100, 300 ms"
    assert ms["first to second token p50"] == pytest.approx(800)
    assert ms["prefill's answer to decode's first token p50"] == ms["first to second token p50"], "ours is seen there"
    assert ms["request p50"] == pytest.approx(1200)
    assert figures["tokens/s"][::2] == (2.0, True), "the median of 4 tokens in 2 s and 5 in 1 s, the lower of two"
    assert figures["requests/s"][0] == 0.5
    assert figures["lost"][0] == 1
    theirs = Run([first], hand_overs_s=[0.04, 0.05, 0.06]).figures()
    assert theirs["prefill's answer to decode's first token p50"][0] == pytest.approx(50)
    assert joined([first, second]).wall_s == 3.0


def test_quantiles_are_ranks():
    assert quantile([3, 1, 2], 0.5) == 2
    assert quantile(range(100), 0.99) == 99
    assert math.isnan(quantile([], 0.5))


def test_parts_of_a_file_are_measured_again(tmp_path: Path, capsys):
    file = tmp_path / "peer.json"
    old = Found(file, keep=True)
    old.add("20m c1: TTFT p50", 10.0, 20.0, "ms")
    old.add("20m c16: requests/s", 30.0, 20.0, "requests/s", higher=True)
    old.emit()
    new = Found(file, keep=True)
    new.add("20m c1: TTFT p50", 5.0, 20.0, "ms")
    new.add("20m c4: TTFT p50", 7.0, math.nan, "ms")
    new.add("20m kill-decode: pause", math.nan, 1.0, "s")
    new.emit()
    rows = {row["case"]: row for row in json.loads(file.read_text())["rows"]}
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == list(rows.values())
    assert rows["20m c1: TTFT p50"]["ratio"] == 4
    assert rows["20m c16: requests/s"]["ratio"] == 1.5
    assert rows["20m c4: TTFT p50"]["peer"] is None
    assert "20m kill-decode: pause" not in rows
    assert set(rows["20m c1: TTFT p50"]) == {"case", "ours", "peer", "peer_name", "unit", "higher_is_better", "ratio"}
    assert Found(file, keep=False).rows == {}


def test_the_open_loops_rate_is_a_share_of_what_the_peer_did():
    runs = Run(), Run([Sample([seen(0.1, 0.2)], 0.5)])
    assert offered("20m", runs, Found(None, keep=False)) == 2.0
    found = Found(None, keep=False)
    with pytest.raises(SystemExit, match="measure that, too"):
        offered("20m", None, found)
    found.add("20m c16: requests/s", 30.0, 20.0, "requests/s", higher=True)
    assert offered("20m", None, found) == 20.0


# -------------------------------------------------------------------------------------------------------------- faults


@pytest.fixture
def hasty(monkeypatch):
    times = {"LATER_EACH_S": 0.01, "STILL_S": 0.05, "FREE_S": 0.5, "LOOK_S": 0.1, "LEAVE_EACH_S": 0.005}
    for name, value in (times | {"LATER": 10, "FLIGHT_TOKENS": 20}).items():
        monkeypatch.setattr(peer_faults, name, value)


@pytest.mark.parametrize("fault", ["kill-decode", "kill-prefill", "stop-decode"])
def test_who_loses_everything_is_reported_so_and_is_back_when_it_was_started_again(fault, hasty):
    side = Paced()
    outcome = asyncio.run(disturb(side, fault, 500))
    deed, role = fault.split("-")
    want = [(role, signal.SIGKILL)] if deed == "kill" else [(role, signal.SIGSTOP), (role, signal.SIGCONT)]
    assert side.signals == want
    assert side.restarts == (deed == "kill")
    assert outcome.lost == 12
    assert 0 < outcome.back_s < peer_faults.BACK_S
    assert outcome.held == 0
    assert (fault == "stop-decode") <= outcome.later_lost <= 10
    table = peer_faults.table(fault, outcome, outcome)
    assert ("lost of 12 in flight", 12.0, 12.0, "requests") in table
    (pause,) = (ours for what, ours, *_ in table if "pause" in what)
    assert math.isnan(pause)
    assert "12 x broken" in peer_faults.told(fault, [("x", outcome)])


def test_who_loses_nothing_is_reported_so(hasty):
    class Sound(Paced):
        def signal(self, role: str, number: signal.Signals) -> None:
            pass

    outcome = asyncio.run(disturb(Sound(lapses=2), "kill-decode", 500))
    assert (outcome.lost, outcome.later_lost, outcome.lapsed) == (0, 0, 2)
    assert 0 < outcome.pause_s < 60


def test_what_clients_leave_behind_is_counted(hasty):
    side = Paced(step_s=0.02, leaks=3)
    outcome = asyncio.run(disturb(side, "disconnect", 500))
    assert all(each.left for each in outcome.in_flight)
    assert outcome.lost == 0
    assert (outcome.held, outcome.freed_s) == (3, 0.5)
    assert [(ours, theirs) for _, ours, theirs, _ in peer_faults.table("disconnect", outcome, None)] == [
        (3, None),
        (0.5, None),
        (0, None),
    ]
    assert "50 lost, 3 held" in peer_faults.told("disconnect", [("x", outcome)])


# ---------------------------------------------------------------------------------------------------- its environment


def test_the_peers_polling_is_patched_and_nothing_else():
    text = "conf = agent_config()\nconf.useProgThread = True\nconf.pthrDelay = 0\nother = 0\n"
    after = peer_env.patched(text)
    assert after == text.replace("pthrDelay = 0", "pthrDelay = 1000")
    assert peer_env.patched(after) == after
    with pytest.raises(ValueError, match="another version"):
        peer_env.patched("nothing = 0")


def test_a_missing_environment_says_how_to_make_it(tmp_path: Path, monkeypatch):
    assert f"--setup --env {tmp_path}" in peer_env.missing(tmp_path)
    (tmp_path / peer_env.STAMP).write_text(json.dumps(peer_env.wanted()))
    assert peer_env.missing(tmp_path) == ""
    (tmp_path / peer_env.STAMP).write_text(json.dumps({**peer_env.wanted(), "nixl": "0"}))
    assert "another vLLM" in peer_env.missing(tmp_path)
    monkeypatch.setenv("BATON_CACHE", str(tmp_path / "cache"))
    assert peer_env.directory() == tmp_path / "cache" / "peer-vllm"
    assert peer_env.directory(str(tmp_path)) == tmp_path
