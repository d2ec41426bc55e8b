"""Split over processes, a model says bit for bit what it says in one; in fast mode, what the arithmetic allows."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from core.sampling import Sampling
from kernels import noise
from tests.live.asks import Case, case
from tests.live.cluster import Client, Live, Reference, Reply, together

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": {"temperature": 0.9, "seed": 5},
    "top_k": {"temperature": 1.2, "top_k": 12, "seed": 6},
    "top_p": {"temperature": 0.7, "top_p": 0.8, "seed": 2**62},
    "all": {"temperature": 1.0, "top_k": 30, "top_p": 0.95, "seed": 7},
}
LENGTHS = (1, 15, 16, 17, 64, 130, 300, 555)
CEILINGS = {"float32": 1e-4, "bfloat16": 0.02}
"""Largest error of a logit in fast mode: absolute, and as a share of the largest logit."""

ALONE = [case(length, 24, **KINDS[kind]) for length in LENGTHS for kind in ("greedy", "all")]
CROWD = [case(LENGTHS[n % 8], 8 + 3 * n, n, **KINDS[[*KINDS][n % 5]]) for n in range(32)]


async def one_by_one(live: Live, cases: Sequence[Case]) -> list[Reply]:
    async with Client(live.gateway) as client:
        return [await client.generate(each.request) for each in cases]


async def at_once(live: Live, cases: Sequence[Case]) -> list[Reply]:
    async with Client(live.gateway) as client:
        return await together(*(client.generate(each.request) for each in cases))


@contextlib.contextmanager
def pulls(live: Live, *, at_most: float = float("inf")) -> Iterator[None]:
    """KV bytes cross between processes meanwhile; not one page of them differs from its digest."""
    nbytes, wrong = live.total("baton_pulled_bytes"), live.total("baton_digest_mismatches")
    yield
    assert 0 < live.total("baton_pulled_bytes") - nbytes <= at_most
    assert live.total("baton_digest_mismatches") == wrong


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def exact(request, launch, model):
    """Two prefill processes and a decode process in exact mode, and one exact engine in this process."""
    dtype = request.param
    live = launch(f"exact-{dtype}", model, prefill=2, dtype=dtype, exact=True, hash_logits=True)
    yield live, Reference(model, dtype=dtype, exact=True)
    live.stop()


@pytest.fixture(scope="module", params=["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def fast(request, launch, model, live):
    """The same in fast mode; one engine of the same kind; and the truth, plain fp32."""
    dtype = request.param
    truth = Reference(model, dtype="float32", exact=True, native=False)
    same = Reference(model, dtype=dtype)
    if dtype == "float32":
        yield live, same, truth
        return
    other = launch(f"fast-{dtype}", model, prefill=2, dtype=dtype)
    yield other, same, truth
    other.stop()


@pytest.mark.parametrize(("how", "cases"), [(one_by_one, ALONE), (at_once, CROWD)], ids=["alone", "32_at_once"])
def test_every_logit_is_bit_equal_to_one_process(exact, how, cases):
    live, reference = exact
    pages = sum(reference.engine.kv.pages_for(len(each.prompt)) for each in cases)
    with pulls(live, at_most=pages * reference.engine.kv.page_nbytes):
        replies = asyncio.run(how(live, cases))
    for each, reply in zip(cases, replies, strict=True):
        each.check(reply, reference)
        assert reply.hashes == reference.hashes(each.prompt, each.sampling)


def test_both_prefill_workers_compute_and_nothing_is_computed_twice(exact):
    live, _ = exact
    first, second = ([case(length, 8, number) for length in LENGTHS] for number in (100, 200))  # nobody has them yet
    before = {name: live.metric(name, "baton_prefill_tokens") for name in ("prefill-0", "prefill-1")}
    asyncio.run(one_by_one(live, first))
    after = {name: live.metric(name, "baton_prefill_tokens") - count for name, count in before.items()}
    assert sum(after.values()) == sum(len(each.prompt) for each in first)
    asyncio.run(at_once(live, second))
    assert all(live.metric(name, "baton_prefill_tokens") > before[name] + count for name, count in after.items())


def test_fast_mode_stays_within_its_error(fast):
    """Each greedy token's true logit is within twice the error of the maximum; seeded ones likewise, noise added."""
    live, same, truth = fast
    dtype = same.engine.kv.dtype
    cases = [case(length, 30, 1, **KINDS[kind]) for length in LENGTHS for kind in ("greedy", "seeded", "top_k")]
    with pulls(live):
        replies = asyncio.run(at_once(live, cases))
    lines, error = [], 0.0
    for each, reply in zip(cases, replies, strict=True):
        assert reply.last.completion_tokens == len(reply.tokens)
        line = truth.logits(each.prompt, reply.tokens)
        error = max(error, np.abs(same.logits(each.prompt, reply.tokens) - line).max(initial=0.0))
        lines.append(line)
    ceiling = CEILINGS[dtype] * (1 if dtype == "float32" else max(np.abs(line).max(initial=0.0) for line in lines))
    assert error < ceiling
    for each, reply, line in zip(cases, replies, lines, strict=True):
        for place, token in enumerate(reply.tokens):
            assert shortfall(line[place], each.sampling, len(each.prompt) + place, token, error) <= 0


def shortfall(logits: np.ndarray, sampling: Sampling, position: int, token: int, error: float) -> float:
    """How much more than `error` a logit everywhere would be needed to make `token` the choice; at most 0 if enough."""
    if sampling.greedy:
        return float(logits.max() - logits[token]) - 2 * error
    every = np.arange(len(logits))
    scores = logits / sampling.temperature
    scores = scores + noise.gumbel(noise.token_steps(noise.key(sampling.seed, position), noise.scale(every)))
    edge = np.sort(logits)[-sampling.top_k] if sampling.top_k else -np.inf
    sure = logits > edge + 2 * error
    if not sure.any():
        return float(edge - logits[token]) - 2 * error
    lost = float(scores[sure].max() - scores[token]) - 2 * error / sampling.temperature
    return max(lost, float(edge - logits[token]) - 2 * error)
