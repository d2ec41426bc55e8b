"""What a client is given of its request, whenever it reads: each token once, and each with what belongs to it."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from core.request import Phase
from core.sampling import Logprobs
from engine.api import NO_TOKEN
from gateway.replies import Batch, Replies, Reply
from gateway.text import TextStream, Tokenizer
from scheduler.router_events import End
from tests.gateway.tokenizers_made import byte_level, save

DONE = End(1, Phase.DONE, "length")
PROMPT = (None, Logprobs(3, -0.5), Logprobs(4, -1.5, (9,), (-0.1,)))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(save(byte_level(), tmp_path_factory.mktemp("made")))


@pytest.fixture(scope="module")
def ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Those of a, e, a, e, a."""
    return tuple(tokenizer.encode(letter, special=False)[0] for letter in "aeaea")


def known(ids: tuple[int, ...], at: int = 0) -> tuple[Logprobs, ...]:
    """Told apart by token and by place."""
    return tuple(Logprobs(token, -0.25 * (at + place)) for place, token in enumerate(ids))


def read(reply: Reply) -> Batch:
    batch = reply.take()
    assert batch is not None
    return batch


def test_tokens_that_wait_are_merged_with_their_logprobs(tokenizer: Tokenizer, ids: tuple[int, ...]) -> None:
    reply = Reply(TextStream(tokenizer))
    reply.deliver(ids[:1], (7,), known(ids[:1]), PROMPT)
    reply.deliver(ids[1:3], (8, 9), known(ids[1:3], 1))
    assert read(reply) == Batch("aea", ids[:3], False, known(ids[:3]), PROMPT)
    reply.deliver(ids[3:], (1, 2), known(ids[3:], 3))
    reply.end("length")
    assert read(reply) == Batch("ea", ids[3:], True, known(ids)[3:])
    assert reply.hashes == [7, 8, 9, 1, 2]


@pytest.mark.parametrize("cut", [1, 2, 3, 5])
def test_a_stop_string_cuts_logprobs_where_it_cuts_tokens(tokenizer: Tokenizer, ids: tuple[int, ...], cut: int) -> None:
    reply = Reply(TextStream(tokenizer, ["eae"]))
    seen: list[Logprobs] = []
    for at in range(0, len(ids), cut):
        if reply.deliver(ids[at : at + cut], (0,) * cut, known(ids[at : at + cut], at)):
            break
    reply.deliver(ids, (0,) * 5, known(ids))
    reply.end("length")
    batch = read(reply)
    seen += batch.logprobs
    assert (batch.text, batch.tokens) == ("a", ids[:4])
    assert tuple(seen) == known(ids)[:4]


def test_a_prompts_logprobs_come_without_a_token_if_there_is_none(tokenizer: Tokenizer) -> None:
    reply = Reply(TextStream(tokenizer))
    reply.deliver((), (), (), PROMPT)
    assert read(reply) == Batch("", (), False, (), PROMPT)
    reply.end("length")
    assert read(reply) == Batch("", (), True)
    assert reply.take() is None


def test_what_is_new_of_any_continuation_is_read_at_once_and_each_end_once(
    tokenizer: Tokenizer, ids: tuple[int, ...]
) -> None:
    async def run() -> None:
        replies = Replies(TextStream(tokenizer) for _ in range(3))
        waiting = asyncio.create_task(replies.next())
        await asyncio.sleep(0)
        replies[2].deliver(ids[:1], (7,))
        assert await waiting == [(2, Batch("a", ids[:1], False))]
        replies[0].deliver(ids[:2], (7, 7))
        replies[1].end("stop", 9)
        assert await replies.next() == [(0, Batch("ae", ids[:2], False)), (1, Batch("", (), True))]
        replies.end(replace(DONE, branch=2))
        assert [(i, batch.last) for i, batch in await replies.next()] == [(0, True), (2, True)]
        assert await replies.next() == []
        outcomes = [reply.outcome for reply in replies.all]
        assert [outcome and outcome.reason for outcome in outcomes] == ["length", "stop", "length"]
        assert [outcome and outcome.stop_token_id for outcome in outcomes] == [None, 9, None]

    asyncio.run(asyncio.wait_for(run(), 5))


def test_a_text_that_nothing_could_follow_is_an_error_and_the_others_are_not(tokenizer, ids) -> None:
    replies = Replies([TextStream(tokenizer), TextStream(tokenizer)])
    replies[0].deliver(ids[:2], (0, 0))
    replies[0].end("stop", NO_TOKEN)
    replies.end(End(1, Phase.DONE, "stop", stop_token_id=1, branch=1))
    dead, done = (each.outcome for each in replies.all)
    assert dead is not None
    assert dead.error is not None
    assert (dead.error.code, dead.completion_tokens) == ("FAILED_PRECONDITION", 2)
    assert dead.error.message == "constraint: after 2 tokens the model's vocabulary has none that it lets follow"
    assert done is not None
    assert done.error is None


def test_a_failed_request_says_why_unless_the_client_has_all_it_wanted(tokenizer, ids) -> None:
    failed = End(1, Phase.FAILED, "no workers", "UNAVAILABLE", retry_s=1.5)
    for stops, aborted, want in (((), False, "UNAVAILABLE"), (("a",), False, None), ((), True, None)):
        replies = Replies([TextStream(tokenizer, stops)])
        replies[0].aborted = aborted
        replies[0].deliver(ids[:1], (0,))
        replies.end(failed)
        outcome = replies[0].outcome
        assert outcome is not None
        assert (outcome.error.code if outcome.error else None) == want
        assert outcome.error is None or (outcome.error.message, outcome.error.retry_s) == ("no workers", 1.5)
