"""Two network namespaces with a narrow link between them that delays and drops packets, and can be cut.

::

    here --mgmt-- [near] --data-- near [wire] far --data-- [far] --mgmt-- here        (`here` are the tests)

The link is a bridge in a third namespace, as a switch would be: a packet is dropped on its way and not in its sender's
own queue, which TCP would hear of and not fill. Each namespace lives as long as the one process that holds it, which
ends with its standard input: whatever becomes of the tests, namespaces, links, addresses and routes go by themselves.
A process listens on its namespace's own address (on `lo`, so that it survives a cut); the others reach it over the data
link, and the tests over links of their own, which a cut does not touch and over which no worker may read from another
(`UCX_NET_DEVICES`).
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from types import TracebackType

from control.launcher import Place

DATA = "data"
"""The link's name in both namespaces."""
PORTS = ("near", "far")
"""Its ends at the bridge, each with the queue of what goes that way."""
TESTING = int(IPv4Address("198.18.0.0"))
"""A range of 2**17 addresses for tests of networks (RFC 2544), of which each pair of namespaces takes 16."""
_numbers = itertools.count(os.getpid())
_OTHER = """
import socket, sys, threading, time
def babble():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as to:
        while True:
            for _ in range(int(sys.argv[2]) // 1400):
                try:
                    to.sendto(bytes(1400), (sys.argv[1], 9))
                except OSError:  # the link is cut, or the port is found to be nobody's
                    pass
            time.sleep(int(sys.argv[3]) / 1000)
threading.Thread(target=babble, daemon=True).start()
sys.stdin.read()
"""


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
    queue_ms: int = 6
    """What would wait longer than this is dropped."""
    delay_ms: int = 5
    loss_percent: float = 0.5
    """The last two only where the kernel has netem; a queue that overflows delays and drops everywhere."""
    other_bytes: int = 60_000
    """Of other traffic that comes at once, so that the queue overflows at any time and not only where TCP tries how
    much it may send."""
    other_ms: int = 40
    """Between two such bursts."""


class Namespace:
    """One network namespace, held by a process of its own, with a /sys that shows its links: UCX looks there."""

    def __init__(self, number: int, host: str = "", address: str = "") -> None:
        self.host, self.address = host, address
        self.outside = f"bt{number % 2**32:x}{'nf'[int(host.rpartition('.')[2] or 0) % 2]}"
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
        self._wires: list[Namespace] = []
        self._others: list[subprocess.Popen[bytes]] = []
        try:
            for host, address in zip(self._hosts, self._data, strict=True):
                self._all.append(Namespace(number, host, address))
            self._wires.append(Namespace(number))
            self._join()
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

    @property
    def ends(self) -> tuple[str, ...]:
        """The addresses of the link itself, between which UCX reads."""
        return tuple(self._data)

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
        """The link's "packets", "drops" and "bytes", and the segments that TCP at both ends "resent"."""
        total = {"packets": 0, "drops": 0, "bytes": 0}
        resent = 0
        for each in self._all:
            names, values = (
                line.split()
                for line in Path(f"/proc/{each.pid}/net/snmp").read_text().splitlines()
                if line.startswith("Tcp:")
            )
            resent += int(values[names.index("RetransSegs")])
        for port in PORTS:
            for qdisc in json.loads(self._wires[0].run("tc", "-s", "-j", "qdisc", "show", "dev", port)):
                for key in total:
                    # A child's packets are counted at its parent, too; its drops are not.
                    if key == "drops" or qdisc.get("root"):
                        total[key] += int(qdisc.get(key, 0))
        return {**total, "resent": resent}

    def __enter__(self) -> Namespaces:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._quiet()
        for each in self._all:
            # Nobody hears what sockets of ended processes still have to say, and they would keep their namespace.
            each.run("sh", "-c", "echo 1 > /proc/sys/net/ipv4/tcp_orphan_retries")
        left = [f"process {pid} is in a namespace" for each in self._all for pid in each.lodgers()]
        self._close()
        if kind is None:
            left += [f"link {each.outside} is left" for each in filter(there, self._all)]
            assert not left, "\n".join(left)

    def _join(self) -> None:
        near, far = self._all
        wire = self._wires[0]
        wire.run("ip", "link", "add", "bridge", "type", "bridge")
        wire.run("ip", "link", "set", "bridge", "up")
        for each, port in zip(self._all, PORTS, strict=True):
            run("ip", "link", "add", each.outside, "type", "veth", "peer", "name", "mgmt", "netns", str(each.pid))
            run("ip", "addr", "add", f"{self._here}/32", "dev", each.outside)
            run("ip", "link", "set", each.outside, "up")
            run("ip", "route", "add", f"{each.host}/32", "dev", each.outside, "src", self._here)
            wire.run("ip", "link", "add", port, "type", "veth", "peer", "name", DATA, "netns", str(each.pid))
            wire.run("ip", "link", "set", port, "master", "bridge", "up")
            each.run("ip", "addr", "add", f"{each.host}/32", "dev", "lo")
            each.run("ip", "addr", "add", f"{each.address}/30", "dev", DATA)
            # A dropped packet should be one packet, not the 64 KB that a veth passes on as one.
            each.run("ip", "link", "set", DATA, "gso_max_segs", "1")
            for name in ("lo", "mgmt", DATA):
                each.run("ip", "link", "set", name, "up")
            each.run("ip", "route", "add", f"{self._here}/32", "dev", "mgmt", "src", each.host)
            self._narrow(port)
        for one, other in ((near, far), (far, near)):
            self._route(one, other)
            if self.shape.other_bytes:
                numbers = (str(self.shape.other_bytes), str(self.shape.other_ms))
                command = [*one.enter, sys.executable, "-c", _OTHER, other.host, *numbers]
                self._others.append(subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True))

    def _route(self, one: Namespace, other: Namespace) -> None:
        one.run("ip", "route", "replace", f"{other.host}/32", "via", other.address, "src", one.host)

    def _narrow(self, port: str) -> None:
        wire, shape = self._wires[0], self.shape
        tbf = ["tbf", "rate", f"{shape.mbit}mbit", "burst", str(shape.burst), "latency", f"{shape.queue_ms}ms"]
        wire.run("tc", "qdisc", "add", "dev", port, "root", "handle", "1:", *tbf)
        netem = ["netem", "delay", f"{shape.delay_ms}ms", "loss", f"{shape.loss_percent}%", "limit", "60"]
        try:
            wire.run("tc", "qdisc", "add", "dev", port, "parent", "1:1", "handle", "10:", *netem)
        except Unavailable as error:
            if not re.search("unknown|not found|No such", str(error)):
                raise
        else:
            self.netem = True

    def _quiet(self) -> None:
        for each in self._others:
            assert each.stdin is not None
            each.stdin.close()
            each.wait(10)
        self._others.clear()

    def _close(self) -> None:
        self._quiet()
        for each in self._all:
            subprocess.run(["ip", "link", "delete", each.outside], capture_output=True, check=False, timeout=20)
        for each in (*self._all, *self._wires):
            each.close()


def there(namespace: Namespace) -> bool:
    """Whether its management link is."""
    return Path("/sys/class/net", namespace.outside).exists()


def places(both: Namespaces, near: Sequence[str], far: Sequence[str]) -> dict[str, Place]:
    """Which process runs where, by name."""
    return {**dict.fromkeys(near, both.near.place), **dict.fromkeys(far, both.far.place)}
