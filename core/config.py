"""The settings of every process: one frozen dataclass each, from TOML and flags, every field documented."""

from __future__ import annotations

import ast
import inspect
import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, TypeVar

from core.errors import SetupError
from core.group import Group
from core.worker import Role

T = TypeVar("T")

DEFAULT_COST = "h200-llama-3.1-8b"

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """One worker process."""

    name: str
    role: Role
    coordinator: str
    """host:port of the coordinator."""
    model: str
    """Model directory."""
    served_name: str
    """Name that clients call the model by."""
    listen: str = "127.0.0.1:0"
    """host:port of the gRPC service; port 0 takes any free one."""
    kv_memory: int = 256 * 2**20
    """Bytes of KV cache."""
    host_memory: int = 0
    """Bytes beside it for KV of rows that are swapped out; 0: they are computed again."""
    page_tokens: int = 64
    """Tokens in a page."""
    dtype: str = ""
    """Compute and KV type; empty: what suits the checkpoint and this CPU."""
    exact: bool = False
    """Bit-equal logits however a request is batched, chunked or moved; slower."""
    threads: int = 1
    """Threads of the engine."""
    transport: str = "nixl"
    """nixl or zeromq."""
    chunk_tokens: int = 512
    """Most prompt tokens in one engine step."""
    preempt: bool = True
    """A prefill step may be suspended for a more urgent prompt, and goes on afterwards."""
    max_rows: int = 64
    """Most sequences in one engine step."""
    max_steps: int = 16
    """Most decode steps in one order to the engine."""
    migrate: bool = False
    """A decode worker that is short of memory, or is to end, gives its running rows to others."""
    migrate_below_steps: int = 48
    """It is short when its rows have memory for fewer steps than these."""
    migrate_above_steps: int = 192
    """Another takes rows while its own have memory for more steps than these."""
    fetch: bool = False
    """A prefill worker pulls pages of prompts from workers that have them, where that is quicker than to compute."""
    tenants: str = ""
    """Weights of tenants, NAME=WEIGHT with commas between; others weigh 1."""
    policy: str = "baton"
    """How requests are ordered and placed, batches bounded and memory promised: a name of docs/policies.md."""
    profile_s: float = 2.0
    """Most seconds in which a worker times its steps at its first start on this machine; 0: it guesses, and learns."""
    hash_logits: bool = False
    """Hash the logits of every token, for comparisons."""
    engine: str = "torch"
    """torch runs the model; paced runs none: exact tokens of its own at the pace of a cost model."""
    cost: str = DEFAULT_COST
    """Cost model of the paced engine, DEVICE-MODEL[-tpN]."""
    pace: float = 1.0
    """How many times the cost model's seconds a step of the paced engine takes; 0: as long as it takes."""
    stop_rate: float = 0.0
    """Chance that the paced engine's next token is an end or stop token; 0: texts end by their length."""
    check: bool = False
    """Check every machine's invariants at every step; for tests."""
    group: str = ""
    """Whose requests it serves, and with whom alone it exchanges KV; empty: of those that name no group."""
    record: str = ""
    """Directory to record in what the machines hear and decide, prompts included; empty: nothing is recorded."""

    @property
    def process(self) -> str:
        """What kind of process this configures."""
        return "worker"


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """One gateway process."""

    name: str
    coordinator: str
    """host:port of the coordinator."""
    model: str
    """Model directory; only its tokenizer and config are read."""
    served_name: str
    """Name that clients call the model by."""
    listen: str = "127.0.0.1:0"
    """host:port of the gRPC service; port 0 takes any free one."""
    timeout_s: float = 600.0
    """Longest life of a request whose call has no deadline."""
    max_queue_s: float = 30.0
    """A request without a TTFT goal is accepted while its wait stays under this."""
    ttft_s: float = 0.0
    """TTFT goal of requests that bring none; 0: best effort."""
    gap_s: float = 0.0
    """Token gap goal of requests that bring none; 0: best effort."""
    deadline_s: float = 0.0
    """Goal for the whole answer of requests that bring no goal at all, in place of the two before; 0: none."""
    tenants: str = ""
    """Weights of tenants, NAME=WEIGHT with commas between; others weigh 1."""
    prefix_cache: bool = True
    """Let workers keep the KV of prompts for others that begin alike, within a tenant."""
    policy: str = "baton"
    """How requests are ordered and placed, batches bounded and memory promised: a name of docs/policies.md."""
    check: bool = False
    """Check the router's invariants at every step; for tests."""
    group: tuple[Group, ...] = ()
    """The groups that there are, with their goals; none: only that of requests that name no group."""
    record: str = ""
    """Directory to record in what the machines hear and decide, prompts included; empty: nothing is recorded."""

    @property
    def process(self) -> str:
        """What kind of process this configures."""
        return "gateway"


@dataclass(frozen=True, slots=True)
class CoordinatorConfig:
    """The coordinator process."""

    name: str = "coordinator"
    listen: str = "127.0.0.1:0"
    """host:port of the gRPC service; port 0 takes any free one."""
    lease_s: float = 3.5
    """A member that is silent this long is dropped from the list."""
    record: str = ""
    """Directory to record in what the machines hear and decide; empty: nothing is recorded."""

    @property
    def process(self) -> str:
        """What kind of process this configures."""
        return "coordinator"


@dataclass(frozen=True, slots=True)
class HttpConfig:
    """The process of the HTTP server in front of the gateways."""

    name: str
    gateways: str
    """host:port of each gateway, with commas between."""
    listen: str = "127.0.0.1:0"
    """host:port of the HTTP server; port 0 takes any free one."""
    timeout_s: float = 600.0
    """Longest life of a request."""

    @property
    def process(self) -> str:
        """What kind of process this configures."""
        return "http"


ProcessConfig = WorkerConfig | GatewayConfig | CoordinatorConfig | HttpConfig


@dataclass(frozen=True, slots=True)
class DeploymentConfig:
    """What `baton up` starts on one machine."""

    model: str
    """Model directory, or a hub id that is in the local cache."""
    served_name: str = ""
    """Name that clients call the model by; empty: the last part of `model`."""
    download: bool = False
    """Fetch a hub id that is not in the local cache."""
    prefill: int = 1
    """Prefill workers."""
    decode: int = 1
    """Decode workers."""
    mixed: int = 0
    """Workers that do both."""
    group: tuple[Group, ...] = ()
    """Further workers that serve requests of their group alone, "chat: 1 prefill, 2 decode, ttft_s=0.4"; may be
    repeated. Those above serve requests that name no group."""
    gateways: int = 1
    """Gateways; each takes the next port."""
    port: int = 50051
    """Port of the first gateway; 0: any free one."""
    http: int = -1
    """Port of an OpenAI-compatible HTTP server before the gateways; 0: any free one, -1: none."""
    host: str = "127.0.0.1"
    """Address that the gateways and HTTP listen on; coordinator and workers stay on loopback."""
    kv_memory: str = "256M"
    """KV cache of each worker, in bytes or with K, M, G."""
    host_memory: str = "0"
    """Memory beside it, of each decode worker, for rows that are swapped out; 0: they are computed again."""
    page_tokens: int = 64
    """Tokens in a page."""
    prefill_page_tokens: int = 0
    """Tokens in a page of the prefill workers; 0: as many as in the others'."""
    dtype: str = ""
    """float32, bfloat16 or float16; empty: what suits the checkpoint and this CPU."""
    exact: bool = False
    """Bit-equal logits however a request is batched, chunked or moved; slower."""
    threads: int = 0
    """Threads of each engine; 0: cores divided by workers."""
    transport: str = "auto"
    """nixl (UCX), zeromq, or auto: nixl, and zeromq only where nixl has no wheel."""
    chunk_tokens: int = 512
    """Most prompt tokens in one engine step."""
    preempt: bool = True
    """A prefill step may be suspended for a more urgent prompt, and goes on afterwards."""
    max_rows: int = 64
    """Most sequences in one engine step."""
    max_steps: int = 16
    """Most decode steps in one order to the engine."""
    policy: str = "baton"
    """How requests are ordered and placed, batches bounded and memory promised: a name of docs/policies.md."""
    profile_s: float = 2.0
    """Most seconds in which a worker times its steps at its first start on this machine; 0: it guesses, and learns."""
    migrate: bool = False
    """A decode worker that is short of memory, or is to end, gives its running rows to others."""
    migrate_below_steps: int = 48
    """It is short when its rows have memory for fewer steps than these."""
    migrate_above_steps: int = 192
    """Another takes rows while its own have memory for more steps than these."""
    fetch: bool = False
    """Prefill workers pull pages of prompts from workers that have them, where that is quicker than to compute them."""
    max_queue_s: float = 30.0
    """A request without a TTFT goal is accepted while its wait stays under this."""
    ttft_s: float = 0.0
    """TTFT goal of requests that bring none; 0: best effort."""
    gap_s: float = 0.0
    """Token gap goal of requests that bring none; 0: best effort."""
    deadline_s: float = 0.0
    """Goal for the whole answer of requests that bring no goal at all, in place of the two before; 0: none."""
    tenants: str = ""
    """Weights of tenants, NAME=WEIGHT with commas between; others weigh 1."""
    timeout_s: float = 600.0
    """Longest life of a request whose call has no deadline."""
    prefix_cache: bool = True
    """Keep the KV of prompts for others that begin alike, within a tenant."""
    engine: str = "torch"
    """torch runs the model; paced runs none: exact tokens of its own at the pace of a cost model."""
    cost: str = DEFAULT_COST
    """Cost model of the paced engine, DEVICE-MODEL[-tpN]."""
    pace: float = 1.0
    """How many times the cost model's seconds a step of the paced engine takes; 0: as long as it takes."""
    stop_rate: float = 0.0
    """Chance that the paced engine's next token is an end or stop token; 0: texts end by their length."""
    hash_logits: bool = False
    """Hash the logits of every token, for comparisons."""
    check: bool = False
    """Check every machine's invariants at every step; for tests."""
    record: str = ""
    """Directory in which every process records what its machines hear and decide, prompts included, for `replay`."""

    def __post_init__(self) -> None:
        def bad(field: str, want: str) -> SetupError:
            return SetupError(f"{field}: got {getattr(self, field)!r}, want {want}")

        for field in ("prefill", "decode", "mixed"):
            if getattr(self, field) < 0:
                raise bad(field, "at least 0")
        bare = self.group and not (self.prefill or self.decode or self.mixed)
        if not bare and not self.mixed and not (self.prefill and self.decode):
            raise SetupError(
                f"workers: got {self.prefill} prefill, {self.decode} decode, {self.mixed} mixed; "
                "want a prefill and a decode worker, or a mixed one"
            )
        for field in ("gateways", "page_tokens", "chunk_tokens", "max_rows", "max_steps"):
            if getattr(self, field) < 1:
                raise bad(field, "at least 1")
        if not 0 <= self.port <= 65535 or (self.port and self.port + self.gateways - 1 > 65535):
            raise bad("port", "in 0..65535, with room for all gateways behind it")
        if not -1 <= self.http <= 65535:
            raise bad("http", "in 0..65535, or -1 for none")
        if self.threads < 0:
            raise bad("threads", "at least 0")
        weights(self.tenants)
        for field in ("max_queue_s", "ttft_s", "gap_s", "deadline_s"):
            if not 0 <= getattr(self, field) < math.inf:
                raise bad(field, "a finite time of at least 0")
        if not 0 <= self.profile_s < math.inf:
            raise bad("profile_s", "a finite time of at least 0")
        if not 0 < self.timeout_s < math.inf:
            raise bad("timeout_s", "a finite time above 0")
        if not 0 <= self.migrate_below_steps <= self.migrate_above_steps:
            raise bad("migrate_below_steps", f"in 0..{self.migrate_above_steps}, which is migrate_above_steps")
        if self.transport not in ("auto", "nixl", "zeromq"):
            raise bad("transport", "auto, nixl or zeromq")
        if self.engine not in ("torch", "paced"):
            raise bad("engine", "torch or paced")
        if not 0 <= self.pace < math.inf:
            raise bad("pace", "a finite factor of at least 0")
        if not 0 <= self.stop_rate <= 1:
            raise bad("stop_rate", "a share, 0 to 1")
        if self.dtype not in ("", "float32", "bfloat16", "float16"):
            raise bad("dtype", "float32, bfloat16, float16 or nothing")
        if 256 % self.page_tokens:
            raise bad("page_tokens", "a divisor of 256")
        if self.prefill_page_tokens < 0 or (self.prefill_page_tokens and 256 % self.prefill_page_tokens):
            raise bad("prefill_page_tokens", "a divisor of 256, or 0 for page_tokens")
        nbytes(self.kv_memory)
        nbytes(self.host_memory, "host_memory", least=0)

        names = [group.name for group in self.group]
        for name in names:
            if not name or names.count(name) > 1:
                raise SetupError(f"group: got the name {name!r} {names.count(name)} times, want a name once")

    @property
    def groups(self) -> tuple[Group, ...]:
        """All of them, the one of requests that name none first, if it has workers."""
        if not (self.prefill or self.decode or self.mixed):
            return self.group
        return (Group("", self.prefill, self.decode, self.mixed), *self.group)

    @property
    def workers(self) -> int:
        """Engine processes."""
        return sum(group.workers for group in self.groups)


def nbytes(text: str, setting: str = "kv_memory", least: int = 1) -> int:
    """Bytes from "1048576", "64K", "256M" or "2G"; raises SetupError on anything else, and on less than `least`."""
    number, unit = text.strip().rstrip("iB"), ""
    if number and number[-1].upper() in _UNITS:
        number, unit = number[:-1], number[-1].upper()
    try:
        value = int(float(number) * _UNITS[unit])
    except (ValueError, OverflowError):
        value = -1
    if value < least:
        raise SetupError(f"{setting}: got {text!r}, want bytes such as 64M or 2G")
    return value


def weights(text: str) -> tuple[tuple[str, float], ...]:
    """Tenants and weights from "a=2,b=0.5"; raises SetupError on anything else, and on a weight that is not above 0."""
    found: dict[str, float] = {}
    for each in text.split(",") if text.strip() else ():
        name, _, weight = each.strip().rpartition("=")
        try:
            value = float(weight)
        except ValueError:
            value = 0.0
        if not name or name in found or not 0 < value < math.inf:
            raise SetupError(f"tenants: got {each.strip()!r}, want NAME=WEIGHT, each name once, weights above 0")
        found[name] = value
    return tuple(found.items())


def build(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """An instance of a config class; an unknown, missing or mistyped field is a SetupError that names it."""
    known = {field.name: field for field in fields(cls)}  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            raise SetupError(f"{where}: got unknown setting {name!r}, want one of {', '.join(sorted(known))}")
    wanted: dict[str, type] = {"int": int, "str": str, "bool": bool, "float": float, "Role": Role}
    clean: dict[str, Any] = {}
    for name, field in known.items():
        if name not in values:
            if field.default is MISSING:
                raise SetupError(f"{where}: {name} is missing")
            continue
        value = values[name]
        if field.type == "tuple[Group, ...]":
            clean[name] = _groups(value, where)
            continue
        kind = wanted[str(field.type)]
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if kind is Role and isinstance(value, str) and value in list(Role):
            value = Role(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise SetupError(f"{where}: {name}: got {value!r}, want {field.type}")
        clean[name] = value
    return cls(**clean)


def _groups(values: object, where: str) -> tuple[Group, ...]:
    """Tables of a file, or groups that flags gave."""
    if not isinstance(values, list | tuple):
        raise SetupError(f"{where}: group: got {values!r}, want [[group]] tables")
    found = []
    for each in values:
        if not isinstance(each, Group | dict):
            raise SetupError(f"{where}: group: got {each!r}, want [[group]] tables")
        found.append(each if isinstance(each, Group) else build(Group, each, f"{where}: group"))
    return tuple(found)


def to_json(config: ProcessConfig) -> str:
    """A process's settings as its launcher passes them on."""
    return json.dumps({"process": config.process, **asdict(config)})


def from_json(text: str) -> ProcessConfig:
    """The inverse of `to_json`."""
    values = json.loads(text)
    kinds: dict[str, type[ProcessConfig]] = {
        "worker": WorkerConfig,
        "gateway": GatewayConfig,
        "coordinator": CoordinatorConfig,
        "http": HttpConfig,
    }
    kind = values.pop("process")
    return build(kinds[kind], values, kind)


def documented(cls: type) -> dict[str, str]:
    """The docstring under each field of a config class, for `--help`."""
    tree = ast.parse(inspect.getsource(cls)).body[0]
    assert isinstance(tree, ast.ClassDef)
    texts: dict[str, str] = {}
    for line, text in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            isdoc = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
            texts[line.target.id] = str(text.value.value) if isdoc else ""  # type: ignore[attr-defined]
    return texts
