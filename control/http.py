"""The HTTP front's process: an unmodified `smg` (from PyPI) before our gateways, minded as every process of ours is.

Run as ``python -m control.http SETTINGS`` with the JSON of `core.config.to_json`. Writes the launcher's line (see
control/process.py) once every gateway is known to it and the model can be asked for. Ends at SIGTERM, and when its
standard input ends.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import math
import os
import secrets
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

from control.launcher import LOOPBACK, reached
from core.config import HttpConfig, from_json
from core.errors import SetupError
from core.worker import Identity
from runtime import debug
from runtime import log as logs

log = logging.getLogger("baton.http")

LEVELS = {"DEBUG": logging.DEBUG, "INFO": logging.INFO, "WARN": logging.WARNING, "ERROR": logging.ERROR}
OF_REQUESTS = ("smg::routers", "smg::response")
WORTH = ("error", "status", "reason", "worker", "url", "step_id", "data_plane")
NEEDED = {"smg": "smg", "smg_grpc_proto": "smg-grpc-proto"}
DRAIN_S = 1
"""Requests that run when it is told to end have this long."""


def require() -> None:
    """SetupError with what to do, if the packages of the extra `http` are missing."""
    missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise SetupError(f"http: needs {' and '.join(missing)}; run `make demo` to install the extra http")


def flags(config: HttpConfig, host: str, port: int, metrics_port: int, key: str) -> list[str]:
    """The command line of `smg launch`. Gateways decide what is admitted, so nothing here tries again or judges them.

    A request that is refused would come back five times, and a worker that is silent over a long prompt, or refuses
    ten requests, would be left alone for a minute.
    """
    timeout_s = math.ceil(config.timeout_s)
    return [
        *("--host", host, "--port", str(port)),
        *("--backend", "vllm", "--worker-urls", *(f"grpc://{address}" for address in config.gateways.split(","))),
        *("--policy", "round_robin", "--request-timeout-secs", str(timeout_s + 60)),
        *("--disable-retries", "--disable-circuit-breaker", "--disable-worker-overload-protection"),
        *("--worker-wedge-secs", str(timeout_s)),
        *("--health-check-interval-secs", "1", "--worker-startup-check-interval", "1"),
        *("--health-failure-threshold", "2", "--health-success-threshold", "1"),
        # What was said is not kept: nobody asked for it, and it would be up to 10,000 answers in memory.
        *("--history-backend", "none"),
        # Whoever may ask questions may not send everybody's to another place.
        *("--control-plane-api-keys", f"baton:baton:admin:{key}"),
        *("--prometheus-host", LOOPBACK, "--prometheus-port", str(metrics_port)),
        *("--log-level", "warn", "--log-json", "--shutdown-grace-period-secs", str(DRAIN_S)),
    ]


def free_port(host: str, port: int = 0) -> int:
    """`port` if nobody listens there, or any free one for 0; SetupError if it is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise SetupError(f"http: cannot listen on {host}:{port}; is the port in use?", exit_code=4) from error
        return int(probe.getsockname()[1])


def get(url: str, key: str = "") -> Any:
    """The JSON document at `url`; None if it cannot be had. Proxies are for other machines."""
    request = urllib.request.Request(url, headers={"authorization": f"Bearer {key}"} if key else {})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=2.0) as answer:
            return json.loads(answer.read())
    except (OSError, ValueError):
        return None


def ready(address: str) -> bool:
    """True if requests are served there."""
    answer = get(f"http://{reached(address)}/readiness")
    return bool(answer) and answer.get("status") == "ready"


def heard(line: str) -> None:
    """Log one of smg's lines as ours; its start-up picture is none."""
    try:
        said = json.loads(line)
        level, target = LEVELS.get(said["level"], logging.WARNING), str(said["target"])
    except (ValueError, KeyError, TypeError):
        return
    # To smg each request that is refused is an error; here it is what a client was told.
    level = min(level, logging.WARNING) if target.startswith(OF_REQUESTS) else level
    more = "".join(f"; {name} {said[name]}" for name in WORTH if said.get(name))
    log.log(level, "%s%s", said.get("message", ""), more, extra={"request": said.get("request_id", "")})


class Front:
    """smg in this process: its standard output becomes our log, ours stays for the launcher's line."""

    def __init__(self, config: HttpConfig) -> None:
        self._config = config
        host = config.listen.rpartition(":")[0]
        self._host = host.strip("[]")
        self._key = secrets.token_urlsafe(24)
        self._port = free_port(self._host, int(config.listen.rpartition(":")[2]))
        self._metrics_port = free_port(LOOPBACK)
        self.address = f"{host}:{self._port}"
        self._out = os.dup(1)
        reading, writing = os.pipe()
        os.dup2(writing, 1)
        os.close(writing)
        self._relay = threading.Thread(target=_each_line, args=(reading, heard), daemon=True)

    def run(self) -> None:
        """Serve until the end of this process's orders; raises SetupError if smg cannot."""
        self._relay.start()
        threading.Thread(target=_launcher_gone, daemon=True).start()
        threading.Thread(target=self._announce, daemon=True).start()
        # Not asked for here, and it would ask huggingface.co for a tokenizer that it does not find on this disk.
        os.environ["HF_ENDPOINT"] = f"http://{LOOPBACK}:1"
        os.environ.pop("RUST_LOG", None)
        from smg.launch_router import launch_router, parse_router_args

        arguments = flags(self._config, self._host, self._port, self._metrics_port, self._key)
        try:
            launch_router(parse_router_args(arguments))
        except Exception as error:
            raise SetupError(f"http: smg cannot serve: {error}", exit_code=8) from error
        finally:
            sys.stdout.flush()
            os.dup2(self._out, 1)
            self._relay.join(1.0)

    def say(self, word: dict[str, Any]) -> None:
        """The launcher's line."""
        os.write(self._out, f"{json.dumps({'name': self._config.name, **word})}\n".encode())

    def _announce(self) -> None:
        base, wanted = f"http://{reached(self.address)}", len(self._config.gateways.split(","))
        while True:
            known = (get(f"{base}/workers", self._key) or {}).get("workers", [])
            if sum(worker["is_healthy"] for worker in known) == wanted and ready(self.address):
                break
            time.sleep(0.1)
        metrics = f"{LOOPBACK}:{self._metrics_port}"
        log.info("serving on %s before %d gateways, metrics on %s", self.address, wanted, metrics)
        self.say({"address": self.address, "metrics": metrics, "pid": os.getpid()})


def _each_line(source: int, take: Callable[[str], None]) -> None:
    with os.fdopen(source, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            take(line)


def _launcher_gone() -> None:
    """Whoever started us holds the other end of our standard input."""
    with contextlib.suppress(OSError):
        while os.read(0, 1):
            pass
    log.info("ending: the launcher is gone")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(2 * DRAIN_S)
    os._exit(0)


def main() -> None:
    """Exit code 0 after an ordered end, else the error's own."""
    config = from_json(sys.argv[1])
    assert isinstance(config, HttpConfig)
    logs.start(Identity(config.name, secrets.randbits(48)))
    debug.stacks_at_signal()
    # Before smg minds signals itself, and after.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    try:
        Front(config).run()
    except SetupError as error:
        log.error("%s", error)
        print(json.dumps({"name": config.name, "error": str(error), "exit_code": error.exit_code}), flush=True)
        os._exit(error.exit_code)
    os._exit(0)


if __name__ == "__main__":
    main()
