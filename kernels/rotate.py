"""Queries and keys rotated, keys and values stored: ``(a, b) -> (a cos - b sin, b cos + a sin)``.

a and b are the two halves of a head's numbers.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from kernels.batch import Batch
from kernels.ops import Heads
from kernels.rope import Rope

Norm = Callable[[Tensor, Tensor, float], Tensor]


def norm_heads(qkv: Tensor, heads: Heads, norms: tuple[Tensor, Tensor], eps: float, norm: Norm) -> None:
    """Normalise every head of q and of k inside `qkv`, rounded as if by an operation of its own."""
    parts = qkv.view(qkv.shape[0], -1, heads.dim)
    both = heads.heads + heads.kv_heads
    for some, weight in zip((parts[:, : heads.heads], parts[:, heads.heads : both]), norms, strict=True):
        some.copy_(norm(some.reshape(-1, heads.dim), weight, eps).view(some.shape))


def rotate_and_store(qkv: Tensor, batch: Batch, layer: Tensor, heads: Heads, rope: Rope) -> Tensor:
    """Rotate q and k inside `qkv`, copy the real rows' k and v to their slots, give q as a view.

    Multiplications and additions stand alone (nothing is fused), so the bits do not depend on the number of rows.
    """
    half = heads.dim // 2
    both = heads.heads + heads.kv_heads
    parts = qkv.view(qkv.shape[0], both + heads.kv_heads, heads.dim)
    a, b = parts[:, :both, :half], parts[:, :both, half:]
    rotated_a = a * rope.cos
    rotated_a -= b * rope.sin
    rotated_b = b * rope.cos
    rotated_b += a * rope.sin
    a.copy_(rotated_a)
    b.copy_(rotated_b)
    kv = parts[: batch.rows, heads.heads :].view(-1, 2, heads.kv_heads, heads.dim)
    layer.permute(0, 3, 1, 2, 4)[batch.page, batch.slot] = kv
    return parts[:, : heads.heads]
