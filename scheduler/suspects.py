"""Which requests were present at crashes of workers, and which workers have one of them to themselves. Pure.

The rules are `scheduler/poison.py`'s: who was present at two crashes is placed alone, in no step with another request,
and who was present at three, alone at one of them, is refused. Two such requests are never at one worker: if it
crashed, nobody would know which of them was the cause.

Present is a request of which a worker computes the prompt, has or is about to have the KV, or decodes. An attempt may
fail before the end of its sink is heard of, which is why it is remembered for a moment where its KV was going.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from core.request import Phase
from core.worker import Identity
from scheduler.calls import Call, Flight, Left
from scheduler.poison import Loss, Poison, Presence, Suspicion, raised, suspicion

LEFT_S = 1.0
"""News of a sink comes no later than this after a prefill worker said that its KV was not taken there."""


class Suspects:
    """Of one gateway."""

    def __init__(self, word_s: float) -> None:
        self._poison = Poison(word_s)
        self._left: deque[Call] = deque()
        """Calls of which an attempt failed lately while its KV was on the way."""
        self._alone: dict[Identity, Flight] = {}
        """Workers, and the one that each has to itself, or will have."""
        self.freed = False
        """There may be a worker for another such one; whoever looks sets it back."""

    def __bool__(self) -> bool:
        """Somebody has workers to itself."""
        return bool(self._alone)

    # Ends of workers.
    def lost(self, worker: Identity, crashed: bool, now: float, there: Sequence[Flight]) -> None:
        """A worker's life is over; `there` are those that it may have had."""
        loss = self._poison.lost(worker, crashed, now)
        for flight in there:
            if flight.finished is None and _present(flight, worker):
                _note(flight.call, loss, flight.alone)
        for call in self._left:
            left = call.left
            if left is not None and worker in left.sinks and now <= left.at + LEFT_S and _note(call, loss, left.alone):
                call.left = None

    def told(self, worker: Identity, crashed: bool) -> Loss | None:
        """Somebody who knows says how a life ended; the loss that this settles."""
        return self._poison.told(worker, crashed)

    def back(self, worker: Identity) -> Loss | None:
        """The same life is here again; the loss that this settles."""
        return self._poison.back(worker)

    def raised(self, flight: Flight, worker: Identity) -> None:
        """An engine's step failed that had it."""
        flight.call.presences += (Presence(raised(worker), flight.alone),)

    def left(self, flight: Flight, sinks: Sequence[Identity], now: float) -> None:
        """An attempt failed while its KV was on the way to one of these."""
        flight.call.left = Left(tuple(sinks), now, flight.alone)
        while self._left and ((first := self._left[0].left) is None or now > first.at + LEFT_S):
            self._left.popleft()
        self._left.append(flight.call)

    # Alone.
    def judge(self, flight: Flight, now: float) -> None:
        """Whether it is alone in the attempt that is about to begin."""
        if flight.call.presences:
            fate, _ = suspicion(flight.call.presences, now)
            flight.alone = fate is not Suspicion.NONE and len(flight.branches) == 1

    def bars(self, worker: Identity) -> bool:
        """Whether another one has this worker to itself."""
        return worker in self._alone

    def begin(self, flight: Flight) -> None:
        """Its attempt begins: if it is to be alone, its workers are its own."""
        if flight.alone:
            self._alone[flight.ticket.source] = self._alone[flight.ticket.sink] = flight

    def release(self, flight: Flight, *workers: Identity) -> None:
        """These do not have it any more."""
        for worker in workers if flight.alone else ():
            if self._alone.get(worker) is flight:
                del self._alone[worker]
                self.freed = True

    def check(self) -> None:
        """Raise AssertionError if an invariant does not hold."""
        self._poison.check()
        assert not self.freed
        for worker, flight in self._alone.items():
            assert flight.alone
            assert worker in (flight.ticket.source, flight.ticket.sink)
            assert flight.call.flights.count(flight) == 1


def _present(flight: Flight, worker: Identity) -> bool:
    match flight.phase:
        case Phase.PREFILLING:
            return flight.ticket.source == worker
        case Phase.HANDING_OFF:
            return worker in (flight.ticket.source, flight.ticket.sink, flight.second)
        case Phase.DECODING:
            return flight.ticket.sink == worker
        case _:
            return False


def _note(call: Call, loss: Loss, alone: bool) -> bool:
    """Once, however many of its continuations were there; False if that was."""
    if call.presences and call.presences[-1].loss is loss:
        return False
    call.presences += (Presence(loss, alone),)
    return True
