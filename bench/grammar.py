"""What texts that must match something cost: to compile, to mask, to replay, and of a decode step.

The vocabulary is one of 32,000 tokens, trained here on the standard library's source; the texts are random ones that
each constraint lets through, which is harder than what a model would write. Masks are in CPU time. Decode: a full batch
of a random model, every row constrained, beside the same rows free.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from bench.report import Row, emit, median, parser, progress
from core.constraint import Constraint, Language
from core.sampling import Sampling
from engine.api import Row as Work
from engine.engine import TorchEngine
from engine.grammar import Grammars
from tests.checkpoints import make_llama

END = 0
CONTEXT, STEPS, BATCH = 256, 20, 8
FIELD = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "when": {"type": "string", "format": "date-time"},
        "size": {"type": "number"},
        "kind": {"enum": ["small", "large", None]},
    },
    "required": ["name", "size"],
    "additionalProperties": False,
}
FORTY = {f"field_{number}": FIELD for number in range(40)}
CONSTRAINTS = {
    "schema of 4 fields": Constraint(Language.JSON_SCHEMA, json.dumps(FIELD)),
    "schema of 160 fields": Constraint(
        Language.JSON_SCHEMA, json.dumps({"type": "object", "properties": FORTY, "required": [*FORTY]})
    ),
    "any object": Constraint(Language.JSON_SCHEMA, '{"type": "object"}'),
    "regex": Constraint(Language.REGEX, r"([A-Z][a-z]{1,9} ){3,200}\d{4}-\d{2}"),
}


def vocabulary(folder: Path, size: int) -> int:
    """Train a byte-level tokenizer into `folder`; how many tokens it has."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=["<end>"], show_progress=False
    )
    made.train([str(path) for path in sorted(Path(os.__file__).parent.glob("*.py"))], trainer)
    made.save(str(folder / "tokenizer.json"))
    return int(made.get_vocab_size())


def walked(grammars: Grammars, constraint: Constraint, most: int, seed: int) -> tuple[list[int], list[float]]:
    """A random text of at most so many tokens, and the CPU seconds that each of its masks took."""
    walk, dice = grammars.walk(constraint, [], [END]), random.Random(seed)
    tokens: list[int] = []
    took: list[float] = []
    walk.allowed()  # waits for the compiler
    while len(tokens) < most:
        some = np.flatnonzero(walk.allowed())
        if some[0] == END and (len(some) == 1 or dice.random() < 0.1):
            break
        tokens.append(int(some[dice.randrange(int(some[0] == END), len(some))]))
        began = time.thread_time()
        walk.add(tokens[-1])
        walk.allowed()
        took.append(time.thread_time() - began)
    return tokens, took


def decode(engine: TorchEngine, sampling: Sampling) -> float:
    """Seconds of a decode step, the median of `STEPS`."""
    used = engine.kv.pages_for(CONTEXT + STEPS)
    dice = random.Random(1)
    for row in range(BATCH):
        prompt = dice.choices(range(1, engine.config.vocab), k=CONTEXT)
        engine.open(f"s{row}", prompt, range(row * used, (row + 1) * used), sampling, CONTEXT)
    took, ends = [], [CONTEXT] * BATCH
    for _ in range(STEPS):
        began = time.perf_counter()
        engine.step([Work(f"s{row}", end - 1, end) for row, end in enumerate(ends)])
        took.append(time.perf_counter() - began)
        ends = [end + 1 for end in ends]
    for row in range(BATCH):
        engine.close(f"s{row}")
    return median(took[1:])


def costs(name: str, grammars: Grammars, fresh: Grammars, tokens: int) -> Sequence[Row]:
    """Of one constraint; `fresh` has not compiled it yet."""
    constraint = CONSTRAINTS[name]
    began = time.perf_counter()
    fresh.check(constraint)
    compiled_s = time.perf_counter() - began
    text: list[int] = []
    took: list[float] = []
    for seed in range(5):
        found, each = walked(grammars, constraint, tokens, seed)
        text, took = max(text, found, key=len), took + each
    began = time.perf_counter()
    grammars.walk(constraint, text, [END]).allowed()
    replayed_s = time.perf_counter() - began
    took.sort()
    return [
        Row(f"{name}: compile", compiled_s * 1e3, None, "", "ms", False),
        Row(f"{name}: mask, p50", statistics.median(took) * 1e6, None, "", "us", False),
        Row(f"{name}: mask, p99", took[int(len(took) * 0.99)] * 1e6, None, "", "us", False),
        Row(f"{name}: mask, most", took[-1] * 1e6, None, "", "us", False),
        Row(f"{name}: replay of a token", replayed_s / max(1, len(text)) * 1e6, None, "", "us", False),
    ]


def main() -> None:
    """Measure and report."""
    flags = parser("grammar", "what constrained texts cost")
    flags.add_argument("--threads", type=int, default=1, help="torch threads (default %(default)s)")
    options = flags.parse_args()
    size, tokens = (8_000, 60) if options.quick else (32_000, 300)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        progress(f"training a vocabulary of {size}")
        vocab = vocabulary(folder, size)
        began = time.perf_counter()
        grammars = Grammars(folder, vocab, [END])
        rows = [Row("tokenizer, once a process", (time.perf_counter() - began) * 1e3, None, "", "ms", False)]
        fresh = Grammars(folder, vocab, [END])
        for name in CONSTRAINTS:
            progress(name)
            rows += costs(name, grammars, fresh, tokens)
        progress("decode steps")
        make_llama(folder, layers=6, hidden=256, intermediate=704, heads=4, vocab=vocab, eos=END, dtype="float32")
        torch.set_num_threads(options.threads)
        engine = TorchEngine(folder, kv_memory=64 * 2**20, threads=options.threads, grammars=grammars)
        free = Sampling(1000, ignore_eos=True, temperature=0.8, seed=1)
        for name in ("any object", "regex"):
            bound = Sampling(1000, stop_token_ids=(END,), temperature=0.8, seed=1, constraint=CONSTRAINTS[name])
            pairs = [(decode(engine, bound), decode(engine, free)) for _ in range(2 if options.quick else 7)]
            ours, theirs = (median([pair[side] * 1e3 for pair in pairs]) for side in (0, 1))
            rows.append(Row(f"decode step of {BATCH} rows, {name}", ours, theirs, "without", "ms", False))
    emit("grammar", rows, options.json)


if __name__ == "__main__":
    main()
