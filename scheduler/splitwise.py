"""Splitwise's dispatch: the shortest queue on both sides, and a mixed pool that takes what is too much. Pure.

Splitwise (ISCA'24), section IV.A (cluster-level scheduling): machines are in a prompt pool, a token pool or a mixed
pool; a request joins the shortest queue of the prompt and of the token pool, queues being measured in pending tokens;
where even the shortest one exceeds a threshold, the mixed pool is used. Pools are the members' roles here: a worker
does not change its pool for a single request, and none is lent from the opposite pool when the mixed one is empty.

| parameter | unit | default | meaning |
|---|---|---|---|
| prompt_tokens | tokens | 8192 | longest queue of a prompt worker that a request joins while there is a mixed one |
| token_share | share | 0.9 | of a token worker's KV, promised at most before a hand-over goes to a mixed one |

The paper leaves the thresholds to the deployment; these are ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from core.worker import Identity
from scheduler.placement import Need, Post, Workers


class Splitwise:
    """Joins the shortest queues; over the thresholds, those of the mixed pool."""

    def __init__(self, *, prompt_tokens: int = 8192, token_share: float = 0.9) -> None:
        self._prompt_tokens = prompt_tokens
        self._token_share = token_share

    def queue_load(self, post: Post) -> float:
        return post.queue_tokens

    def decode_load(self, post: Post) -> float:
        return post.held_tokens

    def sources(self, need: Need, workers: Workers) -> Iterator[Post]:
        ranked = workers.prefills
        shortest = next((post for post in ranked if not post.decodes), None)
        prompts = shortest is not None and shortest.queue_tokens + need.tokens <= self._prompt_tokens
        yield from (post for post in ranked if post.mixed is not prompts)
        yield from (post for post in ranked if post.mixed is prompts)

    def sinks(self, source: Post, need: Need, workers: Workers) -> tuple[Post, ...]:
        if workers.keeps(source, need):
            return (source,)
        fitting = self._pool(source, need, workers, mixed=False)
        if not fitting or fitting[0].held_tokens + need.size > self._token_share * fitting[0].room:
            return (*self._pool(source, need, workers, mixed=True), *fitting)[:2]
        return fitting

    def _pool(self, source: Post, need: Need, workers: Workers, *, mixed: bool) -> tuple[Post, ...]:
        pool: Iterable[Post] = (post for post in workers.decodes if post.mixed is mixed and post is not source)
        return tuple(islice((post for post in pool if workers.takes(source, post, need)), 2))

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
