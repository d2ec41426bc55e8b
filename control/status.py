"""`baton status`: who is there, ready or not, and over which lanes KV goes."""

from __future__ import annotations

import json
from collections.abc import Iterable

from google.protobuf.json_format import MessageToDict

from control import http
from control.client import members
from control.state import State
from core.worker import Role, fell_back
from protos.baton.v1 import registry_pb2


def status(state: State, *, as_json: bool) -> int:
    """Print the membership; exit code 0 if all are ready, else 1."""
    known = members(state.coordinator)
    serves = bool(state.http) and http.ready(state.http.removeprefix("http://"))
    ready = bool(known) and all(member.ready for member in known) and (serves or not state.http)
    if as_json:
        rows = [
            MessageToDict(m, preserving_proto_field_name=True, always_print_fields_with_no_presence=True) for m in known
        ]
        for row, member in zip(rows, known, strict=True):
            for lane, told in zip(row["lanes"], member.lanes, strict=True):
                lane["fallback"] = fallback(told, member, known)
        front = {"url": state.http, "ready": serves} if state.http else None
        print(json.dumps({"coordinator": state.coordinator, "ready": ready, "members": rows, "http": front}))
        return 0 if ready else 1
    print(f"{'NAME':<14} {'ROLE':<8} {'READY':<6} {'ADDRESS':<22} {'METRICS':<22} {'KV TOKENS':>10}  LANES")
    print(f"{'coordinator':<14} {'':<8} {'yes':<6} {state.coordinator:<22}")
    for member in known:
        print(_row(member, known))
    if state.http:
        print(f"{'http':<14} {'':<8} {'yes' if serves else 'no':<6} {state.http}")
    return 0 if ready else 1


def get_workers(state: State, *, as_json: bool) -> int:
    """Print the workers by group: what each does, whom it reads from, and over what; exit code 0."""
    known = [member for member in members(state.coordinator) if member.role != Role.GATEWAY]
    known.sort(key=lambda member: (member.group, member.identity))
    if as_json:
        rows = [
            {
                "name": member.identity.split("#")[0],
                "identity": member.identity,
                "group": member.group,
                "role": member.role,
                "ready": member.ready,
                "address": member.address,
                "kv_tokens": member.pages * member.kv.page_tokens,
                "reads_from": [lane.source.split("#")[0] for lane in member.lanes],
            }
            for member in known
        ]
        print(json.dumps({"workers": rows}))
        return 0
    print(f"{'GROUP':<14} {'NAME':<24} {'ROLE':<8} {'READY':<6} {'KV TOKENS':>10}  READS FROM")
    for member in known:
        name, ready = member.identity.split("#")[0], "yes" if member.ready else "no"
        tokens = f"{member.pages * member.kv.page_tokens:,}"
        sources = ", ".join(lane.source.split("#")[0] for lane in member.lanes)
        print(f"{member.group or '-':<14} {name:<24} {member.role:<8} {ready:<6} {tokens:>10}  {sources}")
    return 0


def fallback(lane: registry_pb2.Lane, reader: registry_pb2.Member, known: Iterable[registry_pb2.Member]) -> bool:
    """Whether UCX took TCP for a lane of `reader` from one of the `known` members that is on its host."""
    sources = (member.address for member in known if member.identity == lane.source)
    return any(fell_back(lane.transport, reader.address, source) for source in sources)


def _row(member: registry_pb2.Member, known: Iterable[registry_pb2.Member]) -> str:
    tokens = f"{member.pages * member.kv.page_tokens:,}" if member.pages else ""
    lanes = "; ".join(
        f"{lane.source.split('#')[0]} {lane.transport} {lane.gbytes_per_s:.1f} GB/s {lane.latency_us:.0f} us"
        + (" (FALLBACK: on one host)" if fallback(lane, member, known) else "")
        for lane in member.lanes
    )
    ready = "yes" if member.ready else "no"
    name = member.identity.split("#")[0]
    where = f"{member.address:<22} {member.metrics_address:<22}"
    return f"{name:<14} {member.role:<8} {ready:<6} {where} {tokens:>10}  {lanes}"
