"""Products with prepacked weights: oneDNN's own layout saves a reorder per call (1.5 to 1.8 times faster in bf16).

The packing operations are private to torch: where they are missing, or the CPU is too old for them, the plain product
serves.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.ops import Packed

PRIVATE = ("_reorder_linear_weight", "_linear_pointwise")


@functools.cache
def packs(dtype: torch.dtype) -> bool:
    """True if this torch packs weights of `dtype` on this CPU: oneDNN has no bf16 for one without AVX-512."""
    mkldnn = torch.ops.mkldnn
    if not torch._C._has_mkldnn or not all(hasattr(mkldnn, name) for name in PRIVATE):
        return False
    try:
        mkldnn._reorder_linear_weight(torch.zeros(2, 2, dtype=dtype), None)
    except RuntimeError:
        return False
    return True


def tiles() -> bool:
    """True if oneDNN multiplies bf16 in this CPU's tile registers (AMX), several times as fast as in vectors."""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return supported is not None and bool(supported())


def pairs() -> bool:
    """True if this CPU multiplies pairs of bf16 and adds them up in fp32, in vectors (AVX512-BF16)."""
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return supported is not None and bool(supported())


def pack(weight: Tensor, bias: Tensor | None = None) -> Packed:
    """`weight` ``[out, in]`` in oneDNN's layout if this torch can, else as it is; `bias` as it is."""
    rows, cols = weight.shape
    data = torch.ops.mkldnn._reorder_linear_weight(weight, None) if packs(weight.dtype) else weight
    return Packed(rows, cols, data, bias)


def linear(x: Tensor, weight: Packed) -> Tensor:
    """``x W^T + b`` in x's dtype, ``[row, out]``."""
    if weight.data.is_mkldnn:
        pointwise = torch.ops.mkldnn._linear_pointwise
        return pointwise(x, weight.data, weight.bias, "none", [], "")  # type: ignore[no-any-return]
    return F.linear(x, weight.data, weight.bias)


def wide_linear(x: Tensor, weight: Packed) -> Tensor:
    """``x W^T + b`` in fp32.

    oneDNN adds up bf16 products in fp32 but rounds the sum to bf16, and no CPU operation of torch hands the fp32 sum
    out. So the product runs twice: ``high = bf16(x W^T + b)``, then ``low = bf16(x W^T + b - high)`` with the
    subtraction fused in before the rounding; ``high + low`` is right to 16 bits. Cheaper than fp32 weights from 8
    rows on.
    """
    if x.dtype == torch.float32:
        return linear(x, weight)
    if not weight.data.is_mkldnn:
        return F.linear(x.float(), weight.data.float(), None if weight.bias is None else weight.bias.float())
    high = linear(x, weight)
    low = torch.ops.mkldnn._linear_pointwise.binary(x, high.neg(), weight.data, weight.bias, "add")
    return high.float().add_(low.float())
