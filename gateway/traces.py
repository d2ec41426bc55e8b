"""Where the time of requests went: of the live ones, and of the last that ended."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from core.request import Request, Stage
from gateway.replies import Replies
from protos.baton.v1 import inference_pb2, inspect_pb2
from runtime import wire
from scheduler.groups import Groups
from scheduler.router_events import End

KEPT = 1000
"""Ended requests whose stages are kept, a few kilobytes each."""


@dataclass(frozen=True, slots=True)
class _Past:
    end: End
    prompt_tokens: int
    completion_tokens: int
    seed: int
    total_s: float
    ended_at: float
    """On the wall's clock."""


class Traces:
    """A ring of the last ends by the clients' names for them; a name that is used again takes the older's place."""

    def __init__(self, router: Groups, now: Callable[[], float], kept: int = KEPT) -> None:
        self._router = router
        self._now = now
        self._kept = kept
        self._past: OrderedDict[str, _Past] = OrderedDict()

    def __len__(self) -> int:
        return len(self._past)

    def ended(self, request: Request, end: End, total_s: float, replies: Replies) -> None:
        """Remember an end; nothing is made of it before somebody asks."""
        tokens = sum(reply.completion_tokens for reply in replies.all)
        self._past.pop(request.id, None)
        self._past[request.id] = _Past(end, len(request.prompt), tokens, request.sampling.seed, total_s, time.time())
        if len(self._past) > self._kept:
            self._past.popitem(last=False)

    def past(self, request_id: str) -> inspect_pb2.TraceResponse | None:
        """Of an ended request; None if it is not, or no longer, known."""
        past = self._past.get(request_id)
        if past is None:
            return None
        end = past.end
        said = inference_pb2.End(
            finish_reason=end.reason,
            prompt_tokens=past.prompt_tokens,
            completion_tokens=past.completion_tokens,
            cached_tokens=end.cached_tokens,
            attempts=end.attempts,
            request_id=request_id,
            seed=past.seed,
            stages=[wire.stage_proto(stage) for stage in (*end.stages, self._total(past.total_s))],
        )
        return inspect_pb2.TraceResponse(
            phase=end.phase,
            code=end.code,
            reason=end.reason,
            end=said,
            total_s=past.total_s,
            arrived_at=past.ended_at - past.total_s,
        )

    def live(self, counter: int, request: Request, arrived_at: float) -> inspect_pb2.TraceResponse | None:
        """Of a live request: the stages that were reported; None if the router has done with it."""
        trace = self._router.trace(counter)
        if trace is None:
            return None
        total_s = self._now() - arrived_at
        said = inference_pb2.End(
            prompt_tokens=len(request.prompt),
            completion_tokens=trace.tokens,
            cached_tokens=trace.cached_tokens,
            attempts=trace.attempts,
            request_id=request.id,
            seed=request.sampling.seed,
            stages=[wire.stage_proto(stage) for stage in (*trace.stages, self._total(total_s))],
        )
        arrived = time.time() - total_s
        return inspect_pb2.TraceResponse(running=True, phase=trace.phase, end=said, total_s=total_s, arrived_at=arrived)

    def _total(self, seconds: float) -> Stage:
        return Stage("total", self._router.name, seconds)
