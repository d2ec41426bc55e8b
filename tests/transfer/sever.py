"""Breaks TCP connections of a process from outside of it, as a network does that drops them: both ends see a reset."""

from __future__ import annotations

import ctypes
import os
import socket
from collections.abc import Callable
from pathlib import Path

ESTABLISHED = 1
_GETFD = 438
"""Number of the system call `pidfd_getfd`, the same everywhere."""
Ends = tuple[tuple[str, int], tuple[str, int]]
"""Address and port here, and there."""


def connections(pid: int) -> dict[int, Ends]:
    """Established TCP connections over IPv4 of a process, by file descriptor."""
    rows = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    known = {row[9]: (_end(row[1]), _end(row[2])) for row in rows if int(row[3], 16) == ESTABLISHED}
    found = {}
    for entry in os.listdir(f"/proc/{pid}/fd"):
        try:
            inode = os.readlink(f"/proc/{pid}/fd/{entry}").removeprefix("socket:[").removesuffix("]")
        except FileNotFoundError:
            continue
        if inode in known:
            found[int(entry)] = known[inode]
    return found


def sever(pid: int, which: Callable[[int, Ends], bool]) -> int:
    """Shut down those connections of a process that `which` says, by descriptor and ends; how many these were."""
    count = 0
    libc = ctypes.CDLL(None, use_errno=True)
    pidfd = os.pidfd_open(pid)
    try:
        for fd, ends in connections(pid).items():
            if which(fd, ends):
                mine = libc.syscall(_GETFD, pidfd, fd, 0)
                if mine < 0:
                    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
                with socket.socket(fileno=mine) as connection:
                    connection.shutdown(socket.SHUT_RDWR)
                count += 1
    finally:
        os.close(pidfd)
    return count


def _end(text: str) -> tuple[str, int]:
    address, _, port = text.partition(":")
    return socket.inet_ntoa(bytes.fromhex(address)[::-1]), int(port, 16)
