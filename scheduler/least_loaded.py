"""Least loaded: the fewest tokens of our own in flight, for both parts. Pure.

What a gateway knows best is what it sent itself (P/D-Serve, "on-demand forwarding upon rejections", orders candidates
by the gateway's own open streams); a refusal tells the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from core.worker import Identity
from scheduler.placement import Need, Post, Workers


class LeastLoaded:
    """Prefill where the fewest new tokens are queued, decode where the smallest share of memory is promised; a mixed
    worker keeps its own, and of those with equal queues the one whose memory is promised least is first."""

    def queue_load(self, post: Post) -> float:
        if post.decodes and post.held_tokens:
            return post.queue_tokens + post.held_tokens / (post.held_tokens + post.room)  # ties only: less than a token
        return post.queue_tokens

    def decode_load(self, post: Post) -> float:
        return post.held_tokens / post.room if post.room else float(post.held_tokens)

    def sources(self, need: Need, workers: Workers) -> Iterable[Post]:
        return workers.prefills

    def sinks(self, source: Post, need: Need, workers: Workers) -> tuple[Post, ...]:
        return (source,) if workers.keeps(source, need) else workers.lightest(source, need, 2)

    def fewest(self, need: Need, workers: Workers) -> int:
        return need.tokens

    def accepted(self, source: Post, need: Need) -> None:
        pass

    def kept(self, post: Post, prefix: tuple[int, ...]) -> None:
        pass

    def holders(self, source: Post, need: Need, pages: int, workers: Workers) -> tuple[tuple[Identity, int], ...]:
        return ()

    def prefilled(self, source: Post, tokens: int, seconds: float) -> None:
        pass

    def document(self) -> dict[str, Any]:
        return {}

    def restore(self, document: Mapping[str, Any]) -> None:
        pass
