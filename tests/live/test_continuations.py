"""Several continuations of one prompt: one prefill, shared pages, and each what it is alone."""

from __future__ import annotations

import signal
from dataclasses import replace
from typing import Any

import pytest

from core.sampling import Sampling
from tests.live.asks import ENDS, prompt
from tests.live.cluster import Reference, Reply, ask, several

SEEDED: dict[str, Any] = {"temperature": 0.9, "seed": 77}


@pytest.fixture(scope="module")
def forks(launch, model):
    """One prefill worker and two decode workers, in exact mode."""
    live = launch("forks", model, prefill=1, decode=2, dtype="float32", exact=True, hash_logits=True, chunk_tokens=32)
    live.torn = True
    yield live
    live.stop()


@pytest.fixture(scope="module")
def reference(model):
    return Reference(model, dtype="float32", exact=True)


def check(replies: list[Reply], tokens: tuple[int, ...], sampling: Sampling, reference: Reference) -> None:
    """Each is what one engine says with that continuation's seed; only the last one's end has the stages."""
    for branch, reply in enumerate(replies):
        alone = sampling.branch(branch)
        assert reply.tokens == reference.tokens(tokens, alone), f"continuation {branch}"
        assert reply.hashes == reference.hashes(tokens, alone)
        assert reply.last.finish_reason == reference.finish(tokens, alone)
        assert (reply.last.prompt_tokens, reply.last.completion_tokens) == (len(tokens), len(reply.tokens))
    assert [bool(reply.last.stages) for reply in replies].count(True) == 1


@pytest.mark.parametrize("length", [48, 50, 3])
@pytest.mark.parametrize("options", [{}, SEEDED], ids=["greedy", "seeded"])
def test_each_continuation_is_what_it_is_alone(forks, reference, length, options):
    """48 fills its pages of 16, so that nothing is copied; 50 and 3 do not."""
    tokens = prompt(length, 60)
    sampling = Sampling(40, n=4, stop_token_ids=ENDS, **options)
    replies = several(forks, ask(tokens, 40, n=4, **options))
    check(replies, tokens, sampling, reference)
    if options:
        assert len({tuple(reply.tokens) for reply in replies}) == 4
    forks.wait_empty()


def test_their_prompt_is_computed_and_pulled_once(forks):
    before = forks.total("baton_prefill_tokens"), forks.total("baton_pulled_bytes")
    several(forks, ask(prompt(160, 61), 8, n=8, ignore_eos=True, **SEEDED))
    after = forks.total("baton_prefill_tokens"), forks.total("baton_pulled_bytes")
    several(forks, ask(prompt(160, 62), 8, n=1, ignore_eos=True, **SEEDED))
    alone = forks.total("baton_prefill_tokens"), forks.total("baton_pulled_bytes")
    assert after[0] - before[0] == alone[0] - after[0] == 160
    assert after[1] - before[1] == alone[1] - after[1] > 0
    forks.wait_empty()


def test_some_end_with_their_first_token_and_the_others_go_on(forks, reference):
    tokens = prompt(30, 63)
    firsts = [reference.tokens(tokens, Sampling(1, n=1, **SEEDED).branch(branch))[0] for branch in range(6)]
    stops = (firsts[1], firsts[4])
    sampling = Sampling(20, n=6, stop_token_ids=(*stops, *ENDS), **SEEDED)
    replies = several(forks, ask(tokens, 20, n=6, stop_token_ids=stops, **SEEDED))
    check(replies, tokens, sampling, reference)
    assert [len(replies[branch].tokens) for branch in (1, 4)] == [0, 0]
    forks.wait_empty()


def test_a_stop_string_ends_its_own_continuation_only(forks, reference, tokenizer):
    tokens, sampling = prompt(50, 64), Sampling(120, n=3, ignore_eos=True, **SEEDED)
    texts = [tokenizer.decode(reference.tokens(tokens, sampling.branch(branch))) for branch in range(3)]
    stop = next(letter for letter in map(chr, range(33, 127)) if 0 < sum(letter in text for text in texts) < 3)
    replies = several(forks, ask(tokens, 120, n=3, ignore_eos=True, stop=[stop], **SEEDED))
    for reply, text in zip(replies, texts, strict=True):
        assert reply.last.finish_reason == ("stop" if stop in text else "length")
        assert len(reply.tokens) == 120 or reply.last.stop_string == stop
        assert stop not in reply.text
    forks.wait_empty()


@pytest.mark.slow
def test_a_decode_worker_killed_in_mid_stream_changes_no_continuation(forks, reference):
    tokens = prompt(90, 65)
    sampling = Sampling(600, n=3, ignore_eos=True, **SEEDED)
    killed: list[str] = []

    def kill(replies: list[Reply]) -> None:
        if not killed and min(len(reply.tokens) for reply in replies) > 20:
            killed.append("decode-0")  # of two idle workers, the first by name is taken
            forks.kill("decode-0", signal.SIGKILL)

    replies = several(forks, ask(tokens, 600, n=3, ignore_eos=True, **SEEDED), kill)
    assert killed
    check(replies, tokens, replace(sampling, stop_token_ids=()), reference)
    assert max(reply.last.attempts for reply in replies) == 2
    forks.wait_empty()
    forks.restart("decode-0")
