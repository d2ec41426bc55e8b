"""Attention over pages as Triton kernels: decode rows with their context split, and chunks of prompts.

For a row at position p and a key at position n, with ``s = q . k * scale``, then ``s = cap * tanh(s / cap)``::

    out = sum_n exp(s_n) v_n / sum_n exp(s_n),   n from max(0, p - window + 1) to p

in blocks of keys with a running maximum, in fp32. Keys and values that nobody may see are never read: their slots may
hold NaN. Offsets into the arena are 64 bits wide, a page's number times its stride overflows 32.

Where a step's sequences lie is read from memory (`kernels.triton_batch`), and the grid of `attend_rows` depends on the
number of slots only, so that one launch serves every length: a CUDA graph can hold it.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def tanh(x):
    """fp32; the error is that of one rounding near 1."""
    return 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0)


@triton.jit
def held(layer, table, page_stride, kv_head, position, there, PAGE: tl.constexpr, KV: tl.constexpr, DIM: tl.constexpr):
    """One head's K and V ``[position, dim]``; zeros where `there` is false, for 0 times NaN would be NaN."""
    dim = tl.arange(0, triton.next_power_of_2(DIM))
    page = tl.load(table + position // PAGE, mask=there, other=0).to(tl.int64)
    keys = layer + page * page_stride + (kv_head * PAGE + position % PAGE) * DIM
    at, mask = keys[:, None] + dim[None, :], there[:, None] & (dim < DIM)[None, :]
    return tl.load(at, mask=mask, other=0.0), tl.load(at + KV * PAGE * DIM, mask=mask, other=0.0)


@triton.jit
def fold(q, keys, values, seen, top, total, mixed, SCALE: tl.constexpr, CAP: tl.constexpr):
    """Take a block of keys into the running maximum ``[row]``, sum ``[row]`` and mix ``[row, dim]``.

    fp32 is multiplied as three tf32 products, which keeps its precision; narrower types do not care.
    """
    scores = tl.dot(q, tl.trans(keys), input_precision="tf32x3") * SCALE
    if CAP > 0:
        scores = CAP * tanh(scores / CAP)
    scores = tl.where(seen, scores * LOG2E, -float("inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    base = tl.where(new_top == -float("inf"), 0.0, new_top)  # a row that has seen nothing yet
    share = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(top - base)
    mixed = tl.dot(share.to(values.dtype), values, mixed * shrink[:, None], input_precision="tf32x3")
    return new_top, total * shrink + tl.sum(share, 1), mixed


@triton.jit
def attend_rows(
    q, parts, logs, layer, tables, first, length, q_stride, page_stride, table_stride,
    HEADS: tl.constexpr, KV: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, SPLITS: tl.constexpr,
    SCALE: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Grid (slot, kv head, split): one row's heads of a group against one of `SPLITS` shares of its keys.

    Writes a normalised mix to `parts` ``[slot, head, split, dim]`` and log2 of the sum to `logs` ``[slot, head,
    split]``, both fp32; minus infinity where the share is empty. `ROWS` >= heads of a group, `KEYS` a block of keys.
    """
    slot, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    GROUP: tl.constexpr = HEADS // KV
    row, dim = tl.arange(0, ROWS), tl.arange(0, triton.next_power_of_2(DIM))
    head = kv_head * GROUP + row
    ours = (slot * HEADS + head) * SPLITS + split
    stop = tl.load(length + slot)
    begin = tl.maximum(stop - WINDOW, 0) if WINDOW > 0 else 0
    share = tl.cdiv(tl.cdiv(stop - begin, SPLITS), KEYS) * KEYS
    begin += split * share
    stop = tl.minimum(begin + share, stop)
    if begin >= stop:
        tl.store(logs + ours, -float("inf"), mask=row < GROUP)
        return
    mask = (row < GROUP)[:, None] & (dim < DIM)[None, :]
    at = q + tl.load(first + slot).to(tl.int64) * q_stride
    queries = tl.load(at + head[:, None] * DIM + dim[None, :], mask=mask, other=0.0)
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, triton.next_power_of_2(DIM)], tl.float32)
    table = tables + slot.to(tl.int64) * table_stride
    for block in range(begin, stop, KEYS):
        position = block + tl.arange(0, KEYS)
        there = position < stop
        keys, values = held(layer, table, page_stride, kv_head, position, there, PAGE, KV, DIM)
        top, total, mixed = fold(queries, keys, values, there[None, :], top, total, mixed, SCALE, CAP)
    tl.store(logs + ours, top + tl.log2(total), mask=row < GROUP)
    tl.store(parts + ours.to(tl.int64)[:, None] * DIM + dim[None, :], mixed / total[:, None], mask=mask)


@triton.jit
def merge_rows(out, parts, logs, first, HEADS: tl.constexpr, DIM: tl.constexpr, SPLITS: tl.constexpr):
    """Grid (slot, head): the shares of `attend_rows` to `out` ``[row, head, dim]``; zeros for a slot without keys."""
    slot, head = tl.program_id(0), tl.program_id(1)
    split, dim = tl.arange(0, SPLITS), tl.arange(0, triton.next_power_of_2(DIM))
    ours = (slot.to(tl.int64) * HEADS + head) * SPLITS + split
    log = tl.load(logs + ours)
    best = tl.max(log, 0)
    weight = tl.exp2(log - tl.where(best == -float("inf"), 0.0, best))
    mask = (log > -float("inf"))[:, None] & (dim < DIM)[None, :]
    mixed = tl.sum(tl.load(parts + ours[:, None] * DIM + dim[None, :], mask=mask, other=0.0) * weight[:, None], 0)
    total = tl.sum(weight, 0)
    at = (tl.load(first + slot).to(tl.int64) * HEADS + head) * DIM + dim
    mixed = mixed / tl.where(total > 0, total, 1.0)
    tl.store(out + at, mixed.to(out.dtype.element_ty), mask=dim < DIM)


@triton.jit(do_not_specialize=["singles", "chunks"])
def attend_chunks(
    q, out, layer, tables, first, count, length, singles, chunks, q_stride, page_stride, table_stride,
    HEADS: tl.constexpr, KV: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr,
    SCALE: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Grid (tile, kv head): `ROWS` // group tokens of one of `chunks` segments, times the heads of a group.

    Those are in the slots behind `singles`. The i-th one's tiles begin at ``first // TILE + i``, so no list of tiles
    is needed, and few programs find nothing to do. The grid has ``rows // TILE + chunks`` tiles.
    """
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    GROUP: tl.constexpr = HEADS // KV
    TILE: tl.constexpr = ROWS // GROUP
    slot, behind = singles, singles + chunks
    while behind - slot > 1:
        middle = (slot + behind) // 2
        before = tl.load(first + middle) // TILE + middle - singles <= tile
        slot = tl.where(before, middle, slot)
        behind = tl.where(before, behind, middle)
    start_row, rows = tl.load(first + slot), tl.load(count + slot)
    token = (tile - start_row // TILE - slot + singles) * TILE  # the tile's first, counted from the segment's first
    if (token < 0) | (token >= rows):
        return
    start = tl.load(length + slot) - rows
    row, dim = tl.arange(0, ROWS), tl.arange(0, triton.next_power_of_2(DIM))
    own = token + row // GROUP
    head = kv_head * GROUP + row % GROUP
    mask = ((row < TILE * GROUP) & (own < rows))[:, None] & (dim < DIM)[None, :]
    at = (start_row + own).to(tl.int64)
    queries = tl.load(q + at[:, None] * q_stride + head[:, None] * DIM + dim[None, :], mask=mask, other=0.0)
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, triton.next_power_of_2(DIM)], tl.float32)
    table = tables + slot.to(tl.int64) * table_stride
    begin = tl.maximum(start + token - WINDOW + 1, 0) if WINDOW > 0 else 0
    stop = start + tl.minimum(token + TILE, rows)
    last = (start + own)[:, None]
    for block in range(begin, stop, KEYS):
        position = block + tl.arange(0, KEYS)
        keys, values = held(layer, table, page_stride, kv_head, position, position < stop, PAGE, KV, DIM)
        seen = position[None, :] <= last
        if WINDOW > 0:
            seen = seen & (position[None, :] > last - WINDOW)
        top, total, mixed = fold(queries, keys, values, seen, top, total, mixed, SCALE, CAP)
    mixed = mixed / tl.where(total > 0, total, 1.0)[:, None]
    at = at[:, None] * (HEADS * DIM) + head[:, None] * DIM + dim[None, :]
    tl.store(out + at, mixed.to(out.dtype.element_ty), mask=mask)
