"""The KV arena: one allocation of whole pages, seen as bytes by transfers and as a tensor by the model."""

from __future__ import annotations

import torch

from core.errors import SetupError
from core.kv import KvShape
from engine.memory import anonymous_memory, page_count

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Arena:
    """As many pages as fit into `nbytes`, at an address that never changes; `setting` is what errors call that number.

    Page-major (core/kv.py): `pages` is the view ``[page, layer, K|V, kv_head, token, dim]``. The memory is zero at
    first; the host's is anonymous, in huge pages where the system has them, and `memory` are its bytes. Raises
    `SetupError` if not even one page fits or the memory cannot be had.
    """

    def __init__(
        self, kv: KvShape, nbytes: int, device: torch.device | None = None, setting: str = "kv_memory"
    ) -> None:
        self.kv = kv
        self.count = page_count(kv, nbytes, setting)
        self.memory: memoryview | None = None
        shape = self.count, kv.layers, 2, kv.kv_heads, kv.page_tokens, kv.head_dim
        if device is not None and device.type == "cuda":
            try:
                self.pages = torch.zeros(shape, dtype=TORCH_DTYPES[kv.dtype], device=device)
            except torch.OutOfMemoryError as error:
                raise SetupError(f"{setting}: {self.count * kv.page_nbytes} bytes cannot be had: {error}") from None
            return
        self._map = anonymous_memory(self.count * kv.page_nbytes, setting)
        self.memory = memoryview(self._map)
        self.pages = torch.frombuffer(self._map, dtype=TORCH_DTYPES[kv.dtype]).view(shape)

    def layer(self, index: int) -> torch.Tensor:
        """One layer of every page: ``[page, K|V, kv_head, token, dim]``, strided, in place."""
        return self.pages[:, index]

    def clear(self, page: int, slot: int) -> None:
        """Zero the slots of `page` from `slot` on, in every layer: no key or value of a former owner is left there."""
        if slot < self.kv.page_tokens:
            self.pages[page, :, :, :, slot:].zero_()
