"""A sink, an engine, host memory and gateways around a decode policy, all of them checking what they are told.

The engine's arena is real: every position of a sequence has a mark, and each step looks for the marks of all positions
before it in the pages of the sequence's table. So a page that is given away too early, a table that is wrong after rows
gave pages back, or KV that was neither computed again nor brought back, is seen at once.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from core.free import numbers
from core.messages import Cancel, Failed, Finished, First
from core.pages import Owner, Pages
from core.request import Hints, Request, Slo, Ticket
from core.sampling import Sampling
from core.worker import Identity
from scheduler.cost import CostModel, Lane
from scheduler.decode_events import (
    Answer,
    Asked,
    Cut,
    DropHandOff,
    Ended,
    Evict,
    Join,
    KvArrived,
    Leave,
    Ran,
    Run,
    RunFailed,
    SwapIn,
    SwapOut,
    SwappedIn,
    SwappedOut,
    Tell,
    Withdrawn,
)
from scheduler.decode_policy import TURN_STEPS, DecodeConfig, DecodePolicy
from scheduler.decode_rows import State
from scheduler.forecast import Forecast, ForecastConfig
from tests.cast import D1, GATEWAY, SHAPE, ticket

PAGE = SHAPE.page_tokens
COST = CostModel(
    "test", ((0.1, 0.01, 0.0, 0.0),), ((0.05, 0.02, 0.001),), (Lane("host", 0.01, 0.0, 0.01 / SHAPE.page_nbytes),)
)


def names(order: int, pages: int) -> tuple[int, ...]:
    """Of the first pages of a request."""
    return tuple(100 * order + page for page in range(pages))


@dataclass
class Sequence:
    """A row at the engine, or kept for it."""

    guest: Guest
    branch: int
    generated: int = 1
    table: tuple[int, ...] = ()
    place: str = ""
    """"" (never there), running, out (evicted), away (swapped), left."""
    host: list | None = None
    moving: tuple[str, tuple[int, ...]] | None = None
    finish: str = ""
    told: int = 0
    unwanted: bool = False

    @property
    def key(self) -> str:
        return self.guest.ticket.key if self.guest.request.sampling.n == 1 else f"{self.guest.ticket.key}/{self.branch}"

    @property
    def alone(self) -> bool:
        return self.guest.request.alone and self.guest.request.sampling.n == 1

    def mark(self, position: int) -> tuple:
        prompt = len(self.guest.request.prompt)
        return (self.guest.ticket.key if position < prompt else self.key, position)


@dataclass
class Guest:
    """A request."""

    ticket: Ticket
    request: Request
    stops_at: int
    """Tokens after which it says its stop token; beyond `max_tokens` never. Later branches stop later."""
    order: int
    deadline: float
    hand_off: str = "asked"
    """asked, promised, arriving, withdrawing, over."""
    unwanted: bool = False
    reports: bool = False
    elsewhere: bool = False
    """Refused or withdrawn: its end is told by the prefill worker."""
    failed: bool = False
    rows: dict[int, Sequence] = field(default_factory=dict)
    granted_at: float | None = None


class World:
    """What surrounds the policy. Times are the caller's."""

    checks = True

    def __init__(self, pages: int, config: DecodeConfig, cost: CostModel | None, least: int = 3) -> None:
        self.ledger = Pages(pages)
        self.arena: list[list] = [[None] * PAGE for _ in range(pages)]
        forecast = Forecast(ForecastConfig(window=8, quantile=0.5, least=least, least_longer=1))
        self.machine = DecodePolicy(D1, SHAPE, self.ledger, config, cost, forecast)
        self.config = config
        self.now = 0.0
        self.guests: dict[str, Guest] = {}
        self.sequences: dict[str, Sequence] = {}
        self.run: Run | None = None
        self.done = 0
        self.cut = False
        self.last_run = 0
        self.last_solo = False
        """The last order was of a row that is to be alone."""
        self.oldest: str | None = None
        """Of the last order's rows, those of the batch class last, while it goes on."""
        self.from_sink: deque = deque()
        self.doubts = 0
        self.loans = 0
        self.log: list[tuple[float, str]] = []
        self.failing = False

    # The driver.
    def give(self, event) -> None:
        for command in self.machine.on(event, self.now):
            self.perform(command)
        if self.checks:
            self.machine.check()
            self.look_up()
        self.turn_clock(self.now)

    def turn_clock(self, until: float) -> None:
        """As a driver: call whenever the deadline has come, also if it came because somebody freed memory."""
        while (due := self.machine.deadline()) is not None and due <= until:
            self.now = max(self.now, due)
            commands = self.machine.on(None, self.now)
            after = self.machine.deadline()
            assert after is None or after > self.now, "the driver would spin"
            for command in commands:
                self.perform(command)
            if self.checks:
                self.machine.check()
        self.now = max(self.now, until)

    def say(self, what: str) -> None:
        self.log.append((self.now, what))

    # The shell.
    def perform(self, command) -> None:
        match command:
            case Answer(key, granted):
                self.answered(key, granted)
            case Run():
                self.begin(command)
            case Cut(run_id):
                assert self.run is not None
                assert self.run.run_id == run_id
                assert not self.cut
                self.cut = True
            case Leave(key):
                sequence = self.sequences[key]
                assert self.run is None or key not in self.run.rows
                assert sequence.moving is None
                assert sequence.place in ("running", "out", "away"), "nobody knows it"
                sequence.place, sequence.host = "left", None
                self.say(f"leaves {key}")
                self.forget_oldest(key)
            case Evict(key):
                sequence = self.sequences[key]
                assert self.run is None
                assert sequence.place == "running"
                sequence.place = "out"
                if sequence.guest.request.slo.batch:  # its pages are its own until it ends, perhaps in this decision
                    self.forget_oldest(key)
                    self.say(f"stops {key}")
                else:
                    self.retires(key)
                    self.say(f"evicts {key}")
            case SwapOut(key, pages):
                sequence = self.sequences[key]
                assert self.run is None
                assert sequence.moving is None
                self.retires(key)
                assert pages == self.ledger.pages(key)
                if sequence.place == "running":
                    sequence.place = "out"
                sequence.moving = "out", pages
                self.say(f"swaps out {key}")
                self.swapping(sequence)
            case SwapIn(key, pages):
                sequence = self.sequences[key]
                assert sequence.moving is None
                assert sequence.place == "away"
                assert pages == self.ledger.pages(key)
                sequence.moving = "in", pages
                self.say(f"swaps in {key}")
                self.swapping(sequence)
            case DropHandOff(key, reason):
                self.say(f"drops {key}: {reason}")
                self.drop(self.guests[key])
            case Tell(message):
                self.told(message)

    def retires(self, key: str) -> None:
        """A row loses its memory after all of the batch class; the oldest that ran only if an older one has some."""
        order = self.sequences[key].guest.order
        holders = [s for s in self.sequences.values() if self.ledger.count(s.key)]
        lent = [s for s in holders if s.guest.request.slo.batch and not s.alone]
        assert not self.sequences[key].guest.request.slo.batch, "a row of the batch class was kept for later"
        here = [s for s in lent if s.guest.hand_off == "over" and not self.gone(s)]
        assert not here, "a row was retired for one of the batch class"
        older = [s for s in holders if s.guest.order < order and s not in lent]
        assert key != self.oldest or older, "the oldest row was retired"
        self.forget_oldest(key)

    def swapping(self, sequence: Sequence) -> None:
        """Called when a swap starts."""

    def swapped(self, sequence: Sequence) -> None:
        """A swap is over: until now its pages were as they were."""
        assert sequence.moving is not None
        (way, pages), sequence.moving = sequence.moving, None
        if way == "out":
            sequence.host = [list(self.arena[page]) for page in pages]
            sequence.place = "away"
            self.give(SwappedOut(sequence.key))
        else:
            assert sequence.host is not None
            for page, content in zip(pages, sequence.host, strict=True):
                self.arena[page] = content
            sequence.host = None
            sequence.place = "out" if sequence.table else ""  # the engine knows nothing of who never joined
            self.give(SwappedIn(sequence.key))

    def answered(self, key: str, granted: bool) -> None:
        guest = self.guests[key]
        if guest.hand_off != "asked":  # the sink has forgotten it by now
            self.ledger.release(key)
            return
        self.say(f"{'grants' if granted else 'refuses'} {key}")
        guest.hand_off = "promised" if granted else "over"
        guest.elsewhere = not granted
        guest.granted_at = self.now
        waiting = [
            g for g in self.guests.values() if g.hand_off == "asked" and not g.unwanted and g.deadline > self.now
        ]
        if granted:
            batch = guest.request.slo.batch
            others = [other for other in waiting if other.request.slo.batch == batch]
            assert all(other.order > guest.order for other in others), "overtaken"
            assert not batch or all(other.request.slo.batch for other in waiting), "memory that others wait for is lent"
            assert not any(
                s.place in ("out", "away") and s.moving is None and not self.gone(s) and not self.here(s)
                for s in self.sequences.values()
                if not s.guest.request.slo.batch  # it has just given its memory
            ), "promised to somebody new while a retired row waits"

    def gone(self, sequence: Sequence) -> bool:
        return sequence.unwanted or sequence.guest.unwanted or sequence.guest.failed

    def here(self, sequence: Sequence) -> bool:
        """A retired row that has its memory again."""
        return self.ledger.count(sequence.key) > 0

    def begin(self, run: Run) -> None:
        assert self.run is None
        assert run.run_id == self.last_run + 1
        assert 1 <= len(run.rows) <= self.config.max_rows
        assert 1 <= run.steps <= self.config.max_steps
        for join in run.joining:
            self.join(join)
        for grow in run.growing:
            sequence = self.sequences[grow.key]
            assert sequence.place == "running"
            assert grow.key not in {join.key for join in run.joining}
            sequence.table = sequence.table[: grow.first] + grow.pages
        for key in run.rows:
            sequence = self.sequences[key]
            assert sequence.place == "running"
            assert run.steps <= sequence.guest.request.sampling.max_tokens - sequence.generated
            last = len(sequence.guest.request.prompt) + sequence.generated + run.steps - 1
            assert last <= len(sequence.table) * PAGE, "a step without a page"
        running = {key for key, sequence in self.sequences.items() if sequence.place == "running"}
        apart = [s.key for s in self.sequences.values() if s.alone and s.guest.hand_off == "over" and not s.finish]
        apart = [key for key in apart if not self.gone(self.sequences[key])]
        others = {key for key in running if not self.sequences[key].alone}
        solo = run.rows[0] in apart
        if solo:
            assert run.rows == (apart[0],), "not alone, or not its turn"
            stalled = self.machine._batch.step == self.machine._memory.horizon
            assert not (self.last_solo and others) or stalled, "it does not take turns"
        else:
            assert others == set(run.rows)
            assert self.last_solo or not apart, "who is to be alone waits for more than one order"
            assert self.oldest is None or self.oldest in run.rows, "the oldest row does not go on"
            guests = {key: self.sequences[key].guest for key in run.rows}
            ages = {key: (guest.request.slo.batch, guest.order, key) for key, guest in guests.items()}
            self.oldest = min(run.rows, key=lambda key: ages[key])
        assert run.steps <= TURN_STEPS or not (apart and others)
        self.last_solo = solo
        self.run, self.last_run, self.done, self.cut = run, run.run_id, 0, False

    def join(self, join: Join) -> None:
        sequence = self.sequences[join.key]
        guest = sequence.guest
        prompt = len(guest.request.prompt)
        again = "again " if join.recompute else "back " if sequence.place == "out" else ""
        self.say(f"joins {again}{join.key}")
        assert guest.hand_off == "over"
        assert sequence.place in ("", "out")
        assert sequence.moving is None
        assert join.generated == sequence.generated
        assert join.first.branch == sequence.branch
        sequence.place, sequence.table = "running", join.pages
        if join.copied is not None:
            source, target = join.copied
            self.arena[target] = list(self.arena[source])
        if join.recompute is not None:
            start, stop = join.recompute
            assert stop == prompt + sequence.generated - 1
            self.look(sequence, start)
            siblings = [other for other in guest.rows.values() if other is not sequence and other.place == "running"]
            assert start == (prompt // PAGE * PAGE if siblings else 0), "shared pages are written while they are read"
            for position in range(start, stop):
                self.write(sequence, position)
        self.look(sequence, prompt + sequence.generated - 1)

    def write(self, sequence: Sequence, position: int) -> None:
        self.arena[sequence.table[position // PAGE]][position % PAGE] = sequence.mark(position)

    def look(self, sequence: Sequence, stop: int) -> None:
        for position in range(stop):
            found = self.arena[sequence.table[position // PAGE]][position % PAGE]
            assert found == sequence.mark(position), f"{sequence.key} finds {found} at {position}"

    def step(self) -> None:
        """One step; the order ends with its last one, with a sequence, or after a cut."""
        run = self.run
        assert run is not None
        self.done += 1
        ended = []
        for key in run.rows:
            sequence = self.sequences[key]
            request = sequence.guest.request
            position = len(request.prompt) + sequence.generated - 1
            self.write(sequence, position)
            self.look(sequence, position + 1)
            if sequence.generated == sequence.guest.stops_at + sequence.branch:
                sequence.finish = "stop"
                ended.append(Ended(key, "stop", sequence.generated, 2, self.names(sequence, position + 1)))
                continue
            sequence.generated += 1
            if sequence.generated == request.sampling.max_tokens:
                sequence.finish = "length"
                ended.append(Ended(key, "length", sequence.generated, None, self.names(sequence, position + 1)))
        if ended or self.cut or self.done == run.steps:
            self.run = None
            for end in ended:
                self.forget_oldest(end.key)
            self.give(Ran(run.run_id, self.done, tuple(ended)))

    def names(self, sequence: Sequence, written: int) -> tuple[int, ...]:
        """As the shell; sometimes it has none, or more than the pages that are full."""
        pages = written // PAGE + sequence.guest.order % 2
        return () if sequence.guest.order % 5 == 4 else names(sequence.guest.order, pages)

    def look_up(self) -> None:
        """Pages with names hold what these say."""
        guests = list(self.guests.values())
        for piece in self.ledger._prefixes.pieces():
            for page, name in zip(numbers(piece.runs), piece.hashes, strict=True):
                key, first = guests[name // 100].ticket.key, name % 100 * PAGE
                assert self.arena[page] == [(key, first + slot) for slot in range(PAGE)], "not what its name says"

    def forget_oldest(self, key: str) -> None:
        if key == self.oldest:
            self.oldest = None

    def fail(self) -> None:
        """The engine raises."""
        run, self.run = self.run, None
        assert run is not None
        self.oldest = None
        self.say("fails")
        self.failing = True
        self.give(RunFailed(run.run_id, "broken"))
        self.failing = False

    def told(self, message: Finished | Failed) -> None:
        guest = self.guests[message.ticket.key]
        if isinstance(message, Failed):
            self.say(f"fails {guest.ticket.key}: {message.code}")
            assert not guest.unwanted
            assert not any(sequence.told > 1 for sequence in guest.rows.values())
            guest.failed = True
            return
        sequence = guest.rows[message.branch]
        self.say(f"finishes {sequence.key}: {message.reason} {message.completion_tokens}")
        sequence.told += 1
        assert sequence.told == 1, "told twice"
        assert not guest.failed
        if self.failing:  # who knows after how many steps
            assert message.completion_tokens <= sequence.generated
        else:
            assert message.completion_tokens == max(sequence.generated, 1)
        assert message.reason == ("cancelled" if guest.reports else sequence.finish)

    # The sink.
    def ask(
        self, prompt: int, max_tokens: int, stops_at: int, *, minter: Identity, timeout_s: float = 1e6, n: int = 1,
        gap_s: float = 0.0,
        session: str = "",
        alone: bool = False,
        batch: bool = False,
    ) -> Guest:  # fmt: skip
        new = ticket(len(self.guests) + 1, minter=minter)
        sampling = Sampling(max_tokens, seed=1, n=n)
        hints, named = Hints(session=session), names(len(self.guests), prompt // PAGE)
        request = Request(
            "r",
            tuple(range(prompt)),
            sampling,
            timeout_s,
            Slo(0.0, gap_s, batch=batch),
            hints,
            prefix=named,
            alone=alone,
        )
        guest = Guest(new, request, stops_at, len(self.guests), self.now + timeout_s)
        self.guests[new.key] = guest
        self.give(Asked(new, request))
        return guest

    def pull(self, guest: Guest, *, all_of_it: bool = True) -> None:
        """Pages arrive; with the last of them the KV is the policy's."""
        key = guest.ticket.key
        missing = SHAPE.pages_for(len(guest.request.prompt)) - self.ledger.count(key)
        self.ledger.bind(key, missing if all_of_it else min(1, missing), Owner.PULLING)
        if not all_of_it:
            return
        table = self.ledger.pages(key)
        for position in range(len(guest.request.prompt)):
            self.arena[table[position // PAGE]][position % PAGE] = (key, position)
        self.ledger.move(key, Owner.DECODING)
        self.ledger.name(key, guest.request.prefix)
        guest.hand_off = "arriving"
        firsts = tuple(First(7, branch=branch) for branch in range(guest.request.sampling.n))
        for first in firsts:
            sequence = Sequence(guest, first.branch)
            guest.rows[first.branch] = self.sequences[sequence.key] = sequence
        self.from_sink.append(KvArrived(guest.ticket, guest.request, firsts))

    def drop(self, guest: Guest) -> None:
        if guest.hand_off in ("asked", "promised"):
            self.withdraw(guest, False)

    def withdraw(self, guest: Guest, recompute: bool) -> None:
        """As the sink: pages of an unfinished read stay in doubt, the rest is free."""
        guest.hand_off = "withdrawing"
        key = guest.ticket.key
        self.ledger.unpromise(key)
        if self.ledger.pages(key):
            self.doubts += 1
            self.ledger.move(key, Owner.IN_DOUBT, to=f"doubt/{self.doubts}")
        else:
            self.ledger.release(key)
        self.from_sink.append(Withdrawn(guest.ticket, "no", recompute))
        guest.elsewhere = not recompute

    def deliver(self) -> None:
        event = self.from_sink.popleft()
        self.guests[event.ticket.key].hand_off = "over"
        self.give(event)

    def fence(self, count: int = 99) -> None:
        """Reads in doubt end, and nobody tells the policy."""
        for holder in [name for name in self.ledger.holders() if name.startswith("doubt/")][:count]:
            self.ledger.release(holder)
        self.turn_clock(self.now)

    def lend(self, guest: Guest) -> None:
        """Somebody fetches pages of a request that are kept, or still in use; nobody tells the policy."""
        self.loans += 1
        self.ledger.share(f"lent/{self.loans}", names(guest.order, 99), Owner.HANDING_OFF)

    def returned(self) -> None:
        """All that was fetched is there."""
        for holder in [name for name in self.ledger.holders() if name.startswith("lent/")]:
            self.ledger.release(holder)
        self.turn_clock(self.now)

    # The end.
    def settle(self) -> None:
        """Everything under way ends, and then nothing is left."""
        for _ in range(3000):
            self.fence()
            self.returned()
            moving = [sequence for sequence in self.sequences.values() if sequence.moving]
            promised = [guest for guest in self.guests.values() if guest.hand_off == "promised"]
            if self.from_sink:
                self.deliver()
            elif moving:
                self.swapped(moving[0])
            elif self.run is not None:
                self.now += 0.25
                self.turn_clock(self.now)
                self.step()
            elif promised:
                self.pull(promised[0])
            else:
                break
        assert self.machine.queue() == dict.fromkeys(State, 0), "a request hangs"
        while (due := self.machine.deadline()) is not None:  # only sessions are kept
            self.turn_clock(due)
        self.look_up()
        assert self.ledger.pinned == 0
        assert self.ledger.holders() == ()
        assert self.machine.host_pages == 0
        for guest in self.guests.values():
            if not (guest.unwanted or guest.elsewhere or guest.failed):
                told = [sequence.told == 1 or sequence.unwanted for sequence in guest.rows.values()]
                assert all(told), "not told"
                assert len(told) == guest.request.sampling.n
        for sequence in self.sequences.values():
            assert sequence.place in ("", "left")


@dataclass(frozen=True)
class Visit:
    """A request in a play: when it asks, how long its KV takes to come, and when its client leaves."""

    at: int
    prompt: int
    max_tokens: int
    stops_at: int
    pull: int
    leaves: int | None
    n: int = 1
    gap_s: float = 0.0
    session: str = ""
    batch: bool = False


class Play(World):
    """Steps of one second, each taking all events of its time before it; reads and swaps take whole seconds, too."""

    checks = False

    def __init__(self, config: DecodeConfig, cost: CostModel | None, pages: int = 18, lengths: int = 4) -> None:
        super().__init__(pages, config, cost)
        for _ in range(3):
            self.machine.forecast.learn(lengths)
        self.due: dict[int, list] = {}
        self.visits: dict[str, Visit] = {}

    def later(self, seconds: int, call) -> None:
        self.due.setdefault(int(self.now) + seconds, []).append(call)

    def answered(self, key: str, granted: bool) -> None:
        super().answered(key, granted)
        guest = self.guests[key]
        if guest.hand_off == "promised":
            self.later(self.visits[key].pull, lambda: self.arrive(guest))

    def arrive(self, guest: Guest) -> None:
        if guest.hand_off == "promised":
            self.pull(guest)

    def swapping(self, sequence: Sequence) -> None:
        self.later(1, lambda: self.swapped(sequence))

    def visit(self, visit: Visit) -> None:
        counter = len(self.guests) + 1
        self.visits[f"{GATEWAY}/{counter}.1"] = visit
        guest = self.ask(
            visit.prompt,
            visit.max_tokens,
            visit.stops_at,
            minter=GATEWAY,
            n=visit.n,
            gap_s=visit.gap_s,
            session=visit.session,
            batch=visit.batch,
        )
        if visit.leaves is not None:
            self.later(visit.leaves, lambda: self.leave(guest))

    def leave(self, guest: Guest) -> None:
        guest.unwanted = True
        self.give(Cancel(guest.ticket, "left"))

    def play(self, visits: list[Visit]) -> list[tuple[float, str]]:
        self.invite(visits)
        return self.finish()

    def invite(self, visits: list[Visit]) -> None:
        for visit in visits:
            self.due.setdefault(visit.at, []).append(lambda visit=visit: self.visit(visit))
        self.at = -1

    def second(self) -> None:
        """All that happens at the next second."""
        self.at = now = self.at + 1
        self.turn_clock(float(now))  # also while a long order is out
        if self.run is not None:  # step ends come first
            self.step()
        while self.due.get(now) or self.from_sink:
            if self.from_sink:
                self.deliver()
            else:
                self.due[now].pop(0)()
        self.due.pop(now, None)

    def finish(self) -> list[tuple[float, str]]:
        while self.run is not None or any(at > self.at for at in self.due):
            self.second()
        self.settle()
        return self.log
