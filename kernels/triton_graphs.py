"""Decode steps as CUDA graphs: one recording for each padded batch size, replayed with one launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernels.batch import Batch
from kernels.triton_batch import StaticBatch

SIZES = (1, 2, 4, *range(8, 257, 8))


class DecodeGraphs:
    """Replays `forward` for steps of single rows; sizes beyond the static batch's room are left out.

    `forward` must read its step from the batch's tensors alone. Recording takes a few forward passes for each size and
    belongs before serving; all graphs share one pool of memory, so only one step's results are valid at a time.
    """

    def __init__(
        self, static: StaticBatch, forward: Callable[[Batch], Tensor | None], sizes: Sequence[int] = SIZES
    ) -> None:
        self._static = static
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._logits: Tensor | None = None
        """Of the step replayed last, for all sizes: what a graph kept for itself the others could not use."""
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        room = min(static.rows, static.slots)
        for size in sorted((size for size in sizes if size <= room), reverse=True):  # the largest makes the pool
            batch = static.blank(size)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # compiles, and lets the libraries allocate what must not be recorded
                logits = forward(batch)
                assert logits is not None
                if self._logits is None:
                    self._logits = torch.empty_like(logits)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                logits = forward(batch)
                assert logits is not None
                self._logits[:size].copy_(logits)
            del logits
            self._graphs[size] = graph
        self._sizes = sorted(self._graphs)

    def takes(self, batch: Batch) -> bool:
        """Whether `run` can do this step: single rows only, and not too many."""
        return len(batch.segments) == batch.rows <= self._sizes[-1]

    def run(self, batch: Batch) -> Tensor:
        """fp32 logits ``[samples, vocab]``, valid until the next step."""
        size = next(size for size in self._sizes if size >= batch.rows)
        self._static.fill(batch, padded=size)
        self._graphs[size].replay()
        assert self._logits is not None
        return self._logits[: batch.samples]
