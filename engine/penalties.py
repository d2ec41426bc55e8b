"""What a request asks to be done to its logits before a token is chosen from them: bars, biases, penalties.

    x = logit + bias
    x = x / r if x > 0 else x * r          for tokens in prompt or output
    x = x - f * count - p * (count > 0)    count: how often the token is in the output

in fp64, rounded once and kept within the finite numbers of fp32; r, f, p are the repetition, frequency and presence
penalty. Before `min_tokens`, stop tokens are minus infinity, unless a constraint allows nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from core.sampling import Sampling

Floats = NDArray[np.float32]

LARGEST = float(np.finfo(np.float32).max)
ROOM = 64
"""Tokens beyond those known at first for which there is room before the arrays are doubled."""


class Penalties:
    """One sequence's. A step costs a copy of the logits, and work for each token concerned: biased, or seen so far."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int], output: Sequence[int], vocab: int) -> None:
        """`prompt` and `output` are what is known so far. Where all tokens are stop tokens, none is barred."""
        self._sampling = sampling
        stops = [token for token in sampling.stop_token_ids if 0 <= token < vocab]
        self._barred = np.array(stops if len(stops) < vocab else [], np.int64)
        self._repeats = sampling.repetition_penalty != 1
        self._counts_output = self._repeats or (sampling.presence_penalty, sampling.frequency_penalty) != (0, 0)
        biased = [token for token, _ in sampling.logit_bias]
        seen = np.unique(np.array([*prompt, *output] if self._repeats else [], np.int64))
        made, counts = np.unique(np.array(output if self._counts_output else [], np.int64), return_counts=True)
        ids = np.unique(np.concatenate([np.array(biased, np.int64), seen, made]))
        self._count = len(ids)
        self._place = {int(token): place for place, token in enumerate(ids)}
        self._ids = np.concatenate([ids, np.zeros(ROOM, np.int64)])
        self._bias = np.zeros(len(self._ids), np.float64)
        self._bias[np.searchsorted(ids, biased)] = [bias for _, bias in sampling.logit_bias]
        self._seen = np.zeros(len(self._ids), np.bool_)
        self._seen[np.searchsorted(ids, seen)] = True
        self._made = np.zeros(len(self._ids), np.int64)
        self._made[np.searchsorted(ids, made)] = counts

    def add(self, token: int) -> None:
        """A token was generated."""
        if not self._counts_output:
            return
        place = self._place.get(token)
        if place is None:
            place = self._place[token] = self._count
            self._count += 1
            if place == len(self._ids):
                self._ids, self._bias, self._seen, self._made = (
                    np.concatenate([array, np.zeros_like(array)])
                    for array in (self._ids, self._bias, self._seen, self._made)
                )
            self._ids[place] = token
        self._seen[place] = True
        self._made[place] += 1

    def apply(self, logits: Floats, made: int, allowed: NDArray[np.bool_] | None = None) -> Floats:
        """Logits ``[vocab]``, fp32, as the request wants them for the token after `made` generated ones.

        Of them the caller takes the `allowed` ones, all if None.
        """
        asked, some = self._sampling, slice(self._count)
        bent = logits.copy()
        ids = self._ids[some]
        x = logits[ids] + self._bias[some]
        if self._repeats:
            with np.errstate(over="ignore"):  # infinite is kept within fp32 below
                repeated = np.where(x > 0, x / asked.repetition_penalty, x * asked.repetition_penalty)
            x = np.where(self._seen[some], repeated, x)
        if self._counts_output:
            count = self._made[some]
            x = x - asked.frequency_penalty * count - asked.presence_penalty * (count > 0)
        bent[ids] = np.clip(x, -LARGEST, LARGEST)
        if made < asked.min_tokens and (allowed is None or _more(allowed, self._barred)):
            bent[self._barred] = -np.inf
        return bent


def _more(allowed: NDArray[np.bool_], barred: NDArray[np.int64]) -> bool:
    """Whether something is allowed that is not barred."""
    return bool(np.count_nonzero(allowed) > np.count_nonzero(allowed[barred]))
