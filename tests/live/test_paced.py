"""Workers that run no model: each client receives what its tokens alone imply, whoever computed them and who died.

A token is drawn from all bytes of all pages of its sequence, so each of these replies also says that every page that
was handed over, shared, copied, freed and used again held what it should, at every step.
"""

from __future__ import annotations

import asyncio
import signal

import pytest

from protos.baton.v1 import inference_pb2
from tests.engine.chain import Chain
from tests.live.asks import ENDS, case
from tests.live.cluster import Client, Reply, together, until
from tests.live.test_sampling import told

SAMPLINGS = ({}, {"temperature": 0.8, "seed": 11}, {"temperature": 1.3, "top_k": 3, "seed": 2**62})


@pytest.fixture(scope="module")
def paced(launch, model):
    """Two prefill and two decode workers at the pace of an H200, with little memory and a few ends of texts."""
    live = launch(
        "paced", model, prefill=2, decode=2, engine="paced", stop_rate=0.01, hash_logits=True, chunk_tokens=32
    )
    live.torn = True
    yield live
    live.stop()


@pytest.fixture(scope="module")
def reference(model):
    """The definition, with tokens and nothing else."""
    return Chain.of(model, 320, 8192, (0, *ENDS), 0.01)


def exact(each, reply, reference):
    """Token by token what the definition says, and drawn from what it says."""
    each.check(reply, reference)
    assert reply.hashes == reference.hashes(each.prompt, each.sampling)


def test_a_crowd_on_little_memory_gives_what_its_tokens_imply(paced, reference):
    cases = [case(1 + 7 * n % 331, 5 + 3 * n % 71, n, **SAMPLINGS[n % 3]) for n in range(48)]

    async def run():
        async with Client(paced.gateway) as client:
            return await together(*(client.generate(each.request) for each in cases))

    replies = asyncio.run(run())
    for each, reply in zip(cases, replies, strict=True):
        exact(each, reply, reference)
    assert {reply.last.finish_reason for reply in replies} == {"stop", "length"}
    assert paced.total("baton_pulled_bytes") > 0


def test_logprobs_are_told(paced, reference):
    each = case(70, 8, 1, forever=True, temperature=1.0, seed=4, logprobs=3, prompt_logprobs=1)

    async def run():
        async with Client(paced.gateway) as client:
            return await told(client, each.request)

    reply = asyncio.run(run())
    exact(each, reply, reference)
    want = reference.samples(each.prompt, each.sampling)
    assert [one.top_ids for one in reply.logprobs] == [one.logprobs.top_ids for one in want]
    assert [one.logprob for one in reply.logprobs] == pytest.approx([one.logprobs.logprob for one in want])
    assert [one.logprob for one in reply.prompt[1:]] == pytest.approx(
        [one.logprob for one in want[0].prompt_logprobs[1:]]
    )


def test_continuations_share_pages_and_are_each_their_own(paced, reference):
    each = case(75, 30, 2, forever=True, temperature=1.0, seed=8, n=4)

    async def run():
        async with Client(paced.gateway) as client:
            tokens = {branch: [] for branch in range(4)}
            async for response in client.responses(each.request, Reply()):
                tokens[response.index] += response.token_ids
            return tokens

    tokens = asyncio.run(run())
    for branch, found in tokens.items():
        assert found == [one.token for one in reference.samples(each.prompt, each.sampling, branch=branch)]


def test_workers_killed_in_mid_stream_and_in_mid_prefill_change_no_token(paced, reference):
    """First a decode worker with rows of its own and others on their way to it, then a prefill worker with a prompt."""
    cases = [case(20 + 70 * n, 120 + 15 * n, n, forever=True, **SAMPLINGS[n % 3]) for n in range(10)]
    long = case(3700, 40, 1, forever=True)

    def computing():
        return paced.metric("prefill-0", "baton_requests", phase="prefill", state="running") > 0

    def decoding():
        rows = {
            each.name: paced.metric(each.name, "baton_requests", phase="decode", state="running")
            for each in paced.workers
            if each.name.startswith("decode")
        }
        return max(rows, key=rows.__getitem__)

    async def run():
        async with Client(paced.gateway) as client:
            first = Reply()
            stream = client.responses(cases[0].request, first)
            others = asyncio.create_task(together(*(client.generate(each.request) for each in cases[1:])))
            while len(first.tokens) < 20:
                first.take(await anext(stream))
            paced.kill(await asyncio.to_thread(decoding), signal.SIGKILL)
            async for response in stream:
                first.take(response)
            replies = [first, *await others]
            going = asyncio.create_task(client.generate(long.request))
            await asyncio.to_thread(until, computing, "its prompt is being computed")
            paced.kill("prefill-0", signal.SIGKILL)  # of two idle workers, the first by name is taken
            return [*replies, await going]

    replies = asyncio.run(run())
    for each, reply in zip([*cases, long], replies, strict=True):
        exact(each, reply, reference)
    attempts = [reply.last.attempts for reply in replies]
    assert max(attempts[:-1]) > 1
    assert attempts[-1] == 2
    paced.wait_empty()


def test_streams_wait_for_a_decode_worker_when_for_a_while_there_is_none(paced, reference):
    cases = [case(30 + 60 * n, 150 + 20 * n, 20 + n, forever=True, **SAMPLINGS[n % 3]) for n in range(5)]

    async def run():
        async with Client(paced.gateway) as client:
            first = Reply()
            stream = client.responses(cases[0].request, first)
            others = asyncio.create_task(together(*(client.generate(each.request) for each in cases[1:])))
            while len(first.tokens) < 20:
                first.take(await anext(stream))
            for each in paced.workers:
                if each.name.startswith("decode") and each.process.poll() is None:
                    paced.kill(each.name, signal.SIGKILL)
            waiting = {"queued": float(len(cases))}
            await asyncio.to_thread(until, lambda: paced.phases() == waiting, "all wait", more=paced.phases)
            refused = await client.generate(cases[0].request)
            assert (refused.code, refused.tokens) == ("UNAVAILABLE", []), "what is new waits for a moment only"
            gone = [each.name for each in paced.workers if each.process.poll() is not None]
            back = asyncio.create_task(asyncio.to_thread(paced.restart, *gone))
            async for response in stream:
                first.take(response)
            await back
            return [first, *await others]

    replies = asyncio.run(run())
    for each, reply in zip(cases, replies, strict=True):
        exact(each, reply, reference)
    assert min(reply.last.attempts for reply in replies) > 1
    paced.wait_empty()


def test_what_takes_logits_is_refused_with_the_names_of_those_who_have_none(paced):
    async def run():
        async with Client(paced.gateway) as client:
            info = await client.stub.GetModelInfo(inference_pb2.GetModelInfoRequest())
            refused = await client.generate(inference_pb2.GenerateRequest(text="x", max_tokens=5, regex="a"))
            free = await client.generate(inference_pb2.GenerateRequest(text="x", max_tokens=5, json_object=False))
            return info.constrains, refused, free

    constrains, refused, free = asyncio.run(run())
    assert not constrains
    assert (refused.code, refused.tokens) == ("UNIMPLEMENTED", [])
    want = "regex: needs workers that compile grammars (the extra grammar; never the paced engine), and "
    assert refused.details == f"{want}decode-0, decode-1, prefill-0, prefill-1 cannot"
    assert free.code == "OK", "an object that need not be one may be anything"


def test_text_is_made_of_its_tokens(paced, reference, tokenizer):
    async def run():
        async with Client(paced.gateway) as client:
            return await client.generate(inference_pb2.GenerateRequest(text="Hello", max_tokens=60, ignore_eos=True))

    reply = asyncio.run(run())
    assert reply.text == tokenizer.decode(reply.tokens)
    assert len(reply.tokens) == 60
    assert not {*reply.tokens} & {0, *ENDS}
