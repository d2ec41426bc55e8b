"""Round robin: every worker in turn, whatever it has to do. Pure.

The baseline that says what looking at loads is worth: with first come, first served at the workers it is what a plain
load balancer in front of them does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from core.worker import Identity
from scheduler.placement import Need, Post, Workers


class RoundRobin:
    """Prefill and decode workers in turn, in order of identity; a mixed worker keeps its own.

    A request that is refused goes on with the next ones, which does not disturb the turn of others.
    """

    def __init__(self) -> None:
        self._turns = [0, 0]
        """Of prefill and of decode workers."""

    def queue_load(self, post: Post) -> float:
        return 0.0

    def decode_load(self, post: Post) -> float:
        return 0.0

    def sources(self, need: Need, workers: Workers) -> Iterable[Post]:
        if need.note is None:
            need.note = self._turns[0]
            self._turns[0] += 1
        assert isinstance(need.note, int)
        return _from(workers.prefills.posts, need.note)

    def sinks(self, source: Post, need: Need, workers: Workers) -> tuple[Post, ...]:
        if workers.keeps(source, need):
            return (source,)
        turn, self._turns[1] = self._turns[1], self._turns[1] + 1
        others = _from(workers.decodes.posts, turn)
        return tuple(islice((post for post in others if post is not source and workers.takes(source, post, need)), 2))

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
        return {"turns": list(self._turns)}

    def restore(self, document: Mapping[str, Any]) -> None:
        self._turns = list(document["turns"])


def _from(posts: tuple[Post, ...], turn: int) -> Iterable[Post]:
    """All of them, the one whose turn it is first."""
    for step in range(len(posts)):
        yield posts[(turn + step) % len(posts)]
