"""A gateway that answers as it is told, behind the real front doors: for tests of what callers make of its answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

from core.config import GatewayConfig
from core.request import Phase
from gateway import vllm
from gateway.chat import ChatTemplate
from gateway.intake import Intake, ModelFacts
from gateway.text import Tokenizer
from protos.baton.v1 import inference_pb2
from runtime import rpc

Play = Callable[[inference_pb2.GenerateRequest], AsyncGenerator[inference_pb2.GenerateResponse]]


class Scripted:
    """Plays `play` for every request and remembers what it was asked."""

    def __init__(self, model: Path, play: Play) -> None:
        self.facts = ModelFacts("tiny", "0", 8192, 320, (1, 310))
        tokenizer = Tokenizer(model)
        config = GatewayConfig("gateway-0", "", str(model), "tiny")
        self.intake = Intake(config, self.facts, tokenizer, ChatTemplate.read(model))
        self.play = play
        self.asked: list[inference_pb2.GenerateRequest] = []
        self.remaining_s: list[float | None] = []
        self.aborted: list[str] = []
        self.left: asyncio.Queue[str] = asyncio.Queue()
        """Requests whose caller went before the end."""
        self.refuse: Any = None
        """Ends the last call with a status."""
        self.lacks: str | None = None
        self.live = dict.fromkeys(Phase, 0)

    async def generate(
        self, asked: inference_pb2.GenerateRequest, remaining_s: float | None, refuse: Any = None
    ) -> AsyncGenerator[inference_pb2.GenerateResponse]:
        self.asked.append(asked)
        self.refuse = refuse
        self.remaining_s.append(remaining_s)
        over = False
        try:
            async for response in self.play(asked):
                yield response
            over = True
        finally:
            if not over:
                self.left.put_nowait(asked.request_id)

    def abort(self, request_id: str) -> bool:
        self.aborted.append(request_id)
        return True

    async def aside(self, request: Any, read: Callable[..., Any], *arguments: Any) -> Any:
        await asyncio.sleep(0)
        return read(*arguments)

    def missing(self) -> str | None:
        return self.lacks

    def phases(self) -> dict[Phase, int]:
        return self.live


async def serve(scripted: Scripted, model: Path) -> rpc.Server:
    """The service on a free port of loopback."""
    server = rpc.Server("127.0.0.1:0", [vllm.SERVICE])
    vllm.add(scripted, model, "1.2.3", server.grpc)  # type: ignore[arg-type]
    await server.start()
    return server
