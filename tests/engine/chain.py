"""What the paced engine must say, from tokens alone: its definition in plain Python, and none of its code.

There are no pages, rows, weights or steps here, which is the point: an engine that reads what it should can only agree.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from tokenizers import Tokenizer

from core.sampling import Logprobs, Sampling
from engine.api import Sampled

ALL = 2**64
START, DRAW = 0x243F6A8885A308D3, 0x13198A2E03707344
STIR, STRIDE = 0xD6E8FEB86659FD93, 0x9E3779B97F4A7C15


def mix(x: int) -> int:
    """The finaliser of splitmix64."""
    x %= ALL
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % ALL
    x = (x ^ x >> 27) * 0x94D049BB133111EB % ALL
    return x ^ x >> 31


def links(tokens: Sequence[int]) -> list[int]:
    """The chain: c(-1), c(0) ... of these tokens."""
    chain = [START]
    for position, token in enumerate(tokens):
        x = (chain[-1] + mix(position * 2**32 + token)) % ALL
        chain.append((x ^ x >> 32) * STIR % ALL)
    return chain


def rows(tokens: Sequence[int], layers: int, kv_heads: int, words: int) -> list[list[bytes]]:
    """The bytes of each position, a piece for each (layer, K|V, head)."""
    places = [
        (layer, half, head, word)
        for layer in range(layers)
        for half in (0, 1)
        for head in range(kv_heads)
        for word in range(words)
    ]
    keys = [mix(layer * 2**48 + half * 2**40 + head * 2**24 + word) for layer, half, head, word in places]
    weights = [mix(key) | 1 for key in keys]
    chain = links(tokens)
    found = []
    for position, (before, link) in enumerate(pairwise(chain)):
        held = [mix(link + key) for key in keys[:-1]]
        want = (link - before) * pow(STRIDE, -position, ALL)
        rest = want - sum(weight * word for weight, word in zip(weights, held, strict=False))
        held.append(rest * pow(weights[-1], -1, ALL) % ALL)
        packed = struct.pack(f"<{len(held)}Q", *held)
        found.append([packed[at : at + 8 * words] for at in range(0, len(packed), 8 * words)])
    return found


class Chain:
    """Continuations of prompts over the `ordinary` tokens of a vocabulary; asked as `tests.live.cluster.Reference`."""

    def __init__(self, vocab: int, ordinary: Sequence[int], context: int, stop_rate: float = 0.0) -> None:
        self.vocab, self.ordinary, self.context, self.stop_rate = vocab, list(ordinary), context, stop_rate
        total = sum(1 / rank**2 for rank in range(1, vocab + 1))
        self._likely = [math.log(1 / rank**2 / total) for rank in range(1, vocab + 1)]

    @classmethod
    def of(cls, model: Path, vocab: int, context: int, ends: Sequence[int], stop_rate: float = 0.0) -> Chain:
        """For a model directory with a tokenizer; `ends` are begin and end tokens."""
        tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        special = {token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special}
        known = set(tokenizer.get_vocab().values()) & set(range(vocab))
        return cls(vocab, sorted(known - special - {*ends}), context, stop_rate)

    def samples(self, prompt: Sequence[int], sampling: Sampling, name: str = "alone", branch: int = 0) -> list[Sampled]:
        """One continuation to its end, a stop token included."""
        if sampling.n > 1:
            sampling = sampling.branch(branch)
        tokens, chain = list(prompt), links(prompt)
        told: list[Logprobs | None] = []
        if (top := sampling.prompt_logprobs) is not None:
            told = [
                None,
                *(self._logprobs(link, token, top) for link, token in zip(chain[1:], prompt[1:], strict=False)),
            ]
        found: list[Sampled] = []
        while not found or found[-1].finish is None:
            state = mix(chain[-1] + DRAW)
            token = self._draw(state, len(found), len(tokens), sampling)
            finish = None
            if token in sampling.stop_token_ids:
                finish = "stop"
            elif len(found) + 1 == sampling.max_tokens or len(tokens) + 1 == self.context:
                finish = "length"
            logprobs = None
            if sampling.logprobs is not None:
                logprobs = self._logprobs(chain[-1], token, sampling.logprobs)
            first = () if found else tuple(told)
            found.append(Sampled(name, len(tokens), token, finish, state, branch, logprobs, () if branch else first))
            tokens.append(token)
            x = (chain[-1] + mix((len(tokens) - 1) * 2**32 + token)) % ALL
            chain.append((x ^ x >> 32) * STIR % ALL)
        return found

    def tokens(self, prompt: Sequence[int], sampling: Sampling) -> list[int]:
        """The tokens that a client receives."""
        return [each.token for each in self.samples(prompt, sampling) if each.finish != "stop"]

    def hashes(self, prompt: Sequence[int], sampling: Sampling) -> list[int]:
        """What each of those was drawn from."""
        return [each.logits_hash for each in self.samples(prompt, sampling) if each.finish != "stop"]

    def _draw(self, state: int, made: int, position: int, sampling: Sampling) -> int:
        drawn, count = state, len(self.ordinary)
        if sampling.temperature > 0:  # the noise's stream of (seed, position), as kernels/noise.py defines it
            drawn = mix(state + mix(mix(sampling.seed + 0x9E3779B97F4A7C15) + position))
        stops = sorted(set(sampling.stop_token_ids))
        if made < sampling.min_tokens:
            turned = self.ordinary[drawn % count :] + self.ordinary[: drawn % count]
            return next((token for token in turned if token not in stops), turned[0])
        if stops and mix(drawn + 1) < self.stop_rate * ALL:
            return stops[mix(drawn + 2) % len(stops)]
        return self.ordinary[drawn % count]

    def _logprobs(self, link: int, token: int, top: int) -> Logprobs:
        best = self.ordinary[mix(link + DRAW) % len(self.ordinary)]
        ids = [(best + rank) % self.vocab for rank in range(top)]
        return Logprobs(token, self._likely[(token - best) % self.vocab], tuple(ids), tuple(self._likely[:top]))
