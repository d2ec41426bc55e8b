"""The CUDA backend: Triton kernels for attention and the small operations, the library's products for the rest.

Steps come from `StaticBatch.fill`. Block sizes are chosen for Hopper's and Ampere's shared memory; nothing is tuned by
trial at run time, so the first step of a shape compiles and every later one only launches.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import triton_attention, triton_rows
from kernels.batch import Batch
from kernels.ops import Heads, Packed
from kernels.rope import Rope
from kernels.triton_batch import DeviceBatch

MAX_SPLITS = 32
"""Most shares of a decode row's keys; a power of two."""
PROGRAMS_PER_PROCESSOR = 4
"""So many programs of decode attention are wanted for each multiprocessor, so that all of them stay busy."""
BLOCK = 1024


class TritonOps:
    """See `kernels.ops`. Works on the current CUDA device; on the CPU only under Triton's interpreter."""

    row_tile = 1

    def pack(self, weight: Tensor, bias: Tensor | None = None) -> Packed:
        rows, cols = weight.shape
        return Packed(rows, cols, weight, bias)

    def pack_head(self, weight: Tensor) -> Packed:
        return self.pack(weight)

    def plan(self, batch: Batch, pages: Tensor, heads: Heads) -> None:
        assert isinstance(batch, DeviceBatch), "steps of this backend come from StaticBatch.fill"
        batch.plans[heads] = splits(batch.singles, heads.kv_heads, _processors(pages.device))

    def linear(self, x: Tensor, weight: Packed) -> Tensor:
        return F.linear(x, weight.data, weight.bias)

    def logits(self, x: Tensor, weight: Packed) -> Tensor:
        bias = None if weight.bias is None else weight.bias.float()
        if not x.is_cuda or x.dtype == torch.float32:
            return F.linear(x.float(), weight.data.float(), bias)
        wide = torch.mm(x, weight.data.T, out_dtype=torch.float32)  # the sums are not rounded on the way
        return wide if bias is None else wide.add_(bias)

    def soft_cap(self, logits: Tensor, cap: float) -> Tensor:
        count = logits.numel()
        triton_rows.soft_cap[(-(-count // BLOCK),)](logits, count, CAP=cap, BLOCK=BLOCK)
        return logits

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return _norm(x, None, weight, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return _norm(x, residual, weight, eps), residual

    def rope_store(
        self,
        qkv: Tensor,
        batch: Batch,
        layer: Tensor,
        heads: Heads,
        rope: Rope,
        norms: tuple[Tensor, Tensor] | None,
        eps: float,
    ) -> Tensor:
        rows, all_heads = qkv.shape[0], heads.heads + 2 * heads.kv_heads
        at_once = max(min(2 * BLOCK // _power(heads.dim), _power(all_heads)), 1)
        q_norm, k_norm = norms or (rope.cos, rope.cos)  # not read
        triton_rows.rope_store[rows, -(-all_heads // at_once)](
            qkv, layer, batch.page, batch.slot, rope.cos, rope.sin, q_norm, k_norm, eps, layer.stride(0),
            HEADS=heads.heads, KV=heads.kv_heads, DIM=heads.dim, PAGE=layer.shape[3], NORM=norms is not None,
            AT_ONCE=at_once,
        )  # fmt: skip
        return qkv.view(rows, all_heads, heads.dim)[:, : heads.heads]

    def attend(self, q: Tensor, batch: Batch, layer: Tensor, heads: Heads) -> Tensor:
        assert isinstance(batch, DeviceBatch)
        rows, singles, page = q.shape[0], batch.singles, layer.shape[3]
        out = q.new_empty(rows, heads.heads * heads.dim)
        shape = {"HEADS": heads.heads, "KV": heads.kv_heads, "DIM": heads.dim, "PAGE": page}
        rule = {"SCALE": heads.scale, "WINDOW": heads.window or 0, "CAP": heads.cap or 0.0}
        strides = q.stride(0), layer.stride(0), batch.tables.stride(0)
        nbytes = q.element_size()
        if singles:
            shares: int = batch.plans[heads]
            parts = q.new_empty(singles, heads.heads, shares, heads.dim, dtype=torch.float32)
            logs = q.new_empty(singles, heads.heads, shares, dtype=torch.float32)
            triton_attention.attend_rows[singles, heads.kv_heads, shares](
                q, parts, logs, layer, batch.tables, batch.first, batch.length, *strides, **shape, **rule,
                SPLITS=shares, ROWS=max(_power(heads.group), 16), **_decode_block(heads.dim, nbytes),
            )  # fmt: skip
            triton_attention.merge_rows[singles, heads.heads](
                out, parts, logs, batch.first, HEADS=heads.heads, DIM=heads.dim, SPLITS=shares
            )
        if chunks := len(batch.segments) - singles:
            block = _chunk_block(heads.dim, nbytes, heads.group)
            tile = block["ROWS"] // heads.group
            triton_attention.attend_chunks[rows // tile + chunks, heads.kv_heads](
                q, out, layer, batch.tables, batch.first, batch.count, batch.length, singles, chunks, *strides,
                **shape, **rule, **block,
            )  # fmt: skip
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return _gated(gate_up, gelu=False)

    def gelu_mul(self, gate_up: Tensor) -> Tensor:
        return _gated(gate_up, gelu=True)


def gather_pages(arena: Tensor, pages: Tensor) -> Tensor:
    """Pages ``[page, ...]`` of the arena, all layers, side by side in fresh memory; `pages` is int32."""
    staging = arena.new_empty(len(pages), *arena.shape[1:])
    _copy_pages(arena, staging, pages, back=False)
    return staging


def scatter_pages(arena: Tensor, staging: Tensor, pages: Tensor) -> None:
    """The inverse of `gather_pages`; no page twice."""
    _copy_pages(arena, staging, pages, back=True)


def splits(rows: int, kv_heads: int, processors: int) -> int:
    """Into how many shares a decode row's keys are cut: a power of two that depends on no length."""
    wanted = -(-PROGRAMS_PER_PROCESSOR * processors // max(rows * kv_heads, 1))
    return min(_power(wanted), MAX_SPLITS)


def _decode_block(dim: int, nbytes: int) -> dict[str, int]:
    """Keys a block and the launch's shape for heads of `dim` numbers of `nbytes`: 16 KiB of K in flight a stage."""
    return {"KEYS": min(max(16384 // (_power(dim) * nbytes), 16), 128), "num_warps": 4, "num_stages": 3}


def _chunk_block(dim: int, nbytes: int, group: int) -> dict[str, int]:
    """Rows and keys a tile and the launch's shape: what fits into an A100's registers and shared memory."""
    room = 16384 if nbytes == 2 else 8192  # fp32 is multiplied as three products, with both operands' parts held
    keys = min(max(room // (_power(dim) * nbytes), 16), 64)
    rows = max(min(room // _power(dim), 128), 32, _power(group))
    return {"ROWS": rows, "KEYS": keys, "num_warps": max(rows // 16, 4), "num_stages": 2}


def _norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    rows, cols = x.shape
    out = torch.empty_like(x)
    warps = min(max(_power(cols) // 1024, 1), 16)
    triton_rows.rms_norm[(rows,)](
        x, x if residual is None else residual, weight, out, eps, COLS=cols, ADD=residual is not None, num_warps=warps
    )
    return out


def _gated(gate_up: Tensor, *, gelu: bool) -> Tensor:
    rows, cols = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, cols)
    triton_rows.gated[rows, -(-cols // BLOCK)](gate_up, out, COLS=cols, GELU=gelu, BLOCK=BLOCK)
    return out


def _copy_pages(arena: Tensor, staging: Tensor, pages: Tensor, *, back: bool) -> None:
    source, target = (tensor.view(len(tensor), -1).view(torch.int64) for tensor in (arena, staging))
    words = source.shape[1]
    triton_rows.copy_pages[len(pages), -(-words // BLOCK)](source, target, pages, WORDS=words, BACK=back, BLOCK=BLOCK)


def _power(number: int) -> int:
    """The least power of two that is not below `number`."""
    return 1 << (number - 1).bit_length()


@functools.cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; under the interpreter one, which makes few shares."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 1
