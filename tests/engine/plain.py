"""The plain reference of sampling: the whole chain by its definitions, token by token in fp64, without shortcuts."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np

from core.sampling import Logprobs, Sampling
from kernels import noise

LARGEST = float(np.finfo(np.float32).max)


def bent(
    logits, sampling: Sampling, prompt: Sequence[int], output: Sequence[int], allowed: Collection[int] | None = None
) -> list[float]:
    """Logits after bias and penalties, in fp32; minus infinity for stop tokens before `min_tokens`.

    And for what is not `allowed`; a stop token is barred only if something else is.
    """
    out, biases = [], dict(sampling.logit_bias)
    for token, logit in enumerate(logits):
        x = float(logit) + biases.get(token, 0.0)
        if token in prompt or token in output:
            x = x / sampling.repetition_penalty if x > 0 else x * sampling.repetition_penalty
        count = list(output).count(token)
        x -= sampling.frequency_penalty * count
        x -= sampling.presence_penalty * (count > 0)
        out.append(float(np.float32(min(max(x, -LARGEST), LARGEST))))
    stops = {token for token in sampling.stop_token_ids if token < len(out)}
    left = set(range(len(out)) if allowed is None else allowed)
    if len(output) < sampling.min_tokens and left - stops:
        left -= stops
    return [score if token in left else -math.inf for token, score in enumerate(out)]


def kept(scores: Sequence[float], sampling: Sampling, top_p: float) -> list[int]:
    """The tokens that min-p, top-k and top-p leave, best first."""
    temperature = max(sampling.temperature, 1e-6)
    best = max(scores)
    below = [(score - best) / temperature for score in scores]
    weight = [math.exp(each) for each in below]
    order = sorted(range(len(scores)), key=lambda token: (-scores[token], token))
    if sampling.min_p:
        order = [token for token in order if below[token] >= math.log(sampling.min_p)]
    if sampling.top_k:
        order = order[: sampling.top_k]
    if top_p < 1:
        goal, reached, last = top_p * math.fsum(weight[token] for token in order), 0.0, 0
        while last < len(order) and reached < goal:
            reached += weight[order[last]]
            last += 1
        order = order[:last]
    return order


def gumbel(seed: int, position: int, token: int) -> float:
    """The noise of one token at one position."""
    bits = noise.mix((noise.key(seed, position) + (token + 1) * noise.GOLDEN) % 2**64)
    return -math.log(-math.log(((bits >> 12) + 0.5) / 2**52))


def choices(
    logits,
    sampling: Sampling,
    position: int,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
    allowed: Collection[int] | None = None,
) -> set[int]:
    """The token to be chosen; two only where a token stands on the very edge of top-p, which rounding decides."""
    scores = bent(logits, sampling, prompt, output, allowed)
    if sampling.greedy:
        return {max(range(len(scores)), key=lambda token: (scores[token], -token))}
    temperature, edge = max(sampling.temperature, 1e-6), 1e-12
    found = set()
    for top_p in {sampling.top_p} if sampling.top_p == 1 else {sampling.top_p * (1 + by) for by in (-edge, 0, edge)}:
        left = kept(scores, sampling, top_p)
        noisy = {token: scores[token] / temperature + gumbel(sampling.seed, position, token) for token in left}
        found.add(max(noisy, key=lambda token: (noisy[token], -token)))
    return found


def logprobs(logits, token: int, top: int) -> Logprobs:
    """The log-softmax of the raw logits at `token` and at the `top` most likely."""
    best = max(map(float, logits))
    total = math.log(math.fsum(math.exp(float(logit) - best) for logit in logits))
    every = [float(logit) - best - total for logit in logits]
    order = sorted(range(len(every)), key=lambda token: (-float(logits[token]), token))[:top]
    return Logprobs(token, every[token], tuple(order), tuple(every[each] for each in order))


def close(got: Logprobs | None, want: Logprobs | None) -> bool:
    """Equal but for the rounding of fp64."""
    if got is None or want is None:
        return got is want
    same = (got.token, got.top_ids) == (want.token, want.top_ids)
    pairs = zip((got.logprob, *got.top_logprobs), (want.logprob, *want.top_logprobs), strict=True)
    return same and all(math.isclose(a, b, rel_tol=1e-12, abs_tol=1e-12) for a, b in pairs)
