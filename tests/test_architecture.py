"""The rooms import what they may and nothing else, and the laws that say so can be broken.

Every check is a function of a file's path and text, so that each also runs on a table of small offending files.
"""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parent.parent

# What each room may import of our own. Floor by floor: a room sees what lies below it, never its siblings; the
# top floor may be composed freely, but a gateway never needs the processes that run it.
FLOOR_2 = {"core", "kernels", "engine", "runtime", "scheduler", "transfer"}
ROOMS: dict[str, set[str]] = {
    "core": set(),
    "kernels": set(),
    "protos": set(),
    "scheduler": {"core"},
    "transfer": {"core"},
    "engine": {"core", "kernels"},
    "runtime": {"core", "protos"},
    "prefill": FLOOR_2,
    "decode": FLOOR_2,
    "sim": {"core", "scheduler", "transfer"},
    "gateway": FLOOR_2 | {"protos"},
    "control": FLOOR_2 | {"protos", "prefill", "decode", "sim", "gateway"},
    "bench": FLOOR_2 | {"protos", "prefill", "decode", "sim", "gateway", "control", "tests"},
}
BESIDE = {"deploy", "tests"}

# What each room may import of others, beside the standard library; a room that is not named may import anything.
THIRD_PARTIES: dict[str, set[str]] = {
    "core": set(),
    "scheduler": set(),
    "sim": set(),
    "prefill": set(),
    "decode": set(),
    "kernels": {"torch", "triton", "numpy"},
    "transfer": {"nixl_cu13", "numpy", "zmq"},
    "engine": {"llguidance", "numpy", "safetensors", "torch"},
    "gateway": {"grpc", "jinja2", "smg_grpc_proto", "tokenizers"},
}

# Rooms and files without I/O, concurrency or tensors.
PURE_ROOMS = ("core", "scheduler", "sim")
PURE_FILES = ("transfer/plan.py", "transfer/repage.py", "transfer/source.py", "transfer/sink.py", "transfer/handoff.py")
IMPURE = {"asyncio", "concurrent", "grpc", "multiprocessing", "select", "selectors", "socket", "subprocess"}
IMPURE |= {"threading", "torch", "zmq"}

# A policy is given the time and its randomness, and says what it decided by its commands.
UNSEEN_BY_POLICIES = {"datetime", "importlib", "logging", "os", "random", "secrets", "time", "uuid"}

# These start in every process, and torch costs each 1.4 s and 224 MB.
WITHOUT_TORCH = ("core", "scheduler", "transfer", "runtime", "prefill", "decode", "gateway", "control", "sim")
WITHOUT_TORCH_FILES = ("engine/api.py", "engine/config.py", "engine/grammar.py", "engine/paced.py")


@dataclass(frozen=True)
class Import:
    module: str
    line: int
    names: tuple[str, ...]
    for_types: bool  # below `if TYPE_CHECKING:`

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]


def imports(text: str) -> Iterator[Import]:
    """Every import statement of a file, those inside functions included."""

    def walk(node: ast.AST, for_types: bool) -> Iterator[Import]:
        match node:
            case ast.Import(names=names):
                for name in names:
                    yield Import(name.name, node.lineno, (), for_types)
            case ast.ImportFrom(module=module, names=names, level=level):
                yield Import("." * level + (module or ""), node.lineno, tuple(n.name for n in names), for_types)
            case ast.Call(func=ast.Name(id="__import__")) | ast.Call(func=ast.Attribute(attr="import_module")):
                yield Import("importlib", node.lineno, (), for_types)
            case ast.If(test=ast.Name(id="TYPE_CHECKING") | ast.Attribute(attr="TYPE_CHECKING"), body=body):
                for child in body:
                    yield from walk(child, True)
                for child in node.orelse:
                    yield from walk(child, for_types)
            case _:
                for part in ast.iter_child_nodes(node):
                    yield from walk(part, for_types)

    yield from walk(ast.parse(text), False)


def broken(path: str, text: str) -> list[str]:
    """The laws that the file `path` (relative to the repository) breaks, one sentence each."""
    room = PurePosixPath(path).parts[0]
    found = []
    for item in imports(text):
        if item.module.startswith("."):
            found.append(f"{path}:{item.line}: relative import; rooms are imported by their literal names")
            continue
        if item.top in ROOMS or item.top in BESIDE:
            if room in ROOMS and item.top != room and item.top not in ROOMS[room]:
                found.append(f"{path}:{item.line}: {room} may not import {item.top}")
        elif item.top not in sys.stdlib_module_names and item.top not in THIRD_PARTIES.get(room, {item.top}):
            found.append(f"{path}:{item.line}: {room} may not import the third party {item.top}")
        if (room in PURE_ROOMS or path in PURE_FILES) and item.top in IMPURE:
            found.append(f"{path}:{item.line}: a pure file may not import {item.top}")
        passed_in = item.module == "random" and item.names == ("Random",) and item.for_types
        if room == "scheduler" and item.top in UNSEEN_BY_POLICIES and not passed_in:
            found.append(f"{path}:{item.line}: a policy may not import {item.top}")
        if room == "sim" and item.top == "transfer" and f"{item.module.replace('.', '/')}.py" not in PURE_FILES:
            found.append(f"{path}:{item.line}: the simulator may use only the pure part of transfer")
    return found


def files(*rooms: str) -> list[Path]:
    """Our own source files; generated ones are not ours."""
    found = [path for room in rooms for path in sorted((ROOT / room).rglob("*.py"))]
    return [path for path in found if not path.stem.endswith(("_pb2", "_pb2_grpc"))]


def packages() -> list[str]:
    """Every importable package that is shipped, by its dotted name."""
    inits = [path for room in ROOMS if room != "bench" for path in (ROOT / room).rglob("__init__.py")]
    return sorted(".".join(path.parent.relative_to(ROOT).parts) for path in inits)


def test_the_laws_hold() -> None:
    paths = files(*ROOMS)
    assert len(paths) > len(ROOMS)
    found = [line for path in paths for line in broken(path.relative_to(ROOT).as_posix(), path.read_text("utf-8"))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "text", "why"),
    [
        ("core/a.py", "import scheduler.router", "core may not import scheduler"),
        ("core/a.py", "import numpy", "third party numpy"),
        ("core/a.py", "def f():\n    import asyncio", "pure file may not import asyncio"),
        ("core/a.py", "from . import kv", "relative import"),
        ("kernels/a.py", "from core.kv import Shape", "kernels may not import core"),
        ("kernels/a.py", "import grpc", "third party grpc"),
        ("scheduler/a.py", "from transfer import sink", "scheduler may not import transfer"),
        ("scheduler/a.py", "import engine", "scheduler may not import engine"),
        ("scheduler/a.py", "from time import monotonic", "policy may not import time"),
        ("scheduler/a.py", "import random", "policy may not import random"),
        ("scheduler/a.py", "from random import Random", "policy may not import random"),
        ("scheduler/a.py", "if TYPE_CHECKING:\n    from random import random", "policy may not import random"),
        ("scheduler/a.py", "if TYPE_CHECKING: pass\nelse:\n    from random import Random", "may not import random"),
        ("scheduler/a.py", "import uuid", "policy may not import uuid"),
        ("scheduler/a.py", "import datetime as d", "policy may not import datetime"),
        ("scheduler/a.py", "import logging", "policy may not import logging"),
        ("scheduler/a.py", "x = __import__('time')", "policy may not import importlib"),
        ("scheduler/a.py", "import importlib as i\ni.import_module('time')", "policy may not import importlib"),
        ("scheduler/a.py", "import torch", "third party torch"),
        ("scheduler/a.py", "import threading", "pure file may not import threading"),
        ("transfer/a.py", "import runtime.driver", "transfer may not import runtime"),
        ("transfer/a.py", "import torch", "third party torch"),
        ("transfer/sink.py", "import zmq", "pure file may not import zmq"),
        ("transfer/source.py", "import socket", "pure file may not import socket"),
        ("transfer/plan.py", "try:\n    import asyncio.queues\nexcept ImportError: pass", "may not import asyncio"),
        ("engine/a.py", "import scheduler", "engine may not import scheduler"),
        ("engine/a.py", "from protos.baton.v1 import worker_pb2", "engine may not import protos"),
        ("runtime/a.py", "import kernels", "runtime may not import kernels"),
        ("runtime/a.py", "import prefill", "runtime may not import prefill"),
        ("prefill/a.py", "import decode", "prefill may not import decode"),
        ("prefill/a.py", "from protos.baton.v1 import worker_pb2", "prefill may not import protos"),
        ("decode/a.py", "from prefill.shell import Shell", "decode may not import prefill"),
        ("decode/a.py", "import sim", "decode may not import sim"),
        ("sim/a.py", "import runtime", "sim may not import runtime"),
        ("sim/a.py", "import transfer.nixl", "only the pure part of transfer"),
        ("sim/a.py", "import asyncio", "pure file may not import asyncio"),
        ("gateway/a.py", "import control", "gateway may not import control"),
        ("gateway/a.py", "import torch", "third party torch"),
        ("control/a.py", "import tests", "control may not import tests"),
        ("control/a.py", "import deploy.bootstrap", "control may not import deploy"),
    ],
)
def test_the_laws_can_be_broken(path: str, text: str, why: str) -> None:
    found = broken(path, text)
    assert any(why in line for line in found), found


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("scheduler/a.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from random import Random"),
        ("scheduler/a.py", "import bisect, math\nfrom core.kv import Shape\nfrom scheduler.router import Router"),
        ("transfer/zeromq.py", "import threading, socket\nimport zmq"),
        ("runtime/wire.py", "import asyncio, time, grpc\nfrom protos.baton.v1 import worker_pb2"),
        ("sim/a.py", "from transfer.sink import Sink"),
        ("control/a.py", "import decode, prefill, torch"),
        ("tests/a.py", "import control, deploy.bootstrap, pytest"),
    ],
)
def test_the_laws_allow_what_is_meant_to_be(path: str, text: str) -> None:
    assert broken(path, text) == []


def test_the_shipped_packages_are_those_of_the_tree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = project["tool"]["setuptools"]["packages"]
    assert listed == sorted(listed)
    assert packages() == listed


def test_our_names_mean_our_packages() -> None:
    for name in (room for room in ROOMS if (ROOT / room / "__init__.py").exists()):
        found = importlib.util.find_spec(name)
        assert found is not None, name
        assert found.origin == str(ROOT / name / "__init__.py")


def loads_torch(modules: list[str]) -> list[str]:
    """The modules after whose import, in one fresh interpreter and in this order, torch is there."""
    script = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    if 'torch' in sys.modules:\n"
        "        print(name)\n"
        "        break\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *modules], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_processes_that_need_no_torch_load_none() -> None:
    paths = [*files(*WITHOUT_TORCH), *(ROOT / name for name in WITHOUT_TORCH_FILES if (ROOT / name).exists())]
    modules = [path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for path in paths]
    names = [name.removesuffix(".__init__") for name in modules]
    assert "gateway.text" in names
    assert loads_torch(names) == []


def test_torch_would_be_noticed() -> None:
    assert loads_torch(["core.errors", "torch"]) == ["torch"]
