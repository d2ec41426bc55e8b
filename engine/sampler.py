"""The next token of a row: greedy, or the best of ``logit / temperature + noise(seed, position, token)``.

Adding Gumbel noise and taking the best draws from the softmax exactly; since the noise is a hash, a request goes on
with the same tokens on any worker and in any batch. Noise is computed only where it can matter: for the survivors of
min-p, top-k and top-p, or, without those, for tokens whose hash is high enough to win.

Ties go to the lower token id. All three keep the first few in the order of likelihood: `min_p` those with a probability
of at least its share of the highest, `top_k` so many, and `top_p` is taken of the probabilities, at the given
temperature, of what those two left.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from core.sampling import Logprobs, Sampling
from kernels import noise

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]

LEAST_TEMPERATURE = 1e-6
"""Lower temperatures count as this one: at it, only ties are left to chance."""
FIRST_LOOK = 256
"""Tokens taken off the top before asking whether they suffice; if not, all are sorted (a sort is cheap, a loop not)."""


class Sampler:
    """Chooses tokens for a vocabulary of `vocab` tokens."""

    def __init__(self, vocab: int) -> None:
        self.vocab = vocab
        self._scaled = noise.scale(np.arange(vocab))

    def choose(self, logits: Floats, sampling: Sampling, position: int) -> int:
        """The token for `position` (the new token's own) from its fp32 `logits` ``[vocab]``, contiguous.

        If the best logit is not finite, its token: the caller looks.
        """
        best = int(logits.argmax())
        top = logits[best]
        if sampling.greedy or not np.isfinite(top):
            return best
        temperature = max(sampling.temperature, LEAST_TEMPERATURE)
        stream = noise.key(sampling.seed, position)
        limit = sampling.top_k if 0 < sampling.top_k < self.vocab else self.vocab
        if sampling.min_p > 0:
            floor = np.float64(top) + temperature * math.log(sampling.min_p)
            limit = min(limit, int(np.count_nonzero(logits >= floor)))
        if sampling.top_p < 1:
            tokens = self._likely(logits, sampling.top_p, limit, temperature, top)
        elif limit < self.vocab:
            tokens = _top(logits, limit)
        else:
            tokens = self._contenders(logits, temperature, stream)
        scores = self._scores(logits, tokens, temperature, stream)
        return int(tokens[scores.argmax()])

    def _scores(self, logits: Floats, tokens: Ids, temperature: float, stream: int) -> NDArray[np.float64]:
        noisy = noise.gumbel(noise.token_steps(stream, self._scaled[tokens]))
        noisy += logits[tokens].astype(np.float64) / temperature
        return noisy

    def _likely(self, logits: Floats, top_p: float, limit: int, temperature: float, top: np.float32) -> Ids:
        """Of the `limit` most likely tokens the survivors of top-p, in order of token id."""

        def weigh(values: Floats) -> NDArray[np.float64]:
            weights = values.astype(np.float64)
            weights -= top
            weights /= temperature
            return np.exp(weights, out=weights)

        if limit < self.vocab:
            tokens, total = _top(logits, limit), None
        else:
            tokens, total = _top(logits, FIRST_LOOK), float(weigh(logits).sum())
        while True:
            falling = -np.sort(-logits[tokens])
            sums = weigh(falling).cumsum()
            goal = top_p * (float(sums[-1]) if total is None else total)
            if sums[-1] >= goal or len(tokens) >= limit:
                kept = min(int(np.searchsorted(sums, goal)) + 1, len(tokens))
                return _least_surplus(logits, tokens, float(falling[kept - 1]), kept)
            tokens = np.arange(self.vocab)

    def _contenders(self, logits: Floats, temperature: float, stream: int) -> Ids:
        """Every token that could have the best score, in order of token id.

        The most likely few set a score to beat. Any other token's logit is at most theirs, so it needs at least
        ``beat - logit / temperature`` of noise, and noise grows with the hash: an integer comparison settles it.
        """
        if self.vocab <= FIRST_LOOK:
            return np.arange(self.vocab)
        first = _top(logits, FIRST_LOOK)
        beat = float(self._scores(logits, first, temperature, stream).max())
        bound = float(logits[first].min()) / temperature
        steps = noise.token_steps(stream, self._scaled)
        lucky = np.flatnonzero(steps >= np.uint64(noise.least_steps(beat - bound)))
        return np.union1d(first, lucky)


def logprobs(logits: Floats, token: int, top: int) -> Logprobs:
    """How likely `token` was by fp32 `logits` ``[vocab]``, and the `top` most likely tokens; in fp64."""
    ids = _top(logits, top) if top else np.empty(0, np.int64)
    ids = ids[np.argsort(-logits[ids], kind="stable")]
    below = logits.astype(np.float64)
    below -= below.max()
    total = math.log(np.exp(below).sum())
    return Logprobs(token, float(below[token]) - total, tuple(ids.tolist()), tuple((below[ids] - total).tolist()))


def _top(logits: Floats, count: int) -> Ids:
    """The `count` most likely tokens in order of token id; of equals at the edge, the lower ids."""
    tokens = np.arange(len(logits))
    if count >= len(logits):
        return tokens
    edge = torch.topk(torch.from_numpy(logits), count, sorted=False).values.min().item()
    return _least_surplus(logits, tokens, edge, count)


def _least_surplus(logits: Floats, tokens: Ids, edge: float, count: int) -> Ids:
    """Those of `tokens` with a logit of at least `edge`, less the highest ids at the edge above `count`."""
    values = logits[tokens]
    kept = tokens[values >= edge]
    if surplus := len(kept) - count:
        equal = kept[logits[kept] == edge]
        kept = np.setdiff1d(kept, equal[len(equal) - surplus :], assume_unique=True)
    return kept
