"""One step's rows as the operations see them: which token, which position, which slot of which page."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


@dataclass(slots=True)
class Segment:
    """Rows [row, row + count) of the step are positions [start, start + count) of one sequence."""

    row: int
    count: int
    start: int
    pages: NDArray[np.int64]
    """The sequence's page table, at least up to its last position here."""
    newest: bool = False
    """The last row is the sequence's newest token; the slots behind it hold finite numbers."""

    @property
    def stop(self) -> int:
        """First position after the segment."""
        return self.start + self.count


@dataclass(slots=True)
class Batch:
    """A step: `rows` real rows, then padding up to a multiple of the backend's row tile.

    `tokens` and `positions` are int64 ``[padded]`` (padding: token 0 at position 0), `page` and `slot` int64
    ``[rows]``: where each row's K and V go. `sample` int64 ``[samples, padded]``: the rows whose logits are wanted.
    """

    rows: int
    tokens: Tensor
    positions: Tensor
    page: Tensor
    slot: Tensor
    segments: list[Segment]
    sample: Tensor
    samples: int
    plans: dict[Any, Any] = field(default_factory=dict)
    """What a backend worked out once for all layers of this step that have the same `kernels.ops.Heads`."""
