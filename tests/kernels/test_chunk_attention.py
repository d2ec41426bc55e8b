"""Prefill attention where all keys are few, against its formula in double precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels import chunk_attention as module
from kernels.batch import Segment
from kernels.chunk_attention import FEW_TOKENS, WHOLE_TOKENS, chunk_attention
from kernels.linear import pairs, tiles
from kernels.ops import Heads

PAGE = 16
CLOSE = {torch.float32: 3e-6, torch.bfloat16: 2e-2}
SHAPES = [(0, 65), (0, 200), (1, 64), (63, 64), (100, 1), (130, 129), (300, 212)]


def drawn(start: int, count: int, heads: Heads, dtype: torch.dtype) -> tuple[torch.Tensor, Segment, torch.Tensor]:
    """q, where it lies, and a layer of KV whose pages are in any order and whose unused slots are not numbers."""
    rng, stop = np.random.default_rng(start + count), start + count
    used = -(-stop // PAGE)
    layer = torch.randn(used + 2, 2, heads.kv_heads, PAGE, heads.dim).to(dtype)
    pages = rng.permutation(used + 2)[:used]
    if stop % PAGE:
        layer[pages[-1], :, :, stop % PAGE :] = torch.nan
    return torch.randn(count, heads.heads, heads.dim).to(dtype), Segment(0, count, start, pages), layer


def formula(q: torch.Tensor, segment: Segment, layer: torch.Tensor, heads: Heads) -> torch.Tensor:
    held = layer[torch.from_numpy(segment.pages)].double().permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, : segment.stop]
    keys, values = held.repeat_interleave(heads.group, dim=1)
    scores = torch.einsum("rhd,hkd->hrk", q.double(), keys) * heads.scale
    own = torch.arange(segment.start, segment.stop)[:, None]
    scores.masked_fill_(torch.arange(segment.stop) > own, -torch.inf)
    return torch.einsum("hrk,hkd->rhd", scores.softmax(-1), values)


@pytest.mark.parametrize("dtype", list(CLOSE), ids=str)
@pytest.mark.parametrize(("start", "count"), SHAPES)
@pytest.mark.parametrize("heads", [Heads(6, 2, 32, 0.2), Heads(4, 4, 64, 0.125), Heads(3, 1, 16, 0.5)], ids=str)
def test_few_keys_are_attended_to_at_once(start, count, heads, dtype, monkeypatch):
    q, segment, layer = drawn(start, count, heads, dtype)
    if dtype == torch.float32 or (pairs() and not tiles()):
        monkeypatch.setattr(module, "_partial", lambda *_, **__: pytest.fail("block by block"))
    before = q.clone()
    found = chunk_attention(q, segment, layer, heads)
    assert found.dtype == dtype
    assert (found.double() - formula(q, segment, layer, heads)).abs().max() < CLOSE[dtype]
    assert torch.equal(q, before)


@pytest.mark.parametrize("dtype", list(CLOSE), ids=str)
def test_more_keys_are_attended_to_in_blocks(dtype, monkeypatch):
    heads, most, asked = Heads(4, 2, 16, 0.25), WHOLE_TOKENS[dtype], list[bool]()
    partial = module._partial

    def counted(*words, **more):
        asked.append(True)
        return partial(*words, **more)

    monkeypatch.setattr(module, "_partial", counted)
    for start, count in ((0, FEW_TOKENS), (most - 10, 11), (0, most + 1)):
        asked.clear()
        q, segment, layer = drawn(start, count, heads, dtype)
        found = chunk_attention(q, segment, layer, heads)
        assert (found.double() - formula(q, segment, layer, heads)).abs().max() < CLOSE[dtype]
        assert asked
