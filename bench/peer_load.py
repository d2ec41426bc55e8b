"""The requests that both sides get, and what their clients see of them.

A list of requests follows from its case alone, so both sides are asked the same, in the same order and, in the open
loop, at the same times. Prompts are token ids, lengths log-uniform; all texts go on to their last token.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Protocol

PROMPT_TOKENS = (32, 1024)
OUTPUT_TOKENS = (32, 64)
TIMEOUT_S = 60.0
"""A client gives up then."""


class Lost(Exception):
    """A request that its server refused, or did not bring to its end."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request."""

    prompt: tuple[int, ...]
    max_tokens: int
    due_s: float = 0.0
    """In the open loop: when it is asked, from the beginning on."""


class Side(Protocol):
    """A deployment, asked through its own front door."""

    def stream(self, ask: Ask) -> AsyncIterator[list[int]]:
        """The tokens as they come; raises Lost. Who closes it early is a client that leaves."""
        ...


@dataclass(slots=True)
class Seen:
    """What a client saw of one request."""

    ask: Ask
    asked: float = 0.0
    """On the clock of `time.perf_counter`."""
    times: list[float] = field(default_factory=list)
    """When each token came."""
    why: str = ""
    """Why it was lost; empty: it was not."""
    left: bool = False
    """Its client left, as it was to."""

    @property
    def good(self) -> bool:
        """All of its tokens came, and no others."""
        return not self.why and len(self.times) == self.ask.max_tokens

    @property
    def ttft_s(self) -> float:
        """From asking to the first token."""
        return self.times[0] - self.asked

    @property
    def second_s(self) -> float:
        """From the first token to the second."""
        return self.times[1] - self.times[0]

    @property
    def gaps_s(self) -> list[float]:
        """Between all later tokens: the first gap is the hand-over's at one side and an ordinary one at the other."""
        return [b - a for a, b in zip(self.times[1:], self.times[2:], strict=False)]


@dataclass(slots=True)
class Sample:
    """All requests of one run, or of several, and how long that took."""

    seen: list[Seen] = field(default_factory=list)
    wall_s: float = 0.0

    @property
    def good(self) -> list[Seen]:
        """Those that were served."""
        return [each for each in self.seen if each.good]

    @property
    def tokens_per_s(self) -> float:
        """That clients received."""
        return sum(len(each.times) for each in self.seen) / self.wall_s

    @property
    def requests_per_s(self) -> float:
        """That were served."""
        return len(self.good) / self.wall_s


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile by the nearest rank; NaN of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else math.nan


def asks(case: str, count: int, vocabulary: int, rate: float = 0.0) -> list[Ask]:
    """The requests of a case; with a `rate` in requests a second they arrive at random times (Poisson)."""
    draw = random.Random(case)
    low, high = (math.log(tokens) for tokens in PROMPT_TOKENS)
    found, due_s = [], 0.0
    for _ in range(count):
        length = round(math.exp(draw.uniform(low, high)))
        prompt = tuple(draw.randrange(10, vocabulary) for _ in range(length))
        if rate:
            due_s += draw.expovariate(rate)
        found.append(Ask(prompt, draw.randint(*OUTPUT_TOKENS), due_s))
    return found


async def follow(
    side: Side, seen: Seen, leave_after: int = 0, heard: Callable[[], None] = lambda: None, timeout_s: float = TIMEOUT_S
) -> Seen:
    """Ask and read to the end, noting when each token came; never raises for what the server does.

    `leave_after` tokens its client leaves, 0: it stays. `heard` is called whenever something came.
    """
    seen.asked = time.perf_counter()
    try:
        async with asyncio.timeout(timeout_s), aclosing(side.stream(seen.ask)) as stream:  # type: ignore[type-var]
            async for tokens in stream:
                seen.times += [time.perf_counter()] * len(tokens)
                heard()
                if leave_after and len(seen.times) >= leave_after:
                    seen.left = True
                    return seen
        if len(seen.times) != seen.ask.max_tokens:
            seen.why = f"got {len(seen.times)} tokens, want {seen.ask.max_tokens}"
    except Lost as error:
        seen.why = str(error) or "lost"
    except TimeoutError:
        seen.why = f"not done within {timeout_s:g} s"
    return seen


async def closed(side: Side, requests: Sequence[Ask], clients: int) -> Sample:
    """So many clients, each with a request at a time, until all are done."""
    todo = iter(requests)
    sample = Sample()
    began = time.perf_counter()

    async def client() -> None:
        for ask in todo:
            sample.seen.append(await follow(side, Seen(ask)))

    await asyncio.gather(*(client() for _ in range(clients)))
    sample.wall_s = time.perf_counter() - began
    return sample


async def opened(side: Side, requests: Sequence[Ask]) -> Sample:
    """Each request at its own time, however many there are then."""
    sample = Sample([Seen(ask) for ask in requests])
    began = time.perf_counter()

    async def one(seen: Seen) -> None:
        await asyncio.sleep(max(0.0, began + seen.ask.due_s - time.perf_counter()))
        await follow(side, seen)

    await asyncio.gather(*(one(seen) for seen in sample.seen))
    sample.wall_s = time.perf_counter() - began
    return sample


def joined(samples: Sequence[Sample]) -> Sample:
    """Repeats of one run as one sample: the times of all requests, and the wall times added up."""
    return Sample([seen for each in samples for seen in each.seen], sum(each.wall_s for each in samples))
