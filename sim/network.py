"""Messages and reads between simulated processes: a fixed hop, and links that are shared in order.

A read occupies the outgoing link of its source and the incoming one of its sink for its bytes and runs; reads that
want the same link come one after the other. What is fixed about a read (its set-up) overlaps with others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from core.messages import Message
from core.worker import Identity
from scheduler.cost import CostModel
from sim.loop import Kind, Loop
from sim.scenario import Link


class Peer(Protocol):
    """Who is at the end of a message."""

    alive: bool
    order: int

    def heard(self, message: Message) -> None:
        """Somebody's message."""
        ...


class Network:
    """Who can be reached, and how long it takes."""

    def __init__(self, loop: Loop, cost: CostModel, lane: str, hop_s: float) -> None:
        self._loop = loop
        self._cost = cost.lane(lane)
        self._hop_s = hop_s
        self.peers: dict[Identity, Peer] = {}
        self._out: dict[str, float] = {}
        self._into: dict[str, float] = {}
        self._faults: list[Link] = []
        self.nbytes = 0

    def reachable(self, identity: Identity) -> bool:
        """True while this life of it goes on."""
        peer = self.peers.get(identity)
        return peer is not None and peer.alive

    def send(self, to: Identity, message: Message) -> bool:
        """It arrives a hop later; False if nobody is there any more."""
        peer = self.peers.get(to)
        if peer is None or not peer.alive:
            return False
        loop = self._loop
        loop.at(loop.now + self._hop_s, Kind.MESSAGE, peer.order, peer.heard, message)
        return True

    def read(
        self,
        source: Identity,
        sink: Identity,
        nbytes: int,
        runs: int,
        order: int,
        done: Callable[[Any], None],
        argument: Any,
    ) -> None:
        """Have `done(argument)` called when the bytes are there."""
        loop, cost = self._loop, self._cost
        speed, delay_s = 1.0, 0.0
        for fault in self._faults:
            if (
                fault.at_s <= loop.now < fault.until_s
                and fault.source in ("*", source.name)
                and fault.sink in ("*", sink.name)
            ):
                speed, delay_s = speed * fault.factor, delay_s + fault.delay_s
        start = max(loop.now, self._out.get(source.name, 0.0), self._into.get(sink.name, 0.0))
        free = start + (cost.run_s * runs + cost.byte_s * nbytes) / speed
        self._out[source.name] = self._into[sink.name] = free
        self.nbytes += nbytes
        loop.at(free + cost.setup_s + delay_s, Kind.READ, order, done, argument)

    def trouble(self, fault: Link) -> None:
        """From `fault.at_s` to `fault.until_s` reads it names are slower."""
        self._faults.append(fault)
