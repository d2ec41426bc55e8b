"""The small operations as Triton kernels: norms, rotation and storing of K and V, gates, and copies of whole pages."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton_attention import tanh


@triton.jit
def rms_norm(x, residual, weight, out, eps, COLS: tl.constexpr, ADD: tl.constexpr):
    """Grid (row): ``x / sqrt(mean(x^2) + eps) * weight``; with `ADD`, of ``residual += x``, rounded before the norm."""
    col = tl.arange(0, triton.next_power_of_2(COLS))
    at, mask = tl.program_id(0).to(tl.int64) * COLS + col, col < COLS
    wide = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        summed = (wide + tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)).to(residual.dtype.element_ty)
        tl.store(residual + at, summed, mask=mask)
        wide = summed.to(tl.float32)
    wide = wide * tl.rsqrt(tl.sum(wide * wide, 0) / COLS + eps) * tl.load(weight + col, mask=mask, other=0.0)
    tl.store(out + at, wide.to(out.dtype.element_ty), mask=mask)


@triton.jit
def rope_store(
    qkv, layer, page, slot, cos, sin, q_norm, k_norm, eps, page_stride,
    HEADS: tl.constexpr, KV: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, NORM: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Grid (row, block of `AT_ONCE` heads): q is normed and rotated in place; k likewise, and k and v go to their page.

    A head's numbers are read as halves (a, b), rotated to ``(a cos - b sin, b cos + a sin)``. A row whose `page` is
    negative is padding and stores nothing.
    """
    row = tl.program_id(0)
    HALF: tl.constexpr = DIM // 2
    head = tl.program_id(1) * AT_ONCE + tl.arange(0, AT_ONCE)[:, None]
    dim = tl.arange(0, triton.next_power_of_2(HALF))[None, :]
    mask = (head < HEADS + 2 * KV) & (dim < HALF)
    at = qkv + row.to(tl.int64) * ((HEADS + 2 * KV) * DIM) + head * DIM + dim
    raw_a, raw_b = tl.load(at, mask=mask, other=0.0), tl.load(at + HALF, mask=mask, other=0.0)
    a, b = raw_a.to(tl.float32), raw_b.to(tl.float32)
    is_q, is_v = head < HEADS, head >= HEADS + KV
    if NORM:
        scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / DIM + eps)[:, None]
        of_q, of_k = mask & is_q, mask & ~is_q
        weight_a = tl.load(q_norm + dim, mask=of_q, other=0.0) + tl.load(k_norm + dim, mask=of_k, other=0.0)
        weight_b = tl.load(q_norm + HALF + dim, mask=of_q, other=0.0)
        weight_b += tl.load(k_norm + HALF + dim, mask=of_k, other=0.0)
        # As if the norm were an operation of its own: what is rotated is rounded.
        a = (a * scale * weight_a).to(raw_a.dtype).to(tl.float32)
        b = (b * scale * weight_b).to(raw_b.dtype).to(tl.float32)
    turn = row * HALF + dim
    c, s = tl.load(cos + turn, mask=dim < HALF, other=0.0), tl.load(sin + turn, mask=dim < HALF, other=0.0)
    new_a = tl.where(is_v, raw_a, (a * c - b * s).to(raw_a.dtype))
    new_b = tl.where(is_v, raw_b, (b * c + a * s).to(raw_b.dtype))
    tl.store(at, new_a, mask=mask & is_q)
    tl.store(at + HALF, new_b, mask=mask & is_q)
    to_page = tl.load(page + row).to(tl.int64)
    kept = mask & ~is_q & (to_page >= 0)
    # K's heads are followed by V's in qkv as in a page.
    to = layer + to_page * page_stride + ((head - HEADS) * PAGE + tl.load(slot + row)) * DIM + dim
    tl.store(to, new_a, mask=kept)
    tl.store(to + HALF, new_b, mask=kept)


@triton.jit
def gated(gate_up, out, COLS: tl.constexpr, GELU: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (row, block of columns): ``act(gate) * up``, act being SiLU or the tanh form of GELU."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = col < COLS
    gate = tl.load(gate_up + row * 2 * COLS + col, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * COLS + COLS + col, mask=mask, other=0.0).to(tl.float32)
    if GELU:  # 0.5 x (1 + tanh(u)) is x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
        inner = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    else:
        inner = gate
    tl.store(out + row * COLS + col, (gate / (1.0 + tl.exp(-inner)) * up).to(out.dtype.element_ty), mask=mask)


@triton.jit
def soft_cap(logits, count, CAP: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (block): ``cap * tanh(x / cap)`` in place, fp32."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(logits + at, CAP * tanh(tl.load(logits + at, mask=at < count, other=0.0) / CAP), mask=at < count)


@triton.jit
def copy_pages(arena, staging, pages, WORDS: tl.constexpr, BACK: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (page, block of words): pages `pages` of the arena to neighbouring pages of `staging`, or back."""
    word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = tl.load(pages + tl.program_id(0)).to(tl.int64) * WORDS + word
    here = tl.program_id(0).to(tl.int64) * WORDS + word
    if BACK:
        tl.store(arena + there, tl.load(staging + here, mask=word < WORDS), mask=word < WORDS)
    else:
        tl.store(staging + here, tl.load(arena + there, mask=word < WORDS), mask=word < WORDS)
