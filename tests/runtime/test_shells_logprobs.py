"""The shells pass on what an engine says of tokens: with each, again with a repeated one, of a prompt, and of none."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

from core.messages import Finished, First, Message, Offer, Prompt, Tokens
from core.pages import Owner, Pages
from core.sampling import Logprobs
from core.worker import Identity
from decode.shell import DecodeShell
from engine.api import NO_TOKEN, Row, Sampled
from prefill.shell import PrefillShell
from runtime.driver import Driver
from runtime.jobs import JobThread
from scheduler.decode_events import Asked, KvArrived
from scheduler.decode_policy import DecodeConfig, DecodePolicy
from scheduler.prefill_policy import PrefillConfig, PrefillPolicy
from tests.cast import D1, P1, SHAPE, ask, ticket
from tests.runtime.test_shells import Fragile, Silent

TOLD = (None, Logprobs(1, -2.0))


class Telling(Fragile):
    """Says how likely each token was, by its position; ends the text with its `stop`th token, or where one had been."""

    def __init__(self, stop: int, *, dead: bool = False) -> None:
        super().__init__("nobody")
        self.stop = stop
        self.dead = dead
        self.generated = -1

    def open(
        self, sequence: str, tokens: Sequence[int], pages: Sequence[int], sampling, prompt: int, generated: int = 0
    ) -> None:
        super().open(sequence, tokens, pages, sampling, prompt, generated)
        self.generated = generated

    def step(self, rows: Sequence[Row]) -> list[Sampled]:
        out = []
        for sample in super().step(rows):
            prompt, _ = self.known[sample.sequence]
            finish = "stop" if sample.position - prompt + 1 == self.stop else sample.finish
            told = TOLD if sample.position == prompt else ()
            said = replace(sample, finish=finish, logprobs=known(sample.position), prompt_logprobs=told)
            out.append(replace(said, token=NO_TOKEN, logprobs=None) if self.dead and finish == "stop" else said)
        return out


def known(position: int) -> Logprobs:
    return Logprobs(7, -float(position))


def heard(seat: str, engine: Telling, start: Callable[[Driver, Pages], None]) -> list[Message]:
    """What the gateway hears of one request of 6 tokens."""
    out: list[Message] = []
    bugs: list[BaseException] = []

    async def scene() -> None:
        driver = Driver(bugs.append, check=True)
        for silent in ("source", "sink"):
            driver.seat(silent, Silent(), lambda command: None)
        thread, ledger, ended = JobThread("engine", bugs.append), Pages(20), asyncio.Event()

        def tell(gateway: Identity, message: Message) -> None:
            out.append(message)
            if isinstance(message, Finished):
                ended.set()

        if seat == "prefill":
            PrefillShell(PrefillPolicy(P1, SHAPE, ledger, PrefillConfig()), driver, engine, thread, tell)  # type: ignore[arg-type]
        else:
            DecodeShell(DecodePolicy(D1, SHAPE, ledger, DecodeConfig()), driver, engine, thread, tell)  # type: ignore[arg-type]
        start(driver, ledger)
        await ended.wait()
        thread.close()
        driver.close()

    asyncio.run(asyncio.wait_for(scene(), 10))
    assert not bugs
    return [message for message in out if isinstance(message, Tokens | Finished)]


def told(messages: list[Message]) -> list[Message]:
    return [message for message in messages if isinstance(message, Tokens)]


def prefill(stop: int, *, dead: bool = False) -> tuple[list[Message], Telling]:
    engine = Telling(stop, dead=dead)

    def start(driver: Driver, ledger: Pages) -> None:
        driver.post("prefill", Offer(ticket(), 6, 1, 10.0))
        driver.post("prefill", Prompt(ticket(), replace(ask(6, 1), generated=2)))

    return heard("prefill", engine, start), engine


def test_a_first_token_comes_with_its_logprobs_and_the_prompts():
    messages, engine = prefill(stop=0)
    assert told(messages) == [Tokens(ticket(), 0, (7,), (0,), 0, (known(6),), TOLD)]
    assert engine.generated == 2


def test_a_text_that_ends_at_once_has_only_the_prompts():
    assert told(prefill(stop=1)[0]) == [Tokens(ticket(), 0, (), prompt_logprobs=TOLD)]


def decode(engine: Telling) -> list[Message]:
    """Of a first token 5, and what follows it."""
    request = replace(ask(6, 8), generated=3)
    first = First(5, 9, 0, Logprobs(5, -0.5))

    def start(driver: Driver, ledger: Pages) -> None:
        driver.post("decode", Asked(ticket(), request))
        ledger.bind(ticket().key, 2, Owner.PULLING)
        ledger.move(ticket().key, Owner.DECODING)
        driver.post("decode", KvArrived(ticket(), request, (first,)))

    return heard("decode", engine, start)


def test_a_decode_worker_repeats_the_first_token_with_its_logprobs():
    engine = Telling(stop=4)
    assert told(decode(engine)) == [
        Tokens(ticket(), 0, (5, 7), (9, 0), 0, (Logprobs(5, -0.5), known(7))),
        Tokens(ticket(), 2, (7,), (0,), 0, (known(8),)),
    ]
    assert engine.generated == 3


def test_where_nothing_may_follow_the_text_ends_without_a_token():
    """Whoever has its prompt, or its last token."""
    *tokens, last = prefill(stop=1, dead=True)[0]
    assert tokens == [Tokens(ticket(), 0, (), prompt_logprobs=TOLD)]
    assert isinstance(last, Finished)
    assert (last.reason, last.completion_tokens, last.stop_token_id) == ("stop", 0, NO_TOKEN)
    *tokens, last = decode(Telling(stop=3, dead=True))
    assert tokens == [Tokens(ticket(), 0, (5, 7), (9, 0), 0, (Logprobs(5, -0.5), known(7)))]
    assert isinstance(last, Finished)
    assert (last.reason, last.completion_tokens, last.stop_token_id) == ("stop", 2, NO_TOKEN)
