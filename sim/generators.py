"""Synthetic workloads that have the quantiles of public traces, for where the traces are not.

Between given quantiles the logarithm of a value is linear in its rank, so every given quantile is met. Quantiles at
50, 90, 99 and 100 % are those of the whole published traces; lower ends come from the parts at hand, or, where
there are none, are chosen (docs/workloads.md).
"""

from __future__ import annotations

import bisect
import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist

from core.errors import LocalError
from sim.workload import Arrival, Workload, blocks_of, gap, stamps


@dataclass(frozen=True, slots=True)
class Quantiles:
    """A distribution by its quantiles: (share below, value), from share 0 to share 1."""

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        shares = [share for share, _ in self.points]
        values = [value for _, value in self.points]
        if len(shares) < 2 or shares[0] != 0 or shares[-1] != 1 or any(a >= b for a, b in itertools.pairwise(shares)):
            raise LocalError(f"points: got shares {shares}, want rising ones from 0 to 1")
        if not values[0] > 0 or not values[-1] < math.inf or any(not a <= b for a, b in itertools.pairwise(values)):
            raise LocalError(f"points: got values {values}, want finite ones above 0 that never fall")

    def at(self, share: float) -> float:
        """The value below which this share lies."""
        if not 0 <= share <= 1:
            raise LocalError(f"share: got {share!r}, want 0 to 1")
        high = max(1, bisect.bisect_left(self.points, share, key=lambda point: point[0]))
        (below, low), (above, top) = self.points[high - 1 : high + 1]
        return low * math.pow(top / low, (share - below) / (above - below))

    @property
    def mean(self) -> float:
        """The distribution's mean."""
        total = 0.0
        for (below, low), (above, top) in itertools.pairwise(self.points):
            total += (above - below) * (low if top == low else (top - low) / math.log(top / low))
        return total


@dataclass(frozen=True, slots=True)
class Shape:
    """What a stream of single requests looks like."""

    name: str
    prompt: Quantiles
    """Tokens."""
    output: Quantiles
    """Tokens."""
    rate: float
    """Requests a second, as recorded."""
    cv: float = 1.0
    """Variation of the gaps between arrivals; 1: Poisson."""
    likeness: float = 0.0
    """Correlation, in [-1, 1], of the normal scores of prompt and output."""
    source: str = ""

    def __post_init__(self) -> None:
        if not -1 <= self.likeness <= 1:
            raise LocalError(f"likeness: got {self.likeness!r}, want -1 to 1")


@dataclass(frozen=True, slots=True)
class Talk:
    """What closed-loop sessions look like: each prompt is the history and something new."""

    name: str
    turns: Quantiles
    first: Quantiles
    """Tokens of the first prompt."""
    adds: Quantiles
    """New tokens of each later prompt."""
    output: Quantiles
    """Tokens."""
    think_s: Quantiles
    """Seconds from a turn's last token to the next turn."""
    keeps_output: bool = True
    """An output is part of the next prompt, beside what that adds."""
    tool: str = ""
    """The tool whose answers are the later turns."""
    source: str = ""


def generate(shape: Shape, seed: int, count: int, *, rate: float | None = None, cv: float | None = None) -> Workload:
    """`count` requests of this shape, at its own rate and variation unless others are given.

    The seed fixes the lengths whatever the rate, and the mean rate is met only as chance has it: `scale` after it
    makes it exact.
    """
    return drift(shape, shape, seed, count, rate=rate, cv=cv)


def drift(
    begin: Shape, end: Shape, seed: int, count: int, *, rate: float | None = None, cv: float | None = None
) -> Workload:
    """`count` requests that turn from one shape into another, a little with each request.

    Quantiles move in their logarithms; rate, variation and likeness move evenly.
    """
    if count < 1:
        raise LocalError(f"count: got {count!r}, want at least 1")
    lengths, gaps = random.Random(f"{seed}/lengths"), random.Random(f"{seed}/gaps")
    normal = NormalDist()
    at_s = 0.0
    made = []
    for index in range(count):
        along = index / max(1, count - 1)
        here = rate if rate is not None else _between(begin.rate, end.rate, along)
        if not 0 < here < math.inf:
            raise LocalError(f"rate: got {here!r}, want a finite number above 0")
        vary = cv if cv is not None else _between(begin.cv, end.cv, along)
        if not 0 <= vary < math.inf:
            raise LocalError(f"cv: got {vary!r}, want a finite number of at least 0")
        at_s += gap(gaps, here, vary)
        # The same two draws a request whatever the shape is, so that seeds compare across shapes.
        ours, other = (normal.inv_cdf(_inside(lengths)) for _ in range(2))
        like = _between(begin.likeness, end.likeness, along)
        shares = normal.cdf(ours), normal.cdf(like * ours + math.sqrt(1 - like**2) * other)
        prompt, output = (
            max(1, round(math.pow(a.at(share), 1 - along) * math.pow(b.at(share), along)))
            for a, b, share in zip((begin.prompt, begin.output), (end.prompt, end.output), shares, strict=True)
        )
        made.append(Arrival(at_s, prompt, output))
    name = begin.name if begin == end else f"{begin.name}-to-{end.name}"
    return Workload(name, tuple(made), f"generated like {name}, seed {seed}")


def talks(talk: Talk, seed: int, count: int, *, rate: float, cv: float = 1.0, block_tokens: int = 64) -> Workload:
    """`count` closed-loop sessions that begin at a mean of `rate` a second, with the ids of their prompts' blocks.

    Blocks that lie whole in a session's earlier prompt keep their ids; sessions share none. Times of later turns
    are nominal: they leave out the model's own.
    """
    if count < 1 or block_tokens < 1:
        raise LocalError(f"count, block_tokens: got {(count, block_tokens)}, want at least 1 each")
    rng = random.Random(f"{seed}/talks")
    made: list[Arrival] = []
    fresh = itertools.count()
    for index, begin in zip(range(count), stamps(random.Random(f"{seed}/arrivals"), rate, cv), strict=False):
        made += _talk(talk, rng, f"{talk.name}-{index}", begin, block_tokens, fresh)
    made.sort(key=lambda arrival: arrival.at_s)
    return Workload(talk.name, tuple(made), f"generated like {talk.name}, seed {seed}")


def _talk(
    talk: Talk, rng: random.Random, session: str, at_s: float, block_tokens: int, fresh: Iterator[int]
) -> Iterator[Arrival]:
    def draw(quantiles: Quantiles) -> int:
        return max(1, round(quantiles.at(rng.random())))

    turns = draw(talk.turns)
    prompt, history = draw(talk.first), 0
    ids: tuple[int, ...] = ()
    kept = 0
    for turn in range(turns):
        ids = (*ids[:kept], *itertools.islice(fresh, blocks_of(prompt, block_tokens) - kept))
        output = draw(talk.output)
        gap_s = talk.think_s.at(rng.random()) if turn + 1 < turns else None
        tool = talk.tool if turn else ""
        yield Arrival(
            at_s, prompt, output, ids, block_tokens, session, turn=turn, gap_s=gap_s, history=history, tool=tool
        )
        at_s += gap_s or 0.0
        kept = prompt // block_tokens
        history = prompt + (output if talk.keeps_output else 0)
        prompt = history + draw(talk.adds)


def _between(a: float, b: float, along: float) -> float:
    return a + (b - a) * along


def _inside(rng: random.Random) -> float:
    """Uniform in (0, 1): both ends have no normal score."""
    return rng.random() or 0.5


def _points(*values: float, shares: tuple[float, ...] = (0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1)) -> Quantiles:
    return Quantiles(tuple(zip(shares, values, strict=True)))


_FEW = (0, 0.5, 0.9, 0.99, 1)

MOONCAKE_CONVERSATION = Shape(
    "mooncake-conversation",
    prompt=_points(891, 970, 2508, 6909, 16255, 27367, 85400, 126195),
    output=_points(1, 24, 152, 350, 476, 597, 1119, 2000),
    rate=3.40,
    likeness=0.07,
    source="Mooncake FAST25 conversation trace",
)
MOONCAKE_SYNTHETIC = Shape(
    "mooncake-synthetic",
    prompt=_points(100, 11587, 38611, 66456, 191378, shares=_FEW),
    output=_points(12, 69, 389, 768, 893, shares=_FEW),
    rate=3.91,
    likeness=-0.37,
    source="Mooncake FAST25 synthetic trace",
)
AZURE_CONV = Shape(
    "azure-conv",
    prompt=_points(2, 207, 396, 1020, 1189, 2734, 4142, 14050),
    output=_points(7, 54, 85, 129, 395, 424, 601, 1000),
    rate=5.53,
    cv=1.09,
    likeness=0.07,
    source="Azure LLM inference trace 2023, conversation",
)
AZURE_CODE = Shape(
    "azure-code",
    prompt=_points(73, 1469, 5188, 7436, 7437, shares=_FEW),
    output=_points(1, 13, 55, 251, 1899, shares=_FEW),
    rate=2.57,
    cv=13.2,
    source="Azure LLM inference trace 2023, code",
)
SHAREGPT = Shape(
    "sharegpt",
    prompt=_points(1, 74, 580, 1730, 3735, 5696, 7434, 8141),
    output=_points(2, 84, 228, 415, 628, 834, 998, 1024),
    rate=1.0,
    likeness=0.05,
    source="ShareGPT as sarathi-serve filtered it; no arrivals are published, the rate is a unit",
)
ARXIV = Shape(
    "arxiv",
    prompt=_points(1, 1242, 1986, 2730, 3370, 3702, 3933, 4054),
    output=_points(5, 78, 115, 167, 242, 372, 3271, 4056),
    rate=1.0,
    likeness=-0.11,
    source="arXiv summarisation as vidur filtered it; no arrivals are published, the rate is a unit",
)
LMSYS = Shape(
    "lmsys",
    prompt=_points(2, 5, 9, 17, 45, 177, 586, 1037),
    output=_points(1, 12, 36, 117, 262, 389, 533, 761),
    rate=0.506,
    likeness=0.14,
    source="apex_plus, lmsys at 0.5/s",
)
CREATION = Shape(
    "creation",
    prompt=_points(100, 199, 244, 309, 362, 400, 566, 1232),
    output=_points(236, 627, 825, 1106, 1451, 1708, 2341, 3501),
    rate=0.466,
    likeness=0.71,
    source="apex_plus, creation at 0.5/s",
)
SHAPES = {
    shape.name: shape
    for shape in (
        MOONCAKE_CONVERSATION,
        MOONCAKE_SYNTHETIC,
        AZURE_CONV,
        AZURE_CODE,
        SHAREGPT,
        ARXIV,
        LMSYS,
        CREATION,
    )
}
"""The shapes that ship, by name."""

CHAT = Talk(
    "chat",
    turns=_points(1, 1, 2, 4, 8, 12, 23, 56),
    first=_points(1, 16, 27, 64, 194, 600, 2383, 7398),
    adds=_points(1, 6, 13, 26, 65, 230, 2131, 6999),
    output=SHAREGPT.output,
    # What Mooncake's continuations wait; both ends are chosen.
    think_s=_points(5, 123, 474, 1500, shares=(0, 0.5, 0.9, 1)),
    source="ShareGPT's turns; pauses as between Mooncake's continuations",
)
AGENT = Talk(
    "agent",
    turns=_points(6, 8, 11, 22, 30, 30, 30, 30),
    first=_points(1270, 1324, 1355, 1478, 1993, 2453, 3090, 3148),
    adds=_points(11, 12, 12, 27, 185, 695, 2654, 2655),
    output=_points(34, 62, 82, 98, 123, 191, 294, 390),
    # As recorded from call to call: the model's own time is in it.
    think_s=_points(0.5, 0.71, 0.87, 1.08, 1.32, 2.03, 2.73, 4.21),
    keeps_output=False,
    tool="shell",
    source="mini-swe-agent in lmcache-agent-trace, 4 characters a token",
)
TALKS = {talk.name: talk for talk in (CHAT, AGENT)}
"""The sessions that ship, by name."""
