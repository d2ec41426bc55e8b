"""However its requests are served, a model says what one process says, to the bit: two hundred requests each way.

One engine in this process is the reference. Against it: split over processes; with steps suspended and rows swapped
wherever that can be forced (tests/live/forced.py); with rows that move as soon as they have some tokens; with a worker
killed in each wave of requests. The demo model and a tiny one of each architecture, greedy and seeded, exact mode, the
hash of the logits at every step.
"""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from core.sampling import Sampling
from tests.checkpoints import MODELS, byte_tokenizer, make_model
from tests.live.asks import Case
from tests.live.cluster import Client, Live, Reference, Reply, ask, together

pytestmark = pytest.mark.slow

DEMO = Path(__file__).parents[2] / "deploy" / "demo" / "model"
ARCHITECTURES = ("Llama 3", "Mistral", "Qwen2", "Qwen3", "Gemma 2", "Gemma 3")
WAVES, WAVE = 3, 10
"""Of requests to each model: 210 for all seven."""
LENGTHS, MOST = (1, 16, 30, 80, 200), 120
PAGE_TOKENS = 16
SAMPLINGS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.8, "seed": 11},
    {"temperature": 1.3, "top_k": 12, "top_p": 0.95, "seed": 2**62},
)
WORKERS = ("prefill-0", "prefill-1", "decode-0", "decode-1")


@dataclass(frozen=True)
class Way:
    """How requests are served. `pages` is the arena's size, `shows` what must have happened: with each model, but for
    `kills`, which hit somebody's requests with some."""

    pages: int
    settings: dict[str, Any]
    shows: Callable[[Live, list[Reply]], dict[str, float]]
    kills: bool = False


def pulled(live: Live, replies: list[Reply]) -> dict[str, float]:
    return {"bytes pulled": live.total("baton_pulled_bytes")}


def forced(live: Live, replies: list[Reply]) -> dict[str, float]:
    return {
        "suspended": live.total("baton_prefill_suspensions"),
        "swapped": live.total("baton_rows_retired", how="swapped"),
    }


def moved(live: Live, replies: list[Reply]) -> dict[str, float]:
    return {"moves": sum(stage.name == "move" for reply in replies for stage in reply.last.stages)}


def placed_again(live: Live, replies: list[Reply]) -> dict[str, float]:
    return {"placed again": sum(reply.last.attempts > 1 for reply in replies)}


SPLIT = {"prefill": 2, "decode": 2}
EDGE = int(256 * 0.95) * PAGE_TOKENS - 150
"""Steps that an empty worker of the moving kind is free for, but 150: a row or two make it scarce."""
WAYS = {
    "handed over": Way(256, SPLIT, pulled),
    "suspended and swapped": Way(
        48, {"chunk_tokens": 2048, "prefix_cache": False, "how": {"worker_entry": "tests.live.forced"}}, forced
    ),
    "moved": Way(256, SPLIT | {"migrate": True, "migrate_below_steps": EDGE, "migrate_above_steps": EDGE}, moved),
    "killed": Way(256, SPLIT, placed_again, kills=True),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, tuple[Path, Reference]]:
    """Each model and the engine that says what it says."""
    found = {"demo": DEMO}
    for name in ARCHITECTURES:
        found[name] = make_model(tmp_path_factory.mktemp("every") / "model", MODELS[name] | {"vocab_size": 320})
        byte_tokenizer(found[name], 320)
    return {name: (path, Reference(path, dtype="float32", exact=True)) for name, path in found.items()}


def cases(dice: random.Random) -> list[Case]:
    made = []
    for number in range(WAVES * WAVE):
        tokens = tuple(dice.choices(range(3, 300), k=dice.choice(LENGTHS)))
        most, options = dice.randrange(1, MOST), SAMPLINGS[number % len(SAMPLINGS)]
        sampling = Sampling(most, ignore_eos=True, **options)
        made.append(Case(tokens, sampling, ask(tokens, most, ignore_eos=True, **options)))
    return made


def served(live: Live, asked: list[Case], kills: random.Random | None) -> list[Reply]:
    """Replies to all, a wave at a time; a worker dies in each, at any time, and is back for the next."""
    replies: list[Reply] = []

    async def run(wave: list[Case]) -> None:
        async with Client(live.gateway) as client:
            running = asyncio.create_task(together(*(client.generate(each.request, 120.0) for each in wave)))
            if kills is not None:
                await asyncio.sleep(kills.uniform(0.0, 0.4))
                await asyncio.to_thread(live.kill, kills.choice(WORKERS), signal.SIGKILL)
            replies.extend(await running)

    for first in range(0, len(asked), WAVE):
        asyncio.run(run(asked[first : first + WAVE]))
        if kills is not None:
            live.restart(*live.deployment.ended())
    return replies


@pytest.mark.parametrize("name", WAYS)
def test_every_way_says_the_same_to_the_bit(launch, models, name):
    way, shown = WAYS[name], dict[str, float]()
    for number, (model, (path, reference)) in enumerate(models.items()):
        nbytes = reference.engine.kv.page_nbytes
        settings = {"kv_memory": str(way.pages * nbytes), "host_memory": str(way.pages * nbytes), **way.settings}
        live = launch(f"{name}-{number}", path, dtype="float32", exact=True, hash_logits=True, **settings)
        live.torn = True
        try:
            asked = cases(random.Random(number))
            replies = served(live, asked, random.Random(number) if way.kills else None)
            for each, reply in zip(asked, replies, strict=True):
                each.check(reply, reference)
                assert reply.hashes == reference.hashes(each.prompt, each.sampling), model
            for what, count in way.shows(live, replies).items():
                of = what if way.kills else f"{what}, {model}"
                shown[of] = shown.get(of, 0) + count
        finally:
            live.stop()
    assert all(shown.values()), shown
