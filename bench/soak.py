"""Soak: what twenty thousand requests leave behind in each process of a deployment: memory, files, pages.

    python -m bench.soak [--requests 20000] [--quick] [--json FILE]

Two gateways, two prefill and two decode workers on the paced engine. Clients that always have a request each ask for
short and long answers, continuations and turns of sessions; some leave in the middle, some ask for what no worker
holds. After every twentieth part all have ended, arenas are looked at, and the resident memory and the open files of
each process are read. Caches and histories fill during the first 30 %; from then on nothing may grow: memory by no
more than 2 % or 4 MiB, files by none. A plot of all processes is written beside FILE.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from bench.report import Row, emit, parser, progress
from core.config import DeploymentConfig
from protos.baton.v1 import inference_pb2
from sim.plot import Axis, Series, lines
from tests.checkpoints import make_llama
from tests.live.asks import ENDS, case, prompt
from tests.live.cluster import Client, Live, Reply, ask, until

VOCAB, CONTEXT = 320, 4096
CLIENTS = 24
PARTS = 20
WARM = PARTS // 4
"""The part after which caches and histories are taken to be full, counted from 0."""
PACE = 0.2
"""Of the cost model's seconds a step: processes are to work, not engines."""
PATIENCE_S = 60.0
"""Every request ends by then."""
GROWS, GROWS_KB = 0.02, 4096
"""Of memory, whichever is more."""
TURNS = 3
"""Of a session."""


@dataclass(slots=True)
class Soaked:
    """What each process had after each part."""

    requests: int
    memory_kb: list[dict[str, int]] = field(default_factory=list)
    files: list[dict[str, int]] = field(default_factory=list)
    ends: Counter[str] = field(default_factory=Counter)
    held: list[str] = field(default_factory=list)
    """Pages that nobody uses and that are not free."""

    def grown_kb(self) -> dict[str, int]:
        """Memory of each process at the end, less what it had when it was warm."""
        return {name: self.memory_kb[-1][name] - kb for name, kb in self.memory_kb[WARM].items()}

    def grown_files(self) -> dict[str, int]:
        """Likewise of files."""
        return {name: self.files[-1][name] - count for name, count in self.files[WARM].items()}

    def broken(self) -> list[str]:
        """Promises that do not hold, in words."""
        warm = self.memory_kb[WARM]
        return [
            *(f"{n}: {kb} KiB more" for n, kb in self.grown_kb().items() if kb > max(GROWS_KB, GROWS * warm[n])),
            *(f"{name}: {count} more files" for name, count in self.grown_files().items() if count > 0),
            *self.held,
            *(f"{count} requests ended as {code}" for code, count in self.ends.items() if code not in ALLOWED),
        ]


ALLOWED = ("OK", "left", "INVALID_ARGUMENT")


async def ends_as(client: Client, request: inference_pb2.GenerateRequest, leaves: bool = False) -> str:
    """How one request ended."""
    reply = Reply()
    async with contextlib.aclosing(client.responses(request, reply, PATIENCE_S)) as responses:
        with contextlib.suppress(grpc.RpcError):  # what it was is in the reply
            async for response in responses:
                if leaves and response.token_ids:
                    return "left"
    return reply.code


async def one(client: Client, number: int, draw: random.Random) -> list[str]:
    """A request, or all turns of a session; how they ended."""
    match number % 20:
        case 0:
            return [await ends_as(client, case(CONTEXT + 1, 8, number).request)]
        case 1:
            return [await ends_as(client, case(draw.randint(8, 40), 24, number, n=2).request)]
        case 2:
            ends = []
            for turn in range(TURNS):
                request = ask(prompt(20 * TURNS, number)[: 20 * (turn + 1)], 8)
                request.hints.session = f"session-{number}"
                ends.append(await ends_as(client, request))
            return ends
        case 3:
            return [await ends_as(client, case(40, 200, number, forever=True).request, leaves=True)]
        case _:
            asked = case(draw.randint(4, 300), draw.randint(2, 24), number, temperature=0.8, seed=number)
            return [await ends_as(client, asked.request)]


async def part(live: Live, numbers: range, ends: Counter[str], seed: int) -> None:
    """So many requests by clients that always have one each, half of them at each gateway."""
    left = iter(numbers)
    addresses = [each.address for name, each in live.deployment.running.items() if name.startswith("gateway")]

    async def always(client: Client, draw: random.Random) -> None:
        for number in left:
            ends.update(await one(client, number, draw))

    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(Client(address)) for address in addresses]
        several = zip(range(CLIENTS), itertools.cycle(clients))
        await asyncio.gather(*(always(client, random.Random(f"{seed}/{n}")) for n, client in several))


def memory_kb(pid: int) -> int:
    """Resident."""
    return int(Path(f"/proc/{pid}/status").read_text().partition("VmRSS:")[2].split()[0])


def files(pids: dict[str, int]) -> dict[str, int]:
    """Open in each process: the fewest of a few looks, as a connection over which metrics were read may be closing."""
    looks = []
    for wait_s in (0.0, 0.1, 0.3):
        time.sleep(wait_s)
        looks.append({name: sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir()) for name, pid in pids.items()})
    return {name: min(each[name] for each in looks) for name in pids}


def soak(live: Live, requests: int) -> Soaked:
    """Ask a deployment that serves for so many, and look at it in between."""
    soaked = Soaked(requests)
    each = requests // PARTS
    for step in range(PARTS):
        asyncio.run(part(live, range(step * each, (step + 1) * each), soaked.ends, step))
        until(lambda: not live.phases(), "nothing is live")
        live.wait_empty()
        pids = {name: running.process.pid for name, running in live.deployment.running.items()}
        soaked.memory_kb.append({name: memory_kb(pid) for name, pid in pids.items()})
        soaked.files.append(files(pids))
        progress(f"  {(step + 1) * each} requests: {sum(soaked.memory_kb[-1].values()) >> 10} MiB in all")
    soaked.held = live.held()
    return soaked


def deployment(scratch: Path) -> Live:
    """Not started yet."""
    model = make_llama(
        scratch / "tiny", vocab=VOCAB, context=CONTEXT, dtype="bfloat16", tokenizer=True, eos=[1, *ENDS[1:]]
    )
    config = DeploymentConfig(
        model=str(model), port=0, prefill=2, decode=2, gateways=2, page_tokens=16, chunk_tokens=256, max_rows=24,
        threads=1, kv_memory="4M", engine="paced", pace=PACE, stop_rate=0.002,
    )  # fmt: skip
    live = Live(config, model, scratch / "log")
    live.torn = True
    return live


def run(requests: int) -> Soaked:
    """A deployment of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        live = deployment(Path(scratch))
        live.start()
        try:
            return soak(live, requests)
        finally:
            live.deployment.stop()


def plot(soaked: Soaked) -> str:
    """SVG: memory of all processes over requests."""
    each = soaked.requests // PARTS
    series = [
        Series(name, [((step + 1) * each, kb[name] / 1024) for step, kb in enumerate(soaked.memory_kb)])
        for name in soaked.memory_kb[0]
    ]
    marks = [((WARM + 1) * each, "warm")]
    return lines("Resident memory of each process", series, Axis("requests"), Axis("MiB", low=0.0), marks=marks)


def rows(soaked: Soaked) -> list[Row]:
    """Growth of each process since it was warm."""
    found = [Row("requests", soaked.requests, None, "", "", True)]
    for name, kb in soaked.grown_kb().items():
        warm = soaked.memory_kb[WARM][name]
        found.append(Row(f"{name}: memory", warm + kb, warm, "when warm", "KiB", False))
        found.append(
            Row(f"{name}: open files", soaked.files[-1][name], soaked.files[WARM][name], "when warm", "", False)
        )
    found.append(Row("pages held afterwards", len(soaked.held), 0, "none", "", False))
    return found


def main() -> None:
    """Exit code 1 where a promise does not hold."""
    words = parser("soak", "what requests leave behind in each process: memory, files, pages")
    words.add_argument("--requests", type=int, default=20000)
    args = words.parse_args()
    soaked = run(1000 if args.quick else args.requests)
    for word in soaked.broken():
        progress(f"  {word}")
    if args.json:
        Path(args.json).with_suffix(".svg").write_text(plot(soaked))
    emit("soak", rows(soaked), args.json)
    if soaked.broken():
        raise SystemExit(1)


if __name__ == "__main__":
    main()
