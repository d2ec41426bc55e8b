"""The entry of a worker with faults: the worker itself, between a transport and peers that do what rules say.

    BATON_TEST_FAULTS=RULES BATON_TEST_LANE=BYTES_PER_S python -m tests.live.faulty SETTINGS

Without the first it has no faults, without the second its lane is as fast as it is.

Beside the events of `tests/transfer/faults.py`, each message between workers has four: "send Ready" before it goes out
and "sent Ready" after that, "hear Ready" before the worker has it and "heard Ready" after that; that of the last
announcement are, besides, those of a "last Ready". What a gateway says has two: "hear Cancel" and "heard Cancel".
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from control.engines import load
from control.process import Service, build_version, main, make
from control.worker import Worker, make_transport
from core.config import ProcessConfig, WorkerConfig
from core.errors import LocalError
from core.messages import Message, Ready, ToPeer
from core.worker import Identity, Lane
from tests.transfer.faults import FAULTS, LANE, MESSAGE_DEEDS, Faulty, FileRules, Rule, Rules, kill
from transfer.transport import Transport


class FaultyWorker(Worker):
    """A worker whose transport and whose messages, but those to gateways, obey rules."""

    def __init__(self, *args: Any, rules: Rules) -> None:
        super().__init__(*args)
        self._rules = rules

    def _send_peer(self, peer: Identity, message: ToPeer) -> bool:
        sends = super()._send_peer
        return self._pass("send", "sent", message, lambda: sends(peer, message))

    def _peer_heard(self, peer: Identity, message: ToPeer | Lane) -> None:
        hears = super()._peer_heard
        if isinstance(message, Lane):
            hears(peer, message)
        else:
            self._pass("hear", "heard", message, lambda: self._peers.has(peer) and bool(hears(peer, message)))

    def _gateway_heard(self, gateway: Identity, message: Message) -> None:
        hears = super()._gateway_heard
        self._pass("hear", "heard", message, lambda: bool(hears(gateway, message)))

    def _pass(self, before: str, after: str, message: Message, go: Callable[[], bool]) -> bool:
        loop = asyncio.get_running_loop()
        times = 1
        for rule in self._on(before, message):
            match rule.do:
                case "drop":
                    return True
                case "delay":
                    loop.call_later(rule.seconds, go)
                    return True
                case "twice":
                    times = 2
                case "kill":
                    kill(rule.seconds)
                case _:
                    raise LocalError(f"rule: got {rule.do!r} of a message, want one of {MESSAGE_DEEDS}")
        done = go()
        for _ in range(times - 1):
            go()
        for rule in self._on(after, message):
            if rule.do != "kill":
                raise LocalError(f"rule: got {rule.do!r} of a message that passed, want 'kill'")
            kill(rule.seconds)
        return done

    def _on(self, when: str, message: Message) -> list[Rule]:
        name = type(message).__name__
        last = isinstance(message, Ready) and bool(message.firsts)
        return self._rules.on(f"{when} {name}") + (self._rules.on(f"{when} last {name}") if last else [])


def faulty(config: ProcessConfig, me: Identity, bug: Callable[[BaseException], None]) -> Service:
    """A worker with the faults that the environment names; of another process, what `control.process` makes."""
    if not isinstance(config, WorkerConfig):
        return make(config, me, bug)
    path, bytes_per_s = os.environ.get(FAULTS), float(os.environ.get(LANE, "inf"))
    rules = FileRules(Path(path), me.name) if path else Rules()

    def transport(kind: str, owner: Identity) -> Transport:
        return Faulty(make_transport(kind, owner), rules, bytes_per_s)

    return FaultyWorker(config, me, build_version(), load, bug, transport, rules=rules)


if __name__ == "__main__":
    main(faulty)
