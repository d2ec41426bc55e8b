"""Logs as readable text on a terminal and as JSON lines otherwise; prompts are never logged."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import IO

from core.worker import Identity


def foreign(worker: str, text: str) -> str:
    """The JSON line for something a library printed past the logging of process `worker`."""
    now = time.time()
    return json.dumps(_fields(now, "warning", worker, "", "", "foreign", text))


def _fields(
    created: float, level: str, worker: str, incarnation: str, request: str, logger: str, message: str
) -> dict[str, str]:
    stamp = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(created))}.{int(created % 1 * 1000):03d}Z"
    return {
        "time": stamp,
        "level": level,
        "worker": worker,
        "incarnation": incarnation,
        "request": request,
        "logger": logger,
        "message": message,
    }


class _Lines(logging.Formatter):
    def __init__(self, identity: Identity) -> None:
        super().__init__()
        self._identity = identity

    def format(self, record: logging.LogRecord) -> str:
        line = _fields(
            record.created,
            record.levelname.lower(),
            self._identity.name,
            f"{self._identity.incarnation:012x}",
            getattr(record, "request", ""),
            record.name,
            record.getMessage(),
        )
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return self._render(line)

    def _render(self, line: dict[str, str]) -> str:
        return json.dumps(line)


class _Text(_Lines):
    def _render(self, line: dict[str, str]) -> str:
        request = f" [{line['request']}]" if line["request"] else ""
        text = f"{line['time'][11:23]} {line['level']:7} {line['worker']}{request} {line['message']}"
        return f"{text}\n{line['exception']}" if "exception" in line else text


class _Limit(logging.Filter):
    """At most `burst` lines a second from one place in the code, so that a failing peer cannot fill the disk."""

    def __init__(self, burst: int = 20) -> None:
        super().__init__()
        self._burst = burst
        self._seen: dict[tuple[str, int], tuple[int, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        place, second = (record.pathname, record.lineno), int(record.created)
        last, count = self._seen.get(place, (second, 0))
        count = count + 1 if last == second else 1
        self._seen[place] = (second, count)
        return count <= self._burst


def start(identity: Identity, *, level: int = logging.INFO, out: IO[str] | None = None) -> None:
    """Send all logs of this process to stderr (or `out`) in the house's form."""
    out = out or sys.stderr
    handler = logging.StreamHandler(out)
    handler.setFormatter(_Text(identity) if out.isatty() else _Lines(identity))
    handler.addFilter(_Limit())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("baton").setLevel(level)
