"""A lane that failed at first is tried again: real workers in one process, over a transport that fails once."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from control import worker as working
from control.client import members
from control.coordinator import Coordinator
from control.worker import Worker
from core.config import CoordinatorConfig, WorkerConfig
from core.errors import RemoteError
from core.kv import PageRun
from core.worker import Identity, Numerics, Role
from scheduler.decode_migrating import MigratingPolicy
from scheduler.decode_policy import DecodePolicy
from scheduler.lanes import LanesConfig
from tests.cast import SHAPE
from tests.live.cluster import until
from tests.transfer.faults import Faulty, Rule, Rules
from transfer import thread
from transfer import thread_events as lanes
from transfer.inprocess import InProcess
from transfer.transport import ReadFailed, ReadFenced

PAGES = 40


class Flaky(InProcess):
    """Its first reads and then two connections fail, each in a way of its own."""

    def __init__(self, owner: str) -> None:
        super().__init__(owner)
        self.faults = ["refused", "broken", "silent", "no connection", "connected all the same"]
        self.connected: list[str] = []
        self.silent = 0
        """The read that never ends."""

    def failing(self, *faults: str) -> str:
        """The next fault if it is one of these, once."""
        return self.faults.pop(0) if self.faults and self.faults[0] in faults else ""

    def connect(self, peer: str, metadata: bytes) -> None:
        self.connected.append(peer)
        fault = self.failing("no connection", "connected all the same")
        if fault != "no connection":
            super().connect(peer, metadata)
        if fault:
            raise RemoteError(fault)

    def read(
        self,
        read_id: int,
        peer: str,
        source: Sequence[PageRun],
        target: Sequence[PageRun],
        nbytes: int | None = None,
    ) -> None:
        match self.failing("refused", "broken", "silent"):
            case "refused":
                raise RemoteError("no such pages")
            case "broken":
                self._ended.append(ReadFailed(read_id, "broken", in_doubt=False))
            case "silent":
                self.silent = read_id
            case _:
                super().read(read_id, peer, source, target, nbytes)

    def abandon(self, read_id: int) -> None:
        if read_id == self.silent:
            self._ended.append(ReadFailed(read_id, "abandoned", in_doubt=True))
        super().abandon(read_id)

    def fence(self, read_ids: Sequence[int]) -> None:
        if self.silent in read_ids:
            self._ended.append(ReadFenced(self.silent))
            self.silent = 0
        super().fence(read_ids)


def load(config: WorkerConfig) -> tuple[Any, Numerics, str, int]:
    """An engine that computes nothing: its memory is all that a lane needs."""
    arena = memoryview(bytearray(PAGES * SHAPE.page_nbytes))
    engine = SimpleNamespace(kv=SHAPE, pages=PAGES, arena=arena, host_pages=0, host_pages_used=0, grammar="")
    return engine, Numerics(False, SHAPE.dtype, 1, "none"), "f", 100


def ready(coordinator: str) -> set[str]:
    """The workers that call themselves ready."""
    return {member.role for member in members(coordinator) if member.ready}


@pytest.mark.parametrize("roles", [(Role.PREFILL, Role.DECODE), (Role.MIXED,)], ids=["two", "alone"])
def test_a_lane_is_tried_again_until_it_is_up_and_then_left_alone(monkeypatch, caplog, roles):
    """The last one reads from the first, or from itself. What is said of an attempt before is no error."""
    transports: dict[str, Flaky] = {}
    bugs: list[BaseException] = []

    def make(kind: str, me: Identity) -> Flaky:
        transports[me.name] = Flaky(str(me))
        return transports[me.name]

    monkeypatch.setattr(working, "LANES", LanesConfig(first_s=0.05, most_s=0.05))
    monkeypatch.setattr(thread, "PROBE_ANSWER_S", 0.05)

    async def run() -> None:
        coordinator = Coordinator(CoordinatorConfig())
        await coordinator.start()
        workers = []
        for number, role in enumerate(roles):
            config = WorkerConfig(
                role, role, coordinator.address, "", "m", transport="inprocess", engine="paced", check=True
            )
            workers.append(Worker(config, Identity(role, number + 1), "b", load, bugs.append, make))
        try:
            for worker in workers:
                await worker.start()
            await asyncio.to_thread(until, lambda: ready(coordinator.address) == {*roles}, "all are ready")
            caplog.set_level("INFO", "baton.worker")
            caplog.clear()
            workers[-1]._transferred(lanes.ProbeFailed(f"{roles[0]}#000000000001", "disconnected", attempt=1))
            assert [each.levelname for each in caplog.records if "lane from" in each.message] == ["INFO"]
        finally:
            for worker in workers:
                await worker.stop("the test is over")
            await coordinator.stop("the test is over")

    asyncio.run(run())
    reader = transports[roles[-1]]
    assert reader.faults == []
    assert reader.connected == [f"{roles[0]}#000000000001"] * 5
    assert not reader.silent, "nothing is in doubt"
    assert not bugs


class Gated(InProcess):
    """Cannot connect while its gate is closed; while it is slow, nothing but the first read of a connection ends."""

    def __init__(self, owner: str) -> None:
        super().__init__(owner)
        self.open, self.slow, self._fresh = True, False, True
        self._held: list[tuple[Any, ...]] = []

    def connect(self, peer: str, metadata: bytes) -> None:
        if not self.open:
            raise RemoteError("the gate is closed")
        super().connect(peer, metadata)
        self._fresh = True

    def read(self, *args: Any) -> None:
        if self.slow and not self._fresh:
            self._held.append(args)
        else:
            super().read(*args)
        self._fresh = False

    def poll(self) -> Any:
        while self._held and not self.slow:
            super().read(*self._held.pop())
        return super().poll()


@pytest.mark.parametrize("migrate", [False, True])
def test_a_lane_that_breaks_is_away_for_all_who_ask_until_it_is_made_anew(monkeypatch, migrate):
    """Both workers live, and no stream ends; two decode workers between which rows move know it, too.

    The second time it is slow to measure, and used before it is.
    """
    gates: dict[str, Gated] = {}
    rules = {"d": Rules(), "e": Rules(), "p": Rules()}
    bugs: list[BaseException] = []

    def make(kind: str, me: Identity) -> Faulty:
        gates[me.name] = Gated(str(me))
        return Faulty(gates[me.name], rules[me.name])

    monkeypatch.setattr(working, "LANES", LanesConfig(first_s=0.05, most_s=0.05))

    async def run() -> None:
        coordinator = Coordinator(CoordinatorConfig())
        await coordinator.start()
        where = coordinator.address
        roles = {"d": Role.DECODE, "p": Role.PREFILL, **({"e": Role.DECODE} if migrate else {})}
        workers = {}
        for number, (name, role) in enumerate(roles.items()):
            config = WorkerConfig(
                name, role, where, "", "m", transport="inprocess", engine="paced", check=True, migrate=migrate
            )
            workers[name] = Worker(config, Identity(name, number + 1), "b", load, bugs.append, make)

        def known() -> dict[str, tuple[bool, set[str]]]:
            return {
                m.identity.partition("#")[0]: (m.ready, {lane.source.partition("#")[0] for lane in m.lanes})
                for m in members(where)
            }

        async def seen(wanted: dict[str, tuple[bool, set[str]]], what: str) -> None:
            await asyncio.to_thread(until, lambda: known() == wanted, what, 20.0, known)

        def peers(name: str) -> set[str]:
            """Those that rows of one may move to."""
            policy = workers[name]._decode.policy
            return {peer.name for peer in policy.moves.peers} if isinstance(policy, MigratingPolicy) else set()

        def measured() -> bool:
            return workers[first]._ways.measured(workers[source]._me)

        first, source = ("d", "e") if migrate else ("d", "p")
        try:
            for worker in workers.values():
                await worker.start()
            lanes = {"d": {"p", "e"}, "e": {"p", "d"}} if migrate else {"d": {"p"}}
            whole = {"p": (True, set()), **{name: (True, each) for name, each in lanes.items()}}
            await seen(whole, "all are there")
            if migrate:
                await asyncio.to_thread(until, lambda: peers("d") == {"e"} and peers("e") == {"d"}, "rows can move")
            for slow in (False, True):
                gates[first].open, gates[first].slow = False, slow
                rules[first].put([Rule("read", "break")])
                reader = workers[first]
                reader._transfer.read(1, str(workers[source]._me), [PageRun(0, 1)], [PageRun(PAGES - 1, 1)])
                less = lanes[first] - {source}
                broken = {**whole, first: (bool(less), less)}
                if not migrate:
                    broken["p"] = (False, set())
                await seen(broken, "its lane is away")
                if migrate:
                    await asyncio.to_thread(until, lambda: not peers("d") and not peers("e"), "none moves")
                assert reader._ways.away(workers[source]._me)
                assert reader._peers.has(workers[source]._me)
                gates[first].open = True
                await seen(whole, "it is made anew")
                if migrate:
                    await asyncio.to_thread(until, lambda: peers("d") == {"e"} and peers("e") == {"d"}, "rows move")
                if slow:
                    assert not measured()
                    gates[first].slow = False
                await asyncio.to_thread(until, measured, "it is measured")
            assert workers[first]._ways.remade == 2
        finally:
            for worker in workers.values():
                await worker.stop("the test is over")
            await coordinator.stop("the test is over")

    asyncio.run(run())
    assert not bugs


def test_decode_workers_between_which_rows_move_have_lanes_but_serve_only_with_a_prefill_worker(monkeypatch):
    bugs: list[BaseException] = []
    monkeypatch.setattr(working, "make_transport", lambda kind, me: InProcess(str(me)))

    async def run() -> None:
        coordinator = Coordinator(CoordinatorConfig())
        await coordinator.start()
        where = coordinator.address

        def worker(name: str, role: Role, number: int, migrate: bool) -> Worker:
            config = WorkerConfig(
                name, role, where, "", "m", transport="inprocess", engine="paced", check=True, migrate=migrate
            )
            return Worker(config, Identity(name, number), "b", load, bugs.append)

        def known() -> dict[str, set[str]]:
            return {
                m.identity.partition("#")[0]: {lane.source.partition("#")[0] for lane in m.lanes}
                for m in members(where)
            }

        asked = [("a", True), ("b", True), ("c", False)]
        workers = [worker(name, Role.DECODE, at, migrate) for at, (name, migrate) in enumerate(asked, 1)]
        workers.append(worker("p", Role.PREFILL, 9, True))
        try:
            for each in workers[:3]:
                await each.start()
            lanes = {"a": {"b"}, "b": {"a"}, "c": set()}
            await asyncio.to_thread(until, lambda: known() == lanes, "rows can move between a and b", 20.0, known)
            assert not await asyncio.to_thread(ready, where)
            await workers[3].start()
            lanes = {"a": {"b", "p"}, "b": {"a", "p"}, "c": {"p"}, "p": set()}
            await asyncio.to_thread(until, lambda: known() == lanes, "all are there", 20.0, known)
            await asyncio.to_thread(until, lambda: ready(where) == {Role.PREFILL, Role.DECODE}, "they serve")
            policies = [each._decode.policy for each in workers[:3] if each._decode is not None]
            assert [type(policy) for policy in policies] == [MigratingPolicy, MigratingPolicy, DecodePolicy]
            a, b = policies[:2]
            assert isinstance(a, MigratingPolicy)
            await asyncio.to_thread(
                until, lambda: a.moves.peers == {workers[1]._me: b.freeness()}, "a knows how free b is"
            )
            drained = asyncio.create_task(workers[1].stop("the test is over"))
            await asyncio.to_thread(until, lambda: not a.moves.peers, "a knows that b is gone")
            await drained
        finally:
            for each in (workers[0], *workers[2:]):
                await each.stop("the test is over")
            await coordinator.stop("the test is over")

    asyncio.run(run())
    assert not bugs


def test_prefill_workers_that_fetch_have_lanes_but_serve_only_with_a_decode_worker(monkeypatch):
    """Lanes from all who may have pages, whether they fetch or not; none is needed to be ready, and none is missed."""
    bugs: list[BaseException] = []
    monkeypatch.setattr(working, "make_transport", lambda kind, me: InProcess(str(me)))

    async def run() -> None:
        coordinator = Coordinator(CoordinatorConfig())
        await coordinator.start()
        where = coordinator.address

        def worker(name: str, role: Role, number: int, fetch: bool) -> Worker:
            config = WorkerConfig(
                name, role, where, "", "m", transport="inprocess", engine="paced", check=True, fetch=fetch
            )
            return Worker(config, Identity(name, number), "b", load, bugs.append)

        def known() -> dict[str, set[str]]:
            return {
                m.identity.partition("#")[0]: {lane.source.partition("#")[0] for lane in m.lanes}
                for m in members(where)
            }

        asked = [("a", Role.PREFILL, True), ("b", Role.PREFILL, True), ("c", Role.PREFILL, False)]
        workers = [worker(name, role, at, fetch) for at, (name, role, fetch) in enumerate(asked, 1)]
        workers.append(worker("d", Role.DECODE, 9, True))

        def reached(number: int) -> set[str]:
            """Those that a prefill worker's policy may fetch from."""
            policy = workers[number]._prefill.policy
            return {who.name for who in policy.fetches._busy_until} if policy.fetches is not None else set()

        async def seen(lanes: dict[str, set[str]]) -> None:
            await asyncio.to_thread(until, lambda: known() == lanes, "lanes", 20.0, known)

        try:
            for each in workers[:3]:
                await each.start()
            await seen({"a": {"b", "c"}, "b": {"a", "c"}, "c": set()})
            assert not await asyncio.to_thread(ready, where)
            await workers[3].start()
            await seen({"a": {"b", "c", "d"}, "b": {"a", "c", "d"}, "c": set(), "d": {"a", "b", "c"}})
            await asyncio.to_thread(until, lambda: ready(where) == {Role.PREFILL, Role.DECODE}, "they serve")
            assert [reached(number) for number in range(3)] == [{"b", "c", "d"}, {"a", "c", "d"}, set()]
            await workers[1].stop("the test is over")
            await asyncio.to_thread(until, lambda: reached(0) == {"c", "d"}, "a knows that b is gone")
            await seen({"a": {"c", "d"}, "c": set(), "d": {"a", "c"}})
            assert await asyncio.to_thread(ready, where) == {Role.PREFILL, Role.DECODE}
        finally:
            for each in (workers[0], *workers[2:]):
                await each.stop("the test is over")
            await coordinator.stop("the test is over")

    asyncio.run(run())
    assert not bugs
