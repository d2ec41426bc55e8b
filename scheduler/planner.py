"""How many devices, in which pools, with how many ranks and stages: the fewest that sustain a rate. Pure.

DistServe (OSDI'24), section 4: each phase gets its own tensor and pipeline parallelism, found by simulated goodput.

| family | what is in it | after |
|---|---|---|
| mixed | every worker does both phases; the plan may say: do not disaggregate | APEX searches both alike |
| apart | phases planned apart, KV between nodes | DistServe's algorithm 1, high node affinity |
| segments | stages of both phases share nodes: KV stays within, sets side by side | algorithm 2, low affinity |

What a layout attains is not computed here: `Evaluate` asks whoever drives this machine, which simulates. A layout
*sustains* a rate if no bound of fluid.py forbids it and the share of good requests reaches what was asked.

The search is exact under one assumption: more workers of a kind never sustain less. It goes through layouts by the
number of devices that they need *at least*, and tightens that until the first one in line is known to sustain the rate:
by bounds that cost nothing; by how many workers one phase needs, the other one having all it wants; then by both
together. Nothing is asked twice. A question about the first in line is put so that "no" puts it behind the second.
Unlike DistServe's, a pool is simulated as a pool: ten workers behind one router sustain more than ten times what one
does. Of layouts with equally many devices the simpler wins: mixed, apart, segments; then fewer stages, fewer ranks,
fewer prefill workers.

What was not needed to find the fewest is known as "at least so many". Where even all devices do not sustain the rate,
the plan is for the highest rate that was found which they do sustain, and says so.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Generic, TypeVar

from core.errors import LocalError
from scheduler.fluid import Load
from scheduler.layout import Cell, Cluster, Layout, Pool
from scheduler.plan import (
    ASKED,
    Ask,
    Case,
    Change,
    Choice,
    Cost,
    Evaluate,
    Evaluated,
    Fit,
    Option,
    Plan,
    Planned,
    Why,
    bounds,
)

T = TypeVar("T")
K = TypeVar("K")
"""Ordered: the simpler first."""
Question = tuple[Layout, float, Change, bool]
Search = Generator[list[Question], None, T]
"""Asks some questions at a time; when it is resumed, their answers are known."""

ROUNDING = 1e-9
LEAP = 1.35
"""How much more than what it needs at least a pool is given in a question, at most."""
DROP = 0.7
"""What is tried next of a rate that no layout sustains, at most."""
ABREAST = 3
"""Of those that are first in line, so many are asked about at a time: who answers may have several cores."""
LEAST = 1e-3
"""Of the rate that was asked for: below, nothing is planned any more."""


@dataclass(slots=True)
class Need:
    """How many of a kind a rate needs: more than `short`, and no more than `enough`."""

    short: int
    enough: float = math.inf
    attained: dict[int, float] = field(default_factory=dict)

    @property
    def least(self) -> int:
        return self.short + 1

    def middle(self, most: int) -> int:
        """What to ask about next, `most` being the first number that would no longer be of interest."""
        if self.enough < math.inf:
            return (self.least + int(self.enough)) // 2 if self.least < self.enough else self.least
        return max(self.least, min(most, math.ceil(self.least * LEAP)))

    def learn(self, count: int, attained: float, share: float) -> None:
        """What so many attain."""
        self.attained[count] = attained
        if attained >= share:
            self.enough = min(self.enough, count)
        else:
            self.short = max(self.short, count)
            if self.enough <= self.short:  # more did worse than fewer: noise; the larger number decides
                self.enough = math.inf


@dataclass(frozen=True, slots=True, order=True)
class Apart:
    """Cells of both phases; at least so many workers each."""

    prefill: Cell
    decode: Cell
    prefills: int = 1
    decodes: int = 1


@dataclass(frozen=True, slots=True, order=True)
class Segment:
    """Pools that share a node's devices, stage by stage."""

    stages: int
    prefill_ranks: int
    decode_ranks: int
    prefills: int
    decodes: int

    def times(self, count: int) -> Layout:
        """So many of it."""
        prefill = Pool(Cell(self.stages, self.prefill_ranks), self.prefills)
        return Layout(prefill, Pool(Cell(self.stages, self.decode_ranks), self.decodes), near=True, times=count)


@dataclass(frozen=True, slots=True)
class Found:
    """What a search came to: a layout, or the number of devices that it takes at least."""

    layout: Layout | None
    devices: int
    attained: float | None = None


class _Line(Generic[K]):
    """Kinds by the devices that they need at least, of which one only ever learns that they are more."""

    def __init__(self, least: Callable[[K], int], kinds: Iterable[K]) -> None:
        self._least = least
        self._seen = set(kinds)
        self._line = [(least(kind), kind) for kind in self._seen]
        heapq.heapify(self._line)

    def fronts(self, count: int) -> list[tuple[int, K]]:
        """The first so many, with what each needs at least."""
        line, found = self._line, list[tuple[int, K]]()
        while line and len(found) < count:
            kind = line[0][1]
            now = self._least(kind), kind
            if now == line[0]:
                found.append(heapq.heappop(line))
            else:
                heapq.heapreplace(line, now)
        for each in found:
            heapq.heappush(line, each)
        return found

    def drop(self) -> None:
        """The first one is out."""
        heapq.heappop(self._line)

    def add(self, kind: K) -> None:
        """One more, if it never was in line."""
        if kind not in self._seen:
            self._seen.add(kind)
            heapq.heappush(self._line, (self._least(kind), kind))


class Planner:
    """Asks for evaluations until it has a plan.

    | parameter | unit | default | meaning |
    |---|---|---|---|
    | ask | | | what is to be sustained |
    | cluster | | | devices and nodes |
    | load | tokens | | requests as they will come |
    | fits | units/s | | by use ("prefill", "decode", "mixed"): every cell with its bound, or why it cannot be used |

    `on(None)` begins and gives the first `Evaluate`s; each is answered by an `Evaluated`, in any order. When all that
    are out are answered come the next ones, and at last a `Planned`. Nothing depends on the order of answers.
    """

    def __init__(self, ask: Ask, cluster: Cluster, load: Load, fits: Mapping[str, Sequence[Fit]]) -> None:
        if not 0 < ask.rate < math.inf:
            raise LocalError(f"rate: got {ask.rate!r}, want a finite number above 0")
        if cluster.devices < 1:
            raise LocalError(f"devices: got {cluster.devices}, want at least 1")
        self._ask, self._cluster, self._load = ask, cluster, load
        self._fits = {use: {fit.cell: fit for fit in found} for use, found in fits.items()}
        self._needs: dict[tuple[float, Layout], Need] = {}
        self._rates: list[float] = []
        """That layouts were searched for."""
        self._known: dict[Question, float] = {}
        self._out: dict[int, Question] = {}
        self._count = 0
        self._stage = "planning"
        self._ended = False
        self._threads = self._planned()
        self._begun = False

    # The machine.

    def on(self, event: Evaluated | None, now: float) -> list[Evaluate | Planned]:
        """Begin, or take an answer; the next questions, when all answers are there."""
        if event is None:
            if self._begun:
                return []
            self._begun = True
            return self._resume()
        question = self._out.get(event.number)
        if question is None:
            raise LocalError(f"evaluated: got number {event.number}, want one of {sorted(self._out)}")
        if not 0 <= event.attained <= 1:
            raise LocalError(f"attained: got {event.attained!r}, want a share from 0 to 1")
        del self._out[event.number]
        self._known[question] = event.attained
        return [] if self._out else self._resume()

    def deadline(self) -> float | None:
        """None: it waits for answers only."""
        return None

    def check(self) -> None:
        """Raise AssertionError if what is known contradicts itself."""
        for (rate, layout), need in self._needs.items():
            assert 0 <= need.short < need.enough, f"{layout.name} at {rate:g}/s: {need}"
        assert not self._ended or not self._out

    @property
    def progress(self) -> str:
        """What is being looked for, and how many evaluations are over."""
        return f"{self._stage}: {len(self._known)} evaluations"

    def _resume(self) -> list[Evaluate | Planned]:
        try:
            questions = next(self._threads)
        except StopIteration as end:
            self._ended = True
            return [Planned(end.value)]
        commands: list[Evaluate | Planned] = []
        for question in questions:
            self._count += 1
            self._out[self._count] = question
            commands.append(Evaluate(self._count, *question))
        return commands

    def _asked(self, *questions: Question) -> Search[list[float]]:
        """Answers, in this order."""
        yield list(questions)
        return [self._known[question] for question in questions]

    def _together(self, searches: Sequence[Search[T]]) -> Search[list[T]]:
        """All searches side by side; what is known already is not asked."""
        results: dict[int, T] = {}
        open_ = dict(enumerate(searches))
        while open_:
            asked: dict[Question, None] = {}
            for at, search in list(open_.items()):
                try:
                    while not (unknown := [each for each in next(search) if each not in self._known]):
                        pass
                    asked |= dict.fromkeys(unknown)
                except StopIteration as end:
                    results[at] = end.value
                    del open_[at]
            if asked:
                yield list(asked)
        return [results[at] for at in range(len(searches))]

    # The plan.

    def _planned(self) -> Search[Plan]:
        rate, failed = self._ask.rate, math.inf
        kept: tuple[float, Found, dict[str, Found]] | None = None
        while True:
            self._rates.append(rate)
            self._stage = f"{rate:.4g}/s"
            best, families = yield from self._fewest(rate)
            if best.layout is not None:
                kept = rate, best, families
            else:
                failed = rate
            if kept is not None and (failed == math.inf or failed <= kept[0] * (1 + self._ask.precision)):
                break
            if kept is None:
                least = min((each.devices for each in families.values() if each.devices), default=0)
                if not least or rate < LEAST * self._ask.rate:
                    return self._nothing()
                # What needs at least that many for the rate needs all of ours for no more than this.
                rate *= min(DROP, self._cluster.devices / least)
            else:
                rate = yield from self._next_rate(kept[0], kept[1], failed)
        rate, best, families = kept
        layout = best.layout
        assert layout is not None
        self._stage = f"alternatives at {rate:.4g}/s, and what if"
        searches: list[Search[Found | float | Case]] = [
            self._apart(rate, self._cluster.devices, equal=True), self._highest(layout, rate),
            *self._cases(layout, rate),
        ]  # fmt: skip
        equal, top, *cases = yield from self._together(searches)
        assert isinstance(equal, Found)
        assert isinstance(top, float)
        return self._written(rate, best, families, equal, top, [each for each in cases if isinstance(each, Case)])

    def _next_rate(self, kept: float, best: Found, failed: float) -> Search[float]:
        """What to search for above a rate that is sustained and below one that is not.

        What all devices sustain in the same way takes few questions; that nothing sustains more takes a search.
        """
        assert best.layout is not None
        (top,) = yield from self._together([self._highest(self._filled(best.layout), kept)])
        assert isinstance(top, float)
        return top if kept < top < failed else kept * (1 + self._ask.precision)

    def _filled(self, layout: Layout) -> Layout:
        """With as many workers more as there are devices for, each where least is to be had."""
        limit = self._cluster.devices
        if layout.near:
            return replace(layout, times=limit * layout.times // layout.devices)
        while True:
            use, pool = min(
                self._pools(layout), key=lambda each: each[1].count * self._fits[each[0]][each[1].cell].bound
            )
            more = Pool(pool.cell, pool.count + 1)
            match use:
                case "prefill":
                    larger = replace(layout, prefill=more)
                case "decode":
                    larger = replace(layout, decode=more)
                case _:
                    larger = replace(layout, mixed=more)
            if larger.devices > limit:
                return layout
            layout = larger

    def _fewest(self, rate: float) -> Search[tuple[Found, dict[str, Found]]]:
        """The best layout for a rate, and what every family came to."""
        limit = self._cluster.devices
        mixed, apart = yield from self._together([self._mixed(rate, limit), self._apart(rate, limit, equal=False)])
        families, best = {"mixed": mixed, "apart": apart}, self._better(mixed, apart)
        if self._ask.segments:
            families["segments"] = Found(None, 0)
            if self._cluster.nodes > 1:
                most = best.devices if best.layout is not None else limit
                (families["segments"],) = yield from self._together([self._segments(rate, most)])
            best = self._better(best, families["segments"])
        return best, families

    @staticmethod
    def _better(first: Found, second: Found) -> Found:
        """The one with fewer devices, the first if they need equally many."""
        if second.layout is None:
            return first
        return first if first.layout is not None and first.devices <= second.devices else second

    def _mixed(self, rate: float, limit: int) -> Search[Found]:
        """The fewest that do both phases."""
        cells = [fit.cell for fit in self._usable("mixed")]
        need, layout = partial(self._pool, rate, "mixed"), partial(self._of, "mixed")
        return self._alike(rate, limit, cells, need, layout)

    def _segments(self, rate: float, limit: int) -> Search[Found]:
        """The fewest in segments; ended without one as soon as they would be more than `limit`."""
        return self._alike(rate, limit, self._drawn(), partial(self._sets, rate), Segment.times)

    def _alike(
        self,
        rate: float,
        limit: int,
        kinds: Iterable[K],
        need: Callable[[K], Need],
        layout: Callable[[K, int], Layout],
    ) -> Search[Found]:
        """The fewest devices where all that is counted is of one kind."""
        line = _Line(lambda kind: need(kind).least * layout(kind, 1).devices, kinds)
        while fronts := line.fronts(ABREAST + 1):
            devices, kind = fronts[0]
            first = need(kind)
            if devices > limit:
                return Found(None, devices)
            if first.least == first.enough:
                return Found(layout(kind, first.least), devices, first.attained.get(first.least))
            tries = []
            behinds = [*(devices for devices, _ in fronts[1:]), limit]
            for (devices, kind), behind in zip(fronts[:ABREAST], behinds, strict=False):
                if devices <= limit and need(kind).least < need(kind).enough:
                    count = need(kind).middle(behind // layout(kind, 1).devices)
                    tries.append((need(kind), layout(kind, count), count))
            yield from self._try(rate, tries)
        return Found(None, 0)

    def _apart(self, rate: float, limit: int, *, equal: bool) -> Search[Found]:
        """The fewest with the phases apart; `equal`: with equal cells."""
        pairs = (
            Apart(prefill.cell, decode.cell)
            for prefill in self._usable("prefill")
            for decode in self._usable("decode")
            if not equal or prefill.cell == decode.cell
        )
        line = _Line(partial(self._least, rate), pairs)
        while fronts := line.fronts(2):
            devices, pair = fronts[0]
            if devices > limit:
                return Found(None, devices)
            slack = (fronts[1][0] if fronts[1:] else limit) - devices
            tries = []
            for use, cell, least in (("prefill", pair.prefill, pair.prefills), ("decode", pair.decode, pair.decodes)):
                need = self._pool(rate, use, cell)
                least = max(least, need.least)
                if least < need.enough:
                    count = max(least, need.middle(least + slack // cell.devices))
                    tries.append((need, self._of(use, cell, count), count))
            if tries:
                yield from self._try(rate, tries)
                continue
            prefills = max(pair.prefills, self._pool(rate, "prefill", pair.prefill).least)
            decodes = max(pair.decodes, self._pool(rate, "decode", pair.decode).least)
            layout = Layout(Pool(pair.prefill, prefills), Pool(pair.decode, decodes))
            (attained,) = yield from self._asked((layout, rate, ASKED, False))
            if attained >= self._ask.share:
                return Found(layout, devices, attained)
            line.drop()
            line.add(replace(pair, prefills=prefills + 1, decodes=decodes))
            line.add(replace(pair, prefills=prefills, decodes=decodes + 1))
        return Found(None, 0)

    def _highest(self, layout: Layout, rate: float) -> Search[float | Case]:
        """The highest rate of a grid from `rate` on that it sustains."""
        steps = max(1, math.floor(math.log(max(1.0, self._bound(layout) / rate)) / math.log1p(self._ask.precision)))
        low, high, step = 0, steps + 1, 1
        while high - low > 1:
            middle = min(low + step, high - 1) if high == steps + 1 else (low + high) // 2
            step *= 2
            asked = rate * (1 + self._ask.precision) ** middle
            if asked > self._bound(layout):
                high = middle
                continue
            (attained,) = yield from self._asked((layout, asked, ASKED, False))
            if attained >= self._ask.share:
                low = middle
            else:
                high = middle
        return rate * (1 + self._ask.precision) ** low

    def _cases(self, layout: Layout, rate: float) -> Iterator[Search[float | Case]]:
        """How the plan fares when it was asked for the wrong thing."""
        x = self._ask.off
        slo = self._ask.slo
        for change in (
            Change("rate", rate=1 + x),
            Change("prompts", prompt=1 + x),
            Change("outputs", output=1 + x),
            Change("TTFT goal", ttft=1 - x),
            Change("gap goal", gap=1 - x),
        ):
            if (change.ttft == 1 or slo.ttft_s) and (change.gap == 1 or slo.gap_s):
                yield self._case(layout, rate, change)

    def _case(self, layout: Layout, rate: float, change: Change) -> Search[float | Case]:
        factor = next(
            value for value in (change.rate, change.prompt, change.output, change.ttft, change.gap) if value != 1
        )
        question = layout, rate * change.rate, replace(change, rate=1.0, name=""), True
        (attained,) = yield from self._asked(question)
        name = f"{change.name} {100 * (factor - 1):+.0f} %"
        return Case(name, rate * change.rate, attained, attained >= self._ask.share)

    # What is known.

    def _usable(self, use: str) -> list[Fit]:
        return [fit for fit in self._fits.get(use, {}).values() if fit.bound > 0]

    @staticmethod
    def _of(use: str, cell: Cell, count: int) -> Layout:
        pool = Pool(cell, count)
        match use:
            case "prefill":
                return Layout(prefill=pool)
            case "decode":
                return Layout(decode=pool)
            case _:
                return Layout(mixed=pool)

    def _pool(self, rate: float, use: str, cell: Cell) -> Need:
        """How many workers of one use."""
        key = rate, self._of(use, cell, 1)
        if key not in self._needs:
            self._needs[key] = self._begun_at(key, _below(rate, self._fits[use][cell].bound))
        return self._needs[key]

    def _begun_at(self, key: tuple[float, Layout], short: int) -> Need:
        """What is known from other rates: what is short at a lower one is short, what is enough at a higher one is."""
        rate, subject = key
        enough = math.inf
        for other in self._rates:
            need = self._needs.get((other, subject))
            if need is not None and other < rate:
                short = max(short, need.short)
            elif need is not None and other > rate:
                enough = min(enough, need.enough)
        return Need(short, enough if enough > short else math.inf)

    def _try(self, rate: float, tries: Sequence[tuple[Need, Layout, int]]) -> Search[None]:
        """Learn whether so many of each are enough."""
        answers = yield from self._asked(*((layout, rate, ASKED, False) for _, layout, _ in tries))
        for (need, _, count), attained in zip(tries, answers, strict=True):
            need.learn(count, attained, self._ask.share)

    def _least(self, rate: float, pair: Apart) -> int:
        """Devices that a pair takes at least."""
        prefills = max(pair.prefills, self._pool(rate, "prefill", pair.prefill).least)
        decodes = max(pair.decodes, self._pool(rate, "decode", pair.decode).least)
        return prefills * pair.prefill.devices + decodes * pair.decode.devices

    def _sets(self, rate: float, segment: Segment) -> Need:
        """How many segments, by what is known of them and of their phases."""
        key = rate, segment.times(1)
        prefill = self._pool(rate, "prefill", Cell(segment.stages, segment.prefill_ranks))
        decode = self._pool(rate, "decode", Cell(segment.stages, segment.decode_ranks))
        short = max((prefill.least - 1) // segment.prefills, (decode.least - 1) // segment.decodes)
        if key not in self._needs:
            self._needs[key] = self._begun_at(key, short)
        need = self._needs[key]
        if need.short < short < need.enough:
            need.short = short
        return need

    def _drawn(self) -> Iterator[Segment]:
        """All segments whose stages fit into nodes."""
        node = min(self._cluster.per_node, self._cluster.devices)
        prefills = {fit.cell for fit in self._usable("prefill")}
        decodes = {fit.cell for fit in self._usable("decode")}
        for one in sorted(prefills):
            for other in sorted(decodes):
                if one.stages != other.stages or one.stages > self._cluster.nodes:
                    continue
                for count in range(1, node // one.ranks + 1):
                    for beside in range(1, (node - count * one.ranks) // other.ranks + 1):
                        yield Segment(one.stages, one.ranks, other.ranks, count, beside)

    def _bound(self, layout: Layout) -> float:
        """Units a second that it cannot pass."""
        uses = (("prefill", layout.prefill), ("decode", layout.decode), ("mixed", layout.mixed))
        return layout.times * min(pool.count * self._fits[use][pool.cell].bound for use, pool in uses if pool)

    # The record.

    def _nothing(self) -> Plan:
        choices = tuple(self._cells(self._ask.rate, use, None) for use in ("mixed", "prefill", "decode"))
        reasons = {option.reason for choice in choices for option in choice.options}
        why = "; ".join(sorted(reasons)[:3]) or "no cell fits the cluster"
        none = Option("none", "none", 0, True, "nothing can serve these requests")
        return Plan(
            self._ask, 0.0, None, f"nothing serves these requests here, at any rate: {why}", None, None, None, "", none,
            None, choices, (), (), len(self._known), None,
        )  # fmt: skip

    def _written(
        self,
        rate: float,
        best: Found,
        families: Mapping[str, Found],
        equal: Found,
        top: float,
        cases: Sequence[Case],
    ) -> Plan:
        layout = best.layout
        assert layout is not None
        options = tuple(self._family(name, found, best) for name, found in families.items())
        short = "" if rate == self._ask.rate else (
            f"{self._cluster.devices} devices do not sustain {self._ask.rate:g}/s; the most that was found is "
            f"{rate:.4g}/s: "
        )  # fmt: skip
        split = layout.mixed is None
        answer = f"disaggregate: {layout.name}" if split else f"do not disaggregate: {layout.name}"
        verdict = f"{short}{answer}, {layout.devices} device{'s' * (layout.devices > 1)}"
        other = min((o for o in options if o.why != "chosen" and o.devices), key=lambda o: o.devices, default=None)
        reason = "nothing else can serve these requests" if other is None else _against(layout, other)
        equal_option = self._family("apart with equal cells", equal, best)
        choices = [Choice("disaggregate?", answer, reason, options)]
        for use, pool in (("mixed", layout.mixed), ("prefill", layout.prefill), ("decode", layout.decode)):
            choices.append(self._cells(rate, use, pool, layout.times))
        return Plan(
            self._ask, rate, layout, verdict, split, best.attained, top * (1 + self._ask.precision),
            self._next(layout), equal_option, equal.layout, tuple(choices), tuple(cases),
            tuple(self._costs(layout, rate, top)), len(self._known), bounds(equal.layout, self._cluster.devices),
        )  # fmt: skip

    def _family(self, name: str, found: Found, best: Found) -> Option:
        if found.layout is not None:
            if found.layout == best.layout:
                return Option(
                    found.layout.name, "chosen", found.devices, True, "needs the fewest devices", found.attained
                )
            more = found.devices - best.devices
            reason = f"needs {more} more" if more else "needs as many, and is less simple"
            return Option(found.layout.name, "dominated", found.devices, True, reason, found.attained)
        if found.devices:
            why: Why = "cluster" if found.devices > self._cluster.devices else "dominated"
            return Option(name, why, found.devices, False, f"needs at least {found.devices}")
        if name == "segments" and self._cluster.nodes == 1:
            return Option(name, "cluster", 0, True, "one node: KV never leaves it")
        return Option(name, "slo", 0, True, "no cell of a phase can be used")

    def _cells(self, rate: float, use: str, pool: Pool | None, times: int = 1) -> Choice:
        """Every cell for one use, with what became of it."""
        options = []
        for fit in self._fits.get(use, {}).values():
            if fit.bound <= 0:
                options.append(Option(fit.cell.name, fit.why, 0, True, fit.reason))
                continue
            need = self._pool(rate, use, fit.cell)
            devices, exact = need.least * fit.cell.devices, need.least == need.enough
            attained = need.attained.get(need.least)
            if pool is not None and pool.cell == fit.cell:
                said = f"{pool.count * times} of them" + (
                    "" if use == "mixed" else f", {need.least} for this phase alone"
                )
                options.append(Option(fit.cell.name, "chosen", pool.devices * times, True, said, attained))
                continue
            about = "" if exact else "at least "
            says = f"needs {about}{need.least} of them, {devices} devices"
            if use != "mixed":
                says += ", for this phase alone"
            options.append(Option(fit.cell.name, "dominated", devices, exact, says, attained))
        answer = "none" if pool is None else f"{pool.count * times} x {pool.cell.name}"
        reason = "not in the plan" if pool is None else "the fewest devices, both phases together"
        return Choice(f"{use} workers", answer, reason, tuple(options))

    def _next(self, layout: Layout) -> str:
        """What is needed next: one more of what has the least room."""
        if layout.near:
            return f"another segment, {layout.devices // layout.times} devices"
        pools = [(use, pool) for use, pool in self._pools(layout)]
        use, pool = min(pools, key=lambda each: each[1].count * self._fits[each[0]][each[1].cell].bound)
        return f"another {use} worker, {pool.cell.name}"

    @staticmethod
    def _pools(layout: Layout) -> Iterator[tuple[str, Pool]]:
        for use, pool in (("prefill", layout.prefill), ("decode", layout.decode), ("mixed", layout.mixed)):
            if pool is not None:
                yield use, pool

    def _costs(self, layout: Layout, rate: float, top: float) -> Iterator[Cost]:
        if self._ask.gpu_hour is None:
            return
        load = self._load
        for each in dict.fromkeys((rate, top)):
            second = layout.devices * self._ask.gpu_hour / 3600 / each
            both = load.prompt_tokens + load.output_tokens
            yield Cost(each, 1e6 * second / load.output_tokens, 1e6 * second / both)


def plan(planner: Planner, evaluate: Callable[[Evaluate], float]) -> Plan:
    """Drive a planner by a function that knows what a layout attains."""
    waiting = planner.on(None, 0.0)
    while waiting:
        command = waiting.pop(0)
        if isinstance(command, Planned):
            return command.plan
        waiting += planner.on(Evaluated(command.number, evaluate(command)), 0.0)
    raise LocalError("a planner ended without a plan")


def _below(rate: float, bound: float) -> int:
    """The most workers whose bound is below the rate."""
    return max(0, math.ceil(rate / bound * (1 - ROUNDING)) - 1)


def _against(layout: Layout, other: Option) -> str:
    about = "" if other.exact else "at least "
    return f"{layout.devices} device{'s' * (layout.devices > 1)} against {about}{other.devices} of {other.name}"
