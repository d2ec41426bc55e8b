"""What exactness costs: the fast and the exact engine on one random model, shape by shape.

Prefill: tokens/s of one prompt in one step. Decode: tokens/s of a full batch, each row at `CONTEXT` tokens. The two
engines take turns, the median of the repeats counts. ``ours`` is fast, ``peer`` is exact: the ratio is the price.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

from bench.report import Row, emit, median, parser, progress
from core.sampling import Sampling
from engine.api import Row as Work
from engine.engine import TorchEngine
from tests.checkpoints import make_llama

CONTEXT = 256
PREFILLS = (128, 512)
DECODES = (1, 8, 32)


@dataclass(frozen=True, slots=True)
class Model:
    """Sizes of a random checkpoint."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    repeats: int


FULL = Model("llama-100m", 12, 768, 2048, 12, 4, 9)
QUICK = Model("llama-20m", 6, 256, 704, 4, 2, 5)
VOCAB = 32000


def prefill(engine: TorchEngine, tokens: int) -> Callable[[], float]:
    """A timed prefill of `tokens` tokens: tokens/s."""
    prompt = random.Random(tokens).choices(range(2, VOCAB), k=tokens)

    def once() -> float:
        engine.open("prompt", prompt, range(engine.kv.pages_for(tokens + 1)), Sampling(2), tokens)
        started = time.perf_counter()
        engine.step([Work("prompt", 0, tokens)])
        taken = time.perf_counter() - started
        engine.close("prompt")
        return tokens / taken

    return once


def decode(engine: TorchEngine, rows: int, steps: int = 5) -> Callable[[], float]:
    """`steps` timed decode steps of `rows` sequences whose KV is taken as it lies: tokens/s."""
    source = random.Random(rows)
    used = engine.kv.pages_for(CONTEXT + steps)

    def once() -> float:
        for row in range(rows):
            prompt = source.choices(range(2, VOCAB), k=CONTEXT)
            engine.open(f"s{row}", prompt, range(row * used, (row + 1) * used), Sampling(1000), CONTEXT)
        started = time.perf_counter()
        for step in range(steps):
            at = CONTEXT - 1 + step
            engine.step([Work(f"s{row}", at, at + 1) for row in range(rows)])
        taken = time.perf_counter() - started
        for row in range(rows):
            engine.close(f"s{row}")
        return rows * steps / taken

    return once


def main() -> None:
    """Measure every shape in both modes and report."""
    flags = parser("engine_modes", "fast against exact, shape by shape")
    flags.add_argument("--dtype", default=None, choices=["float32", "bfloat16"], help="compute dtype")
    flags.add_argument("--threads", type=int, default=None, help="torch threads")
    options = flags.parse_args()
    model = QUICK if options.quick else FULL
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        progress(f"writing {model.name}")
        make_llama(
            folder,
            layers=model.layers,
            hidden=model.hidden,
            intermediate=model.intermediate,
            heads=model.heads,
            kv_heads=model.kv_heads,
            vocab=VOCAB,
            dtype="bfloat16",
        )
        fast, exact = (
            TorchEngine(folder, kv_memory=256 * 2**20, dtype=options.dtype, threads=options.threads, exact=exact)
            for exact in (False, True)
        )
        name = f"{model.name} {fast.dtype}"
        cases = [(f"{name} prefill {tokens}", prefill(fast, tokens), prefill(exact, tokens)) for tokens in PREFILLS]
        cases += [(f"{name} decode batch {count}", decode(fast, count), decode(exact, count)) for count in DECODES]
        for case, run_fast, run_exact in cases:
            run_fast()
            run_exact()  # warm-up: the library compiles a kernel for each new shape
            taken = [(run_fast(), run_exact()) for _ in range(model.repeats)]
            ours, peer = median([pair[0] for pair in taken]), median([pair[1] for pair in taken])
            rows.append(Row(case, ours, peer, "exact = true", "tokens/s"))
            progress(f"{case}: fast {ours:.0f}, exact {peer:.0f} tokens/s")
    emit("engine_modes", rows, options.json)


if __name__ == "__main__":
    main()
