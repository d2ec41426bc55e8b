"""Two network namespaces with a narrow link between them that delays and drops packets, and can be cut.

::

    here (the tests) --- mgmt --- [near]  near.host ==data== far.host  [far] --- mgmt --- here

Each namespace lives as long as the one process that holds it, which ends with its standard input: whatever becomes of
the tests, nothing is left of namespaces, links, addresses and routes. A process listens on its namespace's own address
(on `lo`, so that it survives a cut); the others reach it over the data link, and the tests over links of their own,
which a cut does not touch and on which no worker has another to read from (`UCX_NET_DEVICES`).
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address
from types import TracebackType

from control.launcher import Place

DATA = "data"
"""The link's name in both namespaces."""
TESTING = int(IPv4Address("198.18.0.0"))
"""A range of 2**17 addresses for tests of networks (RFC 2544), of which each pair of namespaces takes 16."""
_numbers = itertools.count(os.getpid())


class Unavailable(Exception):
    """Namespaces cannot be made here, and why."""


def run(*command: str) -> str:
    """What a command says; raises `Unavailable` with its complaint."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except OSError as error:
        raise Unavailable(f"{command[0]}: {error.strerror}") from None
    if done.returncode:
        raise Unavailable(f"{command[0]}: {(done.stderr or done.stdout).strip().splitlines()[-1:]}")
    return done.stdout


@dataclass(frozen=True)
class Shape:
    """What the link does to packets, each way."""

    mbit: int = 40
    """Its rate."""
    burst: int = 4096
    """Bytes that pass at once."""
    queue_ms: int = 20
    """What would wait longer than this is dropped."""
    delay_ms: int = 5
    loss_percent: float = 0.5
    """The last two only where the kernel has netem; a queue that overflows delays and drops everywhere."""


class Namespace:
    """One network namespace, held by a process of its own, with a /sys that shows its links: UCX looks there."""

    def __init__(self, number: int, host: str, address: str) -> None:
        self.host, self.address = host, address
        self.outside = f"bt{number % 2**20:x}{host.rpartition('.')[2]}"
        """The other end of its management link, here."""
        self._holder = subprocess.Popen(
            ["unshare", "-n", "-m", "sh", "-c", "mount -t sysfs sysfs /sys && echo up && exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != "up\n":
            self._holder.kill()
            said = self._holder.communicate()[1]
            raise Unavailable(f"unshare: {said.strip()}")

    @property
    def pid(self) -> int:
        """The process that holds it."""
        return self._holder.pid

    @property
    def enter(self) -> tuple[str, ...]:
        """Runs the command that follows inside."""
        return ("nsenter", "-t", str(self.pid), "-n", "-m")

    @property
    def place(self) -> Place:
        """For the launcher."""
        return Place(self.host, self.enter)

    def run(self, *command: str) -> str:
        """What a command says inside."""
        return run(*self.enter, *command)

    def lodgers(self) -> list[int]:
        """Other processes that are in it."""
        mine, found = os.stat(f"/proc/{self.pid}/ns/net").st_ino, []
        for entry in filter(str.isdigit, os.listdir("/proc")):
            try:
                inside = os.stat(f"/proc/{entry}/ns/net").st_ino == mine
            except OSError:
                continue
            if inside and int(entry) != self.pid:
                found.append(int(entry))
        return found

    def close(self) -> None:
        """End the process that holds it; with the last one in it, it goes, and so do its links."""
        for pipe in (self._holder.stdin, self._holder.stdout, self._holder.stderr):
            assert pipe is not None
            pipe.close()
        self._holder.wait(10)


class Namespaces:
    """`near` and `far` with the link between them; a context manager, which fails if anything is left behind."""

    def __init__(self, shape: Shape | None = None) -> None:
        self.shape = shape or Shape()
        self.netem = False
        """The kernel delays and drops at random, too."""
        number = next(_numbers)
        first = TESTING + number * 16 % 2**17
        name = [str(IPv4Address(first + at)) for at in range(16)]
        self._here, self._hosts, self._data = name[8], name[9:11], name[1:3]
        self._all: list[Namespace] = []
        try:
            for host, address in zip(self._hosts, self._data, strict=True):
                self._all.append(Namespace(number, host, address))
            self._wire()
        except BaseException:
            self._close()
            raise

    @property
    def near(self) -> Namespace:
        """Where the link is cut."""
        return self._all[0]

    @property
    def far(self) -> Namespace:
        """Where a cut is only silence."""
        return self._all[1]

    def environment(self) -> dict[str, str]:
        """What processes inside must be told: otherwise UCX would read over a link of the tests, or through memory."""
        return {"UCX_TLS": "tcp", "UCX_NET_DEVICES": DATA}

    def cut(self) -> None:
        """Take the link down: `near` has no way any more, what `far` sends is lost."""
        self.near.run("ip", "link", "set", DATA, "down")

    def mend(self) -> None:
        """Take it up again."""
        self.near.run("ip", "link", "set", DATA, "up")
        self._route(self.near, self.far)

    def counters(self) -> dict[str, int]:
        """What the qdiscs of both ends have counted: "packets", "drops" and "bytes"."""
        total = {"packets": 0, "drops": 0, "bytes": 0}
        for each in self._all:
            for qdisc in json.loads(each.run("tc", "-s", "-j", "qdisc", "show", "dev", DATA)):
                for key in total:
                    # A child's packets are counted at its parent, too; its drops are not.
                    if key == "drops" or qdisc.get("root"):
                        total[key] += int(qdisc.get(key, 0))
        return total

    def __enter__(self) -> Namespaces:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        left = [f"process {pid} is in a namespace" for each in self._all for pid in each.lodgers()]
        names = [each.outside for each in self._all]
        self._close()
        if kind is None:
            left += [f"link {name} is left" for name in names if os.path.exists(f"/sys/class/net/{name}")]
            assert not left, "\n".join(left)

    def _wire(self) -> None:
        near, far = self._all
        run("ip", "link", "add", far.outside, "type", "veth", "peer", "name", "mgmt", "netns", str(far.pid))
        run("ip", "link", "add", near.outside, "type", "veth", "peer", "name", "mgmt", "netns", str(near.pid))
        near.run("ip", "link", "add", DATA, "type", "veth", "peer", "name", DATA, "netns", str(far.pid))
        for each in self._all:
            run("ip", "addr", "add", f"{self._here}/32", "dev", each.outside)
            run("ip", "link", "set", each.outside, "up")
            run("ip", "route", "add", f"{each.host}/32", "dev", each.outside, "src", self._here)
            each.run("ip", "addr", "add", f"{each.host}/32", "dev", "lo")
            each.run("ip", "addr", "add", f"{each.address}/30", "dev", DATA)
            # A dropped packet should be one packet, not the 64 KB that a veth passes on as one.
            each.run("ip", "link", "set", DATA, "gso_max_segs", "1")
            for name in ("lo", "mgmt", DATA):
                each.run("ip", "link", "set", name, "up")
            each.run("ip", "route", "add", f"{self._here}/32", "dev", "mgmt", "src", each.host)
        for one, other in ((near, far), (far, near)):
            self._route(one, other)
            self._narrow(one)

    def _route(self, one: Namespace, other: Namespace) -> None:
        one.run("ip", "route", "replace", f"{other.host}/32", "via", other.address, "src", one.host)

    def _narrow(self, each: Namespace) -> None:
        shape = self.shape
        tbf = ["tbf", "rate", f"{shape.mbit}mbit", "burst", str(shape.burst), "latency", f"{shape.queue_ms}ms"]
        each.run("tc", "qdisc", "add", "dev", DATA, "root", "handle", "1:", *tbf)
        netem = ["netem", "delay", f"{shape.delay_ms}ms", "loss", f"{shape.loss_percent}%", "limit", "60"]
        try:
            each.run("tc", "qdisc", "add", "dev", DATA, "parent", "1:1", "handle", "10:", *netem)
        except Unavailable as error:
            if not re.search("unknown|not found|No such", str(error)):
                raise
        else:
            self.netem = True

    def _close(self) -> None:
        for each in self._all:
            each.close()
        for each in self._all:
            deadline(each.outside)


def deadline(name: str) -> None:
    """Wait until a link that goes with its namespace is gone: the kernel takes them down behind our back."""
    import time

    until = time.monotonic() + 10
    while os.path.exists(f"/sys/class/net/{name}") and time.monotonic() < until:
        time.sleep(0.05)


def places(near: Sequence[str], far: Sequence[str], both: Namespaces) -> dict[str, Place]:
    """Which process runs where, by name."""
    return {**dict.fromkeys(near, both.near.place), **dict.fromkeys(far, both.far.place)}
