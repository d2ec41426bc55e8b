"""What arrives, and when: one frozen workload, and the pure functions that scale, cut, jitter and combine it.

Nothing here reads a clock or global randomness: the same arguments give the same workload in every process.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from core.errors import LocalError
from core.request import Slo

TICK_SLACK = 0.01
"""A stamp this share of a tick away from a multiple still counts as one: recorders round."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a workload."""

    at_s: float
    """Seconds from the workload's begin. Only nominal for a turn that follows one with a `gap_s`."""
    prompt: int
    """Prompt tokens, the session's history included; at least 1."""
    output: int
    """Tokens to generate, at least 1."""
    blocks: tuple[int, ...] = ()
    """Ids of the prompt's blocks, the last one perhaps partial; equal id: same block after the same prefix."""
    block_tokens: int = 0
    """Tokens in a block; 0: what the prompt shares with others is not known."""
    session: str = ""
    """Names the conversation or program it belongs to; empty: it stands alone."""
    turn: int = 0
    """Its place in the session."""
    gap_s: float | None = None
    """Closed loop: the session's next turn comes this long after this one's last token. None: nothing waits for it."""
    history: int = 0
    """The first this many prompt tokens repeat what the session has already sent or got."""
    tenant: str = ""
    """Who pays for it."""
    tool: str = ""
    """The tool whose answer this turn brings."""
    most: int = 0
    """Tokens that its client asks for at most; 0: what whoever runs it says."""
    slo: Slo | None = None
    """Its own goals; None: those that whoever runs it says."""

    def __post_init__(self) -> None:
        if not 0 <= self.at_s < math.inf:
            raise bad("at_s", self.at_s, "a finite time of at least 0 s")
        for field in ("prompt", "output"):
            if getattr(self, field) < 1:
                raise bad(field, getattr(self, field), "at least 1 token")
        if self.block_tokens < 0:
            raise bad("block_tokens", self.block_tokens, "at least 0")
        want = blocks_of(self.prompt, self.block_tokens)
        if len(self.blocks) != want:
            raise bad("blocks", f"{len(self.blocks)} ids", f"{want} for {self.prompt} tokens by {self.block_tokens}")
        if self.turn < 0:
            raise bad("turn", self.turn, "at least 0")
        if self.gap_s is not None and not 0 <= self.gap_s < math.inf:
            raise bad("gap_s", self.gap_s, "a finite time of at least 0 s")
        if not 0 <= self.history <= self.prompt:
            raise bad("history", self.history, f"0 to the prompt's {self.prompt} tokens")


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests in the order of `at_s`; a session's turns rise, and a turn with a `gap_s` has a next one."""

    name: str
    arrivals: tuple[Arrival, ...]
    source: str = ""
    """Where it came from: a file or a generator, and what was done to it."""

    def __post_init__(self) -> None:
        at_s = 0.0
        last: dict[str, Arrival] = {}
        for arrival in self.arrivals:
            if arrival.at_s < at_s:
                raise bad("arrivals", f"{arrival.at_s} s after {at_s} s", "times that never fall")
            at_s = arrival.at_s
            if arrival.session:
                before = last.get(arrival.session)
                if before is not None and before.turn >= arrival.turn:
                    raise bad("turn", f"{arrival.turn} after {before.turn} in {arrival.session}", "turns that rise")
                last[arrival.session] = arrival
            elif arrival.gap_s is not None:
                raise bad("session", arrival.session, "a name, because gap_s says that a next turn waits")
        for session, arrival in last.items():
            if arrival.gap_s is not None:
                raise bad("gap_s", arrival.gap_s, f"None, because turn {arrival.turn} is the last of {session}")

    def __len__(self) -> int:
        return len(self.arrivals)

    @property
    def span_s(self) -> float:
        """Seconds from the first arrival to the last."""
        return self.arrivals[-1].at_s - self.arrivals[0].at_s if self.arrivals else 0.0

    @property
    def rate(self) -> float:
        """Requests a second between the first and the last arrival; 0 where all come at once."""
        return (len(self) - 1) / self.span_s if self.span_s > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Spread:
    """How a quantity is spread; quantiles interpolate linearly between ranks."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True)
class Summary:
    """A workload in numbers."""

    rows: int
    span_s: float
    rate: float
    """Requests a second."""
    gap_cv: float
    """Standard deviation of the gaps between arrivals over their mean: 1 for Poisson arrivals."""
    prompt: Spread
    """Tokens."""
    output: Spread
    """Tokens."""


def bad(field: str, got: object, want: str) -> LocalError:
    """The error of an argument that breaks its contract."""
    return LocalError(f"{field}: got {got!r}, want {want}")


def blocks_of(tokens: int, block_tokens: int) -> int:
    """How many blocks hold this many tokens; 0 where there are no blocks."""
    return -(-tokens // block_tokens) if block_tokens > 0 else 0


def quantile(ordered: Sequence[float], share: float) -> float:
    """The value below which this share of a sorted sequence lies, linearly between ranks."""
    if not ordered:
        raise bad("ordered", ordered, "at least one value")
    at = share * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def answered(arrival: Arrival, following: Arrival) -> tuple[int, ...]:
    """Ids of the whole blocks of a prompt and its answer, as the session's next turn repeats them; () if it does not.

    A block that the answer completes or fills has its id from the next turn's prompt: that is where it comes again.
    """
    size = arrival.block_tokens
    if not size or following.block_tokens != size or following.history <= arrival.prompt:
        return ()
    whole = arrival.prompt // size
    if following.blocks[:whole] != arrival.blocks[:whole]:
        return ()
    return following.blocks[: min(following.history, arrival.prompt + arrival.output) // size]


def spread(values: Iterable[float]) -> Spread:
    """Mean, quantiles and maximum of at least one value."""
    ordered = sorted(values)
    p50, p90, p99 = (quantile(ordered, share) for share in (0.5, 0.9, 0.99))
    return Spread(math.fsum(ordered) / len(ordered), p50, p90, p99, ordered[-1])


def summary(workload: Workload) -> Summary:
    """A workload of at least one request in numbers, by its nominal times."""
    times = [arrival.at_s for arrival in workload.arrivals]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    mean = math.fsum(gaps) / len(gaps) if gaps else 0.0
    deviation = math.sqrt(math.fsum((gap - mean) ** 2 for gap in gaps) / len(gaps)) if gaps else 0.0
    return Summary(
        rows=len(workload),
        span_s=workload.span_s,
        rate=workload.rate,
        gap_cv=deviation / mean if mean else 0.0,
        prompt=spread(arrival.prompt for arrival in workload.arrivals),
        output=spread(arrival.output for arrival in workload.arrivals),
    )


def reusable(workload: Workload) -> float:
    """The share of prompt tokens whose blocks were in an earlier prompt: the hits of a cache without bounds."""
    seen: set[int] = set()
    hit = total = 0
    for arrival in workload.arrivals:
        known = sum(1 for _ in itertools.takewhile(seen.__contains__, arrival.blocks))
        hit += min(known * arrival.block_tokens, arrival.prompt)
        total += arrival.prompt
        seen.update(arrival.blocks)
    return hit / total if total else 0.0


def groups(workload: Workload) -> list[tuple[Arrival, ...]]:
    """The sessions, each with its turns in order, by their first arrival; a request without one is its own."""
    found: dict[str, list[Arrival]] = {}
    for index, arrival in enumerate(workload.arrivals):
        found.setdefault(arrival.session or f"\0{index}", []).append(arrival)
    return [tuple(turns) for turns in found.values()]


def timed(workload: Workload, when: Callable[[float], float], note: str) -> Workload:
    """The same requests, each at `when(at_s)` seconds, which must never fall as `at_s` rises."""
    moved = tuple(replace(arrival, at_s=when(arrival.at_s)) for arrival in workload.arrivals)
    return Workload(workload.name, moved, _noted(workload, note))


def scale(workload: Workload, rate: float) -> Workload:
    """The same requests in the same order at a mean of `rate` requests a second; what waits for a turn stays as is."""
    if not 0 < rate < math.inf:
        raise bad("rate", rate, "a finite number above 0")
    if workload.rate == 0:
        raise bad("workload", workload.name, "arrivals at more than one time, so that there is a rate to scale")
    factor = workload.rate / rate
    return timed(workload, lambda at_s: at_s * factor, f"scaled to {rate:g}/s")


def window(workload: Workload, start_s: float, stop_s: float) -> Workload:
    """What arrives from `start_s` on and before `stop_s`, counted from `start_s`.

    A session with a closed loop belongs to the window in which it begins, with all its turns or none.
    """
    if not 0 <= start_s < stop_s:
        raise bad("start_s, stop_s", (start_s, stop_s), "0 <= start_s < stop_s")
    closed = {arrival.session for arrival in workload.arrivals if arrival.gap_s is not None}
    begin: dict[str, float] = {}
    kept = []
    for arrival in workload.arrivals:
        at_s = arrival.at_s
        if arrival.session in closed:
            at_s = begin.setdefault(arrival.session, at_s)
        if start_s <= at_s < stop_s:
            kept.append(replace(arrival, at_s=arrival.at_s - start_s))
    return Workload(workload.name, tuple(kept), _noted(workload, f"from {start_s:g} to {stop_s:g} s"))


def jitter(workload: Workload, seed: int, tick_s: float) -> Workload:
    """Spreads stamps that were rounded to `tick_s` evenly over the tick that they begin, in their old order.

    A stamp that is no multiple of the tick is refused, so this comes before any scaling.
    """
    if not 0 < tick_s < math.inf:
        raise bad("tick_s", tick_s, "a finite time above 0 s")
    rng = random.Random(f"{seed}/jitter")
    moved: list[Arrival] = []
    for tick, together in itertools.groupby(workload.arrivals, key=lambda arrival: round(arrival.at_s / tick_s)):
        arrivals = list(together)
        for arrival in arrivals:
            if abs(arrival.at_s - tick * tick_s) > TICK_SLACK * tick_s:
                raise bad("at_s", arrival.at_s, f"a multiple of the tick, {tick_s:g} s")
        shares = sorted(rng.random() for _ in arrivals)
        moved += [
            replace(arrival, at_s=(tick + share) * tick_s) for arrival, share in zip(arrivals, shares, strict=True)
        ]
    return Workload(workload.name, tuple(moved), _noted(workload, f"jittered over {tick_s:g} s by seed {seed}"))


def stamps(rng: random.Random, rate: float, cv: float = 1.0) -> Iterator[float]:
    """Times without end, in seconds, with gamma gaps of mean 1 / `rate`; `cv` 1: Poisson, 0: even."""
    if not 0 < rate < math.inf:
        raise bad("rate", rate, "a finite number above 0")
    if not 0 <= cv < math.inf:
        raise bad("cv", cv, "a finite number of at least 0")
    at_s = 0.0
    while True:
        at_s += gap(rng, rate, cv)
        yield at_s


def gap(rng: random.Random, rate: float, cv: float) -> float:
    """One gamma gap in seconds, of mean 1 / `rate` and of standard deviation `cv` / `rate`."""
    return rng.gammavariate(1 / cv**2, cv**2 / rate) if cv else 1 / rate


def with_arrivals(lengths: Workload, rate: float, *, seed: int, cv: float = 1.0, count: int | None = None) -> Workload:
    """`count` sessions of `lengths`, in shuffled order, that begin at a mean of `rate` a second.

    A request without a session counts as one. All are taken once before one is taken again, then under a new
    name and with new blocks; by default each once. Gaps between begins are gamma with variation `cv` (1: Poisson).
    Later turns keep their distance from the first.
    """
    found = groups(lengths)
    if not found:
        raise bad("lengths", lengths.name, "at least one request")
    if count is not None and count < 1:
        raise bad("count", count, "at least 1")
    order = random.Random(f"{seed}/order")
    times = stamps(random.Random(f"{seed}/arrivals"), rate, cv)
    begun: list[Arrival] = []
    ids = next(unused(lengths))
    left = len(found) if count is None else count
    for lap in itertools.count():
        taken = order.sample(found, min(left, len(found)))
        for turns, begin in zip(taken, times, strict=False):
            first = turns[0].at_s
            named = f"{turns[0].session}+{lap}" if lap and turns[0].session else turns[0].session
            for turn in turns:
                blocks = tuple([id_ + lap * ids for id_ in turn.blocks]) if lap else turn.blocks
                begun.append(replace(turn, at_s=turn.at_s - first + begin, session=named, blocks=blocks))
        left -= len(taken)
        if not left:
            break
    begun.sort(key=lambda arrival: arrival.at_s)
    note = f"{rate:g} arrivals/s, cv {cv:g}, seed {seed}"
    return Workload(lengths.name, tuple(begun), _noted(lengths, note))


def tagged(workload: Workload, tenant: str) -> Workload:
    """The same requests, all of one tenant."""
    marked = tuple(replace(arrival, tenant=tenant) for arrival in workload.arrivals)
    return Workload(workload.name, marked, _noted(workload, f"of {tenant}"))


def concat(*parts: Workload, pause_s: float = 0.0) -> Workload:
    """One after the other: each begins `pause_s` after the last arrival of the one before. They share no block."""
    if not 0 <= pause_s < math.inf:
        raise bad("pause_s", pause_s, "a finite time of at least 0 s")
    placed: list[Arrival] = []
    begin = 0.0
    for arrivals in _apart(parts):
        placed += [replace(arrival, at_s=arrival.at_s + begin) for arrival in arrivals]
        begin = placed[-1].at_s + pause_s if placed else 0.0
    return Workload("+".join(part.name for part in parts), tuple(placed), "; then ".join(part.source for part in parts))


def merge(*parts: Workload) -> Workload:
    """All at once, on one clock; at equal times in the order given. They share no block."""
    mixed = sorted(itertools.chain(*_apart(parts)), key=lambda arrival: arrival.at_s)
    return Workload("&".join(part.name for part in parts), tuple(mixed), "; with ".join(part.source for part in parts))


def resized(arrival: Arrival, prompt: int, output: int, fresh: Iterator[int]) -> Arrival:
    """The same request with other lengths: whole blocks that remain keep their ids, others get `fresh` ones."""
    if (prompt, output) == (arrival.prompt, arrival.output):
        return arrival
    ids = arrival.blocks
    if prompt != arrival.prompt and arrival.block_tokens:
        whole = min(prompt, arrival.prompt) // arrival.block_tokens
        ids = (*ids[:whole], *itertools.islice(fresh, blocks_of(prompt, arrival.block_tokens) - whole))
    return replace(arrival, prompt=prompt, output=output, blocks=ids, history=min(arrival.history, prompt))


def unused(workload: Workload) -> Iterator[int]:
    """Block ids that no prompt of the workload has, without end."""
    return itertools.count(1 + max((id_ for arrival in workload.arrivals for id_ in arrival.blocks), default=-1))


def _apart(parts: Sequence[Workload]) -> Iterator[list[Arrival]]:
    """The arrivals of each part, renumbered so that no two parts share a block or a session."""
    offset = 0
    for index, part in enumerate(parts):
        moved = []
        highest = -1
        for arrival in part.arrivals:
            ids = tuple([id_ + offset for id_ in arrival.blocks]) if offset else arrival.blocks
            highest = max(highest, max(ids, default=-1))
            session = f"{index}/{arrival.session}" if arrival.session else ""
            moved.append(replace(arrival, blocks=ids, session=session))
        offset = max(offset, highest + 1)
        yield moved


def _noted(workload: Workload, note: str) -> str:
    return f"{workload.source}, {note}" if workload.source else note
