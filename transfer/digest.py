"""Page digests: 64 bits that say whether the KV bytes of a page are the announced ones.

A row is one token of one head of K or V in one layer; a word is 8 bytes, little-endian, a row's tail zero-padded.

    digest = sum over rows of mix64(sum of the row's words + key(layer, K|V, head) + key(token))   mod 2**64

Coordinates are absolute, so the sum over the pages, heads or layers that different workers hold is the sum over the
whole: it holds between any page sizes and any tensor parallelism. A changed byte always changes it, because mix64 is
a bijection; rows, heads or pages in the wrong place change it but for a chance of 2**-64. It is a guard against stale
and misplaced bytes, not against an attacker, who can trade words within a row.

In numpy it is one pass over the bytes in blocks whose sums stay in the cache: 6 to 11 GB/s a thread (16 KiB to 2 MiB
pages, measured on a busy machine). A process that has a native loop for it (`Sums`) passes that.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.errors import LocalError
from core.kv import KvShape, page_runs

U64 = NDArray[np.uint64]
Bytes = memoryview | NDArray[Any]
Sums = Callable[[NDArray[Any], NDArray[Any], NDArray[Any], int, int], NDArray[Any]]
"""(pages, keys of lanes, keys of tokens, tokens a page, tokens that count) to digests; as `_sums`, for whole words."""

MASK = 2**64 - 1
_WORD = np.dtype("<u8")
_BLOCK_ROWS = 32768
_own = threading.local()


def mix64(value: int) -> int:
    """The splitmix64 finaliser: a bijection of 64-bit numbers in which every input bit moves every output bit."""
    value &= MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def lane_key(layer: int, kv: int, head: int) -> int:
    """Key of a row's place besides its token; `kv` is 0 for K, 1 for V."""
    return mix64(0x4B56_0000_0000_0000 + (layer << 25) + (kv << 24) + head)


def token_key(token: int) -> int:
    """Key of an absolute token position."""
    return mix64(0x544F_4B00_0000_0000 + token)


def page_digest(
    page: Bytes, shape: KvShape, first_token: int, tokens: int, *, first_head: int = 0, first_layer: int = 0
) -> int:
    """Digest of the first `tokens` tokens of one page, whose first token is at the absolute `first_token`.

    `first_head` and `first_layer` place a shard: its head 0 is head `first_head` of the model.
    """
    if not 0 <= tokens <= shape.page_tokens:
        raise LocalError(f"digest tokens: got {tokens}, want 0 to {shape.page_tokens}")
    flat = _flat(page)
    if flat.nbytes != shape.page_nbytes:
        raise LocalError(f"digest page: got {flat.nbytes} bytes, want {shape.page_nbytes}")
    return _digests(flat[None, :], shape, first_token, tokens, _lanes(shape, first_head, first_layer))[0]


def digests(
    arena: Bytes,
    pages: Sequence[int],
    shape: KvShape,
    first_page_index: int,
    tokens: int,
    *,
    first_head: int = 0,
    first_layer: int = 0,
    sums: Sums | None = None,
) -> list[int]:
    """Digests of `pages` of `arena`, in order; `sums` is another way to the same.

    `pages` are numbers in the arena; the first holds the sequence's page `first_page_index`, the next ones follow.
    `tokens` is how many tokens these pages hold together: all are full but the last ones.
    """
    flat = _flat(arena)
    units, rest = divmod(flat.nbytes, shape.page_nbytes)
    if rest:
        raise LocalError(f"digest arena: got {flat.nbytes} bytes, want whole pages of {shape.page_nbytes}")
    if not 0 <= tokens <= len(pages) * shape.page_tokens:
        raise LocalError(f"digest tokens: got {tokens}, want 0 to {len(pages) * shape.page_tokens}")
    if any(not 0 <= page < units for page in pages):
        raise LocalError(f"digest pages: got {min(pages)} to {max(pages)}, want 0 to {units - 1}")
    lanes = _lanes(shape, first_head, first_layer)
    bodies = flat.reshape(units, shape.page_nbytes)
    full = tokens // shape.page_tokens
    found: list[int] = []
    for run in page_runs(pages[:full]):
        first = (first_page_index + len(found)) * shape.page_tokens
        found += _digests(bodies[run.start : run.stop], shape, first, shape.page_tokens, lanes, sums)
    if full < len(pages):
        first = (first_page_index + full) * shape.page_tokens
        page = pages[full]
        found += _digests(bodies[page : page + 1], shape, first, tokens - full * shape.page_tokens, lanes, sums)
    return found + [0] * (len(pages) - len(found))


def _flat(data: Bytes) -> NDArray[np.uint8]:
    if isinstance(data, np.ndarray):
        return data.reshape(-1).view(np.uint8)
    return np.frombuffer(data, dtype=np.uint8)


@lru_cache(maxsize=16)
def _lanes(shape: KvShape, first_head: int, first_layer: int) -> U64:
    """Keys of the page's (layer, K|V, head), in the page's order, as a column."""
    keys = [
        lane_key(first_layer + layer, kv, first_head + head)
        for layer in range(shape.layers)
        for kv in (0, 1)
        for head in range(shape.kv_heads)
    ]
    return np.array(keys, dtype=np.uint64)[:, None]


@lru_cache(maxsize=256)
def _tokens(first: int, count: int) -> U64:
    """Keys of `count` tokens from `first` on."""
    value = np.arange(first, first + count, dtype=np.uint64) + np.uint64(0x544F_4B00_0000_0000)
    _mix(value, np.empty_like(value))
    return value


def _room(*shape: int) -> tuple[U64, U64]:
    """Two blocks of this thread's own, not cleared: fresh ones of this size come with page faults each time."""
    count = math.prod(shape)
    kept: U64 | None = getattr(_own, "room", None)
    if kept is None or kept.shape[1] < count:
        kept = _own.room = np.empty((2, max(count, _BLOCK_ROWS)), dtype=np.uint64)
    return kept[0, :count].reshape(shape), kept[1, :count].reshape(shape)


def _mix(value: U64, spare: U64) -> None:
    """mix64 of every element, in place; `spare` is scratch of the same shape."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        np.right_shift(value, np.uint64(shift), out=spare)
        np.bitwise_xor(value, spare, out=value)
        np.multiply(value, np.uint64(factor), out=value)
    np.right_shift(value, np.uint64(31), out=spare)
    np.bitwise_xor(value, spare, out=value)


def _digests(
    bodies: NDArray[np.uint8], shape: KvShape, first_token: int, tokens: int, lanes: U64, sums: Sums | None = None
) -> list[int]:
    """Digests of neighbouring pages ``[page, byte]`` of a sequence, of the first `tokens` tokens of each."""
    count = len(bodies)
    if tokens == 0:
        return [0] * count
    keys = _tokens(first_token, count * shape.page_tokens)
    if shape.row_nbytes % 8:
        rows = bodies.reshape(count, -1, shape.row_nbytes)
        padded = np.zeros((*rows.shape[:2], -(-shape.row_nbytes // 8) * 8), dtype=np.uint8)
        padded[..., : shape.row_nbytes] = rows
        bodies = padded.reshape(count, -1)
    return [int(digest) for digest in (sums or _sums)(bodies, lanes, keys, shape.page_tokens, tokens)]


def _sums(bodies: NDArray[Any], lanes: NDArray[Any], keys: NDArray[Any], page_tokens: int, tokens: int) -> U64:
    count = len(bodies)
    words = bodies.view(_WORD).reshape(count, len(lanes), page_tokens, -1)[:, :, :tokens]
    keys = keys.reshape(count, 1, page_tokens)[:, :, :tokens]
    lane_step = min(len(lanes), max(1, _BLOCK_ROWS // tokens))
    page_step = min(count, max(1, _BLOCK_ROWS // (tokens * len(lanes))))
    room, spare = _room(page_step, lane_step, tokens)
    total: U64 = np.zeros(count, dtype=np.uint64)
    for page in range(0, count, page_step):
        for lane in range(0, len(lanes), lane_step):
            block = words[page : page + page_step, lane : lane + lane_step]
            value, scratch = room[: block.shape[0], : block.shape[1]], spare[: block.shape[0], : block.shape[1]]
            np.einsum("pltw->plt", block, out=value)  # add.reduce over so short an axis is several times slower
            np.add(value, lanes[lane : lane + lane_step], out=value)
            np.add(value, keys[page : page + page_step], out=value)
            _mix(value, scratch)
            total[page : page + page_step] += np.add.reduce(value, axis=(1, 2))
    return total
