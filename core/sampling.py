"""How the next token is chosen: the sampling parameters of a request, validated where they are built."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from core.constraint import Constraint
from core.errors import RequestError

MAX_SEED = 2**63 - 1
MAX_N = 64
MAX_PENALTY = 2.0
MAX_BIAS = 100.0
MAX_BIASED = 1024
MAX_LOGPROBS = 20
SEED_STEP = 0x9E3779B97F4A7C15
"""Between the seeds of two continuations; odd, so that all of them differ."""


@dataclass(frozen=True, slots=True)
class Logprobs:
    """How likely a token was: natural logarithms of the softmax of the raw logits, before anything is done to them."""

    token: int
    logprob: float
    top_ids: tuple[int, ...] = ()
    """The most likely tokens, best first; of equals the lower id first."""
    top_logprobs: tuple[float, ...] = ()
    """One for each of `top_ids`."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling parameters; the same on every worker that serves the request.

    Noise is keyed by (seed, position, token id), so a request continues with the same tokens on another worker
    and after a restart. `temperature` 0 is greedy. Raises `RequestError` (INVALID_ARGUMENT) on a bad value.

    A token's logits go through this, in this order: `min_tokens`, `logit_bias`, `repetition_penalty`,
    `frequency_penalty`, `presence_penalty`, `constraint`; then the best is taken, or, with a temperature:
    `temperature`, `min_p`, `top_k`, `top_p`, noise.
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
    n: int = 1
    """Independent continuations of the prompt, 1 to `MAX_N`."""
    min_p: float = 0.0
    """Keep the tokens at least this share as likely as the most likely one, in [0, 1]; 0 keeps all."""
    repetition_penalty: float = 1.0
    """Logits of tokens in prompt or output are divided by it if above 0, else multiplied; above 0, 1 changes none."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens in the output, in [-2, 2]."""
    frequency_penalty: float = 0.0
    """Subtracted for each time that a token is in the output, in [-2, 2]."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, what is added to its logit, in [-100, 100]); each token once, at most `MAX_BIASED` of them."""
    min_tokens: int = 0
    """No stop token is chosen before this many tokens, at most `max_tokens`."""
    logprobs: int | None = None
    """Say how likely each chosen token and this many of the most likely were, up to `MAX_LOGPROBS`; None: nothing."""
    prompt_logprobs: int | None = None
    """The same of the prompt's tokens."""
    constraint: Constraint | None = None
    """What the text must match: stop tokens are chosen where it does and nowhere else, `min_tokens` notwithstanding."""

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
        if not 1 <= self.n <= MAX_N:
            raise bad("n", f"1 to {MAX_N}")
        if not 0 <= self.min_p <= 1:
            raise bad("min_p", "in [0, 1]")
        if not 0 < self.repetition_penalty < math.inf:
            raise bad("repetition_penalty", "a finite number above 0")
        for field in ("presence_penalty", "frequency_penalty"):
            if not abs(getattr(self, field)) <= MAX_PENALTY:
                raise bad(field, f"in [-{MAX_PENALTY:g}, {MAX_PENALTY:g}]")
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise bad("min_tokens", f"0 to max_tokens, {self.max_tokens}")
        for field in ("logprobs", "prompt_logprobs"):
            asked = getattr(self, field)
            if asked is not None and not 0 <= asked <= MAX_LOGPROBS:
                raise bad(field, f"0 to {MAX_LOGPROBS}")
        self._check_bias()
        if self.constraint is not None:
            what = self.constraint.language
            if self.ignore_eos:
                raise bad("ignore_eos", f"False with a {what}, because the text ends where it matches")
            if not self.stop_token_ids:
                raise bad("stop_token_ids", f"one at least with a {what}, because the model has no end token")

    def _check_bias(self) -> None:
        tokens = {token for token, _ in self.logit_bias}
        if len(self.logit_bias) > MAX_BIASED:
            why = f"got {len(self.logit_bias)} tokens, want at most {MAX_BIASED}"
        elif len(tokens) < len(self.logit_bias):
            why = "got a token twice, want each once"
        else:
            wrong = next(((token, bias) for token, bias in self.logit_bias if not abs(bias) <= MAX_BIAS), None)
            if wrong is None:
                return
            why = f"got {wrong[1]!r} for token {wrong[0]}, want in [-{MAX_BIAS:g}, {MAX_BIAS:g}]"
        raise RequestError("INVALID_ARGUMENT", f"logit_bias: {why}")

    def branch(self, index: int) -> Sampling:
        """The parameters of one continuation alone; the first one's are those of the request with `n` 1."""
        return replace(self, n=1, seed=(self.seed + index * SEED_STEP) % (MAX_SEED + 1))

    @property
    def greedy(self) -> bool:
        """True if no noise is drawn."""
        return self.temperature == 0

    @property
    def bends(self) -> bool:
        """True if logits are changed before a token is chosen from them."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)
        return penalties or bool(self.logit_bias) or (self.min_tokens > 0 and bool(self.stop_token_ids))
