"""Makes `.venv` ready to run Baton from nothing but Python's standard library; a second run returns at once.

It resolves before it downloads: it says how much will come and which torch build was taken, and where the index
offers only a CUDA build to a machine without an NVIDIA GPU, it takes torch from PyTorch's CPU index instead. Whatever
pip is configured with (environment, pip.conf) is respected. Exit codes: 0 ready, 1 pip failed, 2 this machine lacks
something (one sentence says what), 130 interrupted.

This file must parse on any Python since 3.6, so that an old one can say what it lacks.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - stock interpreters are older than what we need
    import os
    import shutil

    for name in ("python3.14", "python3.13", "python3.12", "python3.11"):
        if shutil.which(name):
            os.execvp(name, [name, *sys.argv])
    sys.exit(
        f"bootstrap: Python 3.11 or newer is needed, this is {sys.version_info[0]}.{sys.version_info[1]}; "
        "on Debian and Ubuntu: apt install python3.11 python3.11-venv, then run again."
    )

import argparse
import collections
import concurrent.futures
import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import ssl
import subprocess
import tempfile
import time
import tomllib
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
MIB = 1 << 20

# A wheel of ours unpacks to about four times its size (torch: 183 MiB to 754 MiB).
UNPACKED_RATIO = 4

# The first pip that resolves from metadata alone: older ones download every wheel to find out what they would install.
PIP_LAZY = (25, 1)


class Stop(Exception):
    """The environment cannot be made: one sentence, and the exit code to leave with."""

    def __init__(self, sentence: str, code: int = 2) -> None:
        super().__init__(sentence)
        self.code = code


@dataclass(frozen=True)
class Wheel:
    """One distribution that pip would install; `nbytes` is what it costs to fetch, None if nobody says."""

    name: str
    version: str
    url: str
    sha256: str = ""
    nbytes: int | None = None
    direct: bool = False  # asked for by address, not by name

    @property
    def requirement(self) -> str:
        if not self.direct:
            return f"{self.name}=={self.version}"
        return f"{self.name} @ {self.url}" + (f"#sha256={self.sha256}" if self.sha256 else "")


# ---------------------------------------------------------------- what is wanted


def wanted(project: dict[str, Any], extras: Sequence[str]) -> list[str]:
    """The requirements of the project, of its build and of `extras`, as pip reads them."""
    known = project["project"].get("optional-dependencies", {})
    for extra in extras:
        if extra not in known:
            raise Stop(f"extra: got {extra!r}, wanted one of {', '.join(sorted(known))}.")
    lists = [project["build-system"]["requires"], project["project"]["dependencies"]]
    return [line for part in (*lists, *(known[extra] for extra in extras)) for line in part]


def fingerprint(project: dict[str, Any], constraints: str) -> str:
    """Changes when an installed environment would no longer be the one that the tree asks for."""
    asked = [project["build-system"], project["project"], project.get("tool", {}).get("setuptools", {}), constraints]
    here = [str(ROOT), sys.version, platform.machine(), Path(__file__).read_text(encoding="utf-8")]
    return hashlib.sha256(json.dumps([asked, here], sort_keys=True).encode()).hexdigest()


def has_gpu() -> bool:
    """Whether an NVIDIA GPU can be used here, judged without importing anything."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or shutil.which("nvidia-smi") is not None


def takes_cuda(wheels: Sequence[Wheel]) -> bool:
    """Whether this choice of wheels is a CUDA build of torch."""
    return any(wheel.name.startswith("nvidia-") for wheel in wheels)


def ucx_missing_reason() -> str | None:
    """Why there is no UCX lane on this machine, None where there is one."""
    if sys.platform != "linux":
        return f"NIXL has no wheels for {platform.system()}"
    if platform.machine() not in ("x86_64", "aarch64"):
        return f"NIXL has no wheels for {platform.machine()}"
    return None


# ---------------------------------------------------------------- pip


class Pip:
    """pip of the environment; its last lines are kept for when it fails."""

    def __init__(self, python: Path) -> None:
        self.python = python
        self.version = self.read_version()
        self.tail: collections.deque[str] = collections.deque(maxlen=200)

    def read_version(self) -> tuple[int, ...]:
        found = next((self.python.parent.parent / "lib").glob("python3.*/site-packages/pip-*.dist-info"), None)
        return tuple(int(part) for part in re.findall(r"\d+", found.name.split("-")[1])[:2]) if found else (0, 0)

    def lines(self, *arguments: str) -> Iterator[str]:
        """Runs pip and yields its output line by line; raises Stop when it fails."""
        command = [str(self.python), "-m", "pip", *arguments, "--disable-pip-version-check", "--no-input"]
        # An inherited PIP_USER would send the packages to the home directory.
        environment = {**os.environ, "PIP_USER": "0", "PYTHONUNBUFFERED": "1", "PIP_NO_COLOR": "1"}
        environment.pop("PYTHONHOME", None)
        self.tail.clear()
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
            cwd=ROOT,
        )
        assert child.stdout is not None
        try:
            for line in child.stdout:
                if not line.startswith("Progress "):
                    self.tail.append(line.rstrip())
                yield line.rstrip()
        except BaseException:
            child.terminate()
            raise
        finally:
            code = child.wait()
        if code:
            raise self.failure()

    def run(self, *arguments: str) -> None:
        for _ in self.lines(*arguments):
            pass

    def failure(self) -> Stop:
        """One sentence on why pip failed, and its last lines."""
        text = "\n".join(self.tail)
        missing = re.search(r"No matching distribution found for (\S+)", text)
        # pip calls an index that it could not reach an empty one.
        offline = re.search(
            r"NewConnectionError|NameResolutionError|Failed to resolve|ConnectTimeout|ReadTimeout|Connection refused|"
            r"Max retries|Connection broken|Network is unreachable|ProxyError|SSLError",
            text,
        )
        if "No space left on device" in text or "[Errno 28]" in text:
            sentence = f"the disk is full: free some space below {ROOT} or in {tempfile.gettempdir()}, then run again."
        elif "Disk quota exceeded" in text:
            sentence = "the disk quota is used up: free some space, then run again."
        elif offline:
            sentence = "the package index cannot be reached: check the network or pip's own settings, then run again."
        elif missing:
            sentence = f"the package index offers no {missing.group(1)} for Python {platform.python_version()} here."
        elif "THESE PACKAGES DO NOT MATCH THE HASHES" in text:
            sentence = "a downloaded package is damaged: run again, and clear pip's cache if it stays so."
        else:
            sentence = "pip failed."
        shown = [line for line in self.tail if line.strip()][-8:]
        return Stop(sentence + "".join(f"\n    pip: {line}" for line in shown), code=1)

    def resolve(self, *arguments: str) -> list[Wheel]:
        """What `pip install` with these arguments would install, nothing being installed."""
        with tempfile.TemporaryDirectory(prefix="baton-") as folder:
            report = Path(folder, "report.json")
            self.run("install", "--dry-run", "--report", str(report), *arguments)
            found = json.loads(report.read_text(encoding="utf-8"))["install"]
        return [
            Wheel(
                name=re.sub(r"[-_.]+", "-", item["metadata"]["name"]).lower(),
                version=item["metadata"]["version"],
                url=item["download_info"]["url"],
                sha256=item["download_info"].get("archive_info", {}).get("hashes", {}).get("sha256", ""),
                direct=item.get("is_direct", False),
            )
            for item in found
        ]

    def certificates(self) -> str | None:
        """The certificate bundle that pip is told to trust, None for the system's."""
        for name in ("PIP_CERT", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
            if os.environ.get(name):
                return os.environ[name]
        with contextlib.suppress(Stop):
            for line in self.lines("config", "list"):
                if re.match(r"(global|install)\.cert=", line):
                    return line.split("=", 1)[1].strip("'\"")
        return None


def measure(wheels: Sequence[Wheel], certificates: str | None) -> list[Wheel]:
    """The same wheels with their sizes, asked of the servers by HEAD; unknown stays None."""
    try:
        context = ssl.create_default_context(cafile=certificates)
    except OSError:
        context = ssl.create_default_context()

    def size(wheel: Wheel) -> Wheel:
        parts = urllib.parse.urlsplit(wheel.url)
        try:
            if parts.scheme == "file":
                nbytes = os.stat(urllib.request.url2pathname(parts.path)).st_size
            else:
                request = urllib.request.Request(wheel.url, method="HEAD", headers={"User-Agent": "baton-bootstrap"})
                with urllib.request.urlopen(request, timeout=5, context=context) as reply:
                    nbytes = int(reply.headers["Content-Length"])
        except (OSError, ValueError, TypeError, urllib.error.URLError):
            return wheel
        return Wheel(wheel.name, wheel.version, wheel.url, wheel.sha256, nbytes, wheel.direct)

    with concurrent.futures.ThreadPoolExecutor(max_workers=16) as pool:
        return list(pool.map(size, wheels))


# ---------------------------------------------------------------- what is said


class Screen:
    """One line that renews itself on a terminal; a line now and then elsewhere."""

    def __init__(self) -> None:
        self.live = sys.stdout.isatty()
        self.open = False

    def say(self, text: str) -> None:
        self.close()
        print(f"bootstrap: {text}", flush=True)

    def progress(self, text: str, *, keep: bool) -> None:
        """Shows `text`; where lines cannot be renewed, only if `keep`."""
        if self.live:
            width = shutil.get_terminal_size().columns - 1
            print("\r\033[K" + f"bootstrap: {text}"[:width], end="", flush=True)
            self.open = True
        elif keep:
            self.say(text)

    def close(self) -> None:
        if self.open:
            print(flush=True)
            self.open = False


def size_text(wheels: Sequence[Wheel]) -> str:
    """The download in words: what comes over the network, what lies on this machine, what nobody knows."""
    known = sum(w.nbytes or 0 for w in wheels if not w.url.startswith("file:"))
    local = sum(w.nbytes or 0 for w in wheels if w.url.startswith("file:"))
    unknown = sum(1 for w in wheels if w.nbytes is None)
    if unknown == len(wheels):
        return "of unknown size"
    text = f"{known / MIB:.0f} MiB to download"
    if local:
        text += f" and {local / MIB:.0f} MiB from local files"
    if unknown:
        text += f", {unknown} of unknown size"
    return text


def torch_text(version: str, cuda: bool, gpu: bool) -> str:
    build = "CUDA build" if cuda else "CPU build"
    text = f"torch {version} ({build}; this machine has {'an' if gpu else 'no'} NVIDIA GPU)"
    if gpu and not cuda:
        text += "; the GPU will not be used with it"
    return text


# ---------------------------------------------------------------- steps


def check_space(nbytes: float, what: str) -> None:
    free = shutil.disk_usage(ROOT).free
    if free < nbytes:
        raise Stop(f"{what} needs about {nbytes / MIB:.0f} MiB below {ROOT}, {free / MIB:.0f} MiB are free.")


def make_venv(folder: Path, screen: Screen) -> Path:
    """An environment with a working pip at `folder`; a half-made one is made again."""
    python = folder / "bin" / "python"
    if folder.exists() and not (folder / "pyvenv.cfg").exists() and any(folder.iterdir()):
        raise Stop(f"{folder} exists and is not a virtual environment: move it away, then run again.")
    if python.exists():
        probe = "import sys, pip; print(sys.version)"
        answer = subprocess.run([str(python), "-c", probe], capture_output=True, text=True, check=False)
        if answer.returncode == 0 and answer.stdout.strip() == sys.version.strip():
            return python
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        raise Stop(
            "Python's venv module is missing: on Debian and Ubuntu, apt install "
            f"python3-venv (or python{sys.version_info[0]}.{sys.version_info[1]}-venv), then run again."
        )
    check_space(200 * MIB, "the environment")
    screen.say(f"making {folder.name} with Python {platform.python_version()}")
    command = [sys.executable, "-m", "venv", "--clear", str(folder)]
    made = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if made.returncode:
        last = (made.stdout + made.stderr).strip().splitlines()[-1:]
        raise Stop(f"making {folder} failed: {''.join(last)}")
    return python


def choose(pip: Pip, lines: Sequence[str], constraints: Path, cpu_index: str, screen: Screen) -> list[Wheel]:
    """What to install: the index's choice, unless that is a CUDA build which this machine cannot use."""
    wheels = pip.resolve("-c", str(constraints), *lines)
    if not takes_cuda(wheels) or has_gpu():
        return wheels
    asked = next(line for line in lines if re.match(r"torch\b", line))
    screen.say("the index offers a CUDA build of torch and there is no NVIDIA GPU: asking PyTorch's CPU index")
    try:
        (torch,) = pip.resolve(
            "--no-deps", "--retries", "1", "--timeout", "15", "--index-url", cpu_index, "-c", str(constraints), asked
        )
    except Stop as stop:
        screen.say(f"the CPU index did not help, staying with the CUDA build (it runs on the CPU, too): {stop}")
        return wheels
    fixed = Wheel(torch.name, torch.version, torch.url, torch.sha256, direct=True)
    return pip.resolve("-c", str(constraints), *lines, fixed.requirement)


def install(pip: Pip, wheels: Sequence[Wheel], screen: Screen) -> None:
    """Installs exactly `wheels`, saying how far it is."""
    if not wheels:
        return
    arguments = ["install", "--no-deps", *(wheel.requirement for wheel in wheels)]
    if pip.version >= (24, 1):
        arguments[1:1] = ["--progress-bar", "raw"]
    sizes = {wheel.name: wheel.nbytes or 0 for wheel in wheels}
    total, fetched, name, kept = len(wheels), 0, "", 0.0
    for line in pip.lines(*arguments):
        moved = re.match(r"Progress (\d+) of (\d+)", line)
        if line.startswith(("Collecting ", "Processing ")):
            fetched += 1
            word = line.split()[1].rsplit("/", 1)[-1]
            name = re.split(r"[=<>@ ]|-\d", word)[0].replace("_", "-").lower()
            big = sizes.get(name, 0) > 20 * MIB
            note = f" ({sizes[name] / MIB:.0f} MiB)" if big else ""
            screen.progress(f"{min(fetched, total)} of {total}: {name}{note}", keep=big or fetched % 10 == 0)
        elif moved:
            done, whole = int(moved.group(1)), max(1, int(moved.group(2)))
            now = time.monotonic()
            keep = whole > 100 * MIB and now - kept > 10
            kept = now if keep else kept
            screen.progress(
                f"{min(fetched, total)} of {total}: {name}, {done / MIB:.0f} of {whole / MIB:.0f} MiB", keep=keep
            )
        elif line.startswith("Installing collected"):
            screen.progress(f"{total} of {total} fetched, unpacking", keep=True)
    screen.close()


def bootstrap(extras: Sequence[str], cpu_index: str, screen: Screen) -> None:
    """Makes `.venv` hold the project, its dependencies and those of `extras`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    constraints = ROOT / "constraints.txt"
    folder = ROOT / ".venv"
    stamp = folder / "baton-stamp.json"
    key = fingerprint(project, constraints.read_text(encoding="utf-8"))

    def stamped() -> set[str] | None:
        try:
            held = json.loads(stamp.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        same = held["key"] == key and (folder / "bin" / "python").exists()
        return set(held["extras"]) if same else None

    def ready() -> bool:
        held = stamped()
        return held is not None and held.issuperset(extras)

    lines = wanted(project, extras)
    if ready():
        return
    with alone(screen):
        if ready():
            return
        begin = time.monotonic()
        before = stamped() or set()
        pip = Pip(make_venv(folder, screen))
        if pip.version < PIP_LAZY:
            # pip from a bare index or an offline folder still works, it only downloads more before it knows.
            with contextlib.suppress(Stop):
                pip.run("install", "--upgrade", "-c", str(constraints), "pip")
            pip.version = pip.read_version()
        screen.say("finding out what is needed")
        wheels = choose(pip, lines, constraints, cpu_index, screen)
        unreachable = ucx_missing_reason()
        if unreachable is None:
            nixl = [line.split(";")[0].strip() for line in project["project"]["optional-dependencies"]["ucx"]]
            try:
                wheels += pip.resolve("--no-deps", "-c", str(constraints), *nixl)
            except Stop:
                unreachable = "the index offers no NIXL for this machine"
        wheels = measure(wheels, pip.certificates())
        known = sum(wheel.nbytes or 0 for wheel in wheels)
        if wheels:
            screen.say(f"{len(wheels)} package{'s' * (len(wheels) > 1)}, {size_text(wheels)}")
            check_space(known * (UNPACKED_RATIO + 1), "installing them")
        for wheel in wheels:
            if wheel.name == "torch":
                screen.say(torch_text(wheel.version, takes_cuda(wheels), has_gpu()))
        install(pip, wheels, screen)
        if unreachable:
            screen.say(f"{unreachable}: there is no UCX lane, KV pages will travel over ZeroMQ")
        pip.run("install", "--no-deps", "--no-build-isolation", "-e", str(ROOT))
        stamp.write_text(json.dumps({"key": key, "extras": sorted(before.union(extras))}) + "\n", encoding="utf-8")
        screen.say(f"ready after {time.monotonic() - begin:.0f} s")


@contextlib.contextmanager
def alone(screen: Screen) -> Iterator[None]:
    """Lets one bootstrap of this tree work at a time; the lock goes with the process."""
    import fcntl

    handle = os.open(ROOT, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            screen.say("another bootstrap is at work here, waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks: two at once may then trip over each other
        yield
    finally:
        os.close(handle)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bootstrap", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--extra", action="append", default=[], help="also what this extra needs (test, http, ray ...)")
    parser.add_argument("--cpu-index", default=CPU_INDEX, metavar="URL", help="a mirror of PyTorch's CPU index")
    options = parser.parse_args(arguments)
    screen = Screen()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        # NIXL is always installed, in its own way.
        bootstrap([extra for extra in options.extra if extra != "ucx"], options.cpu_index, screen)
    except Stop as stop:
        screen.close()
        print(f"bootstrap: {stop}", file=sys.stderr)
        return stop.code
    except KeyboardInterrupt:
        screen.close()
        print("bootstrap: interrupted; the next run goes on from here.", file=sys.stderr)
        return 130
    except OSError as error:
        screen.close()
        print(f"bootstrap: {error.strerror or error}: {error.filename or ROOT}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
