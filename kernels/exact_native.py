"""The exact CPU backend with native code: attention and the small operations work row by row, products in tiles.

`native.cpp` gives every row its own loop over keys 0, 1, 2 ... in pieces of 64, with sums in a fixed order, so rows
need no tile of their own to be independent of each other; only the library's products do (`kernels.exact_cpu`). Decode
is several times faster than with torch's operations. The bits are not those of `ExactOps`: workers that are to agree
run the same backend.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kernels import linear
from kernels.batch import Batch
from kernels.exact_cpu import TILE_ROWS, tiled_linear, tiled_logits
from kernels.native_cpu import NativeOps, NativePlan
from kernels.ops import Heads, Packed


class ExactNativeOps(NativeOps):
    """See `kernels.ops`. All inputs have a multiple of `TILE_ROWS` rows."""

    row_tile = TILE_ROWS

    def pack(self, weight: Tensor, bias: Tensor | None = None) -> Packed:
        return linear.pack(weight, bias)

    def linear(self, x: Tensor, weight: Packed) -> Tensor:
        return tiled_linear(x, weight)

    def logits(self, x: Tensor, weight: Packed) -> Tensor:
        return self._wide(x, weight) if self._is_wide(weight) else tiled_logits(x, weight)

    def plan(self, batch: Batch, pages: Tensor, heads: Heads) -> None:
        """Every row, of a chunk or of decode, is one row with its own number of keys."""
        if batch.plans:  # the native loop skips what lies before a window by itself
            batch.plans[heads] = next(iter(batch.plans.values()))
            return
        page_tokens = pages.shape[4]
        tables = [segment.pages[: -(-segment.stop // page_tokens)] for segment in batch.segments]
        first = np.cumsum([0, *(len(table) for table in tables)])[:-1]
        counts = [segment.count for segment in batch.segments]
        batch.plans[heads] = NativePlan(
            chunks=[],
            pages=torch.from_numpy(np.concatenate(tables)),
            first=torch.from_numpy(np.repeat(first, counts)),
            keys=batch.positions[: batch.rows] + 1,
            rows=torch.arange(batch.rows),
        )
