"""What clients lose when a worker is killed or stands still, and what they leave behind when they themselves go.

Twelve requests stream; then it happens. Others come four times a second for ten seconds from that moment on. A killed
worker is started again at once, at both sides. "Lost" is who did not get all tokens, for whatever reason.
"""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from bench.peer_load import Ask, Seen, Side, follow, quantile

IN_FLIGHT, FLIGHT_TOKENS = 12, 400
BEGUN_TOKENS = 3
"""Who has these is at the decode worker."""
LATER, LATER_EACH_S = 40, 0.25
STILL_S = 5.0
LEAVERS, LEAVE_EACH_S = 50, 0.1
LOOK_S = 2.0
"""After the last client has gone."""
BACK_S = 180.0
"""Who does not serve again by then does not in this run."""
FREE_S = 45.0
"""Longer than the peer's lease."""
FAULTS = ("kill-decode", "kill-prefill", "stop-decode", "disconnect")


class Victim(Side, Protocol):
    """A deployment whose workers can be hurt."""

    def signal(self, role: str, number: signal.Signals) -> None:
        """To all processes of the worker of this role; returns when a killed one is gone."""
        ...

    def restart(self, role: str) -> None:
        """Start the killed worker of this role again, and wait until it serves."""
        ...

    def held(self) -> float:
        """Pages or blocks of KV in use, of all workers."""
        ...

    def lapsed(self) -> float:
        """Requests so far whose KV was freed only because nobody came for it in time."""
        ...


@dataclass(slots=True)
class Outcome:
    """What became of the requests of one fault."""

    in_flight: list[Seen] = field(default_factory=list)
    later: list[Seen] = field(default_factory=list)
    back_s: float = BACK_S
    """From the fault until the worker is back and a request that was asked then was served; `BACK_S`: not by then."""
    held: float = 0.0
    """Pages or blocks of KV that are held two seconds after the last client has gone."""
    lapsed: float = 0.0
    """Requests whose KV was freed only because nobody came for it in time."""
    freed_s: float = 0.0
    """From when the last client had gone until none is held; `FREE_S`: some still is."""

    @property
    def lost(self) -> int:
        """Of those in flight."""
        return sum(not (each.good or each.left) for each in self.in_flight)

    @property
    def later_lost(self) -> int:
        """Of those that came afterwards."""
        return sum(not each.good for each in self.later)

    @property
    def pause_s(self) -> float:
        """The median of the longest pauses of the streams that were not lost."""
        pauses = [max(each.second_s, *each.gaps_s) for each in self.in_flight if each.good]
        return quantile(pauses, 0.5)

    def words(self) -> str:
        """Why requests were lost, the commonest first."""
        whys = Counter(each.why[:100] for each in (*self.in_flight, *self.later) if each.why)
        return "; ".join(f"{count} x {why}" for why, count in whys.most_common(4)) or "nobody lost"


def prompts(case: str, count: int, tokens: int, vocabulary: int, length: int = 128) -> list[Ask]:
    """Requests of one length."""
    draw = random.Random(case)
    return [Ask(tuple(draw.randrange(10, vocabulary) for _ in range(length)), tokens) for _ in range(count)]


async def disturb(side: Victim, fault: str, vocabulary: int) -> Outcome:
    """One of FAULTS."""
    lapsed = 0.0 if fault == "kill-prefill" else await asyncio.to_thread(side.lapsed)
    outcome = await leave(side, vocabulary) if fault == "disconnect" else await hurt(side, fault, vocabulary)
    gone = time.monotonic()
    await asyncio.sleep(LOOK_S)
    outcome.held = held = await _held(side, vocabulary)
    while held and time.monotonic() < gone + FREE_S:
        await asyncio.sleep(min(1.0, LOOK_S))
        held = await _held(side, vocabulary)
    outcome.freed_s = FREE_S if held else time.monotonic() - gone
    outcome.lapsed = await asyncio.to_thread(side.lapsed) - lapsed
    return outcome


async def _held(side: Victim, vocabulary: int) -> float:
    """KV in use now: the peer's servers count it when they take a step, so they are given one."""
    await follow(side, Seen(prompts("probe", 1, 2, vocabulary, 4)[0]))
    await asyncio.sleep(LOOK_S / 10)
    return await asyncio.to_thread(side.held)


async def hurt(side: Victim, fault: str, vocabulary: int) -> Outcome:
    """Kill a worker and start it again, or let it stand still, while requests stream and others come."""
    deed, role = fault.split("-")
    outcome = Outcome([Seen(ask) for ask in prompts("in flight", IN_FLIGHT, FLIGHT_TOKENS, vocabulary)])
    begun = asyncio.Event()

    def heard() -> None:
        if all(len(seen.times) >= BEGUN_TOKENS for seen in outcome.in_flight):
            begun.set()

    streams = [asyncio.create_task(follow(side, seen, heard=heard)) for seen in outcome.in_flight]
    waits = asyncio.create_task(begun.wait())
    await asyncio.wait([waits, *streams], return_when=asyncio.FIRST_COMPLETED)
    waits.cancel()
    began = time.monotonic()
    await asyncio.to_thread(side.signal, role, signal.SIGKILL if deed == "kill" else signal.SIGSTOP)
    back = asyncio.create_task(_restore(side, deed, role))
    others = asyncio.create_task(_come(side, outcome, vocabulary))
    await back
    probe = prompts("probe", 1, 4, vocabulary)[0]
    while time.monotonic() < began + BACK_S:
        if (await follow(side, Seen(probe))).good:
            outcome.back_s = time.monotonic() - began
            break
        await asyncio.sleep(0.25)
    await asyncio.gather(others, *streams)
    return outcome


async def _restore(side: Victim, deed: str, role: str) -> None:
    if deed == "kill":
        await asyncio.to_thread(side.restart, role)
    else:
        await asyncio.sleep(STILL_S)
        side.signal(role, signal.SIGCONT)


async def _come(side: Victim, outcome: Outcome, vocabulary: int) -> None:
    """Later requests, each at its own time, whatever becomes of the others."""

    async def one(seen: Seen, after_s: float) -> None:
        await asyncio.sleep(after_s)
        await follow(side, seen)

    outcome.later = [Seen(ask) for ask in prompts("later", LATER, 16, vocabulary, 64)]
    await asyncio.gather(*(one(seen, number * LATER_EACH_S) for number, seen in enumerate(outcome.later)))


async def leave(side: Victim, vocabulary: int) -> Outcome:
    """Half of the clients leave before or shortly after their first token, the others later; ten come a second."""
    draw = random.Random("leave")
    outcome = Outcome([Seen(ask) for ask in prompts("leave", LEAVERS, 64, vocabulary, 256)])

    async def one(seen: Seen, after_s: float, stays_s: float, tokens: int) -> None:
        await asyncio.sleep(after_s)
        if tokens:
            await follow(side, seen, tokens)
            return
        try:
            await asyncio.wait_for(follow(side, seen), stays_s)
        except TimeoutError:
            seen.left = True

    await asyncio.gather(
        *(
            one(seen, number * LEAVE_EACH_S, draw.uniform(0.02, 0.4), draw.randint(1, 20) if number % 2 else 0)
            for number, seen in enumerate(outcome.in_flight)
        )
    )
    return outcome


def table(fault: str, ours: Outcome, theirs: Outcome | None) -> list[tuple[str, float, float | None, str]]:
    """What is reported of a fault: (what, ours, theirs, unit); less is better in all of it."""

    def row(what: str, unit: str, of: str) -> tuple[str, float, float | None, str]:
        return what, float(getattr(ours, of)), None if theirs is None else float(getattr(theirs, of)), unit

    held = [
        row("KV held 2 s later", "pages, blocks", "held"),
        row("until no KV is held", "s", "freed_s"),
        row("requests whose KV was freed by a lease's end only", "requests", "lapsed"),
    ]
    if fault == "disconnect":
        return held
    return [
        row(f"lost of {IN_FLIGHT} in flight", "requests", "lost"),
        row(f"lost of {LATER} later ones", "requests", "later_lost"),
        row("longest pause of a stream that was not lost, p50", "s", "pause_s"),
        row("until it serves again", "s", "back_s"),
        *held,
    ]


def told(fault: str, outcomes: Sequence[tuple[str, Outcome]]) -> str:
    """A line for people."""
    parts = []
    for name, each in outcomes:
        part = f"{name}: {each.lost} of {len(each.in_flight)} lost"
        if each.later:
            part += f", {each.later_lost} of {len(each.later)} later ones, back after {each.back_s:.1f} s"
        parts.append(f"{part}, {each.held:g} held, {each.lapsed:g} lapsed ({each.words()})")
    return f"  {fault}: " + " | ".join(parts)
