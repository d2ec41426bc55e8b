"""The sampler against its plain definition over the whole vocabulary, and against the softmax it draws from."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.sampling import Sampling
from engine.sampler import Sampler
from kernels import noise


def plain(logits, sampling, position):
    """argmax over survivors of logit / temperature + gumbel, all of it in full."""
    vocab = len(logits)
    if sampling.greedy:
        return int(np.argmax(logits))
    order = sorted(range(vocab), key=lambda token: (-logits[token], token))
    if sampling.top_k:
        order = order[: sampling.top_k]
    if sampling.top_p < 1:
        weights = np.exp((logits - logits.max()) / np.float32(sampling.temperature))
        sums = weights[order].astype(np.float64).cumsum()
        total = sums[-1] if 0 < sampling.top_k < vocab else weights.sum(dtype=np.float64)
        order = order[: int((sums < sampling.top_p * total).sum()) + 1]
    stream = noise.key(sampling.seed, position)
    best = []
    for token in sorted(order):
        mixed = noise.mix((stream + (token + 1) * noise.GOLDEN) % 2**64) >> 12
        gumbel = noise.gumbel(np.array([mixed], np.uint64))[0]
        best.append((np.float64(logits[token]) / sampling.temperature + gumbel, -token))
    return -max(best)[1]


@st.composite
def cases(draw):
    vocab = draw(st.sampled_from([1, 2, 17, 64, 65, 300, 1000]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    logits = (rng.standard_normal(vocab) * draw(st.sampled_from([0.01, 1.0, 5.0, 30.0]))).astype(np.float32)
    if draw(st.booleans()):  # ties
        logits = np.round(logits)
    sampling = Sampling(
        1,
        temperature=draw(st.sampled_from([0.0, 0.05, 0.7, 1.0, 3.0])),
        top_k=draw(st.sampled_from([0, 1, 5, 50, 400, 5000])),
        top_p=draw(st.sampled_from([1e-6, 0.3, 0.9, 0.999, 1.0])),
        seed=draw(st.integers(0, 2**63 - 1)),
    )
    return logits, sampling, draw(st.integers(0, 10**6))


@settings(max_examples=300, deadline=None)
@given(cases())
def test_equals_the_plain_definition(case):
    logits, sampling, position = case
    assert Sampler(len(logits)).choose(logits, sampling, position) == plain(logits, sampling, position)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1, temperature=1.0),
        Sampling(1, temperature=0.6),
        Sampling(1, temperature=1.0, top_k=5),
        Sampling(1, temperature=1.3, top_p=0.8),
        Sampling(1, temperature=0.9, top_k=20, top_p=0.9),
    ],
)
def test_draws_from_the_softmax(sampling):
    """Chi-square of 4,000 draws over 100 tokens against the truncated softmax."""
    logits = (np.random.default_rng(1).standard_normal(100) * 2).astype(np.float32)
    order = np.argsort(-logits, kind="stable")
    weights = np.exp((logits[order] - logits.max()) / sampling.temperature, dtype=np.float64)
    if sampling.top_k:
        weights[sampling.top_k :] = 0
    weights /= weights.sum()
    weights[int((weights.cumsum() < sampling.top_p).sum()) + 1 :] = 0
    weights /= weights.sum()
    draws = 4000
    sampler = Sampler(100)
    counts = np.bincount([sampler.choose(logits, sampling, place) for place in range(draws)], minlength=100)[order]
    assert counts[weights == 0].sum() == 0
    expected, seen = weights * draws, counts.astype(float)
    few = (expected < 5) & (expected > 0)
    parts = [(seen[few].sum(), expected[few].sum())] if few.any() else []
    parts += list(zip(seen[expected >= 5], expected[expected >= 5], strict=True))
    chi = sum((got - want) ** 2 / want for got, want in parts)
    free = len(parts) - 1
    assert chi < free + 5 * (2 * free) ** 0.5


def test_noise_is_uniform_and_its_bounds_hold():
    steps = noise.token_steps(noise.key(3, 4), noise.scale(np.arange(100_000)))
    uniform = steps / noise.STEPS
    assert abs(uniform.mean() - 0.5) < 0.005
    assert abs(np.corrcoef(uniform[:-1], uniform[1:])[0, 1]) < 0.02
    assert np.isfinite(noise.gumbel(np.array([0, 2**52 - 1], np.uint64))).all()
    values = noise.gumbel(steps)
    for bound in (-2.0, 0.0, 1.0, 5.0, 12.0):
        assert steps[values >= bound].min(initial=2**52) >= noise.least_steps(bound)
    assert noise.least_steps(-800.0) == 0
    assert noise.least_steps(800.0) <= 2**52
    assert len({noise.key(seed, place) for seed in range(50) for place in range(50)}) == 2500


def test_a_tiny_temperature_is_greedy_and_extreme_logits_are_safe():
    logits = np.array([1.0, 1e30, -1e30, 1e29], np.float32)
    for sampling in (Sampling(1, temperature=1e-300), Sampling(1, temperature=1e-300, top_p=0.5)):
        assert Sampler(4).choose(logits, sampling, 7) == 1


def test_large_vocabularies_cost_less_than_noise_and_sort_over_all_of_them():
    """The plain way, timed in the same run, is what the candidates save."""
    logits = (np.random.default_rng(0).standard_normal(32000) * 3).astype(np.float32)
    sampler = Sampler(32000)
    for sampling in (Sampling(1, temperature=1.0), Sampling(1, temperature=0.8, top_k=50, top_p=0.9)):
        best, plain = 1.0, 1.0
        for place in range(20):
            started = time.perf_counter()
            sampler.choose(logits, sampling, place)
            best = min(best, time.perf_counter() - started)
            started = time.perf_counter()
            scaled = noise.scale(np.arange(32000))
            np.argsort(logits + noise.gumbel(noise.token_steps(noise.key(7, place), scaled)))
            plain = min(plain, time.perf_counter() - started)
        assert best < plain
