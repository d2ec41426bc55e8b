"""The sequences that an engine runs: what they hold, what is refused of them, and when they end. No torch here.

Every engine keeps its sequences here, so that all of them refuse the same with the same words, change nothing when they
refuse, and end a text for the same reasons.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from core.errors import LocalError
from core.kv import KvShape
from core.sampling import Logprobs, Sampling
from engine.api import NO_TOKEN, Row


@dataclass(slots=True)
class Sequence:
    """One running sequence: all tokens known so far and where their KV lies."""

    tokens: list[int]
    pages: NDArray[np.int64]
    sampling: Sampling
    stops: frozenset[int]
    prompt: int
    prompt_logprobs: list[Logprobs | None] = field(default_factory=list)
    """One for each prompt token, if asked for; None for the first, and for those not computed here so far."""
    suspended: bool = False
    """It is in a step that has stopped and is to go on."""

    @property
    def made(self) -> int:
        """Tokens generated since the prompt."""
        return len(self.tokens) - self.prompt

    def told(self, row: Row) -> int:
        """Positions from `row.start` on whose logits say how likely the prompt's next token was."""
        return max(0, min(row.stop, len(self.prompt_logprobs) - 1) - row.start)


S = TypeVar("S", bound=Sequence)


class Sequences(Generic[S]):
    """Sequences of `kind` by name, over `pages` pages of shape `kv`, for a model of this context and vocabulary.

    A call that cannot be honoured raises `LocalError` and changes nothing.
    """

    def __init__(self, kind: type[S], kv: KvShape, pages: int, context: int, vocab: int) -> None:
        self._kind = kind
        self._page_tokens = kv.page_tokens
        self._pages = pages
        self._context = context
        self._vocab = vocab
        self._known: dict[str, S] = {}

    def __getitem__(self, name: str) -> S:
        try:
            return self._known[name]
        except KeyError:
            raise LocalError(f"sequence {name!r} is not open") from None

    def has(self, name: str, known: Sequence) -> bool:
        """Whether this very sequence is open under that name."""
        return self._known.get(name) is known

    def open(
        self, name: str, tokens: Seq[int], pages: Seq[int], sampling: Sampling, prompt: int, generated: int = 0
    ) -> S:
        """See `engine.api.Engine.open`."""
        if name in self._known:
            raise LocalError(f"sequence {name!r} is open already")
        if not 1 <= prompt <= len(tokens):
            raise LocalError(f"sequence {name!r}: prompt: got {prompt}, want 1 to {len(tokens)} tokens")
        if not 0 <= generated <= prompt:
            raise LocalError(f"sequence {name!r}: generated: got {generated}, want 0 to {prompt} tokens")
        if len(tokens) > self._context:
            raise LocalError(f"sequence {name!r}: got {len(tokens)} tokens, the context is {self._context}")
        if min(tokens) < 0 or max(tokens) >= self._vocab:
            raise LocalError(f"sequence {name!r}: got a token outside [0, {self._vocab})")
        table = self.table(name, pages)
        known = self._kind(list(tokens), table, sampling, frozenset(sampling.stop_token_ids), prompt)
        if sampling.prompt_logprobs is not None:
            known.prompt_logprobs = [None] * prompt
        self._known[name] = known
        return known

    def extend(self, name: str, pages: Seq[int]) -> None:
        """Append pages to a sequence's page table."""
        known = self[name]
        known.pages = np.concatenate([known.pages, self.table(name, pages)])

    def close(self, name: str) -> None:
        """Forget a sequence; unknown names are ignored."""
        self._known.pop(name, None)

    def of(self, rows: Seq[Row]) -> list[S]:
        """The sequence of each row, if all rows can be computed in one step."""
        seen: set[str] = set()
        found = []
        for row in rows:
            known = self[row.sequence]
            if row.sequence in seen:
                raise LocalError(f"sequence {row.sequence!r} is twice in one step")
            seen.add(row.sequence)
            if known.suspended:
                raise LocalError(f"sequence {row.sequence!r} is in a suspended step")
            if not 0 <= row.start < row.stop <= len(known.tokens):
                raise LocalError(
                    f"sequence {row.sequence!r}: got rows [{row.start}, {row.stop}), want some of "
                    f"[0, {len(known.tokens)})"
                )
            room = len(known.pages) * self._page_tokens
            if row.stop > min(room, self._context):
                raise LocalError(
                    f"sequence {row.sequence!r}: got rows up to {row.stop}, its {len(known.pages)} pages hold "
                    f"{room} tokens and the context is {self._context}"
                )
            found.append(known)
        return found

    def finish(self, known: S, token: int) -> str | None:
        """Why a sequence ends with its next token, if it does."""
        if token in known.stops or token == NO_TOKEN:
            return "stop"
        ends = known.made + 1 >= known.sampling.max_tokens or len(known.tokens) + 1 >= self._context
        return "length" if ends else None

    def table(self, name: str, pages: Seq[int]) -> NDArray[np.int64]:
        """Pages as an array; `LocalError` if the arena does not have one of them."""
        table = np.asarray(pages, dtype=np.int64).reshape(-1)
        if len(table) and not (table.min() >= 0 and table.max() < self._pages):
            raise LocalError(f"sequence {name!r}: got a page outside [0, {self._pages})")
        return table
