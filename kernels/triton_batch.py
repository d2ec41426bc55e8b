"""A step's metadata on the device, at addresses that never change and filled by one copy: CUDA graphs read it there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.batch import Batch

PADDING = {"tokens": 0, "positions": 0, "page": -1, "slot": 0}
"""What a row of padding holds; page -1 means that its K and V are stored nowhere."""
ALIGNED = 64
"""Each tensor begins at a multiple of so many numbers."""


@dataclass(slots=True, kw_only=True)
class DeviceBatch(Batch):
    """A `Batch` whose tensors are int32 on the device, its segments in slots: single rows first, then the chunks."""

    first: Tensor
    """int32 ``[slot]``: the segment's first row."""
    count: Tensor
    """int32 ``[slot]``: its rows."""
    length: Tensor
    """int32 ``[slot]``: its keys, those of its own rows included; 0 in a slot of padding."""
    tables: Tensor
    """int32 ``[slot, page]``: its page table."""
    singles: int
    """Slots of one row; the others are chunks, by ascending first row."""


class StaticBatch:
    """Room for steps of up to `rows` rows of `slots` sequences, with page tables of up to `pages` entries.

    With a GPU the copy is queued on the current stream, and the host's side is written again only when it is over, so
    that the CPU may run ahead. A filled batch is valid until the next is filled.
    """

    def __init__(self, rows: int, slots: int, pages: int, device: torch.device | str) -> None:
        self.rows, self.slots, self.pages = rows, slots, pages
        sizes = dict.fromkeys((*PADDING, "sample"), rows) | dict.fromkeys(("first", "count", "length"), slots)
        starts = list(accumulate((-(-size // ALIGNED) * ALIGNED for size in sizes.values()), initial=0))
        self._tables_at = starts[-1]  # behind all others: what lies behind the last table in use is not copied
        total = self._tables_at + slots * pages
        on_gpu = torch.device(device).type == "cuda"
        self._host = torch.zeros(total, dtype=torch.int32, pin_memory=on_gpu)
        self._device = torch.zeros(total, dtype=torch.int32, device=device)
        self._copied = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]
        self._spans = {name: slice(at, at + size) for at, (name, size) in zip(starts, sizes.items(), strict=False)}

    def fits(self, batch: Batch) -> bool:
        """Whether there is room for this step."""
        pages = max((len(segment.pages) for segment in batch.segments), default=0)
        return max(batch.rows, batch.samples) <= self.rows and len(batch.segments) <= self.slots and pages <= self.pages

    def blank(self, rows: int) -> DeviceBatch:
        """A step of padding alone: its rows read no key and store nothing."""
        return self.fill(_nothing(), padded=rows)

    def fill(self, batch: Batch, padded: int | None = None) -> DeviceBatch:
        """Copy a step to the device. With `padded`, it looks like a step of so many single rows, all sampled.

        Raises `ValueError` if there is no room, or if a step with chunks is to be padded.
        """
        rows, slots, samples = batch.rows, len(batch.segments), batch.samples
        if not self.fits(batch):
            raise ValueError(
                f"step: got {rows} rows, {samples} of them sampled, of {slots} segments, want at most {self.rows} of "
                f"{self.slots} segments of at most {self.pages} pages"
            )
        if padded is not None:
            if slots < rows or padded < max(rows, samples) or padded > min(self.rows, self.slots):
                raise ValueError(f"padded: got {padded} for {rows} rows of {slots} segments, want room and single rows")
            rows = slots = samples = padded
        segments = sorted(batch.segments, key=lambda segment: segment.count > 1)
        if self._copied is not None:
            self._copied.synchronize()
        host = self._host.numpy()
        for name, nothing in PADDING.items():
            _put(host[self._spans[name]][:rows], getattr(batch, name)[: batch.rows], nothing)
        _put(host[self._spans["sample"]][:samples], batch.sample[: batch.samples], 0)
        host[self._spans["first"]][:slots] = np.arange(slots)  # a slot of padding has a row of padding for its own
        _put(host[self._spans["first"]][: len(segments)], [segment.row for segment in segments], 0)
        _put(host[self._spans["count"]][:slots], [segment.count for segment in segments], 1)
        _put(host[self._spans["length"]][:slots], [segment.stop for segment in segments], 0)
        tables = host[self._tables_at :].reshape(self.slots, self.pages)
        for table, segment in zip(tables, segments, strict=False):
            table[: len(segment.pages)] = segment.pages
        end = self._tables_at + len(segments) * self.pages
        self._device[:end].copy_(self._host[:end], non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        part = {name: self._device[span] for name, span in self._spans.items()}
        return DeviceBatch(
            rows=batch.rows,
            tokens=part["tokens"][:rows],
            positions=part["positions"][:rows],
            page=part["page"][:rows],
            slot=part["slot"][:rows],
            segments=segments,
            sample=part["sample"][:samples],
            samples=samples,
            first=part["first"][:slots],
            count=part["count"][:slots],
            length=part["length"][:slots],
            tables=self._device[self._tables_at :].view(self.slots, self.pages)[:slots],
            singles=slots if padded is not None else sum(segment.count == 1 for segment in segments),
        )


def _put(line: NDArray[np.int32], values: Tensor | Sequence[int], rest: int) -> None:
    line[: len(values)] = values
    line[len(values) :] = rest


def _nothing() -> Batch:
    none = torch.zeros(0, dtype=torch.int64)
    return Batch(0, none, none, none, none, [], none, 0)
