"""The Triton kernels against the reference: interpreted here, run where there is a GPU, and compiled for both.

Triton decides when a kernel is defined whether it will be interpreted, so that happens in a process of its own; this
one compiles. What the interpreter cannot do is bf16: it multiplies it wrongly.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import re
import subprocess
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton has wheels for Linux only")

from kernels.batch import Batch, Segment  # noqa: E402
from kernels.ops import Heads  # noqa: E402
from kernels.reference import ReferenceOps  # noqa: E402
from kernels.rope import Rope, frequencies, rope_table  # noqa: E402
from kernels.triton_batch import StaticBatch  # noqa: E402
from kernels.triton_graphs import DecodeGraphs  # noqa: E402
from kernels.triton_ops import TritonOps, gather_pages, scatter_pages, splits  # noqa: E402

CLOSE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
PAGES = 48

# ---------------------------------------------------------------- three places to run


@pytest.fixture(scope="session")
def interpreter():
    """A process in which Triton's kernels are interpreted."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")  # read by the child, which starts now, when it imports the kernels
            pool.submit(os.getpid).result()
        yield pool


TYPED_PLACES = [("cpu", "float32"), ("cpu", "float16"), ("cuda", "float32"), ("cuda", "float16"), ("cuda", "bfloat16")]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def run(request):
    """Calls a check, a function of this file, with the device as its first argument."""
    return runner(request, request.param)


@pytest.fixture(
    params=[
        pytest.param(place, marks=[pytest.mark.gpu] if place[0] == "cuda" else [], id="-".join(place))
        for place in TYPED_PLACES
    ]
)
def run_typed(request):
    """Likewise, and with a dtype as its last argument."""
    device, dtype = request.param
    call = runner(request, device)
    return lambda check, *args: call(check, *args, getattr(torch, dtype))


def runner(request, device):
    if device == "cuda":
        return lambda check, *args: check(device, *args)
    pool = request.getfixturevalue("interpreter")
    return lambda check, *args: pool.submit(check, device, *args).result()


def close(got, want):
    assert got.dtype == want.dtype
    limit = CLOSE[got.dtype] * max(1.0, float(want.abs().max()))
    assert (got.cpu().float() - want.float()).abs().max() <= limit  # false for NaN


# ---------------------------------------------------------------- attention


def make_step(lengths, page_tokens, shuffle=True):
    """A step of segments (count, stop), in this order, on pages dealt from a shuffled arena."""
    dealt = np.random.default_rng(0).permutation(PAGES) if shuffle else np.arange(PAGES)
    segments: list[Segment] = []
    row, at = 0, 0
    for count, stop in lengths:
        used = -(-stop // page_tokens)
        segments.append(Segment(row, count, stop - count, dealt[at : at + used].astype(np.int64), newest=True))
        row, at = row + count, at + used
    assert at <= PAGES
    positions = np.concatenate([np.arange(segment.start, segment.stop) for segment in segments])
    table = np.concatenate([np.repeat(s.pages, page_tokens)[s.start : s.stop] for s in segments])
    sample = torch.tensor([segment.row + segment.count - 1 for segment in segments])
    place, page, slot = (torch.from_numpy(part) for part in (positions, table, positions % page_tokens))
    return Batch(row, (torch.arange(row) + 1) % 7, place, page, slot, segments, sample, len(segments))


def fill_pages(arena, segments, window=None):
    """Random keys and values where a row of the step may look; NaN stays everywhere else."""
    page_tokens = arena.shape[4]
    for segment in segments:
        for position in range(max(segment.start - window + 1, 0) if window else 0, segment.stop):
            held = arena[int(segment.pages[position // page_tokens]), :, :, :, position % page_tokens]
            held.copy_(torch.randn(held.shape))


def make_static(batch, device):
    return StaticBatch(batch.rows + 3, len(batch.segments) + 2, PAGES, device)


def check_attention(device, heads, lengths, page_tokens, shares, dtype):
    torch.manual_seed(0)
    batch = make_step(lengths, page_tokens)
    arena = torch.full((PAGES, 2, 2, heads.kv_heads, page_tokens, heads.dim), torch.nan).to(dtype)
    fill_pages(arena, batch.segments, heads.window)
    q = torch.randn(batch.rows, heads.heads + 2 * heads.kv_heads, heads.dim).to(dtype)[:, : heads.heads]
    plain, ops = ReferenceOps(), TritonOps()
    want = plain.attend(q, batch, arena[:, 1], heads)
    on_device, there = make_static(batch, device).fill(batch), arena.to(device)
    ops.plan(on_device, there, heads)
    on_device.plans[heads] = shares or on_device.plans[heads]
    fused = torch.zeros(batch.rows, heads.heads + 2 * heads.kv_heads, heads.dim, dtype=dtype, device=device)
    fused[:, : heads.heads] = q  # as rope_store gives it: a view
    close(ops.attend(fused[:, : heads.heads], on_device, there[:, 1], heads), want)


ATTENTION = {
    "decode": (Heads(4, 2, 64, 0.125), [(1, 1), (1, 16), (1, 17), (1, 200)], 16, 4),
    "one share": (Heads(4, 2, 64, 0.125), [(1, 300), (1, 5)], 64, 1),
    "more shares than blocks": (Heads(2, 1, 32, 0.2), [(1, 130)], 16, 32),
    "dim 80, group 7": (Heads(14, 2, 80, 0.11), [(1, 70), (5, 40), (40, 133)], 16, None),
    "dim 96, group 3, pages of 48": (Heads(3, 1, 96, 0.1), [(1, 100), (50, 50), (1, 1), (2, 96)], 48, 2),
    "dim 256": (Heads(2, 1, 256, 0.06), [(1, 70), (37, 37)], 32, None),
    "no group": (Heads(3, 3, 32, 0.2), [(70, 70), (1, 33), (3, 35), (129, 129)], 16, None),
    "window": (Heads(4, 2, 32, 0.2, 20), [(1, 130), (1, 20), (1, 3), (60, 90), (30, 30)], 16, 2),
    "window of one": (Heads(2, 1, 32, 0.2, 1), [(1, 40), (20, 40)], 16, None),
    "cap": (Heads(4, 1, 64, 0.5, None, 3.0), [(1, 90), (33, 65)], 32, 2),
    "window and cap": (Heads(16, 1, 32, 0.7, 50, 2.0), [(9, 100), (1, 100)], 16, 2),
}


@pytest.mark.parametrize("case", ATTENTION)
def test_attention(run_typed, case):
    run_typed(check_attention, *ATTENTION[case])


@pytest.mark.parametrize("seed", range(3))
def test_attention_of_mixed_steps(run, seed):
    rng = np.random.default_rng(seed)
    lengths = []
    for stop in rng.integers(1, 150, 6).tolist():
        lengths.append((1 if rng.random() < 0.5 else int(rng.integers(1, stop + 1)), stop))
    window = None if seed % 2 else int(rng.integers(1, 100))
    run(check_attention, Heads(6, 2, 48, 0.15, window), lengths, 32, None, torch.float32)


def check_far_pages(device):
    """Untouched memory takes no room: only the pages at the end, behind number 2^31, are real."""
    heads, page_tokens = Heads(2, 1, 64, 0.125), 64
    count = 2**31 // (2 * page_tokens * heads.dim) + 9
    arena = torch.empty(count, 1, 2, 1, page_tokens, heads.dim, dtype=torch.float16, device=device)
    batch = make_step([(1, 100), (5, 100)], page_tokens, shuffle=False)
    for segment in batch.segments:
        segment.pages += count - 9
    near, far = arena[-PAGES:], arena
    near.zero_()
    fill_pages(far, batch.segments)
    rope = Rope(cos=torch.ones(6, 1, 32, device=device), sin=torch.zeros(6, 1, 32, device=device))
    batch.page = batch.page + count - 9
    on_device, ops = make_static(batch, device).fill(batch), TritonOps()
    ops.plan(on_device, far, heads)
    qkv = torch.randn(6, 4 * heads.dim).to(torch.float16).to(device)
    q = ops.rope_store(qkv, on_device, far[:, 0], heads, rope, None, 1e-5)
    got = ops.attend(q, on_device, far[:, 0], heads)
    for segment in batch.segments:
        segment.pages -= count - PAGES
    want = ReferenceOps().attend(q.cpu(), batch, near[:, 0].cpu(), heads)
    close(got, want)


def test_pages_behind_2_31_numbers(run):
    run(check_far_pages)


def check_padding(device):
    heads, ops = Heads(4, 2, 32, 0.2), TritonOps()
    arena = torch.full((2, 1, 2, 2, 16, 32), torch.nan, device=device)
    batch = StaticBatch(8, 8, 2, device).blank(5)
    ops.plan(batch, arena, heads)
    assert torch.equal(
        ops.attend(torch.randn(5, 4, 32, device=device), batch, arena[:, 0], heads).cpu(), torch.zeros(5, 128)
    )


def test_rows_of_padding_are_finite(run):
    run(check_padding)


def test_shares_depend_on_no_length():
    assert [splits(rows, 8, 132) for rows in (1, 4, 32, 256)] == [32, 32, 4, 1]


# ---------------------------------------------------------------- the small operations


def check_rope_store(device, heads, normed, dtype):
    torch.manual_seed(1)
    batch = make_step([(1, 40), (5, 30), (1, 1)], 16)
    rows, extra = batch.rows, 0 if normed else 2  # with rows of padding, too
    cos, sin = rope_table(frequencies(heads.dim, 10000.0), 64)
    rope = Rope(cos=cos[batch.positions], sin=sin[batch.positions])
    norms = (torch.rand(heads.dim) + 0.5, torch.rand(heads.dim) + 0.5) if normed else None
    qkv = torch.randn(rows, (heads.heads + 2 * heads.kv_heads) * heads.dim).to(dtype)
    arena = torch.full((PAGES, 2, 2, heads.kv_heads, 16, heads.dim), 7.0).to(dtype)
    there, known = arena.clone().to(device), arena
    want = ReferenceOps().rope_store(qkv.clone(), batch, known[:, 1], heads, rope, norms, 1e-5)
    static = StaticBatch(rows + extra, rows + extra, PAGES, device)
    on_device = static.fill(batch)
    on_device.page = torch.cat([on_device.page, torch.full((extra,), -1, dtype=torch.int32, device=device)])
    on_device.slot = torch.cat([on_device.slot, torch.zeros(extra, dtype=torch.int32, device=device)])
    on_device_rope = Rope(
        *(torch.cat([part, part[:1].expand(extra, -1, -1)]).to(device) for part in (rope.cos, rope.sin))
    )
    wide = torch.cat([qkv, torch.full((extra, qkv.shape[1]), torch.nan, dtype=dtype)]).to(device)
    on_device_norms = None if norms is None else (norms[0].to(device), norms[1].to(device))
    got = TritonOps().rope_store(wide, on_device, there[:, 1], heads, on_device_rope, on_device_norms, 1e-5)
    close(got[:rows], want)
    close(there, known)  # what is not written stays 7


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("heads", [Heads(4, 2, 64, 1.0), Heads(5, 1, 80, 1.0), Heads(32, 4, 256, 1.0)], ids=str)
def test_rope_store(run_typed, heads, normed):
    run_typed(check_rope_store, heads, normed)


def check_rows(device, cols, dtype):
    torch.manual_seed(2)
    plain, ops = ReferenceOps(), TritonOps()
    x, residual = torch.randn(5, cols).to(dtype), torch.randn(5, cols).to(dtype)
    weight = torch.rand(cols) + 0.5
    there, weight_there = x.to(device), weight.to(device)
    close(ops.rms_norm(there, weight_there, 1e-5), plain.rms_norm(x, weight, 1e-5))
    want, want_sum = plain.add_rms_norm(x, residual.clone(), weight, 1e-5)
    got, got_sum = ops.add_rms_norm(there, residual.to(device), weight_there, 1e-5)
    close(got, want)
    close(got_sum, want_sum)
    gate_up = (6 * torch.randn(5, 2 * cols)).to(dtype)
    close(ops.silu_mul(gate_up.to(device)), plain.silu_mul(gate_up))
    close(ops.gelu_mul(gate_up.to(device)), plain.gelu_mul(gate_up))
    logits = 100 * torch.randn(3, cols)
    close(ops.soft_cap(logits.clone().to(device), 30.0), plain.soft_cap(logits, 30.0))
    matrix, bias = (torch.randn(7, cols) / math.sqrt(cols)).to(dtype), torch.randn(7).to(dtype)
    packed, packed_there = plain.pack(matrix, bias), ops.pack(matrix.to(device), bias.to(device))
    close(ops.linear(there, packed_there), plain.linear(x, packed))
    close(ops.logits(there, packed_there), plain.logits(x, packed))


@pytest.mark.parametrize("cols", [48, 1000, 4096])
def test_norms_gates_and_products(run_typed, cols):
    run_typed(check_rows, cols)


def check_copies(device, shape, dtype):
    arena = torch.randn(9, *shape).to(dtype).to(device)
    kept, pages = arena.clone(), torch.tensor([7, 0, 3], dtype=torch.int32, device=device)
    staging = gather_pages(arena, pages)
    assert torch.equal(staging, kept[pages])
    arena[pages] = 0
    scatter_pages(arena, staging, pages)
    assert torch.equal(arena, kept)


@pytest.mark.parametrize("shape", [(2, 2, 1, 16, 48), (1, 2, 3, 16, 80)], ids=str)
def test_pages_are_gathered_and_scattered(run_typed, shape):
    run_typed(check_copies, shape)


# ---------------------------------------------------------------- whole steps


class Tiny:
    """One layer of attention between an embedding and its transpose."""

    def __init__(self, ops, device, dtype):
        torch.manual_seed(3)
        self.ops, self.heads = ops, Heads(4, 2, 32, 0.2)
        self.embedding = torch.randn(7, 64).to(dtype).to(device)
        self.qkv, self.out = (
            ops.pack((torch.randn(*shape) / 8).to(dtype).to(device)) for shape in ((8 * 32, 64), (64, 4 * 32))
        )
        self.head, self.weight = ops.pack(self.embedding), torch.ones(64, device=device)
        self.cos, self.sin = (part.to(device) for part in rope_table(frequencies(32, 10000.0), 256))
        self.arena = torch.full((PAGES, 1, 2, 2, 16, 32), torch.nan, dtype=dtype, device=device)

    def forward(self, batch):
        ops, layer, residual = self.ops, self.arena[:, 0], self.embedding[batch.tokens]
        ops.plan(batch, self.arena, self.heads)
        rope = Rope(cos=self.cos[batch.positions], sin=self.sin[batch.positions])
        qkv = ops.linear(ops.rms_norm(residual, self.weight, 1e-5), self.qkv)
        q = ops.rope_store(qkv, batch, layer, self.heads, rope, None, 1e-5)
        x = ops.linear(ops.attend(q, batch, layer, self.heads), self.out)
        x, _ = ops.add_rms_norm(x[batch.sample], residual[batch.sample], self.weight, 1e-5)
        return ops.logits(x, self.head)[: batch.samples]


def steps():
    """A prompt's chunks, then decoding beside another prompt, then decoding alone."""
    return [
        make_step([(20, 20), (33, 33)], 16),
        make_step([(1, 21), (7, 40)], 16),
        make_step([(1, 22), (1, 41), (1, 1)], 16),
        make_step([(1, 23), (1, 42), (1, 2)], 16),
    ]


def deal(batch, order):
    """Give sequence i of a step the pages [16 i, 16 i + 16)."""
    for number, segment in zip(order, batch.segments, strict=True):
        segment.pages = np.arange(16 * number, 16 * number + 16)
        rows = slice(segment.row, segment.row + segment.count)
        batch.page[rows] = torch.from_numpy(segment.pages[np.arange(segment.start, segment.stop) // 16])
    return batch


def check_steps(device, padded):
    dtype = torch.float32
    plain, ours = Tiny(ReferenceOps(), "cpu", dtype), Tiny(TritonOps(), device, dtype)
    static = StaticBatch(64, 8, 16, device)
    for batch in steps():
        deal(batch, range(len(batch.segments)))
        want = plain.forward(batch)
        single = batch.rows == len(batch.segments)
        got = ours.forward(static.fill(batch, padded=8 if padded and single else None))
        close(got[: batch.samples], want)


@pytest.mark.parametrize("padded", [False, True])
def test_steps_of_a_model(run, padded):
    run(check_steps, padded)


def test_a_step_without_room_is_refused():
    static = StaticBatch(8, 2, 4, "cpu")
    with pytest.raises(ValueError, match="step: got 9 rows, 1 of them sampled, of 1 segments"):
        static.fill(make_step([(9, 9)], 16))
    assert not static.fits(make_step([(1, 1), (1, 1), (1, 1)], 16))
    assert static.fits(make_step([(1, 64)], 16))
    assert not static.fits(make_step([(1, 65)], 16))
    with pytest.raises(ValueError, match="padded: got 2 for 3 rows of 1 segments"):
        static.fill(make_step([(3, 3)], 16), padded=2)


@pytest.mark.gpu
def test_graphs_replay_decode_steps():
    eager, ours = (Tiny(TritonOps(), "cuda", torch.bfloat16) for _ in range(2))
    static, aside = StaticBatch(64, 8, 16, "cuda"), StaticBatch(64, 8, 16, "cuda")
    with torch.inference_mode():
        graphs = DecodeGraphs(static, ours.forward, sizes=(1, 2, 4, 512))
        assert torch.isnan(ours.arena).all()  # recording stores nothing
        for batch in steps():
            deal(batch, range(len(batch.segments)))
            want = eager.forward(aside.fill(batch)).clone()
            whole = graphs.takes(batch)
            assert whole == (batch.rows == len(batch.segments))
            got = graphs.run(batch) if whole else ours.forward(static.fill(batch))
            close(got, want.cpu())


# ---------------------------------------------------------------- compiled ahead of time

SHARED_NBYTES = {90: 227 << 10, 80: 163 << 10}
COMPILED = [
    (90, "bfloat16", Heads(32, 8, 128, 0.1)),
    (90, "bfloat16", Heads(14, 2, 80, 0.1)),
    (90, "bfloat16", Heads(8, 4, 256, 0.1, 1024, 50.0)),
    (90, "float16", Heads(32, 8, 128, 0.1)),
    (90, "float32", Heads(32, 8, 128, 0.1)),
    (80, "bfloat16", Heads(32, 8, 128, 0.1)),
    (80, "float16", Heads(16, 16, 64, 0.1, 4096)),
    (80, "float32", Heads(32, 8, 64, 0.1)),
]


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Makes launches compile for a GPU that is not there; gives the list of what was compiled as (name, kernel)."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Absent:
        """As much of a driver as compiling asks for; its device has a number of its own, for the kernels' cache."""

        def __init__(self, arch):
            self.get_current_device = lambda: arch
            self.get_current_stream = lambda device: 0
            self.get_current_target = lambda: GPUTarget("cuda", arch, 32)

    made: list = []
    launch = JITFunction.run

    def compile_only(self, *args, warmup, **kwargs):
        made.append((self.fn.__name__, launch(self, *args, warmup=True, **kwargs)))

    def compile_for(arch):
        monkeypatch.setattr(driver, "_active", Absent(arch))
        return made

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(JITFunction, "run", compile_only)
    return compile_for


def launch_all(heads, dtype):
    """Every kernel once or more, on arguments of a real model's alignment."""
    ops, batch = TritonOps(), make_step([(1, 100), (40, 50)], 64)
    on_device = make_static(batch, "cpu").fill(batch)
    arena = torch.zeros(PAGES, 1, 2, heads.kv_heads, 64, heads.dim, dtype=dtype)
    ops.plan(on_device, arena, heads)
    wide = torch.zeros(batch.rows, 2 * 4096, dtype=dtype)
    x, weight, norm = wide[:, :4096].contiguous(), torch.ones(4096), torch.ones(heads.dim)
    ops.add_rms_norm(x, ops.rms_norm(x, weight, 1e-5), weight, 1e-5)
    ops.silu_mul(wide)
    ops.gelu_mul(wide)
    ops.soft_cap(torch.zeros(2, 32000), 30.0)
    qkv = torch.zeros(batch.rows, (heads.heads + 2 * heads.kv_heads) * heads.dim, dtype=dtype)
    turns = torch.zeros(batch.rows, 1, heads.dim // 2)
    rope = Rope(cos=turns, sin=turns)
    ops.rope_store(qkv, on_device, arena[:, 0], heads, rope, (norm, norm), 1e-5)
    q = ops.rope_store(qkv, on_device, arena[:, 0], heads, rope, None, 1e-5)
    ops.attend(q, on_device, arena[:, 0], heads)
    scatter_pages(arena, gather_pages(arena, on_device.page), on_device.page)


KERNELS = {
    "attend_rows", "merge_rows", "attend_chunks", "rms_norm", "rope_store", "gated", "soft_cap", "copy_pages",
}  # fmt: skip


def stack_nbytes(kernel, folder):
    """Bytes of a thread's stack: what did not fit into registers."""
    (folder / "kernel.cubin").write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [str(tool), "--dump-resource-usage", str(folder / "kernel.cubin")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return max(int(number) for number in re.findall(r"STACK:(\d+)", said))


@pytest.mark.parametrize(("arch", "kind", "heads"), COMPILED, ids=lambda part: str(part))
def test_kernels_compile_without_a_gpu(compiled, tmp_path, record_property, arch, kind, heads):
    made = compiled(arch)
    launch_all(heads, getattr(torch, kind))
    assert {name for name, _ in made} == KERNELS
    for name, kernel in made:
        assert f".target sm_{arch}" in kernel.asm["ptx"]
        assert kernel.asm["cubin"].startswith(b"\x7fELF")
        stack = stack_nbytes(kernel, tmp_path)
        record_property(name, {"shared": kernel.metadata.shared, "stack": stack})
        assert kernel.metadata.shared <= SHARED_NBYTES[arch]
        if kind != "float32":  # a type for debugging: let it spill
            assert stack <= (0 if arch == 90 else 128)
    ptx = {name: kernel.asm["ptx"] for name, kernel in made}
    assert re.search(r"cp\.async\.cg\.shared\.global .*, 0x10", ptx["attend_rows"])  # 16 bytes at once
    assert "wgmma" in ptx["attend_chunks"] if arch == 90 else "mma.sync" in ptx["attend_chunks"]
