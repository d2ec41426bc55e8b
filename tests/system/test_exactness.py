"""Through separate processes or in one engine: the same tokens from the same logits."""

from __future__ import annotations

import random

import numpy as np
import pytest

from core.sampling import Sampling
from engine.api import Row
from kernels.noise import gumbel, key, scale, token_steps
from tests.system.cluster import Cluster, Reference, cluster, hashes, request, said
from tests.system.conftest import DEMO


def prompts(count: int, vocabulary: int, seed: int, longest: int = 300) -> list[list[int]]:
    """Random prompts of very different lengths."""
    draw = random.Random(seed)
    lengths = [1, 2, 63, 64, 65] + [draw.randrange(3, longest) for _ in range(count)]
    return [[draw.randrange(3, vocabulary) for _ in range(length)] for length in lengths[:count]]


def requests(count: int, vocabulary: int, seed: int):
    """Greedy and seeded requests in turn."""
    draw = random.Random(seed)
    made = []
    for index, prompt in enumerate(prompts(count, vocabulary, seed)):
        options = {"max_tokens": draw.randrange(4, 24)}
        if index % 2:
            options |= {"temperature": draw.choice([0.7, 1.0, 1.5]), "seed": draw.randrange(2**62)}
            options |= draw.choice([{}, {"top_k": 20}, {"top_p": 0.8}, {"top_k": 50, "top_p": 0.95}])
        made.append(request(prompt, **options))
    return made


def compare(running: Cluster, reference: Reference, made) -> None:
    for asked, reply in zip(made, running.ask_all(made), strict=True):
        wanted = reference.play(asked)
        assert reply.error is None, reply.error
        assert reply.end is not None
        assert reply.tokens == said(wanted)
        assert list(reply.end.logits_hashes) == hashes(wanted)
        assert reply.end.finish_reason == wanted[-1].finish
        assert reply.end.completion_tokens == len(reply.tokens)
        assert reply.end.prompt_tokens == len(asked.token_ids.ids)
        assert reply.end.attempts == 1


def test_each_alone_gives_the_reference_logits_at_every_step(exact: Cluster, reference: Reference):
    for asked in requests(6, 512, seed=1):
        compare(exact, reference, [asked])


def test_32_at_once_give_the_reference_logits_at_every_step(exact: Cluster, reference: Reference):
    compare(exact, reference, requests(32, 512, seed=2))


def test_bfloat16_gives_the_reference_logits_at_every_step(tiny, scratch):
    with cluster(tiny, scratch, prefill=1, decode=1, exact=True, dtype="bfloat16", hash_logits=True) as running:
        reference = Reference(tiny, exact=True, dtype="bfloat16")
        compare(running, reference, requests(2, 512, seed=3)[1:])
        compare(running, reference, requests(32, 512, seed=4))


def test_every_page_pulled_was_compared_by_digest(exact: Cluster):
    made = [request(prompt, max_tokens=3) for prompt in prompts(8, 512, seed=5)]
    before = {name: exact.metrics(name)["baton_pulled_bytes"][()] for name in ("decode-0", "decode-1")}
    replies = exact.ask_all(made)
    pulled = sum(int(reply.stage("pull").detail["nbytes"]) for reply in replies)
    after = {name: exact.metrics(name) for name in before}
    assert sum(after[name]["baton_pulled_bytes"][()] - before[name] for name in before) == pulled > 0
    assert all(samples["baton_digest_mismatches"][()] == 0 for samples in after.values())
    assert all(reply.stage("pull").detail["transport"].startswith("ucx") for reply in replies)


def test_nothing_is_recomputed_at_the_decode_worker(exact: Cluster):
    computed = {name: exact.metrics(name)["baton_prefill_tokens"][()] for name in ("prefill-0", "prefill-1")}
    made = [request(prompt, max_tokens=5, ignore_eos=True) for prompt in prompts(6, 512, seed=6)]
    exact.ask_all(made)
    after = {name: exact.metrics(name)["baton_prefill_tokens"][()] for name in computed}
    assert sum(after.values()) - sum(computed.values()) == sum(len(asked.token_ids.ids) for asked in made)
    assert all("baton_prefill_tokens" not in exact.metrics(name) for name in ("decode-0", "decode-1"))


@pytest.mark.parametrize(("dtype", "ceiling"), [("float32", 1e-4), ("bfloat16", 0.02)])
def test_fast_mode_gives_valid_continuations(scratch, dtype: str, ceiling: float):
    """Replay what was said, teacher-forced, in exact float32: each token's score is within 2e of the best.

    e is the largest error of the fast engine's logits on this model and dtype, measured here over all replays.
    """
    draw = random.Random(7)
    made = []
    for index in range(12):
        prompt = [draw.randrange(4, 2048) for _ in range(draw.randrange(2, 200))]
        extra = {"temperature": 0.8, "top_k": 0, "seed": index} if index % 2 else {}
        made.append(request(prompt, max_tokens=12, ignore_eos=True, **extra))
    with cluster(DEMO, scratch, prefill=1, decode=1, dtype=dtype) as running:
        replies = running.ask_all(made)
    fast = Reference(DEMO, dtype=dtype)
    true = Reference(DEMO, dtype="float32", exact=True)
    texts = [[*asked.token_ids.ids, *reply.tokens] for asked, reply in zip(made, replies, strict=True)]
    bests = [logits(true, text) for text in texts]
    error = max(float(np.abs(logits(fast, text) - best).max()) for text, best in zip(texts, bests, strict=True))
    assert error < ceiling * (1.0 if dtype == "float32" else max(float(np.abs(best).max()) for best in bests))
    for asked, reply, best in zip(made, replies, bests, strict=True):
        start = len(asked.token_ids.ids)
        for place, token in enumerate(reply.tokens, start):
            scores = best[place - 1]
            scale = 1.0
            if asked.temperature:
                scale = asked.temperature
                scores = scores / scale + noise(asked.seed, place, scores.size)
            assert float(scores.max() - scores[token]) <= 2 * error / scale


class Recorder:
    """Keeps the logits that a sampler was given."""

    def __init__(self, sampler):
        self.sampler = sampler
        self.seen: list[np.ndarray] = []

    def choose(self, line, sampling, position):
        self.seen.append(np.array(line, dtype=np.float32))
        return self.sampler.choose(line, sampling, position)


def logits(reference: Reference, tokens: list[int]) -> np.ndarray:
    """fp32 logits after every position of `tokens`, fed one by one: [len, vocabulary]."""
    engine = reference.engine
    recorder = Recorder(engine._sampler)
    engine._sampler = recorder
    try:
        for stop in range(1, len(tokens) + 1):
            engine.open("forced", tokens[:stop], range(32), Sampling(1), stop)
            engine.step([Row("forced", stop - 1, stop)])
            engine.close("forced")
    finally:
        engine._sampler = recorder.sampler
    return np.stack(recorder.seen)


def noise(seed: int, position: int, vocabulary: int) -> np.ndarray:
    """The noise added to the scores of one position."""
    return gumbel(token_steps(key(seed, position), scale(np.arange(vocabulary))))
