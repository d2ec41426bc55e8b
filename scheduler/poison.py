"""Who crashes workers: counts for each request the crashes that it was present at, and says when that is enough. Pure.

A worker that ends takes all that it had with it, and nothing tells which of these requests was the cause, or whether
any was. So each is suspected, and none is refused for what may be another's fault:

| present at | the request is |
|---|---|
| less than 2 crashes | placed again like any other |
| 2 or more | placed again *alone*: no step of an engine has it and another request (`Request.alone`) |
| 3 or more, at one of them alone | *poisonous*: refused |

A crash is the end of a process by a fault of its own, and an exception of its engine, which takes the requests of that
step and leaves the worker. Whoever is stopped by others (SIGKILL, SIGTERM), says goodbye, or is not heard for a while,
has not crashed. A broken stream does not tell these apart, who started the process can, and its word may come a little
later: so a stream that breaks counts as a crash unless the word is another one, and where that would make a difference
it is waited for. A word that comes later still corrects the count.

| setting | default | unit | meaning |
|---|---|---|---|
| word_s | 0.5 | s | how long the word of who started a process is waited for |
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from core.worker import Identity

ALONE_FROM = 2
"""Crashes after which a request is tried alone."""
POISONOUS_FROM = 3
"""And refused, if it was alone at one of them."""
KEPT = 256
"""Lives of workers whose ends are remembered, for words that come late or early."""


@dataclass(slots=True, eq=False)
class Loss:
    """The end of a worker's life, or of a step of its engine."""

    worker: Identity
    crashed: bool
    """As far as is known."""
    until: float
    """Before this a word may change that; afterwards it is believed as it is."""


@dataclass(frozen=True, slots=True)
class Presence:
    """A request was there."""

    loss: Loss
    alone: bool


class Suspicion(StrEnum):
    """What becomes of a request."""

    NONE = "none"
    ALONE = "alone"
    POISONOUS = "poisonous"


class Poison:
    """All that one gateway knows of ends of workers. A request's own part, its presences, is the request's to keep."""

    def __init__(self, word_s: float = 0.5) -> None:
        self._word_s = word_s
        self._losses: OrderedDict[Identity, Loss] = OrderedDict()
        self._words: OrderedDict[Identity, bool] = OrderedDict()
        """Of lives whose end we had not noticed."""

    def lost(self, worker: Identity, crashed: bool, now: float) -> Loss:
        """This life of a worker is over; `crashed` is believed unless somebody who knows better says so."""
        word = self._words.pop(worker, None)
        waits = word is None and crashed
        loss = Loss(worker, crashed if word is None else word, now + self._word_s if waits else now)
        self._losses[worker] = loss
        _forget(self._losses)
        return loss

    def told(self, worker: Identity, crashed: bool) -> Loss | None:
        """Somebody who knows says how a life ended, or that it goes on; the end that this settles, if noticed."""
        loss = self._losses.get(worker)
        if loss is None:
            self._words[worker] = crashed
            _forget(self._words)
        else:
            loss.crashed, loss.until = crashed, float("-inf")
        return loss

    def back(self, worker: Identity) -> Loss | None:
        """The same life is here again: it was the stream that broke."""
        return self.told(worker, False) if worker in self._losses else None

    def check(self) -> None:
        assert len(self._losses) <= KEPT
        assert len(self._words) <= KEPT
        assert all(worker == loss.worker for worker, loss in self._losses.items())
        assert not self._words.keys() & self._losses.keys()


def raised(worker: Identity) -> Loss:
    """An engine raised: nobody need say more of that."""
    return Loss(worker, True, float("-inf"))


def suspicion(presences: Iterable[Presence], now: float) -> tuple[Suspicion, float]:
    """What is to be done with a request as things stand, and when that is certain; at once if not after `now`."""
    crashed = [each for each in presences if each.loss.crashed]
    sure = [each for each in crashed if each.loss.until <= now]
    worst = _judged(crashed)
    if len(sure) == len(crashed) or worst is _judged(sure):
        return worst, now
    return worst, max([each.loss.until for each in crashed])


def crashes(presences: Iterable[Presence]) -> list[Identity]:
    """Where they were, as far as is known."""
    return [each.loss.worker for each in presences if each.loss.crashed]


def _judged(crashed: Sequence[Presence]) -> Suspicion:
    if len(crashed) >= POISONOUS_FROM and any(each.alone for each in crashed):
        return Suspicion.POISONOUS
    return Suspicion.ALONE if len(crashed) >= ALONE_FROM else Suspicion.NONE


def _forget(ends: OrderedDict[Identity, Loss] | OrderedDict[Identity, bool]) -> None:
    while len(ends) > KEPT:
        ends.popitem(last=False)
