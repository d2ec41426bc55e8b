"""A step that can stop between two operators and go on later (FlowPrefill, "operator-level preemption"). No torch here.

Every engine writes its step as a generator: what is computed so far, a model's hidden states, lives in its frame, and
whoever stops asking for more has suspended it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

from core.errors import LocalError
from engine.api import Row, Sampled
from engine.sequences import Sequence, Sequences

T = TypeVar("T")

Parts = Generator[None, bool | None, T]
"""A computation that yields between two operators; it is sent True if others used the device in the meantime."""


def whole(parts: Parts[T]) -> T:
    """The result of a computation that nobody stops."""
    try:
        while True:
            next(parts)
    except StopIteration as end:
        result: T = end.value
        return result


class Step:
    """See `engine.api.Step`. `rows` are those of `known`, in `sequences`; `mode` is entered whenever `parts` run."""

    def __init__(
        self,
        parts: Parts[list[Sampled]],
        rows: Seq[Row],
        known: Seq[Sequence],
        sequences: Sequences[Any],
        mode: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self._parts = parts
        self._rows = rows
        self._known = known
        self._sequences = sequences
        self._mode = mode
        self._over = self._stopped = False

    def run(self, pause: Callable[[], bool]) -> list[Sampled] | None:
        """See `engine.api.Step`."""
        if self._over:
            raise LocalError("step: got one that is over, want one that was begun or has stopped")
        for row, known in zip(self._rows, self._known, strict=True):
            if not self._sequences.has(row.sequence, known):
                self._end()
                raise LocalError(f"sequence {row.sequence!r} was closed before its step was over")
            known.suspended = False
        try:
            with self._mode():
                self._parts.send(True if self._stopped else None)
                while not pause():
                    next(self._parts)
        except StopIteration as end:
            self._end()
            sampled: list[Sampled] = end.value
            return sampled
        except BaseException:
            self._end()
            raise
        self._stopped = True
        for known in self._known:
            known.suspended = True
        return None

    def _end(self) -> None:
        """Let go of what was computed."""
        self._over = True
        self._parts.close()
        for known in self._known:
            known.suspended = False
