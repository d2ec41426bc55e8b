"""Which operations run a model, on which device, and how a step gets there and back."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.errors import ModelError, SetupError
from engine.arena import TORCH_DTYPES
from engine.config import ModelConfig
from engine.model import Decoder
from engine.steps import Parts
from engine.weights import Weights
from kernels.batch import Batch
from kernels.exact_cpu import ExactOps, row_independent
from kernels.exact_native import ExactNativeOps
from kernels.fast_cpu import FastOps
from kernels.linear import pairs, tiles
from kernels.native import NativeMissing
from kernels.native_cpu import MAX_DIM, MAX_GROUP, NativeOps
from kernels.ops import Ops

log = logging.getLogger("baton.engine")

DEVICES = {"cpu": ("float32", "bfloat16"), "cuda": ("float32", "bfloat16", "float16")}
"""Devices, and the dtypes that each computes in."""
STEP_ROWS, STEP_SEQUENCES = 8192, 256
"""Room on a GPU for one step."""
AHEAD = 4
"""Operators that the host may launch before a GPU has done the first of them, in a step that can be stopped."""

Logits = NDArray[np.float32] | None
"""fp32 logits ``[samples, vocab]`` of a step, None if no row is sampled."""


@dataclass(frozen=True, slots=True)
class Forward:
    """A model's forward pass, from a step's description on the host to logits on the host."""

    whole: Callable[[Batch], Logits]
    parts: Callable[[Batch], Parts[Logits]]
    """The same between whose operators other passes may come."""


def choose(config: ModelConfig, device: str, exact: bool, native: bool) -> tuple[Ops, str]:
    """The table of operations and its name: "native", "torch", "exact-native", "exact-torch" or "cuda".

    Where native code was wanted and cannot be had, ": why" follows the name.
    """
    if device == "cuda":
        return _cuda(exact), "cuda"
    why = ""
    if native and (config.group > MAX_GROUP or config.head_dim > MAX_DIM):
        why = f": native attention has room for {MAX_GROUP} heads to a KV head and {MAX_DIM} numbers to a head"
    elif native:
        try:
            return (ExactNativeOps(), "exact-native") if exact else (NativeOps(), "native")
        except NativeMissing as missing:
            why = f": {missing}"
    return (ExactOps(), "exact-torch" + why) if exact else (FastOps(), "torch" + why)


def place(device: str) -> torch.device:
    """Where tensors are: a GPU's kernels are interpreted on the CPU with TRITON_INTERPRET=1, for tests."""
    return torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else device)


def forward(model: Decoder, device: str, tables: int) -> Forward:
    """The model's forward pass. `tables` is the length of the longest page table.

    On a GPU decode steps are recorded as graphs here, once.
    """
    if device == "cuda":
        return _on_gpu(model, tables)

    def on_host(batch: Batch) -> Logits:
        return _numpy(model.forward(batch))

    def parts(batch: Batch) -> Parts[Logits]:
        return _numpy((yield from model.parts(batch)))

    return Forward(on_host, parts)


def default_dtype(checkpoint: str, device: str) -> str:
    """The checkpoint's own on a GPU; on a CPU bf16 if the checkpoint is bf16 and it is multiplied in hardware."""
    if device == "cuda":
        return checkpoint
    fast = tiles() or pairs()
    return "bfloat16" if checkpoint == "bfloat16" and fast else "float32"


def prove(ops: Ops, weights: Weights, dtype: str) -> None:
    """Raise `SetupError` if a product of this model's shapes is not exact on this CPU."""
    layer = weights.layers[0]
    products = [(ops.linear, weight) for weight in (layer.qkv, layer.out, layer.gate_up, layer.down)]
    for product, weight in (*products, (ops.logits, weights.lm_head)):
        if not row_independent(product, weight, TORCH_DTYPES[dtype]):
            raise SetupError(
                f"exact: got a CPU whose {dtype} product with a [{weight.rows}, {weight.cols}] matrix depends on the "
                "row's place, want one where it does not"
            )


def _cuda(exact: bool) -> Ops:
    if exact:
        raise ModelError("exact: got true on a GPU, want false: its products have no fixed tile yet")
    try:
        from kernels.triton_ops import TritonOps
    except ImportError as error:
        raise SetupError(f"device: cuda needs Triton: {error}") from None
    if place("cuda").type == "cuda" and not torch.cuda.is_available():
        raise SetupError("device: got cuda, but this torch sees no GPU")
    if place("cuda").type == "cpu":
        log.warning("TRITON_INTERPRET=1: a GPU's kernels are interpreted on the CPU, which is for tests")
    return TritonOps()


def _on_gpu(model: Decoder, tables: int) -> Forward:
    from kernels.triton_batch import StaticBatch
    from kernels.triton_graphs import DecodeGraphs

    where = place("cuda")
    static = StaticBatch(STEP_ROWS, STEP_SEQUENCES, tables, where)
    graphs = DecodeGraphs(static, model.forward) if where.type == "cuda" else None

    def on_gpu(batch: Batch) -> Logits:
        if graphs is not None and graphs.takes(batch):
            return graphs.run(batch).cpu().numpy()
        return _numpy(model.forward(static.fill(batch)))

    def parts(batch: Batch) -> Parts[Logits]:
        """One that is recorded as a graph has no parts; it is short."""
        if graphs is not None and graphs.takes(batch):
            return on_gpu(batch)
        steps = model.parts(static.fill(batch))
        ahead: deque[torch.cuda.Event] = deque()
        try:
            while True:
                next(steps)
                if where.type == "cuda":
                    _follow(ahead)
                if (yield):
                    static.fill(batch)  # where another step's description is by now
        except StopIteration as end:
            return _numpy(end.value)

    return Forward(on_gpu, parts)


def _follow(ahead: deque[torch.cuda.Event]) -> None:
    """Let the host be at most `AHEAD` operators before the GPU: what it has launched can no longer be stopped."""
    done = torch.cuda.Event()  # type: ignore[no-untyped-call]
    done.record()
    ahead.append(done)
    if len(ahead) > AHEAD:
        ahead.popleft().synchronize()


def _numpy(logits: Tensor | None) -> Logits:
    return None if logits is None else logits.cpu().numpy()
