"""What a deployment looked like while it ran: queues, ledgers and commands, in memory that does not grow.

A sample looks and changes nothing, so a run that is watched comes to the same outcomes. When there are as many samples
as allowed, every other one is dropped and the interval doubles; commands count from one kept sample to the next.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sim.loop import Kind, Process, Seat
from sim.workload import bad

if TYPE_CHECKING:
    from sim.run import Simulation
    from sim.worker import Worker

LAST = 2**31
"""The rank at equal times: a sample sees what has happened by then."""


@dataclass(frozen=True, slots=True)
class Gauge:
    """A worker at one time."""

    queue: dict[str, int]
    """Requests by what its policies call their state; prefixed by the policy where a worker has several."""
    pages: dict[str, int]
    """Pages by what the ledger says they are used for, without those that are 0."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A deployment at one time."""

    at_s: float
    under_way: int
    """Requests that have arrived and are not over."""
    phases: dict[str, int]
    """Placements by phase, over all gateways."""
    workers: dict[str, Gauge | None]
    """None: lost."""
    commands: dict[str, int]
    """Machine and command -> how often since the sample before."""


class Timeline:
    """Pass it as `watch` to `simulate`, then `end()` it; it is for one run."""

    def __init__(self, interval_s: float = 1.0, most: int = 400) -> None:
        if not 0 < interval_s < float("inf"):
            raise bad("interval_s", interval_s, "a finite time above 0 s")
        if most < 2 or most % 2:
            raise bad("most", most, "an even number of at least 2")
        self.interval_s = interval_s
        self.samples: list[Sample] = []
        """At multiples of the interval; the last one, perhaps, where the run ended."""
        self.total_pages: dict[str, int] = {}
        """By worker."""
        self._most = most
        self._simulation: Simulation | None = None
        self._counters: dict[int, tuple[str, Seat, Counter[str]]] = {}
        """By the address of the seat, which is held; nothing is ordered by it."""
        self._since: Counter[str] = Counter()

    def __call__(self, simulation: Simulation) -> None:
        """Begin to watch."""
        self._simulation = simulation
        self.total_pages = {build.name: build.pages for build in simulation.builds.values()}
        self._enter(simulation)
        self._next()

    def end(self) -> None:
        """Take the last sample, at the time the run ended."""
        simulation = self._simulation
        if simulation is not None and (not self.samples or self.samples[-1].at_s < simulation.loop.now):
            self._take(simulation)

    def _next(self) -> None:
        assert self._simulation is not None
        self._simulation.loop.at(len(self.samples) * self.interval_s, Kind.FAULT, LAST, self._due, self._simulation)

    def _due(self, simulation: Simulation) -> None:
        self._take(simulation)
        # With nothing else on the agenda no more can happen, and samples alone would keep the run going for ever.
        if simulation.loop.pending:
            self._next()

    def _take(self, simulation: Simulation) -> None:
        self._enter(simulation)
        for name, _, counter in self._counters.values():
            for command, count in counter.items():
                self._since[f"{name}.{command}"] += count
            counter.clear()
        phases: Counter[str] = Counter()
        for gateway in simulation.gateways:
            for seat in gateway.seats:
                phases.update({str(phase): count for phase, count in _asked(seat.machine, "phases").items()})
        self.samples.append(
            Sample(
                at_s=simulation.loop.now,
                under_way=len(simulation.world.records),
                phases=dict(sorted(phases.items())),
                workers={name: self._gauge(simulation.workers.get(name)) for name in simulation.builds},
                commands=dict(sorted(self._since.items())),
            )
        )
        self._since.clear()
        if len(self.samples) >= self._most:
            self._thin()

    def _thin(self) -> None:
        kept: list[Sample] = []
        since: Counter[str] = Counter()
        for index, sample in enumerate(self.samples):
            since.update(sample.commands)
            if index % 2 == 0:
                kept.append(
                    Sample(sample.at_s, sample.under_way, sample.phases, sample.workers, dict(sorted(since.items())))
                )
                since.clear()
        self._since.update(since)
        self.samples = kept
        self.interval_s *= 2

    def _enter(self, simulation: Simulation) -> None:
        """Count commands of machines that are new; those of the dead are kept until they have been read."""
        coordinator = simulation.coordinator
        controls: list[Process] = [coordinator] if isinstance(coordinator, Process) else []
        processes: list[Process] = [*simulation.gateways, *simulation.workers.values(), *controls]
        for process in processes:
            for seat in process.seats:
                if id(seat) not in self._counters:
                    self._counters[id(seat)] = type(seat.machine).__name__, seat, seat.count()

    @staticmethod
    def _gauge(worker: Worker | None) -> Gauge | None:
        if worker is None:
            return None
        asked = [(type(seat.machine).__name__, _asked(seat.machine, "queue")) for seat in worker.seats]
        having = [(name, states) for name, states in asked if states]
        queue = {
            f"{name}.{state}" if len(having) > 1 else str(state): count
            for name, states in having
            for state, count in states.items()
        }
        pages = {str(owner): count for owner, count in worker.ledger.counts().items() if count}
        return Gauge(queue, pages)


def _asked(machine: Any, name: str) -> dict[Any, int]:
    """What a machine says of itself under this name; nothing if it does not."""
    method: Callable[[], dict[Any, int]] | None = getattr(machine, name, None)
    return method() if callable(method) else {}
