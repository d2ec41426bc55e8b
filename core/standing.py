"""What a machine says of the requests that it has, for whoever asks why one of them takes so long. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a request is at one machine; a machine may say it of each continuation."""

    key: str
    """Of the gateway's ticket: the same at all machines of an attempt."""
    request: str
    """The client's name for it; empty where the machine does not know it."""
    state: str
    since: float
    """When it came to this machine, on the driver's clock."""
    until: float = math.inf
    """When the machine gives it up."""
    waits_for: str = ""
    """What has to happen elsewhere, as words for people; empty while its own work goes on."""
    owner: str = ""
    """Who has it now, by the name of a process, as far as a router knows."""
    tokens: int = 0
    """Generated so far, as far as this machine knows."""


@runtime_checkable
class Stands(Protocol):
    """A machine that has requests."""

    def standing(self) -> list[Standing]:
        """Of every request it has, in its own order. Reads only, and may scan: it is asked by people."""
        ...
