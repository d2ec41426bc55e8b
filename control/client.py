"""Talks to a running deployment, for the CLI and the demo: plain blocking gRPC."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc

from core.errors import RpcFailure, SetupError
from protos.baton.v1 import inference_pb2, inference_pb2_grpc, registry_pb2, registry_pb2_grpc


@dataclass(slots=True)
class Ask:
    """One prompt and its sampling; None leaves the gateway's default."""

    text: str
    chat: bool = False
    request_id: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    """Other fields of GenerateRequest by name."""
    group: str = ""
    """Whose workers are to serve it; empty: those of requests that name none."""

    def request(self) -> inference_pb2.GenerateRequest:
        """The message for it."""
        request = inference_pb2.GenerateRequest(request_id=self.request_id)
        for name, value in self.options.items():
            if value is None:
                continue
            if isinstance(value, list | tuple):
                getattr(request, name).extend(value)
            else:
                setattr(request, name, value)
        if self.group:
            request.hints.group = self.group
        if self.chat:
            request.chat.messages.append(inference_pb2.ChatMessage(role="user", content=self.text))
        else:
            request.text = self.text
        return request


def generate(
    address: str, request: inference_pb2.GenerateRequest, timeout_s: float | None = None
) -> Iterator[inference_pb2.GenerateResponse]:
    """The responses to one request; raises RpcFailure with the server's sentence."""
    with grpc.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        try:
            yield from stub.Generate(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise _failure(address, error) from error


def members(coordinator: str) -> list[registry_pb2.Member]:
    """The members the coordinator knows."""
    with grpc.insecure_channel(coordinator) as channel:
        stub = registry_pb2_grpc.RegistryServiceStub(channel)
        try:
            for response in stub.Watch(registry_pb2.WatchRequest(), timeout=5.0):
                return list(response.members)
        except grpc.RpcError as error:
            raise _failure(coordinator, error) from error
    return []


def report_end(coordinator: str, identity: str, crashed: bool) -> bool:
    """Tell how a process that we started has ended; False if the coordinator cannot be told now."""
    request = registry_pb2.ReportEndRequest(ended=registry_pb2.Ended(identity=identity, crashed=crashed))
    with grpc.insecure_channel(coordinator) as channel:
        try:
            registry_pb2_grpc.RegistryServiceStub(channel).ReportEnd(request, timeout=1.0)
        except grpc.RpcError:
            return False
    return True


def waterfall(end: inference_pb2.End) -> Sequence[str]:
    """A request's stages as lines of text: where its time went, and over which lane its KV."""
    longest = max((stage.seconds for stage in end.stages), default=0.0) or 1.0
    lines = []
    for stage in end.stages:
        bar = "#" * round(28 * stage.seconds / longest)
        extra = ""
        if stage.name == "pull":
            d = stage.detail
            lane = f"{d['gbytes_per_s']} GB/s, {d['transport']}"
            extra = f"{int(d['nbytes']) / 1e3:,.0f} kB in {d['runs']} runs from {d['from']}, {lane}"
            if int(d["cached"]):
                extra = f"{d['cached']} tokens were here" + (f", {extra}" if int(d["nbytes"]) else "")
        elif stage.name == "move":
            d = stage.detail
            copied = f"{int(d['nbytes']) / 1e3:,.0f} kB from {d['from']} in {float(d['copy_s']) * 1e3:.1f} ms"
            extra = f"{copied} while it ran on, {d['transport']}"
        elif stage.name == "fetch":
            d = stage.detail
            extra = f"from {d['from']}: {d.get('failed', '')}"
            if "nbytes" in d:
                extra = f"{int(d['nbytes']) / 1e3:,.0f} kB from {d['from']}, {d['gbytes_per_s']} GB/s, {d['transport']}"
        elif stage.name == "prefill":
            extra = f"{stage.detail['tokens']} tokens in {stage.detail['chunks']} chunks"
            if "cached" in stage.detail:
                extra += f", {stage.detail['cached']} were there"
        elif stage.name == "decode":
            extra = f"{stage.detail['steps']} steps"
        if "attempt" in stage.detail:
            extra = ", ".join([*([extra] if extra else []), f"attempt {stage.detail['attempt']}"])
        lines.append(f"  {stage.name:<12} {stage.worker:<11} {stage.seconds * 1e3:9.1f} ms  {bar:<28} {extra}".rstrip())
    return lines


def _failure(address: str, error: grpc.RpcError) -> Exception:
    code, details = error.code(), error.details()
    if code is grpc.StatusCode.UNAVAILABLE and "failed to connect" in (details or ""):
        return SetupError(f"nobody listens on {address}", exit_code=3)
    return RpcFailure(f"{code.name}: {details}")
