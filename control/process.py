"""The entry of every process but HTTP's: reads its settings, serves, says where it listens, ends cleanly.

Run as ``python -m control.process SETTINGS`` with the JSON of `core.config.to_json`. Writes one JSON line to stdout
once it listens: {"name", "identity", "address", "metrics", "pid"}. Ends at SIGTERM or SIGINT, and when its standard
input ends, which is how it learns that its launcher is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import secrets
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from core.config import CoordinatorConfig, GatewayConfig, HttpConfig, ProcessConfig, WorkerConfig, from_json, to_json
from core.errors import LocalError, SetupError
from core.worker import Identity
from runtime import debug
from runtime import log as logs
from runtime.inspection import Inspection
from runtime.recorder import Recorder, head

log = logging.getLogger("baton.process")

SWITCH_S = 0.0005
"""Interpreter switch interval: the loop must not wait 5 ms for the engine's Python between two kernels."""


class Service(Protocol):
    """What a process runs."""

    address: str
    metrics_address: str
    inspection: Inspection

    async def start(self) -> None: ...

    async def stop(self, reason: str) -> None: ...


def build_version() -> str:
    """The version this code was installed as."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("baton")
    except PackageNotFoundError:
        return "source"


Make = Callable[[ProcessConfig, Identity, Callable[[BaseException], None]], Service]
"""What makes a process's service: of its settings, its name in this life, and who hears of a fault of its own."""


async def serve(config: ProcessConfig, me: Identity, make: Make) -> None:
    """Run the configured process until it is told to end; raises SetupError if it cannot run."""
    loop = asyncio.get_running_loop()
    over: asyncio.Future[str] = loop.create_future()

    def end(reason: str) -> None:
        if not over.done():
            over.set_result(reason)

    def bug(error: BaseException) -> None:
        def fail() -> None:
            if not over.done():
                over.set_exception(error)

        loop.call_soon_threadsafe(fail)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end, signal.Signals(number).name)
    watching = asyncio.create_task(_launcher_gone(end))
    service = make(config, me, bug)
    recorder: Recorder | None = None
    if not isinstance(config, HttpConfig) and config.record:
        recorder = Recorder(Path(config.record), head(str(me), build_version(), to_json(config)))
        service.inspection.driver.record(recorder)
    # In this order: the stacks of all threads come first, even if the loop stands still, then the loop has its turn.
    loop.add_signal_handler(signal.SIGUSR1, service.inspection.to_log)
    debug.stacks_at_signal()
    try:
        starting = asyncio.create_task(service.start())
        waited: set[asyncio.Future[Any]] = {starting, over}
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            gc.collect()
            gc.freeze()
            where = {
                "name": me.name,
                "identity": str(me),
                "address": service.address,
                "metrics": service.metrics_address,
                "pid": os.getpid(),
            }
            print(json.dumps(where), flush=True)
        reason = await over
        log.info("ending: %s", reason)
    finally:
        watching.cancel()
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await starting
        await service.stop("shutting down")
        if recorder is not None:
            recorder.close("the process ended")


def make(config: ProcessConfig, me: Identity, bug: Callable[[BaseException], None]) -> Service:
    """The service for these settings; imports only what that kind of process needs."""
    match config:
        case CoordinatorConfig():
            from control.coordinator import Coordinator

            return Coordinator(config)
        case GatewayConfig():
            return _gateway(config, me, bug)
        case WorkerConfig():
            from control.engines import load
            from control.worker import Worker

            return Worker(config, me, build_version(), load, bug)
        case HttpConfig():
            raise LocalError("http: has an entry of its own, control/http.py")


def _gateway(config: GatewayConfig, me: Identity, bug: Callable[[BaseException], None]) -> Service:
    from engine.config import ModelConfig, fingerprint
    from gateway.chat import ChatTemplate
    from gateway.gateway import Gateway
    from gateway.intake import Intake, ModelFacts
    from gateway.text import Tokenizer

    model = ModelConfig.read(config.model)
    facts = ModelFacts(config.served_name, fingerprint(config.model), model.context, model.vocab, model.eos_token_ids)
    tokenizer = Tokenizer(Path(config.model))
    chat = ChatTemplate.read(Path(config.model))
    intake = Intake(config, facts, tokenizer, chat)
    return Gateway(config, me, build_version(), facts, tokenizer, intake, chat.source if chat else "", bug)


async def _launcher_gone(end: Callable[[str], None]) -> None:
    """Whoever started us holds the other end of our standard input."""
    if sys.stdin is None or sys.stdin.isatty():
        return
    reader = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(reader)
    try:
        await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, sys.stdin)
    except (ValueError, OSError):
        return
    await reader.read()
    end("the launcher is gone")


def main(make: Make = make) -> None:
    """Run the process that the command line describes: exit code 0 after an ordered end, else the error's own."""
    config = from_json(sys.argv[1])
    me = Identity(config.name, secrets.randbits(48))
    logs.start(me)
    with contextlib.suppress(OSError):  # what `ps -o comm` and `pgrep -x` see of it, where there is such a file
        Path("/proc/self/comm").write_text(me.name[-15:])
    debug.stacks_at_signal()
    sys.setswitchinterval(SWITCH_S)
    try:
        asyncio.run(serve(config, me, make))
    except SetupError as error:
        log.error("%s", error)
        print(json.dumps({"name": me.name, "error": str(error), "exit_code": error.exit_code}), flush=True)
        os._exit(error.exit_code)
    except Exception as error:
        log.exception("ending because of a fault of our own")
        print(json.dumps({"name": me.name, "error": repr(error), "exit_code": 70}), flush=True)
        os._exit(70)
    os._exit(0)


if __name__ == "__main__":
    main()
