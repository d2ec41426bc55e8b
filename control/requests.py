"""`baton get requests`, `baton trace` and `baton debug`: asks the processes of a deployment what they are doing."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import grpc

from control.client import members, waterfall
from control.launcher import reached
from control.state import State
from core.errors import RpcFailure, SetupError
from protos.baton.v1 import inspect_pb2, inspect_pb2_grpc

ANSWER_S = 3.0
"""A process that says nothing for so long is named as silent."""
MACHINES = ("router", "decode", "prefill", "source", "sink", "client")
"""Whose word about a request comes first: who decides before who carries out."""

T = TypeVar("T")


@dataclass(slots=True)
class Asked:
    """A request, or one of its continuations, and what each machine that has it says."""

    request_id: str
    key: str
    at: list[tuple[str, inspect_pb2.Standing]] = field(default_factory=list)
    """Process and its word; the router's first."""

    @property
    def router(self) -> inspect_pb2.Standing | None:
        """The word of the gateway that it came to; None if that one does not say."""
        return next((each for _, each in self.at if each.machine == "router"), None)

    @property
    def age_s(self) -> float:
        """Since it arrived, as far as is known."""
        return max(each.age_s for _, each in self.at)

    @property
    def left_s(self) -> float | None:
        """Until its deadline."""
        known = [each for _, each in self.at if each.HasField("left_s")]
        best = self.router if self.router in known else min(known, key=lambda each: each.left_s, default=None)
        return best.left_s if best is not None else None

    @property
    def owner(self) -> str:
        """PROCESS/MACHINE of who has it now."""
        process = self.router.owner if self.router is not None else self.at[0][0]
        machine = next((each.machine for where, each in self.at if where == process), "")
        return f"{process}/{machine}" if machine else process

    def document(self) -> dict[str, Any]:
        """For `-o json`."""
        at = [
            {
                "process": process,
                "machine": each.machine,
                "state": each.state,
                "age_s": each.age_s,
                "left_s": each.left_s if each.HasField("left_s") else None,
                "waits_for": each.waits_for,
            }
            for process, each in self.at
        ]
        tokens = max(each.tokens for _, each in self.at)
        first = {"request_id": self.request_id, "key": self.key, "owner": self.owner, "age_s": self.age_s}
        return {**first, "left_s": self.left_s, "tokens": tokens, "at": at}


def gathered(words: Iterable[tuple[str, inspect_pb2.Standing]]) -> list[Asked]:
    """What processes said, by request, the oldest first; words without a key are about all with that name."""
    found: dict[str, Asked] = {}
    loose: list[tuple[str, inspect_pb2.Standing]] = []
    for process, each in words:
        if not each.key:
            loose.append((process, each))
            continue
        asked = found.setdefault(each.key, Asked("", each.key))
        asked.request_id = asked.request_id or each.request_id
        asked.at.append((process, each))
    for process, each in loose:
        same = [asked for asked in found.values() if asked.request_id == each.request_id]
        for asked in same or [found.setdefault(f"{process} {each.request_id}", Asked(each.request_id, ""))]:
            asked.at.append((process, each))
    for asked in found.values():
        asked.at.sort(key=lambda word: (_rank(word[1].machine), word[0]))
    return sorted(found.values(), key=lambda asked: (-asked.age_s, asked.key))


def get_requests(state: State, *, older_s: float, as_json: bool) -> int:
    """Print every request in flight of at least that age; exit code 1 if a process did not answer."""
    words, silent = _words(state)
    found = [asked for asked in gathered(words) if asked.age_s >= older_s]
    if as_json:
        print(json.dumps({"requests": [asked.document() for asked in found], "silent": silent}))
    else:
        print("\n".join(_table(found)))
    return _say_silent(silent)


def trace(state: State, request_id: str, *, as_json: bool) -> int:
    """Print where the time of a request went, or has gone so far; SetupError if no gateway knows it."""

    def ask(stub: inspect_pb2_grpc.InspectServiceStub) -> inspect_pb2.TraceResponse | None:
        try:
            answer: inspect_pb2.TraceResponse = stub.Trace(
                inspect_pb2.TraceRequest(request_id=request_id), timeout=ANSWER_S
            )
            return answer
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                return None
            raise

    answers, silent = _all({f"gateway at {each}": reached(each) for each in state.gateways}, ask)
    found = [answer for answer in answers.values() if answer is not None]
    if not found:
        if silent:
            raise RpcFailure(f"no answer from {', '.join(silent)}")
        raise SetupError(f"request: no gateway has {request_id!r}, or still knows it", exit_code=1)
    best = max(found, key=lambda answer: (answer.running, answer.arrived_at))
    at: list[Asked] = []
    if best.running:
        words, _ = _words(state)
        at = [asked for asked in gathered(words) if asked.request_id == request_id]
    if as_json:
        from google.protobuf.json_format import MessageToDict

        document = MessageToDict(best, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
        print(json.dumps({**document, "requests": [asked.document() for asked in at]}))
        return 0
    end = best.end
    how = f"{best.phase} for {best.total_s:.1f} s" if best.running else f"{best.phase}: {best.reason} ({best.code})"
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(best.arrived_at))
    print(f"{request_id}: {how}; arrived {when}, {end.attempts} attempts")
    print("\n".join(waterfall(end)))
    print(f"  {end.prompt_tokens} prompt tokens, {end.cached_tokens} of them cached, {end.completion_tokens} new ones")
    if at:
        print("\n".join(_table(at)))
    return 0


def debug(state: State, name: str, *, as_json: bool) -> int:
    """Print what goes on inside a process; SetupError if there is none of that name."""
    addresses = _addresses(state)
    if name not in addresses:
        raise SetupError(f"process: got {name!r}, want one of {', '.join(sorted(addresses))}")
    answers, silent = _all(
        {name: addresses[name]}, lambda stub: stub.Debug(inspect_pb2.DebugRequest(), timeout=10 * ANSWER_S)
    )
    if silent:
        raise RpcFailure(f"{name} does not answer; SIGUSR1 makes it write its stacks to the log all the same")
    text = answers[name].document
    print(text if as_json else "\n".join(_report(json.loads(text))))
    return 0


def _addresses(state: State) -> dict[str, str]:
    """Of all processes, by name; where the coordinator does not answer, of the gateways alone."""
    try:
        there = {each.identity.partition("#")[0]: reached(each.address) for each in members(state.coordinator)}
    except (RpcFailure, SetupError) as error:
        print(f"the coordinator does not say who is there: {error}", file=sys.stderr)
        there = {f"gateway at {each}": reached(each) for each in state.gateways}
    return {**there, "coordinator": state.coordinator}


def _words(state: State) -> tuple[list[tuple[str, inspect_pb2.Standing]], list[str]]:
    answers, silent = _all(
        _addresses(state), lambda stub: stub.GetRequests(inspect_pb2.GetRequestsRequest(), timeout=ANSWER_S)
    )
    words = [(answer.identity.partition("#")[0], each) for answer in answers.values() for each in answer.requests]
    return words, silent


def _all(
    addresses: dict[str, str], ask: Callable[[inspect_pb2_grpc.InspectServiceStub], T]
) -> tuple[dict[str, T], list[str]]:
    """The answers of several processes, asked at once, and the names of those that gave none."""

    def one(address: str) -> T:
        with grpc.insecure_channel(address) as channel:
            return ask(inspect_pb2_grpc.InspectServiceStub(channel))

    answers: dict[str, T] = {}
    silent = []
    with ThreadPoolExecutor(max_workers=32) as pool:
        for name, asked in [(name, pool.submit(one, address)) for name, address in addresses.items()]:
            try:
                answers[name] = asked.result()
            except grpc.RpcError as error:
                silent.append(f"{name} ({error.code().name})")
    return answers, silent


def _say_silent(silent: list[str]) -> int:
    if silent:
        print(f"no answer from {', '.join(silent)}", file=sys.stderr)
    return 1 if silent else 0


def _rank(machine: str) -> int:
    return MACHINES.index(machine) if machine in MACHINES else len(MACHINES)


def _table(found: list[Asked]) -> list[str]:
    """A line for each word; the owner's is marked."""
    lines = [f"{'REQUEST':<24} {'AGE':>8} {'LEFT':>8}  {'WHERE':<22} {'STATE':<12} WAITS FOR"]
    for asked in found:
        left = f"{asked.left_s:.1f}s" if asked.left_s is not None else ""
        head = f"{asked.request_id or asked.key:<24} {asked.age_s:>7.1f}s {left:>8}"
        for process, each in asked.at:
            where = f"{process}/{each.machine}"
            mark = "*" if where == asked.owner else " "
            lines.append(f"{head} {mark}{where:<22} {each.state:<12} {each.waits_for}".rstrip())
            head = " " * len(head)
    return lines


def _report(document: dict[str, Any]) -> list[str]:
    """A debug document for people: stacks in full, of each machine its fields, of the arena who holds what."""
    lines = [document["process"], "", "threads"]
    for name, stack in document["threads"].items():
        lines += [f"  {name}", *(f"    {each}" for each in stack)]
    lines += ["", "tasks"]
    for task in document["tasks"]:
        lines.append(f"  {task['name']} {task['what']}{''.join(f'; {each}' for each in task['at'][-1:])}")
    state = document["machines"]["state"]
    objects = state["objects"]
    for name, value in objects[state["root"]["#"]][1]:
        kind, attributes = objects[value["#"]]
        lines += ["", f"machine {name}: {kind}"]
        lines += [f"  {field} = {_brief(found, objects)}" for field, found in attributes.items()]
    lines += [f"machine {name}: {why}" for name, why in document["machines"]["unwritten"].items()]
    pages = document["pages"]
    if pages is not None:
        owners = ", ".join(f"{count} {owner}" for owner, count in pages["owners"].items() if count)
        lines += ["", f"pages: {pages['total']}, {owners}, {pages['promised']} promised"]
        for holder, held in sorted(pages["holders"].items()):
            runs = " ".join(f"{start}+{count}" for start, count in held["runs"][:12])
            lines.append(f"  {holder}: {held['pages']} ({held['own']} its own)  {runs}")
    return lines


def _brief(value: Any, objects: list[Any]) -> str:
    """A value of a state document in a few words."""
    if not isinstance(value, dict):
        return repr(value)
    if "#" not in value:
        return str(next(iter(value.values())))
    entry = objects[value["#"]]
    match entry[0]:
        case "numbers":
            return f"{entry[1]} numbers"
        case "enum":
            return str(entry[2])
        case "list" | "tuple" | "set" | "dict" | "OrderedDict" | "deque":
            return f"{len(entry[1])} entries"
        case "core.worker:Identity":
            return str(entry[1]["name"])
        case kind:
            return str(kind)
