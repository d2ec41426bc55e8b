"""`baton up` and `baton down`: a deployment of local processes, in the foreground or behind."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from control import state
from control.client import members
from control.http import require
from control.hub import model_name, resolve_model
from control.launcher import NOD_S, Deployment, uninterrupted
from core.config import DeploymentConfig
from core.errors import RpcFailure, SetupError
from runtime import debug

READY_S = 60.0


def wait_ready(deployment: Deployment, timeout_s: float = READY_S) -> None:
    """Until every worker and gateway is ready; raises SetupError naming those that are not."""
    until = time.monotonic() + timeout_s
    want = len(deployment.running) - 1
    while True:
        seen = members(deployment.coordinator)
        if len(seen) == want and all(member.ready for member in seen):
            return
        if ended := deployment.ended():
            raise SetupError(
                f"{', '.join(ended)} ended with exit code {', '.join(map(str, ended.values()))}", exit_code=8
            )
        if time.monotonic() > until:
            late = sorted({*deployment.running} - {"coordinator"} - {m.identity.split("#")[0] for m in seen if m.ready})
            raise SetupError(f"not ready within {timeout_s:g} s: {', '.join(late)}", exit_code=8)
        time.sleep(0.05)


def say(line: str) -> None:
    """A line for people; lost if they are gone or their disk is full, because a deployment goes on without them."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def up(config: DeploymentConfig, where: Path, *, as_json: bool, detach: bool, argv: list[str]) -> int:
    """Start the deployment and stay with it until SIGINT, SIGTERM or `baton down`; exit code 0 then."""
    if state.taken(where):
        raise SetupError(f"a deployment is running already in {where}; `baton down` ends it")
    if config.http >= 0:
        require()
    model = resolve_model(config.model, config.download)
    name = config.served_name or model_name(config.model)
    state.make(where)
    log = where / "baton.log"
    stop: list[int] = []

    def interrupted(number: int, frame: object) -> None:
        """While starting, as Ctrl-C always does; once ready, an ordered end."""
        stop.append(number)
        if not ready:
            raise KeyboardInterrupt

    ready = False
    debug.stacks_at_signal()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, interrupted)
    if detach:
        return _detached(where, argv, as_json=as_json)
    held = state.lock(where)
    deployment = Deployment(config, model, name, log_path=log, say=say)
    if deployment.transport_reason:
        say(f"KV goes over {deployment.transport}, not UCX: {deployment.transport_reason}")
    with _interrupted_if(stop), held, deployment:
        wait_ready(deployment)
        deployment.open_http()
        url = f"http://{deployment.http}" if deployment.http else ""
        word = state.State(os.getpid(), deployment.coordinator, deployment.gateways, name, str(log), url)
        try:
            state.write(where, word)
            ready = True
            served = [*deployment.gateways, *([f"{url}/v1 (OpenAI API)"] if url else [])]
            say(f"ready: {name} on {', '.join(served)}; log in {log}")
            if as_json:
                print(
                    json.dumps(
                        {
                            "gateways": deployment.gateways,
                            "coordinator": deployment.coordinator,
                            "served_name": name,
                            "pid": os.getpid(),
                            "transport": deployment.transport,
                            "http": url,
                        }
                    ),
                    flush=True,
                )
            known: dict[str, int] = {}
            while not stop:
                time.sleep(0.1)
                for process, code in deployment.ended().items():
                    if known.get(process) != deployment.running[process].process.pid:
                        known[process] = deployment.running[process].process.pid
                        say(f"{process} ended with exit code {code}")
        finally:
            state.remove(where)
    say("all processes have ended")
    return 0


@contextlib.contextmanager
def _interrupted_if(came: list[int]) -> Iterator[None]:
    """An error after a signal came is an interrupt, whose own exception a library's callback may have swallowed."""
    try:
        yield
    except (SetupError, RpcFailure):
        if came:
            raise KeyboardInterrupt from None
        raise


def down(where: Path, timeout_s: float = 30.0) -> int:
    """End the running deployment and wait for it."""
    running = state.read(where)
    with contextlib.suppress(ProcessLookupError):  # it has ended by itself meanwhile
        os.kill(running.pid, signal.SIGTERM)
    until = time.monotonic() + timeout_s
    while state.taken(where):
        if time.monotonic() > until:
            raise SetupError(f"pid {running.pid} did not end within {timeout_s:g} s", exit_code=1)
        time.sleep(0.05)
    say("all processes have ended")
    return 0


def _detached(where: Path, argv: list[str], *, as_json: bool) -> int:
    """Run the same command behind, and return when it is ready or has failed."""
    words = [word for word in argv if word != "--detach"]
    said = where / "up.log"
    child: subprocess.Popen[str] | None = None
    # It prints one JSON document when it is ready; what it says to people goes to a file, so nobody has to stay.
    try:
        with uninterrupted(), said.open("w") as out:
            child = subprocess.Popen(
                [sys.executable, "-m", "control.cli", *words, "-o", "json"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=out,
                text=True,
                start_new_session=True,
            )
        with child.stdout as answers:  # type: ignore[union-attr]
            while not select.select([answers], [], [], NOD_S)[0]:
                pass
            word = answers.readline()
    except KeyboardInterrupt:
        if child is not None:
            child.terminate()
            child.wait()
        raise
    code = 0 if word.strip() else child.wait()
    say(said.read_text().rstrip())
    if as_json and word:
        print(word.rstrip(), flush=True)
    return code
