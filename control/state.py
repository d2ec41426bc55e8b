"""Where `baton up` leaves word of itself, so that the other verbs find it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from core.errors import SetupError

ASKING_S = 0.2
"""`taken` holds the lock for a moment; nobody who only asks holds it longer than this."""


@dataclass(frozen=True, slots=True)
class State:
    """A deployment that runs on this machine."""

    pid: int
    """Of `baton up`."""
    coordinator: str
    gateways: list[str]
    served_name: str
    log: str
    http: str = ""
    """URL of the HTTP server, empty without one."""


def directory(given: str | None) -> Path:
    """The directory of the state file: `given`, $BATON_STATE, or the user's state directory."""
    chosen = given or os.environ.get("BATON_STATE")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "baton"


def make(where: Path) -> None:
    """The directory, writable; raises SetupError if it cannot be had."""
    try:
        where.mkdir(parents=True, exist_ok=True)
        (where / "deployment.lock").open("a").close()
    except OSError as error:
        raise SetupError(f"state: {where} cannot be written: {error.strerror}") from None


def write(where: Path, state: State) -> None:
    """Leave word; complete or not at all."""
    fresh = where / "deployment.json.new"
    try:
        where.mkdir(parents=True, exist_ok=True)
        fresh.write_text(json.dumps(asdict(state)))
        fresh.replace(where / "deployment.json")
    except OSError as error:
        raise SetupError(f"{fresh}: {error.strerror}", exit_code=1) from error


def read(where: Path) -> State:
    """The deployment that runs; raises SetupError (exit code 3) if none does."""
    path = where / "deployment.json"
    try:
        state = State(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        raise SetupError(
            f"no deployment is running here ({path} is missing); start one with `baton up`", exit_code=3
        ) from None
    if not taken(where):
        raise SetupError(f"the deployment of {path} has ended; start one with `baton up`", exit_code=3)
    return state


def remove(where: Path) -> None:
    """Take the word back."""
    with contextlib.suppress(FileNotFoundError):
        (where / "deployment.json").unlink()


def lock(where: Path) -> IO[str]:
    """Hold the directory for one deployment; the lock goes with the file or the process, whichever ends first."""
    held = (where / "deployment.lock").open("w")
    until = time.monotonic() + ASKING_S
    while True:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError:
            if time.monotonic() > until:
                held.close()
                raise SetupError(f"a deployment is running already in {where}; `baton down` ends it") from None
            time.sleep(0.01)
    remove(where)  # what a dead one left: its process number must not pass for ours while we start
    return held


def taken(where: Path) -> bool:
    """True while a deployment holds the directory; a process number alone could be anybody's by now."""
    try:
        with (where / "deployment.lock").open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False
