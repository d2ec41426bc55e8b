"""What is going on inside a process, as one JSON document: threads, tasks, machines, pages. Nothing is stopped for it.

What clients wrote is not in it: of prompts and answers only the lengths are.
"""

from __future__ import annotations

import asyncio
import faulthandler
import signal
import sys
import threading
import traceback
from collections.abc import Mapping
from typing import Any

from core import state
from core.errors import LocalError
from core.machine import Machine
from core.pages import Pages


def document(name: str, machines: Mapping[str, Machine[Any, Any]], ledger: Pages | None) -> dict[str, Any]:
    """All of it; on the loop's thread."""
    return {
        "process": name,
        "threads": threads(),
        "tasks": tasks(),
        "machines": states(machines),
        "pages": None if ledger is None else pages(ledger),
    }


def threads() -> dict[str, list[str]]:
    """The stack of every thread that has run Python, outermost first, by the thread's name."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sys._current_frames()
    return {f"{names.get(ident, 'foreign')} {ident}": _lines(frame) for ident, frame in frames.items()}


def tasks() -> list[dict[str, Any]]:
    """Every task of the running loop, and where it waits."""
    found = []
    for task in sorted(asyncio.all_tasks(), key=lambda task: task.get_name()):
        stack = task.get_stack(limit=8)
        coroutine: Any = task.get_coro()
        what = getattr(coroutine, "__qualname__", type(coroutine).__name__)
        at = [f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}" for frame in stack]
        found.append({"name": task.get_name(), "what": what, "at": at})
    return found


def states(machines: Mapping[str, Machine[Any, Any]]) -> dict[str, Any]:
    """The state of all machines in one document (`core.state`), what they share in it once.

    A machine that cannot be written is named with the reason, and the others are written without it.
    """
    try:
        return {"state": state.dump(dict(machines), brief=True), "unwritten": {}}
    except LocalError:
        unwritten = {name: why for name, machine in machines.items() if (why := _unwritten(machine))}
    written = {name: machine for name, machine in machines.items() if name not in unwritten}
    return {"state": state.dump(written, brief=True), "unwritten": unwritten}


def pages(ledger: Pages) -> dict[str, Any]:
    """Who holds which pages, as runs [first, count]."""
    holders = {}
    for holder in ledger.holders():
        runs = [[run.start, run.count] for run in ledger.runs(holder)]
        holders[holder] = {"pages": ledger.count(holder), "own": ledger.own(holder), "runs": runs}
    counts = {str(owner): count for owner, count in ledger.counts().items()}
    return {"total": ledger.total, "promised": ledger.promised, "owners": counts, "holders": holders}


def stacks_at_signal() -> None:
    """At SIGUSR1 the stacks of all threads go to standard error at once, even if the loop stands still.

    A handler that was set before is called after that. The signal does not end the process, nor those that it starts
    later: they begin with the default again, and set their own.
    """
    if signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL:
        signal.signal(signal.SIGUSR1, lambda number, frame: None)
    faulthandler.unregister(signal.SIGUSR1)  # else it would not notice that another handler was set
    faulthandler.register(signal.SIGUSR1, chain=True)


def _unwritten(machine: Machine[Any, Any]) -> str:
    try:
        state.dump(machine, brief=True)
    except LocalError as error:
        return str(error)
    return ""


def _lines(frame: Any) -> list[str]:
    return [f"{each.filename}:{each.lineno} {each.name}" for each in traceback.extract_stack(frame)]
