"""The shells around the policies, with an engine that fails: a step's requests are handed back, the worker goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from core.messages import Accept, Failed, Finished, First, Message, Offer, Prompt, Tokens
from core.pages import Owner, Pages
from core.worker import Identity
from decode.shell import DecodeShell
from engine.api import Row, Sampled
from prefill.shell import PrefillShell
from runtime.driver import Driver
from runtime.jobs import JobThread
from scheduler.decode_events import Asked, KvArrived
from scheduler.decode_policy import DecodeConfig, DecodePolicy
from scheduler.prefill_policy import PrefillConfig, PrefillPolicy
from tests.cast import D1, P1, SHAPE, ask, ticket


class Fragile:
    """An engine that gives token 7 to every row, and raises whenever one of the rows is `cursed`."""

    def __init__(self, cursed: str) -> None:
        self.cursed = cursed
        self.known: dict[str, tuple[int, int]] = {}

    def open(
        self, sequence: str, tokens: Sequence[int], pages: Sequence[int], sampling, prompt: int, generated: int = 0
    ) -> None:
        if self.cursed == f"open {sequence}":
            raise ValueError("no such token")
        self.known[sequence] = (prompt, sampling.max_tokens)

    def extend(self, sequence: str, pages: Sequence[int]) -> None:
        pass

    def copy(self, source: int, target: int) -> None:
        pass

    def close(self, sequence: str) -> None:
        self.known.pop(sequence, None)

    def step(self, rows: Sequence[Row]) -> list[Sampled]:
        if any(row.sequence == self.cursed for row in rows):
            raise ArithmeticError("cursed")
        out = []
        for row in rows:
            prompt, most = self.known[row.sequence]
            if row.stop >= prompt:
                out.append(Sampled(row.sequence, row.stop, 7, "length" if row.stop - prompt + 1 >= most else None))
        return out


class Silent:
    """A machine that takes everything and says nothing."""

    def on(self, event, now):
        return []

    def deadline(self):
        return None

    def check(self):
        pass


def prefill(cursed: str) -> tuple[list[Message], dict, Fragile]:
    """What gateways hear of two requests of one token each, and the ledger's counts in the end."""
    heard: list[Message] = []
    ledger, engine, bugs = Pages(20), Fragile(cursed), []

    async def scene() -> None:
        driver = Driver(bugs.append, check=True)
        driver.seat("source", Silent(), lambda command: None)
        thread = JobThread("engine", bugs.append)
        policy = PrefillPolicy(P1, SHAPE, ledger, PrefillConfig())
        ended = asyncio.Event()

        def tell(gateway: Identity, message: Message) -> None:
            heard.append(message)
            if isinstance(message, Failed | Finished):
                ended.set()

        PrefillShell(policy, driver, engine, thread, tell)  # type: ignore[arg-type]
        for counter in (1, 2):
            key = ticket(counter)
            driver.post("prefill", Offer(key, 6, 1, 10.0))
            driver.post("prefill", Prompt(key, ask(6, 1)))
            await ended.wait()
            ended.clear()
        thread.close()
        driver.close()

    asyncio.run(asyncio.wait_for(scene(), 10))
    assert not bugs
    return heard, ledger.counts(), engine


def test_a_prefill_step_that_fails_hands_its_requests_back():
    for cursed in (f"prefill {ticket(1).key}", f"open prefill {ticket(1).key}"):
        heard, counts, engine = prefill(cursed)
        assert [type(message) for message in heard] == [Accept, Failed, Accept, Tokens, Finished]
        failed = heard[1]
        assert isinstance(failed, Failed)
        assert failed.code == "INTERNAL"
        assert counts[Owner.FREE] == 20
        assert not engine.known


def test_a_decode_step_that_fails_hands_its_rows_back():
    heard: list[Message] = []
    ledger, bugs = Pages(20), []
    engine = Fragile(ticket(1).key)

    async def scene() -> None:
        driver = Driver(bugs.append, check=True)
        driver.seat("sink", Silent(), lambda command: None)
        thread = JobThread("engine", bugs.append)
        policy = DecodePolicy(D1, SHAPE, ledger, DecodeConfig())
        ended = asyncio.Event()

        def tell(gateway: Identity, message: Message) -> None:
            heard.append(message)
            if isinstance(message, Failed | Finished):
                ended.set()

        DecodeShell(policy, driver, engine, thread, tell)  # type: ignore[arg-type]
        for counter in (1, 2):
            key = ticket(counter)
            driver.post("decode", Asked(key, ask(6, 4)))
            ledger.bind(key.key, 2, Owner.PULLING)
            ledger.move(key.key, Owner.DECODING)
            driver.post("decode", KvArrived(key, ask(6, 4), (First(5),)))
            await ended.wait()
            ended.clear()
        thread.close()
        driver.close()

    asyncio.run(asyncio.wait_for(scene(), 10))
    assert not bugs
    failed, *rest = heard
    assert isinstance(failed, Failed)
    assert (failed.code, failed.ticket) == ("INTERNAL", ticket(1))
    assert [token for message in rest if isinstance(message, Tokens) for token in message.tokens] == [5, 7, 7, 7]
    assert isinstance(rest[-1], Finished)
    assert ledger.counts()[Owner.FREE] == 20
    assert not engine.known
