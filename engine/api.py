"""What a worker's shells know of an engine: rows in, sampled tokens out. No torch here.

An engine owns the KV arena and the running sequences' tokens and page tables; it decides nothing. All calls are
made on one thread (the worker's engine thread).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from core.kv import KvShape
from core.sampling import Logprobs, Sampling

NO_TOKEN = -1
"""The stop token of a text that ends because its constraint lets no token of the vocabulary follow."""


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
    """"stop" (a stop token or `NO_TOKEN`, not part of the text), "length" (`max_tokens` or the context) or None."""
    logits_hash: int = 0
    """64-bit hash of the fp32 logits' bytes if the engine was built with `hash_logits`, else 0."""
    branch: int = 0
    """Which continuation, of a sequence whose sampling asks for `n` of them and whose prompt this step completed."""
    logprobs: Logprobs | None = None
    """If the sequence's sampling asks for them."""
    prompt_logprobs: tuple[Logprobs | None, ...] = ()
    """Of each prompt token, the first None, with the token right after the prompt; if asked for."""


class Step(Protocol):
    """A step that was begun. Until it is over its sequences take no other one; steps of others may come in between."""

    def run(self, pause: Callable[[], bool]) -> list[Sampled] | None:
        """Begin or go on, until the step is over or `pause`, asked between two operators, says yes: then None.

        However often it stops, it samples what `Engine.step` would have: to the bit, if the engine is exact. What it
        keeps meanwhile, besides the pages of its rows, are a few numbers for each row and channel of the model. The
        pages stay the rows' until it is over. `LocalError` if a sequence was closed in between: then it is over.
        """
        ...


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

    @property
    def grammar(self) -> str:
        """What it compiles constraints with, and its version; empty if it takes no sequence that has one."""
        ...

    def prepare(self, sampling: Sampling) -> None:
        """Sequences with this sampling are to come: what they need is made meanwhile. From any thread."""
        ...

    @property
    def host_pages(self) -> int:
        """Pages that fit into host memory beside the arena; 0: it keeps none there."""
        ...

    @property
    def host_pages_used(self) -> int:
        """Those that hold KV of sequences."""
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
        and no longer for `max_tokens` and `min_tokens`; a constraint is about all output, theirs included. Prompt
        logprobs take a prompt that is stepped here in full.
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

    def begin(self, rows: Sequence[Row]) -> Step:
        """The same as a step that can stop on its way; nothing is computed yet."""
        ...

    def swap_out(self, sequence: str, pages: Sequence[int]) -> None:
        """Copy these pages into host memory, as the sequence's, and forget all else of it; the pages are the caller's.

        `LocalError`, and nothing is changed, if there is no room for them.
        """
        ...

    def swap_in(self, sequence: str, pages: Sequence[int]) -> None:
        """Copy what host memory holds of the sequence into as many pages, in the same order, and keep it no longer."""
        ...

    def close(self, sequence: str) -> None:
        """Forget a sequence, also what host memory holds of it; its pages are the caller's. Ignores unknown names."""
        ...
