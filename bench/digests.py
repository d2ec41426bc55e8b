"""What digests cost: those of a prompt's pages beside the prefill that filled them, on the same core.

A prompt is prefilled in one step, then its pages are digested as the transfer thread does it, in turns; the medians
count. ``ours`` is the time of the digests, ``peer`` is 5 % of the prefill's: a ratio above 1 keeps the promise. Once by
the native loop, where there is a compiler, and once by numpy, as where there is none.
"""

from __future__ import annotations

import tempfile
import time

import torch

from bench.engine_modes import FULL, QUICK, VOCAB, prefill
from bench.report import Row, emit, median, parser, progress
from core.errors import SetupError
from engine.engine import TorchEngine
from kernels import native
from tests.checkpoints import make_llama
from transfer.digest import Sums, digests

PROMPTS = (128, 512, 2048)
SHARE = 0.05


def digesting(engine: TorchEngine, tokens: int, sums: Sums | None) -> float:
    """Seconds to digest the pages of a prompt."""
    started = time.perf_counter()
    digests(engine.arena, range(engine.kv.pages_for(tokens)), engine.kv, 0, tokens, sums=sums)
    return time.perf_counter() - started


def main() -> None:
    """Measure every length and report."""
    options = parser("digests", "digests beside the prefill that they belong to").parse_args()
    model = QUICK if options.quick else FULL
    ways: dict[str, Sums | None] = {"numpy": None}
    try:
        ways = {"native": native.page_sums(), **ways}
    except native.NativeMissing as why:
        progress(f"no native loop: {why}")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make_llama(
            folder,
            layers=model.layers,
            hidden=model.hidden,
            intermediate=model.intermediate,
            heads=model.heads,
            kv_heads=model.kv_heads,
            vocab=VOCAB,
            dtype="bfloat16",
            context=4096,
        )
        torch.set_num_threads(1)
        try:
            engine = TorchEngine(folder, kv_memory=256 * 2**20, threads=1)
        except SetupError as error:
            raise SystemExit(f"bench.digests: {error}") from None
        for tokens in PROMPTS:
            computed = prefill(engine, tokens)
            computed()
            taken = [
                (tokens / computed(), *(digesting(engine, tokens, sums) for sums in ways.values()))
                for _ in range(model.repeats)
            ]
            prefill_s = median([each[0] for each in taken])
            for place, way in enumerate(ways, 1):
                digest_s = median([each[place] for each in taken])
                case = f"{model.name} {engine.kv.dtype} prompt of {tokens}: digests, {way}"
                rows.append(Row(case, digest_s, SHARE * prefill_s, "5 % of its prefill, one thread", "s", False))
                progress(f"{case}: {digest_s * 1e3:.2f} ms, {digest_s / prefill_s:.2%} of {prefill_s * 1e3:.0f} ms")
    emit("digests", rows, options.json)


if __name__ == "__main__":
    main()
