"""Many clients at once, each with its own stream of exactly its own tokens."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from core.sampling import Sampling
from protos.baton.v1 import common_pb2, inference_pb2
from tests.live.asks import ENDS, case, prompt
from tests.live.cluster import SECRET, Client, Reply, ask, together, until
from tests.live.conftest import TEMPLATE

SAMPLINGS = ({}, {"temperature": 0.8, "seed": 11}, {"temperature": 1.1, "top_k": 20, "top_p": 0.9, "seed": 12})
SMALL_WINDOW = (("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0))
"""A client that takes 1 kB before the server must wait for it."""


def test_64_streams_on_one_gateway_are_each_their_own(live, reference):
    """The arena holds a third of them at a time, so they also wait for memory."""
    cases = [case(1 + 7 * n % 331, 5 + 3 * n % 71, n, **SAMPLINGS[n % 3]) for n in range(64)]

    async def run():
        async with Client(live.gateway) as client:
            return await together(*(client.generate(each.request) for each in cases))

    replies = asyncio.run(run())
    for each, reply in zip(cases, replies, strict=True):
        each.check(reply, reference)
        assert sum(reply.sizes) == len(reply.tokens)
        assert reply.last.attempts == 1
    assert {reply.last.finish_reason for reply in replies} == {"stop", "length"}


def test_text_is_what_the_tokens_say(live, tokenizer):
    async def run():
        async with Client(live.gateway) as client:
            return await together(*(client.generate(ask(f"{SECRET} {n}", 60, ignore_eos=True)) for n in range(4)))

    for reply in asyncio.run(run()):
        assert reply.text == tokenizer.decode(reply.tokens)
        assert len(reply.tokens) == reply.last.completion_tokens == 60
        assert reply.last.prompt_tokens == len(SECRET) + 2


def test_a_slow_reader_gets_waiting_tokens_merged(live, reference):
    slow, quick = case(20, 1500, 1, forever=True), case(30, 200, 2, forever=True)

    async def run():
        async with Client(live.gateway, SMALL_WINDOW) as lazy, Client(live.gateway) as client:
            reply = Reply()
            stream = lazy.responses(slow.request, reply)
            reply.take(await anext(stream))
            other = await client.generate(quick.request)
            await asyncio.to_thread(until, lambda: not live.phases(), "both were generated")
            async for response in stream:
                reply.take(response)
            return reply, other

    reply, other = asyncio.run(run())
    slow.check(reply, reference)
    quick.check(other, reference)
    assert max(reply.sizes) > 100
    assert len(reply.sizes) < len(reply.tokens) / 2


def test_the_first_token_arrives_before_the_hand_off_is_complete(live, reference):
    """The decode worker stands still meanwhile, so there is nothing but the prefill worker's own message."""
    each = case(90, 20, 3, forever=True)

    async def run():
        async with Client(live.gateway) as client:
            reply = Reply()
            stream = client.responses(each.request, reply)
            live.kill("decode-0", signal.SIGSTOP)
            try:
                reply.take(await asyncio.wait_for(anext(stream), 2.5))
                assert reply.tokens == reference.tokens(each.prompt, each.sampling)[:1]
                assert live.phases() == {"handing_off": 1}
            finally:
                live.kill("decode-0", signal.SIGCONT)
            async for response in stream:
                reply.take(response)
            return reply

    each.check(asyncio.run(run()), reference)


@pytest.mark.parametrize("length", [2, 5])
def test_a_stop_string_ends_the_text_wherever_tokens_begin(live, reference, tokenizer, length):
    """Every token is a byte, so no stop string lies within one."""
    tokens = prompt(50, 4)
    made = reference.tokens(tokens, Sampling(300, ignore_eos=True))
    texts = [tokenizer.decode(made[:count]) for count in range(301)]
    whole = texts[-1].rstrip("\N{REPLACEMENT CHARACTER}")
    at = next(at for at in range(40, len(whole)) if whole[at : at + length].isascii())
    stop = whole[at : at + length]
    count = next(count for count, text in enumerate(texts) if stop in text)

    async def run():
        async with Client(live.gateway) as client:
            request = ask(tokens, 300, ignore_eos=True, stop=["never to be seen", stop])
            return await client.generate(request)

    reply = asyncio.run(run())
    assert reply.text == whole[: whole.index(stop)]
    assert (reply.last.finish_reason, reply.last.stop_string) == ("stop", stop)
    assert reply.tokens == made[:count]
    assert reply.last.completion_tokens == count
    stages = {stage.name: stage for stage in reply.last.stages}
    assert {"queued", "prefill", "pull", "decode", "total"} <= stages.keys()
    assert int(stages["decode"].detail["steps"]) >= count - 1
    live.wait_empty(2.0)


def test_a_stop_token_ends_the_tokens_and_is_not_among_them(live, reference):
    each = case(40, 50, 5, forever=True)
    made = reference.tokens(each.prompt, each.sampling)
    at = next(at for at in range(10, 50) if made[at] not in made[:at])

    async def run():
        async with Client(live.gateway) as client:
            request = ask(each.prompt, 50, ignore_eos=True, stop_token_ids=[made[at]])
            return await client.generate(request)

    reply = asyncio.run(run())
    assert reply.tokens == made[:at]
    assert (reply.last.finish_reason, reply.last.stop_token_id) == ("stop", made[at])
    assert reply.last.completion_tokens == at


def test_a_stop_token_that_comes_first_leaves_nothing(live, reference):
    each = case(40, 50, 5, forever=True)
    first = reference.tokens(each.prompt, each.sampling)[0]

    async def run():
        async with Client(live.gateway) as client:
            return await client.generate(ask(each.prompt, 50, stop_token_ids=[first]))

    reply = asyncio.run(run())
    assert (reply.tokens, reply.text) == ([], "")
    assert (reply.last.finish_reason, reply.last.completion_tokens, reply.last.stop_token_id) == ("stop", 0, first)


def test_hints_and_goals_change_no_token(live, reference):
    each = case(45, 20, 6)
    hints = common_pb2.Hints(priority=3, session="s", tenant="t", group="g", program_step=2, tool="grep")
    request = ask(each.prompt, 20, hints=hints, slo=common_pb2.Slo(ttft_s=30.0, gap_s=5.0))

    async def run():
        async with Client(live.gateway) as client:
            return await client.generate(request)

    each.check(asyncio.run(run()), reference)


def test_ignore_eos_goes_on_past_the_end_token(live, reference):
    ending = next(each for each in (case(25, 80, n) for n in range(50)) if finishes(each, reference) == "stop")
    on = case(25, 80, next(n for n in range(50) if prompt(25, n) == ending.prompt), forever=True)

    async def run():
        async with Client(live.gateway) as client:
            return await together(client.generate(ending.request), client.generate(on.request))

    short, long = asyncio.run(run())
    ending.check(short, reference)
    on.check(long, reference)
    assert len(long.tokens) == 80
    assert long.tokens[: len(short.tokens)] == short.tokens
    assert long.tokens[len(short.tokens)] == short.last.stop_token_id
    assert short.last.stop_token_id in ENDS


def finishes(each, reference):
    return reference.finish(each.prompt, each.sampling)


def test_one_token_needs_no_hand_off(live, reference):
    each = case(70, 1, 6, forever=True)
    before = live.total("baton_pulled_bytes")

    async def run():
        async with Client(live.gateway) as client:
            return await client.generate(each.request)

    reply = asyncio.run(run())
    each.check(reply, reference)
    assert live.total("baton_pulled_bytes") == before
    assert not {"pull", "reserve_wait", "decode"} & {stage.name for stage in reply.last.stages}


def test_a_chat_is_the_template_of_its_messages(live, reference, tokenizer):
    chat = inference_pb2.Chat(
        messages=[
            inference_pb2.ChatMessage(role="system", content=f"{SECRET} be brief"),
            inference_pb2.ChatMessage(role="user", content="Héllo?"),
        ]
    )
    rendered = f"[system]{SECRET} be brief[user]Héllo?>"

    async def run():
        async with Client(live.gateway) as client:
            reply = await client.generate(inference_pb2.GenerateRequest(chat=chat, max_tokens=30, ignore_eos=True))
            ids = await client.stub.Tokenize(inference_pb2.TokenizeRequest(chat=chat))
            info = await client.stub.GetModelInfo(inference_pb2.GetModelInfoRequest())
            text = await client.stub.Detokenize(inference_pb2.DetokenizeRequest(token_ids=ids.token_ids))
            return reply, tuple(ids.token_ids), info, text.text

    reply, ids, info, text = asyncio.run(run())
    assert ids == tuple(tokenizer.encode(rendered, add_special_tokens=False).ids)
    assert text == rendered
    assert reply.tokens == reference.tokens(ids, Sampling(30, ignore_eos=True))
    assert (info.chat_template, info.context_tokens, info.vocabulary) == (TEMPLATE, 8192, 320)
    assert tuple(info.eos_token_ids) == ENDS


def test_a_live_request_id_is_taken_and_a_past_one_is_free(live, reference):
    first, second = case(10, 900, 7, forever=True, request_id="mine"), case(12, 5, 8, request_id="mine")

    async def run():
        async with Client(live.gateway) as client:
            reply = Reply()
            stream = client.responses(first.request, reply)
            reply.take(await anext(stream))
            refused = await client.generate(second.request)
            async for response in stream:
                reply.take(response)
            return reply, refused, await client.generate(second.request)

    reply, refused, later = asyncio.run(run())
    assert refused.code == "ALREADY_EXISTS"
    assert "mine" in refused.details
    first.check(reply, reference)
    second.check(later, reference)
    assert later.last.request_id == "mine"


def test_the_last_message_tells_where_the_time_went(live):
    """Long enough that the prefill worker's part of it has come."""

    async def run():
        async with Client(live.gateway) as client:
            return await client.generate(ask(prompt(200, 9), 500, ignore_eos=True))

    stages = {stage.name: stage for stage in asyncio.run(run()).last.stages}
    assert {"queued", "offered", "batch_wait", "prefill", "reserve_wait", "pull", "join_wait", "decode"} <= {*stages}
    assert stages["prefill"].detail["tokens"] == "200"
    assert stages["prefill"].detail["chunks"] == "4"
    assert stages["decode"].detail["steps"] == "499"
    assert int(stages["pull"].detail["nbytes"]) > 0
    assert stages["pull"].detail["transport"].startswith(("ucx", "zeromq"))
    assert all(0 <= stage.seconds <= stages["total"].seconds for stage in stages.values())


def test_metrics_count_what_was_served(live):
    until(lambda: not live.phases(), "nothing is live")
    before = live.metric("gateway-0", "baton_requests_total", outcome="done", code="OK")

    async def run():
        async with Client(live.gateway) as client:
            return await together(*(client.generate(ask(prompt(9, n), 4)) for n in range(5)))

    asyncio.run(run())
    assert live.metric("gateway-0", "baton_requests_total", outcome="done", code="OK") == before + 5


def test_workers_and_their_lanes_listen_on_loopback_only(live):
    """Also UCX, which else names every interface of the machine to its peers: reads would hang when one goes away."""
    heard = set()
    for each in live.workers:
        here = Path("/proc", str(each.process.pid))
        sockets = {os.readlink(fd) for fd in (here / "fd").iterdir() if fd.is_symlink()}
        for line in [*(here / "net/tcp").read_text().splitlines(), *(here / "net/tcp6").read_text().splitlines()]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                heard.add(fields[1].rpartition(":")[0])
    mapped = "0000000000000000FFFF00000100007F"  # 127.0.0.1 of a socket for both families
    assert "0100007F" in heard
    assert heard <= {"0100007F", mapped}, heard
