"""`baton up` and `baton down`: a deployment of local processes, in the foreground or behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from control import state
from control.client import members
from control.hub import model_name, resolve_model
from control.launcher import Deployment
from core.config import DeploymentConfig
from core.errors import SetupError

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
    """A line for people."""
    print(line, file=sys.stderr, flush=True)


def up(config: DeploymentConfig, where: Path, *, as_json: bool, detach: bool, argv: list[str]) -> int:
    """Start the deployment and stay with it until SIGINT, SIGTERM or `baton down`; exit code 0 then."""
    try:
        running = state.read(where)
    except SetupError:
        pass
    else:
        raise SetupError(f"a deployment is running already (pid {running.pid}); `baton down` ends it")
    model = resolve_model(config.model, config.download)
    name = config.served_name or model_name(config.model)
    where.mkdir(parents=True, exist_ok=True)
    log = where / "baton.log"
    if detach:
        return _detached(where, argv, log, as_json=as_json)
    stop: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda got, _: stop.append(got))
    deployment = Deployment(config, model, name, log_path=log, say=say)
    if deployment.transport_reason:
        say(f"KV goes over {deployment.transport}, not UCX: {deployment.transport_reason}")
    with deployment:
        wait_ready(deployment)
        word = state.State(os.getpid(), deployment.coordinator, deployment.gateways, name, str(log))
        state.write(where, word)
        try:
            say(f"ready: {name} on {', '.join(deployment.gateways)}; log in {log}")
            if as_json:
                print(
                    json.dumps(
                        {
                            "gateways": deployment.gateways,
                            "coordinator": deployment.coordinator,
                            "served_name": name,
                            "pid": os.getpid(),
                            "transport": deployment.transport,
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


def down(where: Path, timeout_s: float = 30.0) -> int:
    """End the running deployment and wait for it."""
    running = state.read(where)
    os.kill(running.pid, signal.SIGTERM)
    until = time.monotonic() + timeout_s
    while state.alive(running.pid):
        if time.monotonic() > until:
            raise SetupError(f"pid {running.pid} did not end within {timeout_s:g} s", exit_code=1)
        time.sleep(0.05)
    say("all processes have ended")
    return 0


def _detached(where: Path, argv: list[str], log: Path, *, as_json: bool) -> int:
    """Run the same command behind, and return when it is ready or has failed."""
    words = [word for word in argv if word != "--detach"]
    with log.open("a") as out:
        child = subprocess.Popen(
            [sys.executable, "-m", "control.cli", *words],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
    assert child.stderr is not None
    for line in child.stderr:
        say(line.rstrip())
        if line.startswith("ready: "):
            if as_json:
                running = state.read(where)
                print(
                    json.dumps(
                        {
                            "gateways": running.gateways,
                            "coordinator": running.coordinator,
                            "served_name": running.served_name,
                            "pid": running.pid,
                        }
                    ),
                    flush=True,
                )
            return 0
    return child.wait()
