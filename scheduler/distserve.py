"""DistServe's dispatch: the shortest prefill queue, the least loaded decode worker, and fixed pairs. Pure.

DistServe (OSDI'24), section 4.3 (online scheduling): a request goes to the prefill instance with the shortest queue,
then to the least loaded decode instance. Where nodes are far apart (algorithm 2, low node affinity) the two belong to
one segment, so that KV crosses the node's own links only: a prefill worker hands over within its segment, always.

| parameter | unit | default | meaning |
|---|---|---|---|
| paired | - | true | hand over within the segment only; false: to any decode worker (algorithm 1, high affinity) |

Segments are made of the ready workers in order of identity. With n prefill and m decode workers there are min(n, m);
worker number i of either kind belongs to segment i mod min(n, m). Without a decode worker that is large enough in its
segment a prefill worker is passed over.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from core.worker import Identity
from scheduler.placement import Need, Post, Workers


class DistServe:
    """Fewest queued prompts first; of the decode workers of its segment, the one with the fewest sequences."""

    def __init__(self, *, paired: bool = True) -> None:
        self._paired = paired
        self._segments: tuple[int, dict[Post, list[Post]]] = (0, {})
        """Members' version, and who hands over to whom."""

    def queue_load(self, post: Post) -> float:
        return post.queue

    def decode_load(self, post: Post) -> float:
        return post.rows

    def sources(self, need: Need, workers: Workers) -> Iterable[Post]:
        return workers.prefills

    def sinks(self, source: Post, need: Need, workers: Workers) -> tuple[Post, ...]:
        if workers.keeps(source, need):
            return (source,)
        if not self._paired:
            return workers.lightest(source, need, 2)
        if self._segments[0] != workers.version:
            self._segments = workers.version, self._drawn(workers)
        mine = self._segments[1].get(source)
        if mine is None:  # mixed, and too full to keep it
            return workers.lightest(source, need, 2)
        fitting = [post for post in mine if workers.takes(source, post, need)]
        return tuple(sorted(fitting, key=lambda post: (post.rows, post.order)))[:2]

    def _drawn(self, workers: Workers) -> dict[Post, list[Post]]:
        sources = [post for post in workers.prefills.posts if not post.decodes]
        sinks = [post for post in workers.decodes.posts if not post.prefills]
        if not sinks:
            return {}
        segments = min(len(sources), len(sinks))
        return {source: sinks[number % segments :: segments] for number, source in enumerate(sources)}

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
