"""Where a checkpoint's tensors lie: safetensors headers, read by hand and without torch.

A safetensors file is 8 bytes of little-endian header length, that many bytes of JSON (name -> dtype, shape,
[begin, end) offsets behind the header), and the payload.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import ModelError

ITEM_NBYTES = {"F32": 4, "BF16": 2, "F16": 2}
"""Sizes of the dtypes that a weight may have."""
MAX_HEADER_NBYTES = 100_000_000
"""The format's own limit."""


@dataclass(frozen=True, slots=True)
class TensorSlot:
    """One tensor's place: file, absolute byte range, shape, and its safetensors dtype (``F32``, ``BF16`` ...)."""

    path: Path
    offset: int
    nbytes: int
    shape: tuple[int, ...]
    dtype: str


def tensor_index(model_dir: str | Path) -> dict[str, TensorSlot]:
    """Every tensor of a model directory by name, from ``model.safetensors`` or the shards that its index names.

    Raises `ModelError` naming the file or tensor that is missing, damaged or truncated.
    """
    folder = Path(model_dir)
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        single = folder / "model.safetensors"
        if not single.exists():
            raise ModelError(f"{folder}: got no model.safetensors and no {index.name}, want one of them")
        return file_index(single)
    weight_map = _weight_map(index)
    slots: dict[str, TensorSlot] = {}
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).exists():
            raise ModelError(f"{index}: shard {shard!r} is not in the directory")
        for name, slot in file_index(folder / shard).items():
            if weight_map.get(name) != shard:
                raise ModelError(f"{folder / shard}: tensor {name!r} is not listed for this file in {index.name}")
            slots[name] = slot
    for name, shard in weight_map.items():
        if name not in slots:
            raise ModelError(f"{folder / shard}: tensor {name!r} is missing, {index.name} lists it there")
    return slots


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(shard, str) and Path(shard).name == shard for shard in weight_map.values()):
            raise ValueError("a shard's name is not a plain file name")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index}: cannot be read as an index of shards: {error!r}") from None
    return dict(weight_map)


def file_index(path: Path) -> dict[str, TensorSlot]:
    """The tensors of one safetensors file; `ModelError` if it is damaged or shorter than its header says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > min(size - 8, MAX_HEADER_NBYTES):
            raise ModelError(f"{path}: truncated: {size} bytes cannot hold the header of {length} bytes")
        text = file.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        slots = {name: _slot(path, 8 + length, entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: not a safetensors header: {error!r}") from None
    for name, slot in slots.items():
        if slot.offset + slot.nbytes > size:
            raise ModelError(
                f"{path}: truncated: tensor {name!r} ends at byte {slot.offset + slot.nbytes}, the file has {size}"
            )
        item = ITEM_NBYTES.get(slot.dtype)
        if item is not None and math.prod(slot.shape) * item != slot.nbytes:
            raise ModelError(f"{path}: tensor {name!r}: got {slot.nbytes} bytes for {slot.dtype} {list(slot.shape)}")
    return slots


def _slot(path: Path, base: int, entry: dict[str, Any]) -> TensorSlot:
    begin, end = (int(offset) for offset in entry["data_offsets"])
    shape = tuple(int(size) for size in entry["shape"])
    if not 0 <= begin <= end or any(size < 0 for size in shape):
        raise ValueError(f"offsets {begin}..{end} for shape {list(shape)}")
    return TensorSlot(path, base + begin, end - begin, shape, str(entry["dtype"]))
