"""One simulation: a workload at a deployment under a policy, deterministic to the last digit."""

from __future__ import annotations

import gc
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from operator import add
from typing import Any, Protocol

from core.errors import SetupError
from core.request import Slo
from core.worker import Identity, Role
from scheduler.policies import Policy
from sim.fleet import Build
from sim.gaps import RATIO, edges
from sim.loop import CHECK_EVERY, Kind, Loop
from sim.network import Network
from sim.outcome import Outcome, Record, Tally
from sim.scenario import Drain, Fault, Link, Lose, Return, Scenario, Slow
from sim.worker import Gateway, Worker, World
from sim.workload import Arrival, Workload, answered, groups

CALM = Scenario("none")
SALT = 0x9E3779B97F4A7C15
MASK = 2**64 - 1
YOUNG = 100_000
"""Objects that come while a simulation runs before Python looks for cycles among them."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What a simulation assumes beside workers, policy and workload.

    | field | default | unit | meaning |
    |---|---|---|---|
    | slo | none | s | goals of every request |
    | gateways | 1 | | requests go round them |
    | lane | rdma-400g | | how KV moves, by the cost model's name |
    | hop_s | 0.0002 | s | a message between two processes |
    | lost_s | 0.025 | s | until a death is noticed |
    | load_s | 10 | s | until a worker that returns takes requests |
    | timeout_s | 600 | s | what a client waits for the whole answer |
    | max_tokens | None | tokens | what a client asks for at most; None: what the answer will come to |
    | check_every | 1000 | events | how often machines look at their invariants |
    | gap_ratio | 1.1 | | of the edges of the gaps' histogram |
    """

    slo: Slo = field(default_factory=Slo)
    gateways: int = 1
    lane: str = "rdma-400g"
    hop_s: float = 0.0002
    lost_s: float = 0.025
    load_s: float = 10.0
    timeout_s: float = 600.0
    max_tokens: int | None = None
    check_every: int = CHECK_EVERY
    gap_ratio: float = RATIO


@dataclass(frozen=True, slots=True)
class Result:
    """What came of it."""

    tally: Tally
    seconds: float
    """Simulated, from the first arrival to the last end."""
    arriving_s: float
    """From the first arrival to the last."""
    events: int
    runs: int
    """Standing orders of decode workers."""
    steps: int
    """Their steps."""
    moved_nbytes: int
    devices: int

    @property
    def rate(self) -> float:
        """Requests a second that arrived."""
        return (self.tally.arrived - 1) / self.arriving_s if self.arriving_s > 0 else 0.0


class Controls(Protocol):
    """Who changes the deployment while it runs."""

    def came(self, arrival: Arrival) -> None:
        """A request came to a gateway."""
        ...

    def ended(self, arrival: Arrival, one: Outcome) -> None:
        """A request is over."""
        ...

    def up(self, worker: Worker) -> None:
        """A worker takes requests, in its role."""
        ...

    def down(self, worker: Worker) -> None:
        """A worker is lost, or takes nothing more for another reason than that it was told so from there."""
        ...


def simulate(
    workload: Workload | Iterable[Arrival],
    builds: Sequence[Build],
    policy: Policy,
    settings: Settings,
    *,
    scenario: Scenario = CALM,
    over: Callable[[Outcome], None] | None = None,
    watch: Callable[[Simulation], None] | None = None,
    control: Callable[[Simulation], Controls] | None = None,
) -> Result:
    """Run all of a workload to the end of its last request; `over` gets every outcome when it happens.

    With `control` (`sim.coordinator.Control`) the ratio of prefill to decode workers adapts; without, it stays.

    Any iterable of arrivals in order of time will do, taken as they come, so that what is kept does not grow; only a
    `Workload` may have turns that wait for the one before.
    """
    simulation = Simulation(workload, builds, policy, settings, scenario, over, control)
    if watch is not None:
        watch(simulation)
    return simulation.run()


class Simulation:
    """The processes of a deployment, the clients, and what goes wrong."""

    def __init__(
        self,
        arrivals: Workload | Iterable[Arrival],
        builds: Sequence[Build],
        policy: Policy,
        settings: Settings,
        scenario: Scenario,
        over: Callable[[Outcome], None] | None,
        control: Callable[[Simulation], Controls] | None = None,
    ) -> None:
        if not builds:
            raise SetupError("workers: got none, want at least one")
        self.loop = loop = Loop(check_every=settings.check_every)
        self.settings = settings
        self.policy = policy
        self.tally = Tally()
        self.gaps: list[int] | None = None
        """Of all answers together, by bucket, if somebody wants them."""
        if policy.colocated:
            builds = [replace(build, role=Role.MIXED) for build in builds]
        self.builds = {build.name: build for build in builds}
        network = Network(loop, builds[0].cost, settings.lane, settings.hop_s)
        upper = edges(settings.slo.gap_s, settings.gap_ratio)
        self.world = World(loop, network, upper, settings.slo)
        self._over = over
        self._ended_s = 0.0
        self._first_s = self._last_s = 0.0
        self._counter = 0
        self._prompt: tuple[int, ...] = ()
        self._page_tokens = builds[0].shape.page_tokens
        self.gateways = [
            Gateway(self.world, name, i, policy.router(Identity(name, 1), builds[0].cost, mixed_alone=True), self._done)
            for i, name in enumerate(f"gateway-{i}" for i in range(settings.gateways))
        ]
        self.workers: dict[str, Worker] = {}
        self._lives: dict[str, int] = {}
        self._past: list[tuple[int, int]] = []
        self.coordinator = None if control is None else control(self)
        for build in builds:
            self.start(build.name)
        self._waiting: dict[str, deque[Arrival]] = {}
        """Turns that come after the end of the one before, by session."""
        self._following: dict[tuple[str, int], Arrival] = {}
        """The next turn of a session, by the name and the number of the one before."""
        if isinstance(arrivals, Workload):
            for turns in groups(arrivals):
                self._following.update({(one.session, one.turn): two for one, two in itertools.pairwise(turns)})
        self._arrivals = iter(arrivals) if not isinstance(arrivals, Workload) else iter(self._set_apart(arrivals))
        self._due = 0
        """Requests under way, on the agenda, or waiting for the turn before."""
        self._exhausted = False
        for fault in scenario.faults:
            self._fault(fault)
        self._next(None)

    def run(self) -> Result:
        """Until every request is over."""
        # What a request leaves behind is in no cycles, and looking for some takes a thirtieth of the time.
        young, *older = gc.get_threshold()
        gc.set_threshold(max(young, YOUNG) if young else 0, *older)
        try:
            self.loop.run()
        finally:
            gc.set_threshold(young, *older)
        lives = [worker.orders() for worker in self.workers.values()]
        runs, steps = (sum(column) for column in zip((0, 0), *lives, *self._past, strict=True))
        return Result(
            self.tally,
            self._ended_s - self._first_s,
            self._last_s - self._first_s,
            self.loop.events,
            runs,
            steps,
            self.world.network.nbytes,
            sum(build.tp for build in self.builds.values()),
        )

    # Clients.
    def _next(self, arrival: Arrival | None) -> None:
        """An arrival's time has come; the one after it is put on the agenda."""
        if arrival is not None:
            self._arrive(arrival)
        following = next(self._arrivals, None)
        if following is None:
            self._exhausted = True
            self._rest()
            return
        self._due += 1
        self.loop.at(max(following.at_s, self.loop.now), Kind.ARRIVAL, 0, self._next, following)

    def _set_apart(self, workload: Workload) -> list[Arrival]:
        """What comes at its own time; the turns that wait for another are kept by session."""
        alone: list[Arrival] = []
        closed: set[str] = set()
        for arrival in workload.arrivals:
            if arrival.session in closed:
                self._waiting.setdefault(arrival.session, deque()).append(arrival)
            else:
                alone.append(arrival)
            if arrival.gap_s is not None:
                closed.add(arrival.session)
            else:
                closed.discard(arrival.session)
        return alone

    def _arrive(self, arrival: Arrival) -> None:
        now, settings = self.loop.now, self.settings
        self._counter += 1
        if self._counter == 1:
            self._first_s = now
        self._last_s = now
        if len(self._prompt) < arrival.prompt:
            self._prompt = (0,) * max(arrival.prompt, 2 * len(self._prompt))
        gateway = self.gateways[self._counter % len(self.gateways)]
        most = arrival.most or max(1, arrival.output if settings.max_tokens is None else settings.max_tokens)
        prefix = page_hashes(arrival, self._page_tokens)
        if self.coordinator is not None:
            self.coordinator.came(arrival)
        prompt, answered = self._prompt[: arrival.prompt], self._answered(arrival) if self._following else ()
        gateway.ask(self._counter, arrival, prompt, prefix, most, settings.timeout_s, answered)

    def _answered(self, arrival: Arrival) -> tuple[int, ...]:
        """Hashes of the pages that the next turn will ask for and that the answer fills."""
        following = self._following.get((arrival.session, arrival.turn))
        blocks = () if following is None else answered(arrival, following)
        return _hashes(blocks, arrival.block_tokens, self._page_tokens, len(blocks) * arrival.block_tokens)

    def _done(self, record: Record, outcome: Outcome) -> None:
        self._due -= 1
        self._ended_s = self.loop.now
        self.tally.add(outcome)
        if self.gaps is not None and record.gaps:
            self.gaps = list(map(add, self.gaps, record.gaps))
        if self._over is not None:
            self._over(outcome)
        arrival = record.arrival
        if self.coordinator is not None:
            self.coordinator.ended(arrival, outcome)
        if arrival.gap_s is not None:
            turn = self._waiting[arrival.session].popleft()
            self._due += 1
            self.loop.at(self.loop.now + arrival.gap_s, Kind.ARRIVAL, 0, self._arrive, turn)
        self._rest()

    def _rest(self) -> None:
        """Whatever else is on the agenda, nobody waits for it."""
        if self._exhausted and not self._due:
            self.loop.stopped = True

    # Workers and what happens to them.
    def start(self, name: str) -> None:
        """A worker of this name begins, empty."""
        build = self.builds[name]
        life = self._lives[name] = self._lives.get(name, 0) + 1
        order = len(self.gateways) + list(self.builds).index(name)
        worker = self.workers[name] = Worker(self.world, build, life, order, self.policy)
        for gateway in self.gateways:
            gateway.up(worker.member())
        for other in self.workers.values():
            if other is not worker:
                other.meet(worker)
                worker.meet(other)
        if self.coordinator is not None:
            self.coordinator.up(worker)

    def drain(self, worker: Worker) -> None:
        """It takes nothing new, and its gateways know."""
        worker.drain()
        for gateway in self.gateways:
            gateway.up(worker.member())

    def become(self, worker: Worker, role: Role) -> None:
        """A worker that has drained takes the other role, which a later life of it will have, too."""
        decoded = worker.role is Role.DECODE
        worker.become(role)
        self.builds[worker.me.name] = replace(self.builds[worker.me.name], role=role)
        for gateway in self.gateways:
            gateway.up(worker.member())
        for other in self.workers.values():
            if other is not worker and decoded:
                other.left(worker)
            elif other is not worker:
                other.meet(worker)
                worker.meet(other)
        if self.coordinator is not None:
            self.coordinator.up(worker)

    def end(self, worker: Worker) -> None:
        """A worker that has drained is given back."""
        name = worker.me.name
        worker.die()
        self._past.append(worker.orders())
        del self.workers[name]
        self._noticed(worker)

    def _fault(self, fault: Fault) -> None:
        name = fault.source if isinstance(fault, Link) else fault.worker
        names = [name, fault.sink] if isinstance(fault, Link) else [name]
        for each in names:
            if each != "*" and each not in self.builds:
                raise SetupError(f"scenario: worker: got {each!r}, want one of {', '.join(self.builds)}")
        match fault:
            case Link():
                self.world.network.trouble(fault)
            case Lose():
                self._at(fault.at_s, self._lose, name)
            case Return():
                self._at(fault.at_s + self.settings.load_s, self.start, name)
            case Drain():
                if self.builds[name].role is not Role.DECODE:
                    raise SetupError(f"scenario: drain: got {name!r}, want a decode worker")
                self._at(fault.at_s, self._drain, name)
            case Slow():
                self._at(fault.at_s, self._slow, (name, fault.factor))
                if fault.until_s != float("inf"):
                    self._at(fault.until_s, self._slow, (name, 1 / fault.factor))

    def _at(self, when: float, call: Callable[..., None], argument: Any) -> None:
        self.loop.at(when, Kind.FAULT, 0, call, argument)

    def _lose(self, name: str) -> None:
        worker = self.workers.pop(name)
        worker.die()
        self._past.append(worker.orders())
        self._at(self.loop.now + self.settings.lost_s, self._noticed, worker)

    def _drain(self, name: str) -> None:
        if name in self.workers:
            self.drain(self.workers[name])
            if self.coordinator is not None:
                self.coordinator.down(self.workers[name])

    def _noticed(self, worker: Worker) -> None:
        for gateway in self.gateways:
            gateway.down(worker.me)
        for other in self.workers.values():
            other.lost(worker.me)
        if self.coordinator is not None:
            self.coordinator.down(worker)

    def _slow(self, which: tuple[str, float]) -> None:
        name, factor = which
        if name in self.workers:
            self.workers[name].slowness *= factor


def page_hashes(arrival: Arrival, page_tokens: int) -> tuple[int, ...]:
    """One hash for each full page of the prompt whose block is known; equal where all blocks up to there are equal."""
    return _hashes(arrival.blocks, arrival.block_tokens, page_tokens, arrival.prompt)


def _hashes(blocks: tuple[int, ...], block_tokens: int, page_tokens: int, tokens: int) -> tuple[int, ...]:
    if not blocks:
        return ()
    ratio, rest = divmod(block_tokens, page_tokens)
    if rest or not ratio:
        raise SetupError(f"page tokens: got {page_tokens}, want a divisor of the trace's block of {block_tokens}")
    full = tokens // page_tokens
    if ratio == 1:
        return blocks[:full]
    pages: Iterator[int] = ((block * SALT + part * 2 + 1) & MASK for block in blocks for part in range(ratio))
    return tuple(itertools.islice(pages, full))
