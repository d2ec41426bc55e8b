"""Decode attention that reads pages in place: one partial softmax a page, then one merge a row.

Page p of a row gives ``o_p = softmax(s_p) V_p`` and ``lse_p = log sum exp(s_p)``, ``s_p = q K_p^T * scale``; the
row's result is ``sum_p exp(lse_p - m) o_p / sum_p exp(lse_p - m)``. Neighbouring pages of the arena are a batch for
one call with strides, whoever they belong to, so nothing is copied and nothing is padded to the longest row; pages
that stand alone are gathered first, a bounded number at a time. Pages before a row's window are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.batch import Segment
from kernels.chunk_attention import capped_attention
from kernels.ops import Heads

RUN_PAGES = 4
"""Shorter runs of neighbouring pages are gathered: a call costs more than copying a few pages."""
GATHER_PAGES = 256
"""Most pages gathered at once."""


@dataclass(slots=True)
class Piece:
    """Pages [start, stop) of the plan: in place from page `first` of the arena on, or gathered by number."""

    start: int
    stop: int
    first: int
    gathered: Tensor | None


@dataclass(slots=True)
class PagePlan:
    """All pages of a step's decode rows, in the arena's order."""

    rows: Tensor
    """int64 ``[row]``: the step's rows that decode."""
    owner: Tensor
    """int64 ``[page]``: which of `rows` a page belongs to."""
    source: Tensor
    """int64 ``[page]``: the step's row whose query meets this page."""
    mask: Tensor | None
    """``[page, 1, 1, token]``: 0, or minus infinity where the row does not see; None if all pages are seen whole."""
    pieces: list[Piece]


def page_plan(segments: list[Segment], page_tokens: int, dtype: torch.dtype, window: int | None = None) -> PagePlan:
    """The plan for segments of one row each."""
    last = np.array([segment.start for segment in segments])
    unseen = np.zeros(len(segments), np.int64) if window is None else np.maximum(last - window + 1, 0)
    starts, stops = unseen // page_tokens, last // page_tokens + 1
    counts = stops - starts
    tables = [segment.pages[start:stop] for segment, start, stop in zip(segments, starts, stops, strict=True)]
    page = np.concatenate(tables)
    owner = np.repeat(np.arange(len(segments)), counts)
    ends = np.cumsum(counts)
    filled = np.full(len(page), page_tokens)
    filled[ends - 1] = last % page_tokens + 1
    empty = np.zeros(len(page), np.int64)
    empty[ends - counts] = unseen % page_tokens
    order = _arena_order(page)
    pieces, regrouped = _pieces(page[order])
    order = order[regrouped]
    owner, filled, empty = owner[order], filled[order], empty[order]
    rows = np.array([segment.row for segment in segments])
    mask = None
    if (filled < page_tokens).any() or empty.any():
        slot = np.arange(page_tokens)
        hidden = (slot >= filled[:, None]) | (slot < empty[:, None])
        mask = torch.zeros(len(page), 1, 1, page_tokens, dtype=dtype)
        mask.masked_fill_(torch.from_numpy(hidden)[:, None, None], -torch.inf)
    return PagePlan(torch.from_numpy(rows), torch.from_numpy(owner), torch.from_numpy(rows[owner]), mask, pieces)


def _arena_order(page: NDArray[np.int64]) -> NDArray[np.int64]:
    """Ascending page numbers; a page of several rows goes round again, so that each round is strictly ascending."""
    order = np.argsort(page, kind="stable")
    ranked = page[order]
    first = np.r_[True, ranked[1:] != ranked[:-1]]
    if first.all():
        return order
    starts = np.flatnonzero(first)
    nth = np.arange(len(page)) - np.repeat(starts, np.diff(np.r_[starts, len(page)]))
    return order[np.lexsort((ranked, nth))]


def _pieces(page: NDArray[np.int64]) -> tuple[list[Piece], NDArray[np.int64]]:
    """Long runs first, then the lone pages in gathers; with the order that this takes."""
    edges = np.flatnonzero(np.diff(page) != 1) + 1
    starts, stops = np.r_[0, edges], np.r_[edges, len(page)]
    long = stops - starts >= RUN_PAGES
    pieces = []
    order: list[NDArray[np.int64]] = []
    done = 0
    for start, stop in zip(starts[long], stops[long], strict=True):
        pieces.append(Piece(done, done + int(stop - start), int(page[start]), None))
        order.append(np.arange(start, stop))
        done = pieces[-1].stop
    lone = np.flatnonzero(np.repeat(~long, stops - starts))
    for start in range(0, len(lone), GATHER_PAGES):
        part = lone[start : start + GATHER_PAGES]
        pieces.append(Piece(done, done + len(part), -1, torch.from_numpy(page[part])))
        done = pieces[-1].stop
    return pieces, np.concatenate([*order, lone])


def page_attention(q: Tensor, plan: PagePlan, layer: Tensor, heads: Heads) -> Tensor:
    """``[row of plan.rows, heads, dim]`` from the step's q ``[row, heads, dim]`` and one layer of the arena.

    Slots of a page that a row does not see must hold finite numbers (the engine clears those behind the last
    position): they are masked in the scores, but 0 times NaN would still be NaN.
    """
    queries = q[plan.source].view(-1, heads.kv_heads, heads.group, heads.dim)
    outs, sums = [], []
    for piece in plan.pieces:
        if piece.gathered is None:
            held = layer[piece.first : piece.first + piece.stop - piece.start]
        else:
            held = layer.index_select(0, piece.gathered)
        mask = None if plan.mask is None else plan.mask[piece.start : piece.stop]
        part = queries[piece.start : piece.stop]
        if heads.cap is None:
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                part, held[:, 0], held[:, 1], attn_mask=mask, scale=heads.scale
            )
        else:
            out, lse = capped_attention(part, held[:, 0], held[:, 1], heads, mask)
        outs.append(out)
        sums.append(lse)
    out = outs[0] if len(outs) == 1 else torch.cat(outs)
    lse = sums[0] if len(sums) == 1 else torch.cat(sums)
    count = len(plan.rows)
    top = lse.new_full((count, heads.kv_heads, heads.group), -torch.inf)
    top.scatter_reduce_(0, plan.owner[:, None, None].expand_as(lse), lse, "amax")
    share = (lse - top[plan.owner]).exp_()
    total = torch.zeros_like(top).index_add_(0, plan.owner, share)
    mixed = share.new_zeros(count, heads.kv_heads, heads.group, heads.dim)
    mixed.index_add_(0, plan.owner, out * share[..., None])
    return (mixed / total[..., None]).flatten(1, 2).to(q.dtype)
