"""DualMap between two pools of prefill workers: short prompts to one, long ones to the other. Pure.

LAPS, spatial mode: a worker in one of the pools (`Workers.divide`) computes only prompts of that class. The class goes
by the fewest *new* tokens that the prompt may come to at its two workers, so a long conversation's next turn is short.
A session is not torn from its cache: a worker that has half of a prompt or more may be asked, whichever pool it is in.
A pool without a ready worker is as good as none: then everybody may be asked. Where nothing is divided this is DualMap.
"""

from __future__ import annotations

from collections.abc import Iterable

from scheduler.dualmap import DualMap
from scheduler.placement import Lane, Need, Post, Workers

KEPT = 0.5
"""Share of a prompt that a worker must have to be asked though it is in the other pool."""


class SplitMap(DualMap):
    """DualMap's order, without those who compute the other class."""

    def sources(self, need: Need, workers: Workers) -> Iterable[Post]:
        found = super().sources(need, workers)
        lane = self._lane(need, workers)
        if lane is Lane.ANY:
            return found
        return (post for post in found if self._asked(post, lane, need, workers))

    def sinks(self, source: Post, need: Need, workers: Workers) -> tuple[Post, ...]:
        # Whoever waits is offered to a worker that has room, which nobody has ranked.
        lane = self._lane(need, workers)
        if lane is not Lane.ANY and not self._asked(source, lane, need, workers):
            return ()
        return super().sinks(source, need, workers)

    def _lane(self, need: Need, workers: Workers) -> Lane:
        """The pool that it belongs to; any if that has no worker."""
        if not workers.short_tokens:
            return Lane.ANY
        lane = Lane.SHORT if self.fewest(need, workers) <= workers.short_tokens else Lane.LONG
        return lane if workers.in_lane(lane) else Lane.ANY

    def _asked(self, post: Post, lane: Lane, need: Need, workers: Workers) -> bool:
        if post.lane is lane or post.lane is Lane.ANY:
            return True
        return bool(need.prefix) and self._new(post, need, workers) <= (1 - KEPT) * need.tokens
