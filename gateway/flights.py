"""A client's side of one request: tokens come in, text that is final goes out, however slowly it is read."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from core.request import Phase
from gateway.text import TextStream
from scheduler.router import End


@dataclass(slots=True)
class Batch:
    """What is new for the client since the last batch."""

    text: str
    tokens: tuple[int, ...]
    last: bool
    """The request is over and this is all that is left of it."""


@dataclass(slots=True)
class Outcome:
    """How it ended for the client."""

    reason: str
    """"stop", "length" or "abort"; a sentence if the request failed."""
    completion_tokens: int
    stop_string: str | None = None
    end: End | None = None

    @property
    def served(self) -> bool:
        """False if the client did not get what it asked for."""
        done = self.end is not None and self.end.phase is Phase.DONE
        return done or self.stop_string is not None or self.reason == "abort"


class Flight:
    """Buffers what came until the client reads it: waiting tokens are merged, never delayed by a timer."""

    def __init__(self, stream: TextStream) -> None:
        self._stream = stream
        self._text = ""
        self._tokens: list[int] = []
        self._changed = asyncio.Event()
        self._count = 0
        self.hashes: list[int] = []
        self.aborted = False
        self.outcome: Outcome | None = None

    @property
    def completion_tokens(self) -> int:
        """Tokens generated for the client so far, those that completed a stop string included."""
        return self._count

    def deliver(self, tokens: tuple[int, ...], hashes: tuple[int, ...]) -> bool:
        """Take new tokens; True if a stop string ended the text, after which nothing is taken any more."""
        if self.outcome is not None:
            return False
        piece = self._stream.feed(tokens)
        used = piece.tokens - self._count
        self._count = piece.tokens
        self._text += piece.text
        self._tokens.extend(tokens[:used])
        self.hashes.extend(hashes[:used])
        self._changed.set()
        if piece.stop is None:
            return False
        self.outcome = Outcome("stop", self._count, piece.stop)
        return True

    def end(self, end: End) -> None:
        """The request is over; text held back for a possible stop string or character comes out first."""
        if self.outcome is None:
            piece = self._stream.flush()
            self._text += piece.text
            reason = "abort" if self.aborted else "stop" if piece.stop else end.reason
            self.outcome = Outcome(reason, self._count, piece.stop)
        self.outcome.end = end
        self._changed.set()

    async def next(self) -> Batch:
        """What is new, as soon as there is something or the request is over."""
        while not self._over and not self._tokens and not self._text:
            self._changed.clear()
            await self._changed.wait()
        batch = Batch(self._text, tuple(self._tokens), self._over)
        self._text, self._tokens = "", []
        return batch

    @property
    def _over(self) -> bool:
        return self.outcome is not None and self.outcome.end is not None
