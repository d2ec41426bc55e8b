"""What a worker's shells know of an engine: rows in, sampled tokens out. No torch here.

An engine owns the KV arena and the running sequences' tokens and page tables; it decides nothing. All calls are
made on one thread (the worker's engine thread).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from core.kv import KvShape
from core.sampling import Logprobs, Sampling


@dataclass(frozen=True, slots=True)
class Row:
    """Compute the KV of positions [start, stop) of `sequence`; sample when `stop` reaches its last known token."""

    sequence: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Sampled:
    """One new token of `sequence`, at `position` (0 is the prompt's first token)."""

    sequence: str
    position: int
    token: int
    finish: str | None = None
    """"stop" (a stop token, not part of the text), "length" (`max_tokens` or the context is full) or None."""
    logits_hash: int = 0
    """64-bit hash of the fp32 logits' bytes if the engine was built with `hash_logits`, else 0."""
    branch: int = 0
    """Which continuation, of a sequence whose sampling asks for `n` of them and whose prompt this step completed."""
    logprobs: Logprobs | None = None
    """If the sequence's sampling asks for them."""
    prompt_logprobs: tuple[Logprobs | None, ...] = ()
    """Of each prompt token, the first None, with the token right after the prompt; if asked for."""


class Engine(Protocol):
    """Runs a model over page-major KV. Every page of the arena is `kv.page_nbytes` bytes."""

    @property
    def kv(self) -> KvShape: ...

    @property
    def pages(self) -> int:
        """Pages in the arena."""
        ...

    @property
    def arena(self) -> memoryview:
        """The arena's bytes, `pages * kv.page_nbytes` long, writable, its address fixed for life."""
        ...

    def open(
        self,
        sequence: str,
        tokens: Sequence[int],
        pages: Sequence[int],
        sampling: Sampling,
        prompt: int,
        generated: int = 0,
    ) -> None:
        """Make a sequence known: its tokens so far, of which the first `prompt` are the prompt, and its page table.

        The last `generated` tokens of the prompt are output of earlier attempts. They count as output for penalties,
        and no longer for `max_tokens` and `min_tokens`. Prompt logprobs take a prompt that is stepped here in full.
        """
        ...

    def extend(self, sequence: str, pages: Sequence[int]) -> None:
        """Append pages to a sequence's page table."""
        ...

    def copy(self, source: int, target: int) -> None:
        """Write the bytes of one page into another."""
        ...

    def step(self, rows: Sequence[Row]) -> list[Sampled]:
        """One forward over prefill chunks and decode rows together; appends each sampled token to its sequence."""
        ...

    def close(self, sequence: str) -> None:
        """Forget a sequence; its pages are the caller's again. Unknown names are ignored."""
        ...
