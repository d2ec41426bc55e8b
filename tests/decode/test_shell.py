"""The decode shell with an engine that reads its own pages: rows that lose their KV say what they would have said."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest

from core.errors import LocalError
from core.messages import Carried, Failed, Finished, First, Freeness, Message, Moved, OfferMigration, Tokens
from core.pages import Owner, Pages
from core.prefix import page_hashes
from core.request import Stage as Part
from core.sampling import Logprobs, Sampling
from core.worker import Identity
from decode import shell
from decode.shell import DecodeShell
from engine.api import Row, Sampled
from runtime.driver import Driver
from runtime.jobs import JobThread
from scheduler.decode_events import (
    Asked,
    Cut,
    Grow,
    HandOver,
    Join,
    KvArrived,
    Leave,
    OfferRow,
    Run,
    SealRow,
    SwapIn,
    SwapOut,
    SwappedIn,
    SwappedOut,
    TellMoved,
    TellPeer,
    WithdrawRow,
)
from scheduler.decode_policy import DecodeConfig, DecodePolicy
from scheduler.forecast import Forecast, ForecastConfig
from tests.cast import D1, D2, SHAPE, ask, ticket
from tests.runtime.test_shells import Silent
from transfer.source import AskToMove, Sealed, Withdraw

PAGE = SHAPE.page_tokens


def slot(before: int, token: int) -> int:
    """The KV of a token behind the one before it."""
    return zlib.crc32(f"{before}/{token}".encode())


def say(rows: list[int]) -> int:
    """What the model says after these."""
    return zlib.crc32(repr(rows).encode()) % 50


def text(prompt: Sequence[int], first: int, count: int) -> list[int]:
    """What follows a prompt and its first token when nothing happens, in all `count` tokens."""
    rows, said = [0], [first]
    for token in prompt:
        rows.append(slot(rows[-1], token))
    while len(said) < count:
        rows.append(slot(rows[-1], said[-1]))
        said.append(say(rows[1:]))
    return said


@dataclass
class Known:
    tokens: list[int]
    table: list[int]
    prompt: int
    sampling: Sampling


class Reader:
    """An engine whose next token depends on everything that is in a sequence's pages."""

    def __init__(self, pages: int, host_pages: int = 0) -> None:
        self.arena = [[-1] * PAGE for _ in range(pages)]
        self.host: dict[str, list[list[int]]] = {}
        self.host_pages = host_pages
        self.known: dict[str, Known] = {}
        self.longest = 0
        self.opened: list[str] = []

    def open(
        self, sequence: str, tokens: Sequence[int], pages: Sequence[int], sampling, prompt: int, generated: int = 0
    ) -> None:
        assert sequence not in self.known
        self.opened.append(sequence)
        self.known[sequence] = Known(list(tokens), list(pages), prompt, sampling)

    def extend(self, sequence: str, pages: Sequence[int]) -> None:
        self.known[sequence].table += pages

    def copy(self, source: int, target: int) -> None:
        self.arena[target] = list(self.arena[source])

    def close(self, sequence: str) -> None:
        self.known.pop(sequence, None)
        self.host.pop(sequence, None)

    def swap_out(self, sequence: str, pages: Sequence[int]) -> None:
        if sum(map(len, self.host.values())) + len(pages) > self.host_pages:
            raise LocalError("no room")
        assert sequence not in self.host
        self.known.pop(sequence, None)
        self.host[sequence] = [self.arena[page] for page in pages]
        for page in pages:
            self.arena[page] = [-1] * PAGE

    def swap_in(self, sequence: str, pages: Sequence[int]) -> None:
        for page, kept in zip(pages, self.host.pop(sequence), strict=True):
            self.arena[page] = kept

    def rows(self, known: Known, stop: int) -> list[int]:
        return [self.arena[known.table[at // PAGE]][at % PAGE] for at in range(stop)]

    def step(self, rows: Sequence[Row]) -> list[Sampled]:
        out = []
        for row in rows:
            known = self.known[row.sequence]
            self.longest = max(self.longest, row.stop - row.start)
            for at in range(row.start, row.stop):
                before = self.rows(known, at)[-1] if at else 0
                self.arena[known.table[at // PAGE]][at % PAGE] = slot(before, known.tokens[at])
            if row.stop == len(known.tokens):
                known.tokens.append(say(self.rows(known, row.stop)))
                full = len(known.tokens) - known.prompt == known.sampling.max_tokens
                out.append(Sampled(row.sequence, row.stop, known.tokens[-1], "length" if full else None))
        return out


class Mute(Reader):
    """It always says the same."""

    kv = SHAPE

    def step(self, rows: Sequence[Row]) -> list[Sampled]:
        out = super().step(rows)
        for row in rows:
            self.known[row.sequence].tokens[-1] = 0
        return [replace(each, token=0) for each in out]


class Stage:
    """A shell, what gateways hear, and the rest of a worker."""

    def __init__(self, machine, engine: Reader) -> None:
        self.heard: list[Message] = []
        self.bugs: list[BaseException] = []
        self.driver = Driver(self.bugs.append, check=True)
        self.driver.seat("sink", Silent(), lambda command: None)
        self.source = Scripted()
        self.driver.seat("source", self.source, lambda command: None)
        self.to_peers: list[tuple[Identity, Freeness]] = []
        self.thread = JobThread("engine", self.bugs.append)
        self.shell = DecodeShell(
            machine,
            self.driver,
            engine,  # type: ignore[arg-type]
            self.thread,
            self.tell,
            tell_peer=lambda peer, message: self.to_peers.append((peer, message)),
        )

    def tell(self, gateway: Identity, message: Message) -> None:
        self.heard.append(message)

    async def until(self, done) -> None:
        for _ in range(5_000):
            if done():
                return
            await asyncio.sleep(0.002)

    def close(self) -> None:
        self.thread.close()
        self.driver.close()

    def said(self, counter: int) -> list[int]:
        tokens: list[int] = []
        for message in self.heard:
            if isinstance(message, Tokens) and message.ticket == ticket(counter):
                assert message.index == len(tokens)
                tokens += message.tokens
        return tokens


@pytest.mark.parametrize(("piece", "host_pages"), [(512, 0), (3, 0), (3, 20), (3, 4)])
def test_a_row_whose_memory_was_taken_says_what_it_would_have_said(piece, host_pages, monkeypatch):
    """Its KV is computed again, or was swapped, or, where there is room for some of them only, both."""
    monkeypatch.setattr(shell, "RECOMPUTE_TOKENS", piece)
    engine, ledger = Reader(10, host_pages), Pages(10)
    forecast = Forecast(ForecastConfig(window=4, least=1, least_longer=1))
    forecast.learn(3)
    config = DecodeConfig(admission="past_future", max_steps=3, host_pages=host_pages)
    machine = DecodePolicy(D1, SHAPE, ledger, config, None, forecast)
    requests = {counter: ask(6, 22, start=counter) for counter in (1, 2, 3)}

    async def scene() -> None:
        stage = Stage(machine, engine)
        for counter, request in requests.items():
            stage.driver.post("decode", Asked(ticket(counter), request))
        for counter, request in requests.items():
            key = ticket(counter).key
            if not ledger.promised:
                break
            pages = ledger.bind(key, 2, Owner.PULLING)
            known = Known(list(request.prompt), list(pages), 6, request.sampling)
            for at, token in enumerate(request.prompt):
                before = engine.rows(known, at)[-1] if at else 0
                engine.arena[pages[at // PAGE]][at % PAGE] = slot(before, token)
            ledger.move(key, Owner.DECODING)
            stage.driver.post("decode", KvArrived(ticket(counter), request, (First(5),)))
        await stage.until(lambda: sum(isinstance(message, Finished) for message in stage.heard) == 3)
        stage.close()
        assert not stage.bugs
        for counter, request in requests.items():
            assert stage.said(counter) == text(request.prompt, 5, 22)

    asyncio.run(asyncio.wait_for(scene(), 20))
    assert (machine.evicted > 0, machine.swapped > 0) == (host_pages < 20, host_pages > 0)
    assert (machine.recomputed_tokens > 0) == (host_pages < 20)
    assert engine.longest <= max(piece, 1)
    assert (engine.longest > 1) == (host_pages < 20)
    assert not engine.known
    assert not engine.host
    assert machine.host_pages == 0
    assert ledger.counts()[Owner.FREE] == 10


class Scripted:
    """A machine that says the next of its lines at every event."""

    def __init__(self, *lines) -> None:
        self.lines = list(lines)
        self.events: list = []

    def on(self, event, now):
        self.events.append(event)
        return self.lines.pop(0) if self.lines else []

    def deadline(self):
        return None

    def check(self):
        pass


def test_pages_in_place_of_others_open_a_sequence_again():
    request, key = ask(6, 8), ticket().key
    engine = Reader(6)
    pages = (0, 1)
    known = Known(list(request.prompt), list(pages), 6, request.sampling)
    for at, token in enumerate(request.prompt):
        before = engine.rows(known, at)[-1] if at else 0
        engine.arena[pages[at // PAGE]][at % PAGE] = slot(before, token)
    joins = Join(key, ticket(), request, First(5), (0, 1, 2, 3))
    machine = Scripted(
        [Run(1, (key,), (joins,), (), 2)],
        [Run(2, (key,), (), (Grow(key, (4, 5), 2),), 5)],
        [Leave(key)],
    )

    async def scene() -> None:
        stage = Stage(machine, engine)
        stage.driver.post("decode", Cut(0))
        await stage.until(lambda: len(machine.events) == 3 and not engine.known)
        stage.close()
        assert not stage.bugs
        assert stage.said(1) == text(request.prompt, 5, 8)

    asyncio.run(asyncio.wait_for(scene(), 20))
    assert engine.arena[2] == engine.arena[3] == [-1] * PAGE
    assert engine.opened == [key, key]


@pytest.mark.parametrize(
    ("prompt", "count", "named", "link"),
    [
        *((6, 8, 3, 0), (6, 7, 3, 0), (6, 6, 2, 0), (8, 6, 3, 0), (4, 2, 1, 0), (6, 8, 0, 0)),
        # Names of pages half as large go on as such; those of larger ones name none of ours.
        *((6, 8, 3, 2), (6, 7, 3, 2), (5, 8, 3, 2), (8, 8, 0, 8), (6, 8, 3, 4)),
    ],
)
def test_a_row_ends_with_the_names_of_its_full_pages(prompt, count, named, link):
    """The newest token has no KV: a page that it fills has no name yet."""
    request, key = ask(prompt, count), ticket().key
    size = link or PAGE
    chain = page_hashes((*request.prompt, *([5, *([0] * (count - 1))])), size, "tenant")
    names = chain[PAGE // size - 1 :: PAGE // size] if size <= PAGE else ()
    # A name too many is none.
    given = chain[: -(-prompt // size)] if named or prompt < PAGE or link else ()
    request = replace(request, prefix=given, prefix_page_tokens=link)
    joins = Join(key, ticket(), request, First(5), tuple(range(4)))
    machine = Scripted([Run(1, (key,), (joins,), (), count - 1)], [Leave(key)])

    async def scene() -> None:
        stage = Stage(machine, Mute(6))
        stage.driver.post("decode", Cut(0))
        await stage.until(lambda: len(machine.events) == 2)
        stage.close()
        assert not stage.bugs

    asyncio.run(asyncio.wait_for(scene(), 20))
    ((ended,),) = [ran.ended for ran in machine.events[1:]]
    assert ended.prefix == names[:named]


def test_the_prompts_logprobs_are_not_asked_for_again():
    request, key = replace(ask(6, 8), sampling=Sampling(8, prompt_logprobs=1)), ticket().key
    engine, asked = Reader(6), []
    machine = Scripted([Run(1, (key,), (Join(key, ticket(), request, First(5), (0, 1, 2), None, 1, (0, 6)),), (), 2)])

    async def scene() -> None:
        stage = Stage(machine, engine)
        stage.driver.post("decode", Cut(0))
        await stage.until(lambda: len(machine.events) == 2)
        asked.append(engine.known[key].sampling.prompt_logprobs)
        stage.close()
        assert stage.said(1) == text(request.prompt, 5, 3)

    asyncio.run(asyncio.wait_for(scene(), 20))
    assert asked == [None]


def test_a_swap_is_a_bug_where_there_is_no_host_memory():
    async def scene() -> list[BaseException]:
        stage = Stage(Scripted([SwapOut("somebody", (1,))]), Reader(1))
        stage.driver.post("decode", Cut(0))
        await stage.until(lambda: stage.bugs)
        stage.close()
        return stage.bugs

    (bug,) = asyncio.run(asyncio.wait_for(scene(), 20))
    assert isinstance(bug, LocalError)


def test_a_row_is_swapped_between_the_orders_before_and_after_it():
    """Another row gets its pages as soon as its copy is told of, and it gets others."""
    request, key = ask(6, 8), ticket().key
    other, other_key = ask(6, 4, start=20), ticket(2).key
    engine = Reader(6, 3)
    filled(engine, request, (0, 1))
    joins = Join(key, ticket(), request, First(5), (0, 1, 2))
    visits = Join(other_key, ticket(2), other, First(5), (0, 1, 2), None, 1, (0, 6))
    back = Join(key, ticket(), request, First(5), (3, 4, 5, 0), None, 4)
    machine = Scripted(
        [Run(1, (key,), (joins,), (), 3)],
        [SwapOut(key, (0, 1, 2))],
        [Run(2, (other_key,), (visits,), (), 3)],
        [Leave(other_key), SwapIn(key, (3, 4, 5))],
        [Run(3, (key,), (back,), (), 9)],
        [Leave(key)],
    )

    async def scene() -> None:
        stage = Stage(machine, engine)
        stage.driver.post("decode", Cut(0))
        await stage.until(lambda: len(machine.events) == 6 and not engine.known)
        stage.close()
        assert not stage.bugs
        assert stage.said(1) == text(request.prompt, 5, 8)
        assert stage.said(2) == text(other.prompt, 5, 4)

    asyncio.run(asyncio.wait_for(scene(), 20))
    assert (machine.events[2], machine.events[4]) == (SwappedOut(key), SwappedIn(key))
    assert not engine.host


def test_a_row_that_leaves_while_it_is_away_leaves_nothing():
    request, key = ask(6, 8), ticket().key
    engine = Reader(3, 3)
    joins = Join(key, ticket(), request, First(5), (0, 1, 2))
    machine = Scripted([Run(1, (key,), (joins,), (), 3)], [SwapOut(key, (0, 1, 2))], [Leave(key)])

    async def scene() -> None:
        stage = Stage(machine, engine)
        stage.driver.post("decode", Cut(0))
        await stage.until(lambda: len(machine.events) == 3 and not engine.host)
        stage.close()
        assert not stage.bugs
        assert not stage.shell._sequences
        assert not stage.shell._rows

    asyncio.run(asyncio.wait_for(scene(), 20))
    assert not engine.host


def test_a_row_that_is_not_what_it_was_is_a_bug():
    request, key = ask(6, 8), ticket().key
    machine = Scripted([Run(1, (key,), (Join(key, ticket(), request, First(5), (0, 1, 2), None, 3),), (), 2)])

    async def scene() -> None:
        stage = Stage(machine, Reader(3))
        stage.driver.post("decode", Cut(0))
        await stage.until(lambda: len(machine.events) == 2)
        stage.close()

    asyncio.run(asyncio.wait_for(scene(), 20))
    assert "want the 7 it has" in machine.events[1].reason
    assert not isinstance(machine.events[1], Failed)


# Rows that move.
class Telling(Reader):
    """Says how likely each token was, and a hash, by its position."""

    def step(self, rows: Sequence[Row]) -> list[Sampled]:
        return [replace(s, logits_hash=1000 + s.position, logprobs=known(s.position)) for s in super().step(rows)]


def known(position: int) -> Logprobs:
    return Logprobs(position, -1.0)


def filled(engine: Reader, request, pages: tuple[int, ...]) -> None:
    """The KV of a prompt, as a prefill worker would have left it."""
    before = Known(list(request.prompt), list(pages), len(request.prompt), request.sampling)
    for at, token in enumerate(request.prompt):
        engine.arena[pages[at // PAGE]][at % PAGE] = slot(engine.rows(before, at)[-1] if at else 0, token)


MOVE = ticket(7, minter=D1, source=D1, sink=D2)
PARTS = (Part("decode", "decode-1", 0.5),)


def test_a_row_that_moves_goes_on_elsewhere_and_says_all_of_it_again():
    request, key = ask(6, 8), ticket().key
    here, there = Telling(4), Telling(9)
    filled(here, request, (0, 1))
    joins = Join(key, ticket(), request, First(5, 99, 0, known(6)), (0, 1, 2, 3))
    giver = Scripted([Run(1, (key,), (joins,), (), 3)], [HandOver(key, MOVE.key, (0, 1, 2), 9, PARTS)], [Leave(key)])
    said = text(request.prompt, 5, 8)

    async def give() -> Sealed:
        stage = Stage(giver, here)
        stage.driver.post("decode", Cut(0))
        await stage.until(lambda: stage.source.events)
        stage.driver.post("decode", Cut(0))
        await stage.until(lambda: not stage.shell._sequences)
        stage.close()
        assert not stage.bugs
        assert not here.known
        assert stage.said(1) == said[:4]
        (sealed,) = stage.source.events
        return sealed

    sealed = asyncio.run(asyncio.wait_for(give(), 20))
    carried = sealed.carried
    assert 0 <= carried.stopped_s < 20
    hashes, logprobs = (99, 1007, 1008, 1009), (known(6), known(7), known(8), known(9))
    assert carried == Carried(tuple(said[:4]), PARTS, hashes, logprobs, carried.stopped_s)
    assert sealed == Sealed(MOVE.key, (0, 1, 2), 9, (First(said[3], 1009),), carried)

    pages = (8, 2, 5)
    for source, target in zip((0, 1, 2), pages, strict=True):
        there.arena[target] = list(here.arena[source])
    moved = replace(ticket(), sink=D2)
    comes = Join(MOVE.key, moved, request, sealed.firsts[0], (*pages, 1), None, 4, None, carried)
    taker = Scripted([TellMoved(Moved(moved, 1)), Run(1, (MOVE.key,), (comes,), (), 9)], [Leave(MOVE.key)])

    async def take() -> list[Message]:
        stage = Stage(taker, there)
        stage.driver.post("decode", Cut(0))
        await stage.until(lambda: len(taker.events) == 2)
        stage.close()
        assert not stage.bugs
        return stage.heard

    (first, again, *rest) = asyncio.run(asyncio.wait_for(take(), 20))
    assert first == Moved(moved, 1)
    assert again == Tokens(moved, 0, tuple(said[:5]), (*hashes, 1010), 0, (*logprobs, known(10))), (
        "whoever was faster, nothing is missing"
    )
    assert [(each.index, each.tokens) for each in rest] == [(at, (said[at],)) for at in range(5, 8)]
    (ended,) = taker.events[1].ended
    assert (ended.key, ended.reason, ended.generated) == (MOVE.key, "length", 8)


def test_a_row_that_was_not_taken_goes_on_here_and_says_nothing_twice():
    request, key = ask(6, 8), ticket().key
    engine = Reader(4)
    filled(engine, request, (0, 1))
    joins = Join(key, ticket(), request, First(5), (0, 1, 2, 3))
    back = Join(key, ticket(), request, First(5), (0, 1, 2, 3), None, 4)
    machine = Scripted(
        [Run(1, (key,), (joins,), (), 3)],
        [HandOver(key, MOVE.key, (0, 1, 2), 9, ())],
        [Run(2, (key,), (back,), (), 9)],
        [Leave(key)],
    )

    async def scene() -> None:
        stage = Stage(machine, engine)
        stage.driver.post("decode", Cut(0))
        await stage.until(lambda: stage.source.events)
        assert not engine.known
        stage.driver.post("decode", Cut(0))
        await stage.until(lambda: len(machine.events) == 4)
        stage.close()
        assert not stage.bugs
        assert stage.said(1) == text(request.prompt, 5, 8)
        assert stage.source.events[0].carried.logits_hashes == ()

    asyncio.run(asyncio.wait_for(scene(), 20))


def test_a_row_that_is_not_what_is_handed_over_is_a_bug():
    request, key = ask(6, 8), ticket().key
    engine = Reader(4)
    joins = Join(key, ticket(), request, First(5), (0, 1, 2, 3))
    machine = Scripted([Run(1, (key,), (joins,), (), 3)], [HandOver(key, MOVE.key, (0, 1), 8, ())])

    async def scene() -> list[BaseException]:
        stage = Stage(machine, engine)
        stage.driver.post("decode", Cut(0))
        await stage.until(lambda: stage.bugs)
        stage.close()
        assert not stage.source.events
        return stage.bugs

    (bug,) = asyncio.run(asyncio.wait_for(scene(), 20))
    assert "got 8 tokens with KV, want the 9 it has" in str(bug)


OFFER = OfferMigration(MOVE, ask(), ticket(), 3, 20)


@pytest.mark.parametrize(
    ("command", "event"),
    [
        (OfferRow(OFFER, 9.0), AskToMove(OFFER, 9.0)),
        (SealRow(MOVE.key, (1, 2), 8), Sealed(MOVE.key, (1, 2), 8)),
        (WithdrawRow(MOVE.key, "ended"), Withdraw(MOVE.key, "ended")),
        (TellPeer(D2, Freeness(D1, 3.0)), None),
        (TellMoved(Moved(ticket(), 2)), None),
    ],
)
def test_what_is_said_of_a_move_reaches_who_is_to_hear_it(command, event):
    async def scene() -> Stage:
        stage = Stage(Scripted([command]), Reader(1))
        stage.driver.post("decode", Cut(0))
        stage.close()
        return stage

    stage = asyncio.run(asyncio.wait_for(scene(), 20))
    assert not stage.bugs
    assert stage.source.events == ([] if event is None else [event])
    assert stage.to_peers == ([(D2, command.message)] if isinstance(command, TellPeer) else [])
    assert stage.heard == ([command.message] if isinstance(command, TellMoved) else [])
