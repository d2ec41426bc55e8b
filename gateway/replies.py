"""A client's side of its request: tokens come in, text that is final goes out, however slowly it is read."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass

from core.errors import RequestError
from core.request import Phase
from core.sampling import Logprobs
from engine.api import NO_TOKEN
from gateway.text import TextStream
from scheduler.router_events import End


@dataclass(slots=True)
class Batch:
    """What is new for the client since the last batch."""

    text: str
    tokens: tuple[int, ...]
    last: bool
    """The continuation is over and this is all that is left of it."""
    logprobs: tuple[Logprobs, ...] = ()
    """One for each of `tokens`, if they were asked for."""
    prompt_logprobs: tuple[Logprobs | None, ...] = ()
    """One for each token of the prompt, once, if they were asked for."""


@dataclass(slots=True)
class Outcome:
    """How it ended for the client."""

    reason: str
    """"stop", "length" or "abort"; a sentence if the request failed."""
    completion_tokens: int
    stop_string: str | None = None
    stop_token_id: int | None = None
    end: End | None = None
    """Set for the continuation that the whole request ended with."""

    @property
    def error(self) -> RequestError | None:
        """Why the client did not get what it asked for; None if it did."""
        if self.stop_string is not None or self.reason == "abort":
            return None
        if self.end is not None and self.end.phase is not Phase.DONE:
            return RequestError(self.end.code, self.end.reason, retry_s=self.end.retry_s)
        if self.stop_token_id == NO_TOKEN:
            why = f"after {self.completion_tokens} tokens the model's vocabulary has none that it lets follow"
            return RequestError("FAILED_PRECONDITION", f"constraint: {why}")
        return None


class Reply:
    """One continuation: what came is kept until the client reads it, merged, never delayed by a timer."""

    def __init__(self, stream: TextStream, changed: asyncio.Event | None = None) -> None:
        self._stream = stream
        self._text = ""
        self._tokens: list[int] = []
        self._logprobs: list[Logprobs] = []
        self._prompt_logprobs: tuple[Logprobs | None, ...] = ()
        self._changed = changed or asyncio.Event()
        self._count = 0
        self._over = False
        self.read = False
        self.hashes: list[int] = []
        self.last_token_at: float | None = None
        self.aborted = False
        self.outcome: Outcome | None = None

    @property
    def completion_tokens(self) -> int:
        """Tokens generated for the client so far, those that completed a stop string included."""
        return self._count

    def deliver(
        self,
        tokens: tuple[int, ...],
        hashes: tuple[int, ...],
        logprobs: tuple[Logprobs, ...] = (),
        prompt_logprobs: tuple[Logprobs | None, ...] = (),
    ) -> bool:
        """Take new tokens; True if a stop string ended the text, after which nothing is taken any more."""
        if self.outcome is not None:
            return False
        piece = self._stream.feed(tokens)
        used = piece.tokens - self._count
        self._count = piece.tokens
        self._text += piece.text
        self._tokens.extend(tokens[:used])
        self._logprobs.extend(logprobs[:used])
        self._prompt_logprobs += prompt_logprobs
        self.hashes.extend(hashes[:used])
        self._changed.set()
        if piece.stop is None:
            return False
        self.outcome = Outcome("stop", self._count, piece.stop)
        return True

    def end(self, reason: str, stop_token_id: int | None = None, end: End | None = None) -> None:
        """It is over, and with `end` the request; text held back for a stop string or a character comes out first."""
        if self._over:
            return
        if self.outcome is None:
            piece = self._stream.flush()
            self._text += piece.text
            reason = "abort" if self.aborted else "stop" if piece.stop else reason
            self.outcome = Outcome(reason, self._count, piece.stop, stop_token_id)
        self.outcome.end = end
        self._over = True
        self._changed.set()

    @property
    def unread(self) -> int:
        """Tokens that the client has yet to read."""
        return len(self._tokens)

    @property
    def ends_request(self) -> bool:
        """True for the continuation that the whole request ended with: its last message comes last."""
        return self.outcome is not None and self.outcome.end is not None

    def take(self) -> Batch | None:
        """What is new; None if nothing is. The last batch comes once."""
        over = self._over and not self.read
        if not (over or self._tokens or self._text or self._prompt_logprobs):
            return None
        self.read = self.read or over
        batch = Batch(self._text, tuple(self._tokens), over, tuple(self._logprobs), self._prompt_logprobs)
        self._text, self._tokens, self._logprobs, self._prompt_logprobs = "", [], [], ()
        return batch


class Replies:
    """All continuations of a request."""

    def __init__(self, streams: Iterable[TextStream]) -> None:
        self._changed = asyncio.Event()
        self.all = [Reply(stream, self._changed) for stream in streams]

    def __getitem__(self, branch: int) -> Reply:
        return self.all[branch]

    def end(self, end: End) -> None:
        """The request is over, and with it every continuation that was not yet."""
        for branch, reply in enumerate(self.all):
            if branch != end.branch:
                reply.end(end.reason, None, end)
        self.all[end.branch].end(end.reason, end.stop_token_id, end)

    async def next(self) -> list[tuple[int, Batch]]:
        """What is new of any, as soon as there is something; empty when all of it was read."""
        while not (news := [(i, batch) for i, reply in enumerate(self.all) if (batch := reply.take()) is not None]):
            if all(reply.read for reply in self.all):
                return []
            self._changed.clear()
            await self._changed.wait()
        return sorted(news, key=lambda item: item[1].last and self.all[item[0]].ends_request)
