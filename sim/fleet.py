"""Which workers there are, what they cost and what they hold: "4 prefill tp2, 4 decode tp1" of a named cost model."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

from core.errors import SetupError
from core.kv import KvShape
from core.worker import Role
from scheduler import roofline
from scheduler.cost import CostModel
from scheduler.roofline import LANES, Hardware, Sizes, kv_tokens, over

SHIPPED = Path(roofline.__file__).parent / "costs"
MODELS: dict[str, Sizes] = {
    "llama-3.1-8b": roofline.LLAMA_3_1_8B,
    "llama-3.1-70b": roofline.LLAMA_3_1_70B,
    "llama-2-7b": roofline.LLAMA_2_7B,
    "llama-2-70b": roofline.LLAMA_2_70B,
    "qwen2.5-32b": roofline.QWEN_2_5_32B,
    "opt-13b": roofline.OPT_13B,
    "opt-66b": roofline.OPT_66B,
}
DEVICES: dict[str, Hardware] = {"a100": roofline.A100, "h100": roofline.H100, "h200": roofline.H200}

_POOL = re.compile(r"\s*(\d+)\s+(prefill|decode|mixed)(?:\s+tp(\d+))?\s*")
_COST = re.compile(r"([a-z0-9]+)-(.+?)(?:-tp(\d+))?")


@dataclass(frozen=True, slots=True)
class Build:
    """What a worker is made of."""

    name: str
    role: Role
    cost: CostModel
    shape: KvShape
    pages: int
    tp: int = 1
    """Devices it takes."""
    turns_s: tuple[float, ...] = ()
    """From a policy's order to the begin of its first step: drawn from these, by chance; 0 without any."""
    vary: tuple[tuple[float, ...], tuple[float, ...]] = ((), ())
    """So many times as long as `cost` says do the steps of an order take, which prefill or decode: drawn likewise."""


def workers(
    spec: str, cost: str, *, page_tokens: int = 16, kv: int | None = None, lane: str = "rdma-400g"
) -> tuple[Build, ...]:
    """The workers of a specification such as "2 prefill tp2, 1 decode"; SetupError where it is wrong.

    `cost` names a device and a model, "h200-llama-3.1-8b"; a rank count in the name is the default of `tp`. What is not
    among the shipped tables is the roofline's prediction. `kv`: tokens of KV a worker, instead of what fits.
    """
    found: list[Build] = []
    numbers = dict.fromkeys(Role, 0)
    for part in spec.split(","):
        match = _POOL.fullmatch(part)
        if match is None or not int(match[1]):
            raise SetupError(f"workers: got {part.strip()!r}, want COUNT prefill|decode|mixed [tpN]")
        role = Role(match[2])
        model, sizes, device = resolve(cost, int(match[3]) if match[3] else None, lane)
        room = kv if kv is not None else kv_tokens(sizes, device)
        pages = room // page_tokens
        if pages < 1:
            raise SetupError(
                f"workers: {part.strip()!r} of {model.name}: got room for {room} tokens, want a page at least"
            )
        shape = KvShape(sizes.layers, sizes.kv_heads, sizes.head_dim, page_tokens, "bfloat16")
        for _ in range(int(match[1])):
            found.append(Build(f"{role}-{numbers[role]}", role, model, shape, pages, sizes.tp))
            numbers[role] += 1
    return tuple(found)


def resolve(name: str, tp: int | None, lane: str) -> tuple[CostModel, Sizes, Hardware]:
    """The cost model of a name and a number of ranks, with the lane named in it."""
    match = _COST.fullmatch(name)
    if match is None or match[1] not in DEVICES or match[2] not in MODELS:
        raise SetupError(
            f"cost: got {name!r}, want DEVICE-MODEL[-tpN], of {', '.join(DEVICES)} and {', '.join(MODELS)}"
        )
    ranks = tp or (int(match[3]) if match[3] else 1)
    device, sizes = DEVICES[match[1]], over(MODELS[match[2]], ranks)
    base = f"{match[1]}-{match[2]}"
    names = (f"{base}-tp{ranks}", base) if ranks == 1 else (f"{base}-tp{ranks}",)
    for each in names:
        path = SHIPPED / f"{each}.json"
        if path.exists():
            model = CostModel.of(json.loads(path.read_text(encoding="utf-8")))
            break
    else:
        try:
            model = roofline.roofline(names[0], sizes, device)
        except ValueError as error:
            raise SetupError(f"cost: {name} over {ranks} ranks: {error}") from None
    known = {each.name: each for each in (*LANES, *model.lanes)}
    if lane not in known:
        raise SetupError(f"lane: got {lane!r}, want one of {', '.join(known)}")
    return replace(model, lanes=tuple(known.values())), sizes, device
