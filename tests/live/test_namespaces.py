"""Prefill and decode worker in network namespaces of their own: KV over TCP, on a link that loses packets and is cut.

The workers are paced ones, so a token is drawn from every byte of KV that came over the link, and must be right.
"""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import time
from contextlib import contextmanager

import pytest

from tests.checkpoints import make_llama
from tests.engine.chain import Chain
from tests.live.asks import ENDS, case
from tests.live.cluster import LATE_S, Client, together, until
from tests.live.namespaces import Namespaces, Unavailable, places, there
from tests.transfer.sever import sever

TIMEOUT_S = 30.0
"""Deadline of requests that a cut meets."""
ALONE_S = 15.0
"""The same, where it meets them until they end."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """2 KiB of KV a token: a prompt of 400 is 800 kB."""
    folder = tmp_path_factory.mktemp("model") / "wide"
    return make_llama(
        folder,
        layers=4,
        kv_heads=4,
        head_dim=32,
        vocab=320,
        context=8192,
        dtype="bfloat16",
        tokenizer=True,
        eos=list(ENDS),
    )


@pytest.fixture(scope="module")
def reference(model):
    return Chain.of(model, 320, 8192, (0, *ENDS))


@contextmanager
def apart(launch, model, name, *, decode=1, near=(), far=("decode-0",)):
    """A deployment of which the workers in `far` are behind the link. Nothing of it is left afterwards."""
    try:
        both = Namespaces()
    except Unavailable as error:
        pytest.skip(f"needs network namespaces ({error})")
    with both:
        where = places(both, ("coordinator", "gateway-0", "prefill-0", *near), far)
        how = {"env": both.environment(), "places": where}
        options = {"engine": "paced", "pace": 0.0, "kv_memory": "32M", "chunk_tokens": 128}
        live = launch(name, model, how=how, decode=decode, transport="nixl", **options)
        live.torn = True
        try:
            yield live, both
        finally:
            live.stop()


@pytest.fixture(scope="module")
def pair(launch, model):
    """One prefill and one decode worker, and the link between them."""
    with apart(launch, model, "namespaces") as found:
        yield found


def crowd(count, first, tokens=40):
    """Prompts of 20 to 460 tokens: 40 kB to 920 kB each. Other prompts for another `first`: nobody has their KV."""
    numbers = range(first, first + count)
    return [
        case(20 + 40 * (n - first), tokens + n % 20, n, forever=True, temperature=0.7 * (n % 2), seed=n % 2 * n)
        for n in numbers
    ]


def lanes(live):
    """Transport of each lane, as the worker's metrics name it."""
    return {
        (each.name, dict(labels)["source"]): dict(labels)["transport"]
        for each in live.workers
        for key, labels in live.metrics(each.name)
        if key == "baton_lane_latency_seconds"
    }


async def ask_all(live, cases, timeout_s=100.0):
    """All at once."""
    async with Client(live.gateway) as client:
        return await together(*(client.generate(each.request, timeout_s) for each in cases))


def check_all(cases, replies, reference):
    for each, reply in zip(cases, replies, strict=True):
        each.check(reply, reference)


def check_ends(cases, replies, reference):
    """Each has all its tokens, or the first of them and a status that says why; the statuses."""
    for each, reply in zip(cases, replies, strict=True):
        if reply.code == "OK":
            each.check(reply, reference)
        else:
            assert reply.code in {"UNAVAILABLE", "DEADLINE_EXCEEDED"}, reply
            assert reply.details
            assert reply.tokens == reference.tokens(each.prompt, each.sampling)[: len(reply.tokens)]
    return {reply.code for reply in replies}


def arrives(live):
    """Says whether KV has come over the link since it was asked for: the first of seconds' worth of it."""
    pulled = live.total("baton_pulled_bytes")
    return lambda: live.total("baton_pulled_bytes") > pulled


async def in_midst(live, cases, when, act, timeout_s):
    """All at once, and `act` on another thread as soon as `when()`; also how long they took."""

    def meet():
        until(when, "it is time")
        act()

    acting = asyncio.create_task(asyncio.to_thread(meet))
    started = time.monotonic()
    replies = await ask_all(live, cases, timeout_s)
    took_s = time.monotonic() - started
    await acting
    return replies, took_s


def test_streams_over_a_link_that_drops_packets_and_is_cut_for_two_seconds(pair, reference):
    live, both = pair
    assert lanes(live) == {("decode-0", "prefill-0"): "ucx: tcp/data emulated"}
    assert not live.total("baton_lane_fallback", source="prefill-0", transport="ucx: tcp/data emulated")
    cases = crowd(12, 0)
    before, pulled = both.counters(), live.total("baton_pulled_bytes")
    check_all(cases, asyncio.run(ask_all(live, cases)), reference)
    after = both.counters()
    assert after["drops"] > before["drops"]
    assert after["resent"] > before["resent"]
    assert live.total("baton_pulled_bytes") - pulled >= 2048 * sum(len(each.prompt) for each in cases)
    live.wait_empty()

    mended = []

    def pause():
        both.cut()
        time.sleep(2)
        both.mend()
        mended.append(time.monotonic())

    cases, began = crowd(12, 100, 200), time.monotonic()
    replies, took_s = asyncio.run(in_midst(live, cases, arrives(live), pause, TIMEOUT_S))
    # Mostly nobody is lost in 2 s; if so, those who had begun wait for the link.
    check_all(cases, replies, reference)
    assert mended[0] < began + took_s < began + TIMEOUT_S, "the cut met requests"
    live.wait_empty()
    live.wait_ready()
    cases = crowd(4, 150)
    check_all(cases, asyncio.run(ask_all(live, cases)), reference)


def test_a_lane_whose_connections_are_reset_is_made_anew_and_nobody_is_lost(pair, reference):
    """Only UCX's connections: the streams of the two workers, over the same link, stand."""
    live, both = pair
    remade, said = live.total("baton_lanes_remade"), len(live.lines())
    sink = live.deployment.running["decode-0"].process.pid

    def reset():
        assert sever(sink, lambda _, ends: {address for address, _ in ends} == {*both.ends})

    def measured():
        lane = re.compile("lane from prefill-0.*: ucx: .* us$")
        return sum(lane.match(line["message"]) is not None for line in live.lines()[said:])

    for number in range(2):
        reset()
        each = case(460, 60, 620 + number, forever=True)
        (reply,) = asyncio.run(ask_all(live, [each], TIMEOUT_S))
        each.check(reply, reference)
        assert reply.last.attempts > 1, "it met the broken lane"
        until(lambda: live.total("baton_lanes_remade") == remade + number + 1, "it is made anew")  # noqa: B023
        until(lambda: measured() == number + 1, "its probe is over, or that would meet the next one")  # noqa: B023
    live.wait_ready()
    assert lanes(live) == {("decode-0", "prefill-0"): "ucx: tcp/data emulated"}
    assert not [line for line in live.lines()[said:] if line["message"].startswith("lost ")]
    cases = crowd(4, 680)
    replies = asyncio.run(ask_all(live, cases))
    check_all(cases, replies, reference)
    assert max(reply.last.attempts for reply in replies) == 1


@pytest.mark.slow
def test_requests_wait_for_the_only_decode_worker_while_the_link_is_away(launch, model, reference):
    """For so long that everybody is lost to everybody, and the lane with them."""
    with apart(launch, model, "away") as (live, both):

        def pause():
            both.cut()
            time.sleep(8)
            both.mend()

        cases = crowd(12, 700, 600)
        replies, took_s = asyncio.run(in_midst(live, cases, arrives(live), pause, 100.0))
        check_all(cases, replies, reference)
        assert took_s > 8
        assert max(reply.last.attempts for reply in replies) > 1
        live.wait_empty()


@pytest.mark.slow
def test_a_worker_that_is_cut_off_for_good_loses_no_request_while_another_is_there(launch, model, reference):
    with apart(launch, model, "cut-off", decode=2, near=("decode-1",)) as (live, both):
        cases = crowd(12, 200, 600)

        def runs():
            return live.metric("decode-0", "baton_requests", phase="decode", state="running") > 0

        replies, _ = asyncio.run(in_midst(live, cases, runs, both.cut, TIMEOUT_S))
        check_all(cases, replies, reference)
        assert max(reply.last.attempts for reply in replies) > 1, "rows were lost while they ran"
        live.wait_empty()  # the one that is cut off, too: the tests still reach it
        both.mend()
        live.wait_ready()
        assert set(lanes(live)) == {("decode-0", "prefill-0"), ("decode-1", "prefill-0")}
        cases = crowd(12, 300)
        check_all(cases, asyncio.run(ask_all(live, cases)), reference)


@pytest.mark.slow
def test_requests_that_nobody_can_end_have_a_typed_end_at_their_deadline(launch, model, reference):
    with apart(launch, model, "alone") as (live, both):
        cases = crowd(12, 400, 600)
        replies, took_s = asyncio.run(in_midst(live, cases, arrives(live), both.cut, ALONE_S))
        assert check_ends(cases, replies, reference) != {"OK"}, "the cut met requests"
        assert took_s < ALONE_S + LATE_S
        live.wait_empty()
        both.mend()
        live.wait_ready()
        cases = crowd(12, 500)
        check_all(cases, asyncio.run(ask_all(live, cases)), reference)
        live.wait_empty()
        both.cut()  # and all processes end by themselves nevertheless


def test_nothing_is_left_of_namespaces_and_a_process_inside_is_told():
    try:
        both = Namespaces()
    except Unavailable as error:
        pytest.skip(f"needs network namespaces ({error})")
    lodger = subprocess.Popen([*both.far.enter, "sleep", "60"])
    try:
        until(lambda: bool(both.far.lodgers()), "it is inside")
        with pytest.raises(AssertionError, match=f"process {lodger.pid} is in a namespace"), both:
            assert both.counters().keys() == {"packets", "drops", "bytes", "resent"}
    finally:
        lodger.kill()
        lodger.wait()
    with pytest.raises(ProcessLookupError):
        os.kill(both.far.pid, 0)
    until(lambda: not there(both.near) and not there(both.far), "its links are gone")
