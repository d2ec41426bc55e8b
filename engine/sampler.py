"""The next token of a row: greedy, or the best of ``logit / temperature + noise(seed, position, token)``.

Adding Gumbel noise and taking the best draws from the softmax exactly; since the noise is a hash, a request goes on
with the same tokens on any worker and in any batch. Noise is computed only where it can matter: for the survivors of
top-k and top-p, or, without those, for tokens whose hash is high enough to win.

Ties go to the lower token id. `top_p` is taken of the probabilities at the given temperature after `top_k`.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from core.sampling import Sampling
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
        """The token for `position` (the new token's own) from its fp32 `logits` ``[vocab]``, contiguous."""
        best = int(logits.argmax())
        if sampling.greedy:
            return best
        temperature = max(sampling.temperature, LEAST_TEMPERATURE)
        stream = noise.key(sampling.seed, position)
        if sampling.top_p < 1:
            tokens = self._likely(logits, sampling, temperature, logits[best])
        elif 0 < sampling.top_k < self.vocab:
            tokens = _top(logits, sampling.top_k)
        else:
            tokens = self._contenders(logits, temperature, stream)
        scores = self._scores(logits, tokens, temperature, stream)
        return int(tokens[scores.argmax()])

    def _scores(self, logits: Floats, tokens: Ids, temperature: float, stream: int) -> NDArray[np.float64]:
        noisy = noise.gumbel(noise.token_steps(stream, self._scaled[tokens]))
        noisy += logits[tokens].astype(np.float64) / temperature
        return noisy

    def _likely(self, logits: Floats, sampling: Sampling, temperature: float, top: np.float32) -> Ids:
        """The survivors of top-k, then top-p, in order of token id."""
        limit = sampling.top_k if 0 < sampling.top_k < self.vocab else self.vocab

        def weigh(values: Floats) -> Floats:
            with np.errstate(over="ignore"):  # far below the top: minus infinity is right, its weight is 0
                weights: Floats = np.exp((values - top) / np.float32(temperature))
            return weights

        if limit < self.vocab:
            tokens, total = _top(logits, limit), None
        else:
            tokens, total = _top(logits, FIRST_LOOK), float(weigh(logits).sum(dtype=np.float64))
        while True:
            falling = -np.sort(-logits[tokens])
            sums = weigh(falling).cumsum(dtype=np.float64)
            goal = sampling.top_p * (float(sums[-1]) if total is None else total)
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
