"""What a model should cost on hardware that nobody has measured it on: a prior, from sizes and published peaks. Pure.

    linear(n)  = layers * launch + ((weights / (stream * bandwidth))^p + (2 * parameters * n / (gemm * peak))^p)^(1/p)
                 + layers * passes * n * hidden * 2 bytes / bandwidth
    attention  = 4 * layers * heads * head_dim * pairs / (attend * peak)        prefill
               = context * bytes of KV a token / (read * bandwidth)              decode
    all-reduce = 2 * layers * (latency + n * hidden * 2 bytes / its bandwidth)    with tensor parallelism

A smooth maximum (p = 1.5) of reading the weights and computing, with efficiencies that were fitted to Vidur's public
profiles of linear operations (A100 and H100; held-out mean error 4 to 7 %, 9 in 10 within 8 to 18 %). Attention's
efficiencies on a GPU, and every one on the H200, are extrapolated; `docs/cost.md` has the errors against tables.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from scheduler.cost import CostModel, Lane, Row, decode_features, prefill_features
from scheduler.cost_fit import Sample, fit_lines


@dataclass(frozen=True, slots=True)
class Sizes:
    """What of a decoder-only model costs time, as one of `tp` tensor-parallel ranks sees it."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    gated: bool = True
    value_bytes: int = 2
    tp: int = 1

    @property
    def layer_parameters(self) -> int:
        """Parameters of all layers' matrices, over all ranks."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        return self.layers * (attention + (3 if self.gated else 2) * self.hidden * self.intermediate)

    @property
    def head_parameters(self) -> int:
        """Parameters of the matrix that makes logits; used once a row, not once a token."""
        return self.hidden * self.vocab

    @property
    def kv_bytes(self) -> int:
        """Bytes of KV a token, over all ranks."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.value_bytes


@dataclass(frozen=True, slots=True)
class Hardware:
    """Peaks of one device and the share of them that is reached.

    | field | unit | meaning |
    |---|---|---|
    | flops, bytes_s, memory_bytes | FLOP/s, B/s, B | published peaks: dense 16-bit, device memory |
    | stream, read | share of bytes_s | weights; KV in decode |
    | gemm, gemm_few, attend | share of flops | matrices in prefill; in decode; attention in prefill |
    | bend | | p of the smooth maximum |
    | layer_s | s | fixed cost a layer |
    | passes | | times that a layer's element-wise operations touch a row |
    | all_reduce | (ranks, s, B/s) | latency and bandwidth of a small and a large one |
    """

    name: str
    flops: float
    bytes_s: float
    memory_bytes: float
    stream: float = 0.80
    read: float = 0.70
    gemm: float = 0.69
    gemm_few: float = 0.69
    attend: float = 0.50
    bend: float = 1.5
    layer_s: float = 35e-6
    passes: float = 15.0
    all_reduce: tuple[tuple[int, float, float], ...] = ()


# Peaks: NVIDIA's data sheets. All-reduce: the smallest and the largest message of Vidur's (A100) and APEX's tables.
A100 = Hardware("a100-80g", 312e12, 2.039e12, 80e9, all_reduce=((2, 10e-6, 156e9), (4, 61e-6, 111e9), (8, 62e-6, 99e9)))
H100 = Hardware("h100", 989e12, 3.35e12, 80e9, all_reduce=((2, 8e-6, 311e9), (4, 10e-6, 234e9), (8, 14e-6, 246e9)))
H200 = Hardware("h200", 989e12, 4.8e12, 141e9, all_reduce=((2, 6e-6, 301e9), (4, 9e-6, 228e9), (8, 15e-6, 198e9)))
# Two shared cores with AMX, bf16, fast mode. Peaks: the best matrix product and stream of weights that ran here;
# efficiencies: fitted to bench/results/engine_modes.json (mean error 3 %).
CPU = Hardware(
    "cpu-2-amx", 2.3e12, 40e9, 24e9, stream=0.43, read=0.35, gemm=0.50, gemm_few=0.20, attend=0.19, layer_s=20e-6,
    passes=10.0,
)  # fmt: skip
HARDWARE = {hardware.name: hardware for hardware in (A100, H100, H200, CPU)}


def cpu(threads: int, *, nbytes: int = 2, exact: bool = False) -> Hardware:
    """A guess at a CPU of which nothing is known: `CPU` with so many cores; `nbytes` a value.

    Without bf16 units an eighth of the products is left; exact mode takes 3 times as long to compute.
    """
    share = threads / 2 / (8 if nbytes == 4 else 1) / (3 if exact else 1)
    return replace(CPU, name=f"cpu-{threads}", flops=CPU.flops * share)


# What a read costs by kind of path. The first two: from Ready to Taken, digests included, between two processes here
# (bench/results); NVLink: APEX's and Vidur's send and receive; a network of 400 Gb/s and a PCIe 5 bus to
# host memory: their rates, unmeasured.
LANES = (
    Lane("cma", 2.0e-3, 10e-6, 1 / 5.3e9),
    Lane("tcp", 2.0e-3, 20e-6, 1 / 1.9e9),
    Lane("nvlink", 6e-6, 6e-6, 1 / 365e9),
    Lane("rdma-400g", 0.5e-3, 5e-6, 1 / (0.9 * 50e9)),
    Lane("host", 20e-6, 5e-6, 1 / 50e9),
)


def step_s(sizes: Sizes, hardware: Hardware, rows: Sequence[Row], batch: int, context: int) -> float:
    """Seconds of one step by the formula itself, prefill rows and decode rows together."""
    _, new, pairs, count = prefill_features(rows)
    tokens = new + batch
    if not tokens:
        return 0.0
    peak, memory = hardware.flops * sizes.tp, hardware.bytes_s * sizes.tp
    weights_s = (sizes.layer_parameters + sizes.head_parameters) * sizes.value_bytes / (hardware.stream * memory)
    prefill_flops = sizes.layer_parameters * new + sizes.head_parameters * count
    decode_flops = (sizes.layer_parameters + sizes.head_parameters) * batch
    compute_s = 2 * (prefill_flops / hardware.gemm + decode_flops / hardware.gemm_few) / peak
    linear_s = math.pow(math.pow(weights_s, hardware.bend) + math.pow(compute_s, hardware.bend), 1 / hardware.bend)
    # Not divided by the ranks: each rank has the whole row.
    touched_s = sizes.layers * hardware.passes * tokens * sizes.hidden * 2 / hardware.bytes_s
    prefill_s = 4 * sizes.layers * sizes.heads * sizes.head_dim * pairs / (hardware.attend * peak)
    decode_s = context * sizes.kv_bytes / (hardware.read * memory)
    joined_s = 0.0
    if sizes.tp > 1:
        latency_s, bytes_s = _all_reduce(hardware, sizes.tp)
        joined_s = 2 * sizes.layers * (latency_s + tokens * sizes.hidden * 2 / bytes_s)
    return sizes.layers * hardware.layer_s + linear_s + touched_s + prefill_s + decode_s + joined_s


def _all_reduce(hardware: Hardware, ranks: int) -> tuple[float, float]:
    for known, latency_s, bytes_s in hardware.all_reduce:
        if known == ranks:
            return latency_s, bytes_s
    known_ranks = [known for known, _, _ in hardware.all_reduce]
    raise ValueError(f"tp: got {ranks}, wanted 1 or one of {known_ranks} on {hardware.name}")


# What the formula is asked for. Lines bend where weights stop hiding the computation: more points there.
_NEW = (1, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096, 8192, 16384)
_BATCH = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256)
_LENGTH = (64, 512, 2048, 8192)

# A roofline's own error is a guess until something is measured: the worst of docs/cost.md, roughly.
GUESSED_MARGINS = (0.1, 0.25, 0.4, 0.5, 0.6)


def roofline(
    name: str, sizes: Sizes, hardware: Hardware, lanes: Sequence[Lane] = LANES, *, lines: int = 3
) -> CostModel:
    """The cost model that stands in until something is measured: lines fitted to the formula.

    Three a phase come within 3 % of it and take 0.25 s to find, two within 5 % and 0.04 s.
    """
    prefill = [
        Sample(prefill_features(rows), step_s(sizes, hardware, rows, 0, 0))
        for new in _NEW
        for rows in ([(new, 0)], [(new, 4096)], [(max(1, new // 4), 0)] * 4)
    ]
    decode = [
        Sample(decode_features(batch, batch * length), step_s(sizes, hardware, (), batch, batch * length))
        for batch in _BATCH
        for length in _LENGTH
    ]
    return CostModel(
        name,
        tuple((a, b, c, d) for a, b, c, d in fit_lines(prefill, lines)),
        tuple((a, b, c) for a, b, c in fit_lines(decode, lines)),
        tuple(lanes),
        (("decode", GUESSED_MARGINS), ("prefill", GUESSED_MARGINS), ("transfer", GUESSED_MARGINS)),
    )


# Sizes from the models' published configurations.
LLAMA_3_1_8B = Sizes(32, 4096, 14336, 32, 8, 128, 128256)
LLAMA_3_1_70B = Sizes(80, 8192, 28672, 64, 8, 128, 128256)
LLAMA_2_7B = Sizes(32, 4096, 11008, 32, 32, 128, 32000)
LLAMA_2_70B = Sizes(80, 8192, 28672, 64, 8, 128, 32000)
QWEN_2_5_32B = Sizes(64, 5120, 27648, 40, 8, 128, 152064)
OPT_13B = Sizes(40, 5120, 20480, 40, 40, 128, 50272, gated=False)
OPT_66B = Sizes(64, 9216, 36864, 72, 72, 128, 50272, gated=False)
RANDOM_100M = Sizes(12, 768, 2048, 12, 4, 64, 32000)


def over(sizes: Sizes, tp: int) -> Sizes:
    """The same model over `tp` ranks."""
    return replace(sizes, tp=tp)


def kv_tokens(sizes: Sizes, hardware: Hardware, *, share: float = 0.9) -> int:
    """Tokens of KV that fit beside the weights into `share` of the devices' memory; 0 where the weights do not fit.

    What activations and graphs take is in the rest of the memory.
    """
    weights = (sizes.layer_parameters + 2 * sizes.head_parameters) * sizes.value_bytes
    return max(0, int((share * hardware.memory_bytes * sizes.tp - weights) / sizes.kv_bytes))
