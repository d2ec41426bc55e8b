"""The sampler against its plain definition over the whole vocabulary, and against the softmax it draws from."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.sampling import Sampling
from engine.penalties import Penalties
from engine.sampler import Sampler, logprobs
from kernels import noise
from tests.engine.plain import bent, choices, close
from tests.engine.plain import logprobs as plain_logprobs

EXTREME = [float(np.finfo(np.float32).max), -float(np.finfo(np.float32).max), 1e30, -1e30, 1e-40, 0.0, -0.0, 88.0]


@st.composite
def lines(draw):
    """fp32 logits of any size, with ties, or at the very ends of what there is."""
    vocab = draw(st.sampled_from([1, 2, 3, 17, 64, 65, 300, 1000]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    logits = (rng.standard_normal(vocab) * draw(st.sampled_from([0.01, 1.0, 5.0, 30.0, 1e37]))).astype(np.float32)
    match draw(st.sampled_from(["as they are", "ties", "all equal", "some extreme", "all extreme"])):
        case "ties":
            logits = np.round(logits)
        case "all equal":
            logits[:] = draw(st.sampled_from(EXTREME))
        case "some extreme":
            logits[rng.integers(0, vocab, 3)] = draw(st.sampled_from(EXTREME))
        case "all extreme":
            logits = rng.choice(EXTREME, vocab).astype(np.float32)
    return np.ascontiguousarray(logits, np.float32)


@st.composite
def histories(draw):
    """Logits, a sampling, and the prompt and output before them."""
    logits = draw(lines())
    vocab = len(logits)
    tokens = st.integers(0, vocab - 1)
    stops = draw(st.one_of(st.lists(tokens, max_size=3, unique=True), st.just(list(range(vocab - 1)))))
    bias = draw(
        st.one_of(
            st.dictionaries(tokens, st.sampled_from([-100.0, -1.5, 0.0, 0.1, 100.0]), max_size=4),
            st.just(dict.fromkeys(range(vocab), -100.0)),
        )
    )
    sampling = Sampling(
        10,
        temperature=draw(st.sampled_from([0.0, 1e-300, 0.05, 0.7, 1.0, 3.0, 1e300])),
        top_k=draw(st.sampled_from([0, 0, 1, 5, 50, 400, 5000])),
        top_p=draw(st.sampled_from([1e-6, 0.3, 0.9, 0.999, 1.0, 1.0])),
        min_p=draw(st.sampled_from([0.0, 0.0, 5e-324, 0.01, 0.4, 1.0])),
        seed=draw(st.integers(0, 2**63 - 1)),
        stop_token_ids=tuple(stops),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 0.5, 1.3, 5e-324, 1e308])),
        presence_penalty=draw(st.sampled_from([0.0, 0.0, -2.0, 0.3, 2.0])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.0, -2.0, 0.7, 2.0])),
        logit_bias=tuple(sorted(bias.items())),
        min_tokens=draw(st.sampled_from([0, 0, 3, 10])),
    )
    prompt = draw(st.lists(tokens, max_size=8))
    output = draw(st.lists(tokens, max_size=12))
    return logits, sampling, prompt, output, draw(st.integers(0, 10**6))


@settings(max_examples=400, deadline=None)
@given(histories(), st.data())
def test_equals_the_plain_definition(case, data):
    """However much of the output was known when the sequence was opened here."""
    logits, sampling, prompt, output, position = case
    before = logits.copy()
    wanted = bent(logits, sampling, prompt, output)
    known = data.draw(st.integers(0, len(output)))
    penalties = Penalties(sampling, prompt, output[:known], len(logits))
    for token in output[known:]:
        penalties.add(token)
    got = penalties.apply(logits, len(output)) if sampling.bends else logits
    assert got.dtype == np.float32
    assert (got == np.array(wanted, np.float32)).all()
    assert Sampler(len(logits)).choose(got, sampling, position) in choices(logits, sampling, position, prompt, output)
    assert (logits == before).all()


@settings(max_examples=200, deadline=None)
@given(lines(), st.integers(0, 20), st.data())
def test_logprobs_are_the_log_softmax_of_the_raw_logits(logits, top, data):
    token = data.draw(st.integers(0, len(logits) - 1))
    got = logprobs(logits, token, top)
    assert close(got, plain_logprobs(logits, token, top))
    assert len(got.top_ids) == min(top, len(logits))
    assert dict(zip(got.top_ids, got.top_logprobs, strict=True)).get(token, got.logprob) == got.logprob


def test_penalties_grow_with_the_output():
    """More different tokens than there is room for at first."""
    rng = np.random.default_rng(0)
    logits = rng.standard_normal(2000).astype(np.float32)
    sampling = Sampling(1000, repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.1, min_tokens=1)
    prompt, output = rng.integers(0, 2000, 50).tolist(), rng.integers(0, 2000, 500).tolist()
    penalties = Penalties(sampling, prompt, [], 2000)
    for token in output:
        penalties.add(token)
    assert penalties.apply(logits, 500).tolist() == bent(logits, sampling, prompt, output)
    again = Penalties(sampling, prompt, output, 2000)
    assert (again.apply(logits, 500) == penalties.apply(logits, 500)).all()


def test_where_every_token_ends_the_text_none_is_barred():
    sampling = Sampling(5, min_tokens=5, stop_token_ids=(0, 1, 7))
    logits = np.array([1.0, 2.0], np.float32)
    assert Penalties(sampling, [0], [], 2).apply(logits, 0).tolist() == [1.0, 2.0]
    assert Penalties(sampling, [0], [], 3).apply(np.array([1.0, 2.0, 0.0], np.float32), 4).argmax() == 2


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1, temperature=1.0),
        Sampling(1, temperature=0.6),
        Sampling(1, temperature=1.0, top_k=5),
        Sampling(1, temperature=1.3, top_p=0.8),
        Sampling(1, temperature=0.9, top_k=20, top_p=0.9),
        Sampling(1, temperature=1.2, min_p=0.1),
        Sampling(1, temperature=1.2, min_p=0.02, top_k=40, top_p=0.9),
    ],
)
def test_draws_from_the_softmax(sampling):
    """Chi-square of 4,000 draws over 100 tokens against the truncated softmax."""
    logits = (np.random.default_rng(1).standard_normal(100) * 2).astype(np.float32)
    order = np.argsort(-logits, kind="stable")
    weights = np.exp((logits[order] - logits.max()) / sampling.temperature, dtype=np.float64)
    weights[weights < sampling.min_p] = 0
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
