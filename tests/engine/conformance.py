"""What docs/models.md promises, measured: every model of `MODELS` against transformers, and exact mode against itself.

``python -m tests.engine.conformance`` writes the table anew; `test_models.py` measures the same and compares.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.sampling import Sampling
from engine.config import ModelConfig
from engine.engine import TorchEngine
from engine.rotation import Llama3, Yarn
from tests.checkpoints import MODELS, make_model
from tests.engine.play import alone, poison

DOC = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- python -m tests.engine.conformance -->\n", "<!-- end -->\n"
BACKENDS: dict[str, dict[str, Any]] = {
    "native": {},
    "torch": {"native": False},
    "exact-native": {"exact": True},
    "exact-torch": {"exact": True, "native": False},
}
PROMPT = random.Random(1).choices(range(2, 128), k=75)
CHUNKS = ((10**9,), (13,), (40, 1))
NEW = 12
CLOSE, NARROW = 1e-4, 0.02
"""The largest error of a logit in fp32, and in bf16 as a share of the largest logit."""


@dataclass(frozen=True, slots=True)
class Line:
    """What was measured of one model, over all backends and ways to cut its prompt."""

    name: str
    architecture: str
    same_tokens: bool
    error: float
    narrow_error: float
    same_bits: bool
    past: int | None
    """The window, or the context before rope was scaled, that the sequence went past."""

    @property
    def conforms(self) -> bool:
        return self.same_tokens and self.same_bits and self.error < CLOSE and self.narrow_error < NARROW


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """The oracle's own continuation."""
    with torch.inference_mode():
        out = model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None)
    found: list[int] = out[0, len(prompt) :].tolist()
    return found


def measure(name: str, folder: Path, model: Any) -> Line:
    """One line of the table; `model` is transformers', in fp32."""
    config = ModelConfig.read(folder)
    want = greedy(model, PROMPT, NEW)
    same_tokens = same_bits = True
    errors = {"float32": 0.0, "bfloat16": 0.0}
    for dtype in errors:
        for backend, options in BACKENDS.items():
            engine = TorchEngine(folder, kv_memory=2 * 2**20, page_tokens=16, dtype=dtype, hash_logits=True, **options)
            assert engine.backend == backend
            poison(engine)
            bits = set()
            for sizes in CHUNKS:
                tokens, logits, hashes = _run(engine, sizes)
                bits.add(hashes)
                with torch.inference_mode():
                    truth = model(torch.tensor([PROMPT + tokens])).logits[0, len(PROMPT) - 1 : -1]
                scale = 1.0 if dtype == "float32" else float(truth.abs().max())
                errors[dtype] = max(errors[dtype], float((logits - truth).abs().max()) / scale)
                same_tokens &= dtype == "bfloat16" or tokens == want
            same_bits &= len(bits) == 1 or "exact" not in options
    windows = [window for window in config.windows if window is not None]
    scaling = config.rotation.scaling
    past = min(windows, default=scaling.original_context if isinstance(scaling, Llama3 | Yarn) else None)
    assert past is None or past < len(PROMPT)
    return Line(name, config.architecture, same_tokens, errors["float32"], errors["bfloat16"], same_bits, past)


def _run(engine: TorchEngine, sizes: tuple[int, ...]) -> tuple[list[int], Tensor, tuple[int, ...]]:
    """A greedy text's tokens, logits and their hashes."""
    seen: list[Tensor] = []
    forward: Callable[..., Tensor | None] = engine._model.forward

    def forward_and_keep(batch: Any) -> Tensor | None:
        logits = forward(batch)
        seen.extend([] if logits is None else [logits.clone()])
        return logits

    engine._model.forward = forward_and_keep  # type: ignore[method-assign]
    try:
        samples = alone(engine, PROMPT, Sampling(NEW), sizes)
    finally:
        engine._model.forward = forward  # type: ignore[method-assign]
    return [sample.token for sample in samples], torch.cat(seen), tuple(sample.logits_hash for sample in samples)


def table(lines: list[Line]) -> str:
    """The lines as Markdown."""
    head = (
        "model", "architecture", "fp32 tokens equal", f"fp32 logits within {CLOSE:.0e}", "largest error",
        f"bf16 logits within {NARROW:.0%}", "largest error", "exact mode bit-equal", "goes past",
    )  # fmt: skip
    rows = [head, ("---",) * len(head)]
    for line in lines:
        rows.append(
            (
                line.name,
                line.architecture,
                _yes(line.same_tokens),
                _yes(line.error < CLOSE),
                f"{line.error:.1e}",
                _yes(line.narrow_error < NARROW),
                f"{line.narrow_error:.1%}",
                _yes(line.same_bits),
                "" if line.past is None else f"{line.past} of {len(PROMPT) + NEW} tokens",
            )
        )
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _yes(held: bool) -> str:
    return "yes" if held else "NO"


def committed() -> str:
    """The table in docs/models.md."""
    return DOC.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]


def without_errors(text: str) -> list[list[str]]:
    """A table's cells but for the measured errors, which differ from CPU to CPU."""
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in text.splitlines()]
    measured = [place for place, title in enumerate(rows[0]) if title == "largest error"]
    return [[cell for place, cell in enumerate(row) if place not in measured] for row in rows]


def main() -> None:
    """Measure all and write the table into docs/models.md."""
    import transformers

    torch.set_num_threads(1)
    lines = []
    for name in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            made = make_model(folder, MODELS[name])
            model = transformers.AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32)
            lines.append(measure(name, made, model))
    before, behind = DOC.read_text(encoding="utf-8").split(BEGIN + committed() + END)
    DOC.write_text(before + BEGIN + table(lines) + END + behind, encoding="utf-8")


if __name__ == "__main__":
    main()
