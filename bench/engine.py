"""Our engine beside `transformers` on one random model, in turns, with the same threads.

Prefill: tokens/s of one prompt. Decode: tokens/s of a full batch, each row at `CONTEXT` tokens. Serving: output
tokens/s of `REQUESTS` requests that arrive together, by continuous batching on both sides; ours is the plainest loop
that a worker could run (all running rows and as much of the next prompts as one step takes), transformers' is its
own `generate_batch`. The last rows say what our native operations buy over plain torch, in our own engine.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from bench.report import Row, emit, median, parser, progress

PREFILLS = (128, 512, 2048)
DECODES = (1, 8, 32)
CONTEXT = 256
STEPS = 5
REQUESTS, PROMPT, OUTPUT = 32, 200, 64
CHUNK = 512
"""Most prompt tokens in one of our steps."""
VOCAB = 32000
PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
"""For both sides: on shared cores a spinning pool costs whoever waits for it."""

Timed = Callable[[], float]
"""One timed run: tokens/s."""


def words(count: int, seed: int) -> list[int]:
    """A prompt without meaning."""
    return random.Random(seed).choices(range(2, VOCAB), k=count)


class Ours:
    """`TorchEngine`, driven as a worker drives it."""

    def __init__(self, folder: str, device: str, threads: int, native: bool = True) -> None:
        from engine.engine import TorchEngine

        self.engine = TorchEngine(folder, kv_memory=1024 * 2**20, threads=threads, native=native, device=device)

    def prefill(self, tokens: int) -> Timed:
        from core.sampling import Sampling
        from engine.api import Row as Work

        engine, prompt = self.engine, words(tokens, tokens)

        def once() -> float:
            engine.open("prompt", prompt, range(engine.kv.pages_for(tokens + 1)), Sampling(2), tokens)
            started = time.perf_counter()
            engine.step([Work("prompt", 0, tokens)])
            taken = time.perf_counter() - started
            engine.close("prompt")
            return tokens / taken

        return once

    def decode(self, rows: int) -> Timed:
        from core.sampling import Sampling
        from engine.api import Row as Work

        engine = self.engine
        used = engine.kv.pages_for(CONTEXT + STEPS)

        def once() -> float:
            for row in range(rows):
                table = range(row * used, (row + 1) * used)
                engine.open(f"s{row}", words(CONTEXT, row), table, Sampling(1000), CONTEXT)
            started = time.perf_counter()
            for at in range(CONTEXT - 1, CONTEXT - 1 + STEPS):
                engine.step([Work(f"s{row}", at, at + 1) for row in range(rows)])
            taken = time.perf_counter() - started
            for row in range(rows):
                engine.close(f"s{row}")
            return rows * STEPS / taken

        return once

    def serve(self, count: int) -> Timed:
        from core.sampling import Sampling
        from engine.api import Row as Work

        engine = self.engine
        used = engine.kv.pages_for(PROMPT + OUTPUT)

        def once() -> float:
            started = time.perf_counter()
            for row in range(count):
                table = range(row * used, (row + 1) * used)
                engine.open(f"s{row}", words(PROMPT, row), table, Sampling(OUTPUT, ignore_eos=True), PROMPT)
            waiting = deque((f"s{row}", 0) for row in range(count))
            running: dict[str, int] = {}
            made = 0
            while waiting or running:
                step = [Work(name, at, at + 1) for name, at in running.items()]
                budget = CHUNK
                while waiting and budget:
                    name, at = waiting.popleft()
                    stop = min(PROMPT, at + budget)
                    step.append(Work(name, at, stop))
                    budget -= stop - at
                    if stop < PROMPT:
                        waiting.appendleft((name, stop))
                for each in engine.step(step):
                    made += 1
                    running[each.sequence] = each.position
                    if each.finish is not None:
                        del running[each.sequence]
                        engine.close(each.sequence)
            assert made == count * OUTPUT
            return made / (time.perf_counter() - started)

        return once


class Transformers:
    """`transformers`' own model, cache and continuous batching."""

    def __init__(self, folder: str, device: str, threads: int) -> None:
        import torch
        import transformers

        transformers.utils.logging.set_verbosity_error()
        torch.set_num_threads(threads)
        self._torch = torch
        self._device = device
        model: Any = transformers.AutoModelForCausalLM
        self._model = model.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa").to(device).eval()

    def prefill(self, tokens: int) -> Timed:
        torch = self._torch
        ids = torch.tensor([words(tokens, tokens)], device=self._device)

        def once() -> float:
            started = time.perf_counter()
            with torch.inference_mode():
                int(self._model(ids, use_cache=True, logits_to_keep=1).logits[0, -1].argmax())
            return tokens / (time.perf_counter() - started)

        return once

    def decode(self, rows: int) -> Timed:
        torch = self._torch
        prompt = torch.tensor([words(CONTEXT, row) for row in range(rows)], device=self._device)

        def once() -> float:
            with torch.inference_mode():
                out = self._model(prompt, use_cache=True, logits_to_keep=1)
                token = out.logits[:, -1].argmax(-1, keepdim=True)
                started = time.perf_counter()
                for _ in range(STEPS):
                    out = self._model(token, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
                    token = out.logits[:, -1].argmax(-1, keepdim=True)
                token.tolist()
                return rows * STEPS / (time.perf_counter() - started)

        return once

    def serve(self, count: int) -> Timed:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        prompts = [words(PROMPT, row) for row in range(count)]
        how = GenerationConfig(max_new_tokens=OUTPUT, do_sample=False, eos_token_id=-1, pad_token_id=0)
        batching = ContinuousBatchingConfig(num_blocks=128, max_batch_tokens=1024)

        def once() -> float:
            started = time.perf_counter()
            out = self._model.generate_batch(
                prompts, generation_config=how, continuous_batching_config=batching, progress_bar=False
            )
            made = sum(len(each.generated_tokens) for each in out.values())
            assert made == count * OUTPUT, f"got {made} tokens, want {count * OUTPUT}"
            return made / (time.perf_counter() - started)

        return once


def compare(case: str, ours: Timed, peer: Timed, peer_name: str, repeats: int) -> Row:
    """The medians of both, taken in turns after one run of each to warm up."""
    ours()
    peer()
    taken = [(ours(), peer()) for _ in range(repeats)]
    row = Row(case, median([a for a, _ in taken]), median([b for _, b in taken]), peer_name, "tokens/s")
    progress(f"{case}: {row.ours:.0f}, {peer_name} {row.peer:.0f} tokens/s, {row.ratio:.2f}x")
    return row


def main() -> None:
    """Measure every shape on both sides and report."""
    flags = parser("engine", "our engine beside transformers, shape by shape")
    flags.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="torch threads of both")
    flags.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where both run")
    options = flags.parse_args()
    from tests.checkpoints import make_llama

    sizes: dict[str, Any] = {"layers": 4, "hidden": 256, "intermediate": 704, "heads": 4, "kv_heads": 2}
    if not options.quick:
        sizes = {"layers": 12, "hidden": 768, "intermediate": 2048, "heads": 12, "kv_heads": 4}
    repeats, requests = (3, 8) if options.quick else (7, REQUESTS)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        progress("writing a random checkpoint")
        make_llama(folder, vocab=VOCAB, dtype="bfloat16", **sizes)
        ours = Ours(folder, options.device, options.threads)
        peer = Transformers(folder, options.device, options.threads)
        for tokens in PREFILLS:
            case = f"prefill {tokens}"
            rows.append(compare(case, ours.prefill(tokens), peer.prefill(tokens), "transformers", repeats))
        for count in DECODES:
            case = f"decode batch {count}"
            rows.append(compare(case, ours.decode(count), peer.decode(count), "transformers", repeats))
        case = f"continuous batching, {requests} requests of {PROMPT}+{OUTPUT}"
        few = max(1, repeats // 2)
        rows.append(compare(case, ours.serve(requests), peer.serve(requests), "transformers", few))
        plain = Ours(folder, "cpu", options.threads, native=False) if options.device == "cpu" else None
        for tokens in PREFILLS if plain else ():
            assert plain is not None
            case = f"native operations, prefill {tokens}"
            rows.append(compare(case, ours.prefill(tokens), plain.prefill(tokens), "plain torch", repeats))
        for count in DECODES if plain else ():
            assert plain is not None
            case = f"native operations, decode batch {count}"
            rows.append(compare(case, ours.decode(count), plain.decode(count), "plain torch", repeats))
    emit("engine", rows, options.json)


if __name__ == "__main__":
    if any(os.environ.get(name) != value for name, value in PASSIVE.items()):
        # Read when torch is loaded, so it takes a new process.
        os.execve(sys.executable, [sys.executable, "-m", "bench.engine", *sys.argv[1:]], {**os.environ, **PASSIVE})
    main()
