"""How the next token is chosen: the sampling parameters of a request, validated where they are built."""

from __future__ import annotations

import math
from dataclasses import dataclass

from core.errors import RequestError

MAX_SEED = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling parameters; the same on every worker that serves the request.

    Noise is keyed by (seed, position, token id), so a request continues with the same tokens on another worker
    and after a restart. `temperature` 0 is greedy. Raises `RequestError` (INVALID_ARGUMENT) on a bad value.
    """

    max_tokens: int
    """Most tokens to generate, at least 1."""
    temperature: float = 0.0
    """0 takes the most likely token; else scores are logits / temperature."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens whose probabilities sum to at least this, in (0, 1]."""
    seed: int = 0
    """Key of the noise, in [0, 2**63)."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the text, the model's own end tokens included unless `ignore_eos`; they are not part of it."""
    ignore_eos: bool = False
    """Go on past the model's end token."""

    def __post_init__(self) -> None:
        def bad(field: str, want: str) -> RequestError:
            return RequestError("INVALID_ARGUMENT", f"{field}: got {getattr(self, field)!r}, want {want}")

        if self.max_tokens < 1:
            raise bad("max_tokens", "at least 1")
        if not math.isfinite(self.temperature) or self.temperature < 0:
            raise bad("temperature", "a finite number of at least 0")
        if self.top_k < 0:
            raise bad("top_k", "at least 0")
        if not 0 < self.top_p <= 1:
            raise bad("top_p", "in (0, 1]")
        if not 0 <= self.seed <= MAX_SEED:
            raise bad("seed", f"in [0, {MAX_SEED}]")

    @property
    def greedy(self) -> bool:
        """True if no noise is drawn."""
        return self.temperature == 0
