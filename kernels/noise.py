"""Noise without state: a hash of (seed, position, token id) where others draw random numbers.

``key = mix(mix(seed) + position)``, ``bits = mix(key + (token + 1) * GOLDEN)`` with splitmix64's mix, and
``u = (top 52 bits + 1/2) / 2^52``, ``gumbel = -log(-log u)`` in fp64. The same on every worker, in any batch, after
any restart.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

GOLDEN = 0x9E3779B97F4A7C15
_M1, _M2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = 2**64 - 1
STEPS = 2.0**52
"""Uniform numbers are odd multiples of half a step of 2**-52, so never 0 and never 1."""


def mix(value: int) -> int:
    """splitmix64's finaliser on one number."""
    value = ((value ^ (value >> 30)) * _M1) & _MASK
    value = ((value ^ (value >> 27)) * _M2) & _MASK
    return value ^ (value >> 31)


def key(seed: int, position: int) -> int:
    """The stream of one position of one request."""
    return mix((mix((seed + GOLDEN) & _MASK) + position) & _MASK)


def token_steps(stream: int, scaled: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The uniform numbers of tokens in whole steps, [0, 2**52); `scaled` is ``(token + 1) * GOLDEN`` (see `scale`)."""
    bits = scaled + np.uint64(stream)
    part = bits >> np.uint64(30)
    bits ^= part
    bits *= np.uint64(_M1)
    np.right_shift(bits, np.uint64(27), out=part)
    bits ^= part
    bits *= np.uint64(_M2)
    np.right_shift(bits, np.uint64(31), out=part)
    bits ^= part
    bits >>= np.uint64(12)
    return bits


def scale(tokens: NDArray[np.int64]) -> NDArray[np.uint64]:
    """``(token + 1) * GOLDEN`` mod 2**64."""
    return (tokens.astype(np.uint64) + np.uint64(1)) * np.uint64(GOLDEN)


def gumbel(steps: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Gumbel noise, fp64, from uniform numbers in steps."""
    uniform = (steps.astype(np.float64) + 0.5) / STEPS
    noise: NDArray[np.float64] = -np.log(-np.log(uniform))
    return noise


def least_steps(noise: float) -> int:
    """A number of steps below which the noise is certainly less than `noise` (rounding allowed for)."""
    uniform = math.exp(-math.exp(min(-noise, 700.0)))
    return max(int(uniform * STEPS * (1 - 1e-12)) - 16, 0)
