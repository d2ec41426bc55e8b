"""The entry of a worker with faults: the worker itself, between a transport and peers that do what rules say.

    BATON_TEST_FAULTS=RULES BATON_TEST_LANE=BYTES_PER_S python -m tests.live.faulty SETTINGS

Without the first it has no faults, without the second its lane is as fast as it is.

Beside the events of `tests/transfer/faults.py`, each message between workers has four: "send Ready" before it goes out
and "sent Ready" after that, "hear Ready" before the worker has it and "heard Ready" after that; that of the last
announcement are, besides, those of a "last Ready". What a gateway says has two: "hear Cancel" and "heard Cancel".
A step of the engine that has a sequence whose first token is 300 is a "step 300", before it begins.
"""

from __future__ import annotations

import asyncio
import os
import resource
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from control.engines import Loaded, load
from control.process import Service, build_version, main, make
from control.worker import Worker, make_transport
from core.config import ProcessConfig, WorkerConfig
from core.errors import LocalError
from core.messages import Message, Ready, ToPeer
from core.worker import Identity, Lane
from engine.api import Engine, Sampled, Step
from engine.api import Row as EngineRow
from tests.transfer.faults import FAULTS, LANE, MESSAGE_DEEDS, STEP_DEEDS, Faulty, FileRules, Rule, Rules, kill
from transfer.transport import Transport


class FaultyEngine:
    """`engine`, which crashes its process, or raises, in steps that rules name by a sequence's first token."""

    def __init__(self, engine: Engine, rules: Rules) -> None:
        self._engine = engine
        self._rules = rules
        self._firsts: dict[str, int] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def open(self, sequence: str, tokens: Sequence[int], *rest: Any) -> None:
        self._firsts[sequence] = tokens[0]
        self._engine.open(sequence, tokens, *rest)

    def close(self, sequence: str) -> None:
        self._firsts.pop(sequence, None)
        self._engine.close(sequence)

    def step(self, rows: Sequence[EngineRow]) -> list[Sampled]:
        self._obey(rows)
        return self._engine.step(rows)

    def begin(self, rows: Sequence[EngineRow]) -> Step:
        self._obey(rows)
        return self._engine.begin(rows)

    def _obey(self, rows: Sequence[EngineRow]) -> None:
        for row in rows:
            for rule in self._rules.on(f"step {self._firsts.get(row.sequence)}"):
                match rule.do:
                    case "abort":
                        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                        os.abort()
                    case "raise":
                        raise ValueError(f"a step of {len(rows)} rows is cursed")
                    case "kill":
                        kill(rule.seconds)
                    case _:
                        raise LocalError(f"rule: got {rule.do!r} of a step, want one of {STEP_DEEDS}")


class FaultyWorker(Worker):
    """A worker whose transport, engine and messages, but those to gateways, obey rules."""

    def __init__(self, *args: Any, rules: Rules) -> None:
        super().__init__(*args)
        self._rules = rules
        found = self._load

        def load(config: WorkerConfig) -> Loaded:
            engine, *rest = found(config)
            return FaultyEngine(engine, rules), *rest  # type: ignore[return-value]

        self._load = load

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
