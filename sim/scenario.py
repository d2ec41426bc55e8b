"""What goes wrong and what changes during a run: a TOML file of timed events, read strictly.

```
name = "worker-loss"
about = "one sentence"

[[event]]
kind = "lose"
at_s = 60
worker = "decode-0"
```

Faults (`lose`, `return`, `drain`, `slow`, `link`) are for whoever runs the workers; `applied` makes the others part of
a workload. docs/workloads.md lists every kind with its fields.
"""

from __future__ import annotations

import bisect
import itertools
import math
import random
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

from core.errors import LocalError, SetupError
from sim.generators import SHAPES, generate
from sim.workload import Workload, bad, merge, resized, stamps, timed, unused

SHIPPED = Path(__file__).parent / "scenarios"


@dataclass(frozen=True, slots=True)
class Lose:
    """A worker dies at once, with all that it holds."""

    at_s: float
    worker: str

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True, slots=True)
class Return:
    """A lost worker is back, empty, as a new incarnation."""

    at_s: float
    worker: str

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True, slots=True)
class Drain:
    """A decode worker takes nothing more; what it has ends there, or moves to others where the policy says so."""

    at_s: float
    worker: str

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True, slots=True)
class Slow:
    """A worker's steps take `factor` times as long, until `until_s`."""

    at_s: float
    worker: str
    factor: float
    until_s: float = math.inf

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True, slots=True)
class Link:
    """Reads of `source`'s memory by `sink` run at `factor` of their speed and begin `delay_s` later, until `until_s`.

    `*` stands for every worker.
    """

    at_s: float
    factor: float = 1.0
    delay_s: float = 0.0
    source: str = "*"
    sink: str = "*"
    until_s: float = math.inf

    def __post_init__(self) -> None:
        _check(self)
        if self.factor > 1:
            raise bad("factor", self.factor, "above 0, at most 1")


@dataclass(frozen=True, slots=True)
class Rate:
    """Requests come `factor` times as densely, until `until_s`; all come, so the end comes earlier or later."""

    at_s: float
    factor: float
    until_s: float = math.inf

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True, slots=True)
class Lengths:
    """Lengths move from what they are at `at_s` to `prompt` and `output` times that at `until_s`, and stay there."""

    at_s: float
    until_s: float
    prompt: float = 1.0
    output: float = 1.0

    def __post_init__(self) -> None:
        _check(self)
        if self.until_s == math.inf:
            raise bad("until_s", self.until_s, "a finite time, when the drift is over")


@dataclass(frozen=True, slots=True)
class Tenant:
    """Another tenant sends `rate` requests a second of a shipped shape (Poisson), until `until_s`."""

    at_s: float
    until_s: float
    tenant: str
    shape: str
    rate: float

    def __post_init__(self) -> None:
        _check(self)
        if self.until_s == math.inf:
            raise bad("until_s", self.until_s, "a finite time, when the burst is over")
        if self.shape not in SHAPES:
            raise bad("shape", self.shape, f"one of {', '.join(SHAPES)}")


Fault = Lose | Return | Drain | Slow | Link
Event = Fault | Rate | Lengths | Tenant
KINDS: dict[str, type[Event]] = {
    "lose": Lose,
    "return": Return,
    "drain": Drain,
    "slow": Slow,
    "link": Link,
    "rate": Rate,
    "lengths": Lengths,
    "tenant": Tenant,
}


@dataclass(frozen=True, slots=True)
class Scenario:
    """Events in order of time, those of equal time as written; a worker returns only after it was lost."""

    name: str
    events: tuple[Event, ...] = ()
    about: str = ""

    def __post_init__(self) -> None:
        lost: set[str] = set()
        for before, event in zip((None, *self.events), self.events, strict=False):
            if before is not None and event.at_s < before.at_s:
                raise bad("at_s", event.at_s, f"at least {before.at_s}, the event before's")
            match event:
                case Lose(at_s=at_s, worker=worker):
                    if worker in lost:
                        raise bad("worker", worker, f"one that is not lost already at {at_s:g} s")
                    lost.add(worker)
                case Return(at_s=at_s, worker=worker):
                    if worker not in lost:
                        raise bad("worker", worker, f"one that was lost before {at_s:g} s")
                    lost.remove(worker)

    @property
    def faults(self) -> tuple[Fault, ...]:
        """The events that happen to workers and links."""
        return tuple(event for event in self.events if isinstance(event, Fault))


CALM = Scenario("none")
"""Nothing happens."""


def read(path: Path) -> Scenario:
    """The scenario in a TOML file; SetupError with file, event, field, got and want where it is wrong."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not TOML, not UTF-8, too many digits
        raise SetupError(f"{path}: got {error}, want a TOML file") from None
    try:
        return parse(data)
    except LocalError as error:
        raise SetupError(f"{path}: {error}") from None


def shipped(name: str) -> Scenario:
    """A scenario that comes with Baton."""
    names = sorted(path.stem for path in SHIPPED.glob("*.toml"))
    if name not in names:
        raise SetupError(f"scenario: got {name!r}, want one of {', '.join(names)}")
    return read(SHIPPED / f"{name}.toml")


def parse(data: dict[str, Any]) -> Scenario:
    """A scenario from what a TOML file says; events may stand in any order."""
    if unknown := sorted(set(data) - {"name", "about", "event"}):
        raise bad(unknown[0], data[unknown[0]], "only name, about and event")
    name, about, tables = data.get("name"), data.get("about", ""), data.get("event", [])
    if not isinstance(name, str) or not name:
        raise bad("name", name, "a text that is not empty")
    if not isinstance(about, str):
        raise bad("about", about, "a text")
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise bad("event", tables, "tables, each below [[event]]")
    events = [_event(number, table) for number, table in enumerate(tables, 1)]
    return Scenario(name, tuple(sorted(events, key=lambda event: event.at_s)), about)


def applied(scenario: Scenario, workload: Workload, seed: int) -> Workload:
    """The workload with the scenario's rates, lengths and tenants in it; faults change nothing here.

    Rates first, for which the events' times are those of the new workload; then lengths; then the tenants' own
    requests are added, untouched by either.
    """
    if rates := [event for event in scenario.events if isinstance(event, Rate)]:
        workload = timed(workload, _clock(rates), f"rates of {scenario.name}")
    fresh = unused(workload)
    for event in scenario.events:
        if isinstance(event, Lengths):
            moved = []
            for arrival in workload.arrivals:
                along = _along(event, arrival.at_s)
                prompt = max(1, round(arrival.prompt * event.prompt**along))
                output = max(1, round(arrival.output * event.output**along))
                moved.append(resized(arrival, prompt, output, fresh))
            workload = replace(workload, arrivals=tuple(moved))
    tenants = [event for event in scenario.events if isinstance(event, Tenant)]
    bursts = [_burst(event, f"{seed}/tenant/{index}") for index, event in enumerate(tenants)]
    mixed = merge(workload, *bursts) if bursts else workload
    return Workload(workload.name, mixed.arrivals, f"{workload.source}, scenario {scenario.name}")


def _check(event: Event) -> None:
    """What holds for a field of this name in every kind of event."""
    for field in fields(event):
        value = getattr(event, field.name)
        if isinstance(value, str):
            if not value:
                raise bad(field.name, value, "a text that is not empty")
        elif field.name in ("at_s", "delay_s"):
            if not 0 <= value < math.inf:
                raise bad(field.name, value, "a finite time of at least 0 s")
        elif field.name == "until_s":
            if not value > event.at_s:
                raise bad(field.name, value, f"a time after at_s, {event.at_s:g}")
        elif not 0 < value < math.inf:
            raise bad(field.name, value, "a finite number above 0")


def _event(number: int, table: dict[str, Any]) -> Event:
    kind = table.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise bad(f"event {number}: kind", kind, f"one of {', '.join(KINDS)}")
    of = {field.name: field for field in fields(KINDS[kind])}
    given: dict[str, Any] = {}
    for name, value in table.items():
        if name == "kind":
            continue
        if name not in of:
            raise bad(f"event {number} ({kind}): {name}", value, f"only {', '.join(of)}")
        if of[name].type == "str":
            if not isinstance(value, str):
                raise bad(f"event {number} ({kind}): {name}", value, "a text")
            given[name] = value
        else:
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise bad(f"event {number} ({kind}): {name}", value, "a number")
            try:
                given[name] = float(value)
            except OverflowError:
                raise bad(f"event {number} ({kind}): {name}", "an integer too large", "a number") from None
    for name, field in of.items():
        if field.default is MISSING and name not in given:
            raise bad(f"event {number} ({kind}): {name}", None, "a value, because it has no default")
    try:
        return KINDS[kind](**given)
    except LocalError as error:
        raise LocalError(f"event {number} ({kind}): {error}") from None


def _clock(rates: Sequence[Rate]) -> Callable[[float], float]:
    """The new time of an old one: within each piece between the events' times, `factor` old seconds are one new."""
    edges = sorted({0.0, *(event.at_s for event in rates), *(event.until_s for event in rates)} - {math.inf})
    factors = [math.prod(event.factor for event in rates if event.at_s <= edge < event.until_s) for edge in edges]
    # Old times at the edges.
    olds = [0.0]
    for (edge, following), factor in zip(itertools.pairwise(edges), factors, strict=False):
        olds.append(olds[-1] + (following - edge) * factor)

    def new(old_s: float) -> float:
        piece = bisect.bisect_right(olds, old_s) - 1
        # Rounding must not carry a time over the next edge: order would be lost.
        return min(edges[piece] + (old_s - olds[piece]) / factors[piece], *edges[piece + 1 : piece + 2], math.inf)

    return new


def _along(event: Lengths, at_s: float) -> float:
    return min(1.0, max(0.0, (at_s - event.at_s) / (event.until_s - event.at_s)))


def _burst(event: Tenant, seed: str) -> Workload:
    rng = random.Random(seed)
    times = list(itertools.takewhile(lambda at_s: at_s < event.until_s - event.at_s, stamps(rng, event.rate)))
    if not times:
        return Workload(event.tenant, ())
    made = generate(SHAPES[event.shape], rng.getrandbits(32), len(times))
    placed = (
        replace(arrival, at_s=event.at_s + at_s, tenant=event.tenant)
        for arrival, at_s in zip(made.arrivals, times, strict=True)
    )
    return Workload(event.tenant, tuple(placed), made.source)
