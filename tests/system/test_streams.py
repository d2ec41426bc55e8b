"""Streams as clients see them: many at once, ended in every way, read fast or slowly."""

from __future__ import annotations

import random
import threading
import time

import grpc
import pytest

from gateway.chat import ChatTemplate
from gateway.text import Tokenizer
from protos.baton.v1 import inference_pb2
from tests.system.cluster import Cluster, Reference, request, said
from tests.system.conftest import DEMO


def test_64_streams_at_once_each_get_their_own_tokens_in_order(exact: Cluster, reference: Reference):
    draw = random.Random(11)
    made = []
    for index in range(64):
        prompt = [draw.randrange(3, 512) for _ in range(draw.choice([1, 5, 40, 130, 400]))]
        seeded = {"temperature": 1.0, "seed": index, "top_p": 0.9} if index % 3 == 0 else {}
        made.append(request(prompt, max_tokens=draw.randrange(1, 40), **seeded))
    for asked, reply in zip(made, exact.ask_all(made), strict=True):
        assert reply.error is None, reply.error
        assert reply.end is not None
        wanted = reference.play(asked)
        assert reply.tokens == said(wanted)
        assert reply.end.finish_reason == wanted[-1].finish
        assert (reply.end.prompt_tokens, reply.end.completion_tokens) == (len(asked.token_ids.ids), len(reply.tokens))
        assert [message.HasField("end") for message in reply.messages].count(True) == 1
        assert reply.messages[-1].HasField("end")


def test_the_first_token_comes_before_the_hand_off_is_over(exact: Cluster):
    """The client has it although no decode worker can take the request yet."""
    reply = exact.ask(request([7] * 300, max_tokens=30, ignore_eos=True))
    assert reply.end is not None
    names = [stage.name for stage in reply.end.stages]
    assert names.index("prefill") < names.index("handing_off")
    assert list(reply.messages[0].token_ids) == reply.tokens[:1]
    source, sink = reply.stage("prefill").worker, reply.stage("decode").worker
    assert source.startswith("prefill-")
    assert sink.startswith("decode-")


def test_one_token_needs_no_hand_off(exact: Cluster, reference: Reference):
    asked = request([5, 6, 7], max_tokens=1)
    reply = exact.ask(asked)
    assert reply.tokens == said(reference.play(asked))
    assert reply.end is not None
    assert "pull" not in [stage.name for stage in reply.end.stages]
    assert reply.end.finish_reason in ("length", "stop")


def test_a_stop_token_ends_the_text_and_is_not_part_of_it(exact: Cluster, reference: Reference):
    free = said(reference.play(request([9, 8, 7], max_tokens=12, ignore_eos=True)))
    place = next(i for i in range(2, 12) if free[i] not in free[:i])
    reply = exact.ask(request([9, 8, 7], max_tokens=12, ignore_eos=True, stop_token_ids=[free[place]]))
    assert reply.tokens == free[:place]
    assert reply.end is not None
    assert (reply.end.finish_reason, reply.end.stop_token_id) == ("stop", free[place])
    assert reply.end.completion_tokens == place


def test_a_stop_token_that_comes_first_gives_an_empty_text(exact: Cluster, reference: Reference):
    first = said(reference.play(request([9, 8, 7], max_tokens=1, ignore_eos=True)))[0]
    reply = exact.ask(request([9, 8, 7], max_tokens=12, stop_token_ids=[first]))
    assert (reply.tokens, reply.text) == ([], "")
    assert reply.end is not None
    assert (reply.end.finish_reason, reply.end.completion_tokens) == ("stop", 0)


@pytest.fixture(scope="module")
def demo(scratch):
    from tests.system.cluster import cluster

    with cluster(DEMO, scratch, prefill=1, decode=1) as running:
        yield running


def test_a_stop_string_over_token_boundaries_ends_text_and_request(demo: Cluster):
    whole = demo.ask(_chat("What does textwrap.dedent do?"))
    assert whole.text == "textwrap.dedent removes any common leading whitespace from every line in text."
    for stop in ("common leading", "ommon lead", "every line in"):
        reply = demo.ask(_chat("What does textwrap.dedent do?", stop=["never said", stop]))
        assert reply.text == whole.text[: whole.text.index(stop)]
        assert reply.end is not None
        assert (reply.end.finish_reason, reply.end.stop_string) == ("stop", stop)
        assert reply.end.completion_tokens == len(reply.tokens) <= len(whole.tokens)
    demo.assert_empty()


def test_chat_text_and_token_ids_are_three_ways_to_ask_the_same(demo: Cluster):
    tokenizer, chat = Tokenizer(DEMO), ChatTemplate.read(DEMO)
    assert chat is not None
    question = "Explain list.pop."
    rendered = chat.render([{"role": "user", "content": question}])
    by_chat = demo.ask(_chat(question))
    ids = tokenizer.encode(rendered, special=False)
    by_ids = demo.ask(request(ids, max_tokens=60))
    assert by_chat.text == by_ids.text != ""
    assert by_chat.end is not None
    assert by_chat.end.prompt_tokens == len(ids)
    stub = demo.stub()
    message = inference_pb2.ChatMessage(role="user", content=question)
    tokenized = stub.Tokenize(inference_pb2.TokenizeRequest(chat=inference_pb2.Chat(messages=[message])))
    assert tuple(tokenized.token_ids) == ids
    back = stub.Detokenize(inference_pb2.DetokenizeRequest(token_ids=by_chat.tokens))
    assert back.text == by_chat.text


def test_the_pieces_of_text_add_up_although_tokens_split_characters(exact: Cluster):
    """The tiny model's tokens are bytes: most of its text is broken UTF-8."""
    reply = exact.ask(request([200, 201, 150], max_tokens=60, ignore_eos=True, temperature=1.5, seed=3))
    stub = exact.stub()
    assert reply.text == stub.Detokenize(inference_pb2.DetokenizeRequest(token_ids=reply.tokens)).text


def test_a_slow_reader_gets_its_waiting_tokens_merged(exact: Cluster, reference: Reference):
    asked = request([31, 32, 33], max_tokens=600, ignore_eos=True)
    sizes: list[int] = []

    def read_slowly(response: inference_pb2.GenerateResponse) -> None:
        sizes.append(len(response.token_ids))
        if len(sizes) < 4:
            time.sleep(0.5)

    reply = exact.ask(asked, watch=read_slowly)
    assert reply.tokens == said(reference.play(asked))
    assert sum(sizes) == 600


def test_waiting_tokens_are_one_message():
    """What the flow control of a real connection hides: tokens that wait become one batch, at once."""
    import asyncio

    from gateway.flights import Flight
    from gateway.text import TextStream

    async def scene() -> None:
        flight = Flight(TextStream(Tokenizer(DEMO)))
        flight.deliver((10,), ())
        flight.deliver((11, 12), ())
        batch = await asyncio.wait_for(flight.next(), 1.0)
        assert batch.tokens == (10, 11, 12)
        assert not batch.last

    asyncio.run(scene())


def test_two_live_requests_may_not_share_a_name(exact: Cluster):
    asked = request([1, 2, 3], max_tokens=1500, ignore_eos=True, request_id="twice")
    call = exact.stub().Generate(asked)
    next(iter(call))
    second = exact.ask(asked)
    assert second.code is grpc.StatusCode.ALREADY_EXISTS
    assert "twice" in second.error.details()
    assert exact.stub().Abort(inference_pb2.AbortRequest(request_id="twice")).aborted
    end = None
    for response in call:
        end = response.end if response.HasField("end") else end
    assert end is not None
    assert end.finish_reason == "abort"
    assert not exact.stub().Abort(inference_pb2.AbortRequest(request_id="twice")).aborted


def test_hints_and_goals_are_taken_without_effect_on_the_tokens(exact: Cluster, reference: Reference):
    asked = request([40, 41], max_tokens=6)
    asked.hints.priority, asked.hints.session, asked.hints.tenant = 3, "s", "t"
    asked.hints.group, asked.hints.program_step, asked.hints.tool = "g", 2, "grep"
    asked.slo.ttft_s, asked.slo.gap_s = 30.0, 5.0
    assert exact.ask(asked).tokens == said(reference.play(asked))


def test_streams_on_both_gateways_share_the_workers(exact: Cluster, reference: Reference):
    made = [request([50 + i, 3, 4], max_tokens=20) for i in range(12)]
    replies: dict[int, list] = {}

    def run(gateway: int) -> None:
        replies[gateway] = exact.ask_all(made, gateway)

    threads = [threading.Thread(target=run, args=(gateway,)) for gateway in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wanted = [said(reference.play(asked)) for asked in made]
    assert [reply.tokens for reply in replies[0]] == [reply.tokens for reply in replies[1]] == wanted


def _chat(question: str, **fields) -> inference_pb2.GenerateRequest:
    made = request("", max_tokens=60, **fields)
    made.chat.messages.append(inference_pb2.ChatMessage(role="user", content=question))
    return made
