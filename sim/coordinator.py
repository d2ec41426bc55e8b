"""The coordinator of a simulated deployment: both controllers as they are, and what their commands take here.

Every `report_s` it tells the controller what came and how workers do, as gateways and workers would. A question is
answered by `sim/whatif.py` `think_s` later; asking takes no time of any worker. A flip takes what it takes until the
worker has nothing left (its rows move, where the policy lets them, or end; from one that is to decode others may yet
pull what it prefilled), and then `flip_s`; nobody's request is lost by it. The worker keeps its memory, so what it
computed is still there for who asks for it in the new role. A new worker loads for `Settings.load_s`; one that is
given up ends like one that flips.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, assert_never

from core.errors import SetupError
from core.request import Phase
from core.worker import Role
from scheduler.ratio import RatioConfig, RatioController
from scheduler.ratio_events import (
    ANY,
    Act,
    Add,
    Bounds,
    Candidate,
    Changed,
    Decided,
    Decision,
    Flip,
    Gone,
    Offered,
    Pressed,
    RatioCommand,
    RatioEvent,
    Remove,
    Score,
    Seen,
    Simulate,
    Simulated,
)
from scheduler.split import Came, Divide, Division, Queued, SplitConfig, SplitController, Went
from sim.loop import Kind, Process, Seat
from sim.outcome import Outcome
from sim.recent import Recent
from sim.whatif import WhatIf, feasible, judge
from sim.workload import Arrival

if TYPE_CHECKING:
    from sim.fleet import Build
    from sim.run import Simulation
    from sim.worker import Worker

ORDER = 2**20
"""Its rank at equal times: behind gateways and workers."""


@dataclass(frozen=True, slots=True)
class Control:
    """That a deployment adapts its ratio, and what that takes.

    | field | default | unit | meaning |
    |---|---|---|---|
    | report_s | 5 | s | between two words about traffic and workers |
    | think_s | 1 | s | a question takes |
    | flip_s | 0.5 | s | an empty worker takes for its new role |
    | look_s | 0.05 | s | between two looks whether it is empty |
    | patient_s | 0.2 | s | that a hand-over waits at a decode worker before that counts as full |
    """

    ratio: RatioConfig | None = field(default_factory=RatioConfig)
    """None: the ratio stays as it is."""
    split: SplitConfig | None = None
    """None: prefill workers are not divided. Needs a placement that minds (`scheduler/split_map.py`)."""
    short_tokens: int = 512
    """New tokens up to which a prompt is short."""
    bounds: Bounds = ANY
    whatif: WhatIf = field(default_factory=WhatIf)
    report_s: float = 5.0
    think_s: float = 1.0
    flip_s: float = 0.5
    look_s: float = 0.05
    patient_s: float = 0.2

    def __call__(self, simulation: Simulation) -> Coordinator:
        """For one run."""
        return Coordinator(simulation, self)


class Coordinator(Process):
    """Decides on the ratio of one simulated deployment, and has it done."""

    def __init__(self, simulation: Simulation, control: Control) -> None:
        super().__init__(simulation.loop, ORDER)
        if any(build.role is Role.MIXED for build in simulation.builds.values()):
            raise SetupError("ratio: got mixed workers, want prefill and decode workers: only those have a ratio")
        self._simulation = simulation
        self._control = control
        self._recent = Recent((control.ratio or RatioConfig()).window_s)
        self._requests = self._tokens = self._cached = self._refused = 0
        """Since the last word."""
        self._busy: dict[str, float] = {}
        """Seconds that prefill workers had been busy for at the last word."""
        self._models = {(build.cost.name, build.pages, build.tp) for build in simulation.builds.values()}
        self.decisions: list[Decision] = []
        """About the ratio, all of them."""
        self.divisions: list[Division] = []
        """Likewise, of prefill workers into short and long."""
        self._ratio: Seat | None = None
        if control.ratio is not None:
            self._ratio = self.seat(RatioController(control.ratio, control.bounds), self._perform)
        self._split: Seat | None = None
        if control.split is not None:
            self._split = self.seat(SplitController(control.split, control.short_tokens), self._divide)
        self.loop.at(control.report_s, Kind.FAULT, ORDER, self._report)

    # What it hears.
    def came(self, arrival: Arrival) -> None:
        """A request came to a gateway."""
        self._requests += 1
        self._tokens += arrival.prompt
        self._recent.came(arrival, self.loop.now)

    def ended(self, arrival: Arrival, one: Outcome) -> None:
        """A request is over."""
        slo = self._simulation.settings.slo if arrival.slo is None else arrival.slo
        late = slo.ttft_s and one.ttft_s is not None and one.ttft_s > slo.ttft_s
        self._refused += bool(late) or one.phase is not Phase.DONE
        self._cached += one.cached
        self._recent.ended(arrival, one, self.loop.now)

    def up(self, worker: Worker) -> None:
        """A worker takes requests, in its role."""
        self._busy.pop(worker.me.name, None)
        self.tell(Seen(worker.me, worker.role, len(self._models) == 1))
        if self._split is not None and worker.role is Role.PREFILL:
            self.post(self._split, Came(worker.me))

    def down(self, worker: Worker) -> None:
        """A worker is lost, or drains for other reasons than ours."""
        self.tell(Gone(worker.me))
        self._went(worker)

    def tell(self, event: RatioEvent) -> None:
        """The ratio controller hears this: of a worker, or of the planner or an operator."""
        if self._ratio is not None:
            self.post(self._ratio, event)

    def _went(self, worker: Worker) -> None:
        if self._split is not None and worker.role is Role.PREFILL:
            self.post(self._split, Went(worker.me))

    def _report(self, _: None) -> None:
        """Tell what came and how workers do, every so often, as long as anything may happen."""
        every_s = self._control.report_s
        output = round(self._requests * self._recent.lengths(self.loop.now, self._made()).mean) if self._requests else 0
        cached = min(self._cached, self._tokens)
        offered = Offered(
            every_s, self._requests, self._tokens - cached, cached, output, min(self._refused, self._requests)
        )
        self._requests = self._tokens = self._cached = self._refused = 0
        for name, worker in self._simulation.workers.items():
            if not worker.draining:
                pressed = self._pressed(name, worker)
                self.tell(pressed)
                if self._split is not None and worker.prefill is not None:
                    policy, now = worker.prefill.policy, self.loop.now
                    waits_s = pressed.oldest_s + policy.predicted_wait_s(now, 1)
                    late_s = max(0.0, waits_s - (self._simulation.settings.slo.ttft_s or math.inf))
                    self.post(self._split, Queued(worker.me, policy.work_s(now), late_s, max(0.0, 1 - pressed.load)))
        self.tell(offered)
        if self.loop.pending:
            self.loop.at(self.loop.now + every_s, Kind.FAULT, ORDER, self._report)

    def _pressed(self, name: str, worker: Worker) -> Pressed:
        now, load, waiting = self.loop.now, 0.0, 0
        since: list[float] = []
        if worker.prefill is not None:
            busy_s = worker.prefill.busy_s
            load = min(1.0, (busy_s - self._busy.get(name, 0.0)) / self._control.report_s)
            self._busy[name] = busy_s
            waiting = sum(worker.prefill.policy.queue().values())
            since = [each.since for each in worker.prefill.policy.standing() if each.state == "queued"]
        elif worker.decode is not None:
            policy, pages = worker.decode.policy, worker.build.pages
            since = [each.since for each in policy.standing() if each.state in ("waiting", "joining")]
            rows = len(worker.decode.batch) / self._simulation.policy.decode_config.max_rows
            load = max(1 - worker.ledger.available / pages, min(1.0, rows))
            waiting = len(since)
            if since and now - min(since) > self._control.patient_s:
                load = 1.0
        return Pressed(worker.me, max(0.0, load), waiting, now - min(since) if since else 0.0)

    # What it does.
    def _perform(self, command: RatioCommand) -> None:
        match command:
            case Decided(decision):
                self.decisions.append(decision)
            case Simulate():
                simulated = self._simulated(command)
                self.loop.at(self.loop.now + self._control.think_s, Kind.FAULT, ORDER, self._ended, simulated)
            case Flip(number, who, role):
                worker = self._simulation.workers.get(who.name)
                if worker is None or worker.me != who or worker.draining or worker.role is role:
                    self._later(Changed(number, False, "is not there any more, or drains"))
                else:
                    self._drain(worker)
                    self._look((number, worker, role))
            case Add(number, role):
                self._add(number, role)
            case Remove(number, who):
                worker = self._simulation.workers.get(who.name)
                if worker is None or worker.me != who or worker.draining:
                    self._later(Changed(number, False, "is not there any more, or drains"))
                else:
                    self._drain(worker)
                    self._look((number, worker, None))
            case _:
                assert_never(command)

    def _divide(self, command: Divide) -> None:
        self.divisions.append(command.division)
        for gateway in self._simulation.gateways:
            gateway.divided(command.divided)

    def _drain(self, worker: Worker) -> None:
        self._simulation.drain(worker)
        self._went(worker)

    def _ended(self, event: Simulated | Changed) -> None:
        self.tell(event)

    def _later(self, event: Changed) -> None:
        self.loop.at(self.loop.now, Kind.FAULT, ORDER, self._ended, event)

    def _made(self) -> dict[int, int]:
        """Tokens of all outputs that run, by the address of their arrival."""
        return {
            id(record.arrival): tokens
            for worker in self._simulation.workers.values()
            if worker.decode is not None
            for record, tokens in worker.decode.batch.made(self.loop.now)
        }

    def _simulated(self, command: Simulate) -> Simulated:
        simulation, whatif = self._simulation, self._control.whatif
        arrivals, span_s = self._recent.within(self.loop.now, self._made())
        builds = [replace(worker.build, role=worker.role) for worker in simulation.workers.values()]
        if len({build.role for build in builds}) < 2:
            return Simulated(command.number, (), reason="a phase is without workers")
        if not arrivals:
            return Simulated(command.number, (Score(1.0, 0),) * len(command.candidates))
        settings, policy = simulation.settings, simulation.policy
        scores = tuple(
            judge(arrivals, span_s, fleet, policy, settings, whatif, candidate.stress)
            for candidate in command.candidates
            for fleet in [list(changed(builds, candidate))]
        )
        return Simulated(command.number, scores, feasible(arrivals, builds, settings))

    def _look(self, what: tuple[int, Worker, Role | None]) -> None:
        """Whether a worker that drains is empty; if so, it takes its role soon, or ends."""
        number, worker, role = what
        if not worker.alive:
            self._ended(Changed(number, False, "was lost"))
        elif not (worker.empty if role is None else worker.may_become(role)):
            self.loop.at(self.loop.now + self._control.look_s, Kind.FAULT, ORDER, self._look, what)
        elif role is None:
            self._simulation.end(worker)
            self._ended(Changed(number, True))
        else:
            self.loop.at(self.loop.now + self._control.flip_s, Kind.FAULT, ORDER, self._become, (number, worker, role))

    def _become(self, what: tuple[int, Worker, Role]) -> None:
        number, worker, role = what
        if not worker.alive:
            self._ended(Changed(number, False, "was lost"))
        elif not worker.may_become(role):
            self._look(what)
        else:
            self._simulation.become(worker, role)
            self._ended(Changed(number, True))

    def _add(self, number: int, role: Role) -> None:
        simulation = self._simulation
        like = next((build for build in simulation.builds.values() if build.role is role), None)
        if like is None:
            self._later(Changed(number, False, f"no {role} worker to make another like"))
            return
        count = sum(name.startswith(f"{role}-") for name in simulation.builds)
        simulation.builds[f"{role}-{count}"] = build = replace(like, name=f"{role}-{count}")
        when = self.loop.now + simulation.settings.load_s
        self.loop.at(when, Kind.FAULT, ORDER, self._added, (number, build.name))

    def _added(self, what: tuple[int, str]) -> None:
        number, name = what
        self._simulation.start(name)
        self._ended(Changed(number, True))


def changed(builds: list[Build], candidate: Candidate) -> Iterator[Build]:
    """The workers of a candidate: first whom it names, then others of that phase, in order."""
    act, left = candidate.act, candidate.steps
    prefill = act in (Act.TO_PREFILL, Act.ADD_PREFILL, Act.REMOVE_PREFILL)
    role = Role.PREFILL if prefill else Role.DECODE
    from_role = (Role.DECODE if prefill else Role.PREFILL) if act.flips else role
    name = candidate.worker.name if candidate.worker is not None else ""
    for build in sorted(builds, key=lambda build: build.name != name):
        if left and build.role is from_role and act is not Act.KEEP:
            left -= 1
            if act.flips:
                yield replace(build, role=role)
            elif act.adds:
                yield build
                yield replace(build, name=f"{build.name}+")
        else:
            yield build
