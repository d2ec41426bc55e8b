"""Chaos: what clients lose while processes are killed, stopped, restarted and drained, and reads of KV fail.

    python -m bench.chaos [--minutes 10] [--engine both|paced|torch] [--seed N] [--quick] [--json FILE]

With both engines the one that computes has a fifth of the minutes, and so has the part with gateways in each; see
below.

Two prefill and two decode workers. First the deployment is measured in peace: its capacity by clients that always have
a request each, then latency at 60 % of that by Poisson arrivals. Then the same load comes again, with the deadline at
ten times the median latency, while three hands work beside each other, one for each phase and one for the coordinator:
every few seconds each kills a process, stops it for a while, or has it drain and end; it touches nobody else of its
kind before that is whole again. Meanwhile workers' reads fail, stall, hang and bring flipped bits, and their messages
are late or come twice. Some clients leave.

At the end all of that goes on while a gateway is killed, too, again and again, through which half of the requests come.
What becomes of these is counted apart: they die with it. Those that come through the other gateway are promised what
all are.

Each reply is compared with what its tokens imply (`tests/engine/chain.py`; for `torch` with one engine of this
process), token by token and by the hash that each token was drawn from. Failed is who ended otherwise than well, by
leaving, or by a refusal before the first token.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.report import Row, emit, parser, progress
from core.config import DeploymentConfig
from tests.checkpoints import make_llama
from tests.engine.chain import Chain
from tests.live.asks import ENDS, Case, case
from tests.live.cluster import Client, Live, Reference, Reply
from tests.transfer.faults import Rule

VOCAB, CONTEXT = 320, 8192
LLAMA: dict[str, dict[str, Any]] = {"paced": {}, "torch": {"layers": 6, "hidden": 256}}
"""Where the engine computes, such that an answer takes about as long as on the paced one. In smaller ones most of a
token's time is not the engine's, and ten answers' time is not much more than it takes to know who stands still."""
ROWS = 24
"""Of a step."""
KV_MEMORY = {"paced": "2M", "torch": "24M"}
"""8,192 tokens each."""
SHARE = 0.6
"""Of the capacity."""
PATIENCE = 10.0
"""The deadline, in median latencies of the undisturbed run."""
MORE_REFUSED = 2.0
"""Points by which more may be refused than undisturbed."""
LEAVES = 0.03
"""Share of clients that leave in the middle."""
CLIENTS = 32
"""At once, while the capacity is measured."""
BETWEEN_S = (1.0, 4.0)
"""From the time that a phase is whole again to its next disturbance."""
AWAY_S = (0.2, 2.0)
"""How long a killed process stays dead."""
STILL_S = (0.5, 5.0)
"""How long a stopped one stands still."""
BACK_S = 60.0
"""Nobody takes longer to drain, or to serve again."""
DEEDS = {"prefill": ("kill", "stop", "drain"), "decode": ("kill", "stop", "drain"), "coordinator": ("kill", "stop")}
"""What is done to processes of each kind, by a hand of its own."""
SAMPLINGS: tuple[dict[str, Any], ...] = ({}, {"temperature": 0.8, "seed": 11}, {"temperature": 1.2, "seed": 5})
SHORTER = 5
"""The part with gateway kills, and the engine that computes, have this fraction of the time."""
DOOMED = "gateway-1"
"""The gateway that is killed."""
RULES_S = 3.0
"""New faults of reads and messages come this often."""
READS = ("flip", "fail", "delay", "stall", "doubt", "break")
WORDS = ("Reserve", "Grant", "Ready", "Taken", "Release")


@dataclass(slots=True)
class Asked:
    """One request, and what its client saw."""

    case: Case
    leaves_at: int = 0
    """Tokens after which its client leaves; 0: it stays."""
    reply: Reply = field(default_factory=Reply)
    times: list[float] = field(default_factory=list)
    """When tokens came, the time of asking first."""
    left: bool = False
    doomed: bool = False
    """It came through a gateway that is killed."""

    @property
    def fate(self) -> str:
        """good, left, rejected, failed, or lost with its gateway."""
        if self.left:
            return "left"
        if self.reply.code == "OK":
            return "good"
        if self.doomed and self.reply.code == "UNAVAILABLE" and "attempts" not in self.reply.details:
            return "lost"
        nobody = self.reply.code == "UNAVAILABLE" and "attempts" not in self.reply.details
        refused = self.reply.code == "RESOURCE_EXHAUSTED" or nobody
        return "rejected" if refused and not self.reply.tokens else "failed"

    @property
    def latency_s(self) -> float:
        """From asking to the last token."""
        return self.times[-1] - self.times[0]

    @property
    def pause_s(self) -> float:
        """The longest time without a token, once there was one."""
        return max((b - a for a, b in zip(self.times[1:], self.times[2:], strict=False)), default=0.0)


def some(number: int, draw: random.Random) -> Case:
    """A request of its own."""
    return case(draw.randint(8, 400), draw.randint(40, 160), number, **SAMPLINGS[number % len(SAMPLINGS)])


async def go(client: Client, asked: Asked, timeout_s: float) -> None:
    """Ask, and read until the end, or until its client leaves."""
    asked.times.append(time.monotonic())
    with contextlib.suppress(Exception):  # what it was is in the reply
        async for response in client.responses(asked.case.request, asked.reply, timeout_s):
            asked.reply.take(response)
            if response.token_ids:
                asked.times.append(time.monotonic())
            if asked.leaves_at and len(asked.reply.tokens) >= asked.leaves_at and asked.reply.end is None:
                asked.left = True
                return


async def capacity(live: Live, seconds: float, draw: random.Random) -> float:
    """Requests a second that clients get done who always have one each."""
    done = 0
    until = time.monotonic() + seconds

    async def always(client: Client, number: int) -> None:
        nonlocal done
        while time.monotonic() < until:
            asked = Asked(some(number, draw))
            await go(client, asked, 60.0)
            if time.monotonic() < until:
                done += 1

    async with Client(live.gateway) as client:
        await asyncio.gather(*(always(client, number) for number in range(CLIENTS)))
    return done / seconds


async def load(
    live: Live, rate: float, seconds: float, timeout_s: float, draw: random.Random, doomed: bool = False
) -> list[Asked]:
    """Poisson arrivals for so long, half of them through a gateway that is `doomed`; returns when all have ended."""
    asked: list[Asked] = []
    tasks: list[asyncio.Task[None]] = []
    address = live.deployment.running[DOOMED].address
    async with Client(live.gateway) as kept, Client(address) as lost:
        due = time.monotonic()
        until = due + seconds
        while due < until:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            each = Asked(some(len(asked), draw), draw.randint(1, 30) if draw.random() < LEAVES else 0)
            each.doomed = doomed and len(asked) % 2 == 1
            asked.append(each)
            tasks.append(asyncio.create_task(go(lost if each.doomed else kept, each, timeout_s)))
            due += draw.expovariate(rate)
        await asyncio.gather(*tasks)
    return asked


class Hand:
    """Disturbs processes by name, one after the other, until `stop`; counts what it did to which kind."""

    def __init__(self, live: Live, deeds: Mapping[str, Sequence[str]], draw: random.Random) -> None:
        self._live = live
        self._deeds = dict(deeds)
        self._draw = draw
        self.did: Counter[str] = Counter()

    async def work(self, stop: asyncio.Event) -> None:
        """Until `stop` is set, and then until all of its own are back."""
        while not stop.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), self._draw.uniform(*BETWEEN_S))
                return
            name = self._draw.choice(list(self._deeds))
            deed = self._draw.choice(self._deeds[name])
            self.did[f"{deed} {_kind(name)}"] += 1
            match deed:
                case "kill":
                    await asyncio.to_thread(self._live.kill, name, signal.SIGKILL)
                    await self._back(name)
                case "drain":
                    await asyncio.to_thread(self._live.kill, name, signal.SIGTERM)
                    await asyncio.to_thread(self._live.deployment.running[name].process.wait, BACK_S)
                    await self._back(name)
                case "stop":
                    self._live.kill(name, signal.SIGSTOP)
                    await asyncio.sleep(self._draw.uniform(*STILL_S))
                    self._live.kill(name, signal.SIGCONT)
            await _until(self._whole)

    async def _back(self, name: str) -> None:
        await asyncio.sleep(self._draw.uniform(*AWAY_S))
        await asyncio.to_thread(self._live.revive, name)

    def _whole(self) -> bool:
        live, names = self._live, {*self._deeds} - {"coordinator", DOOMED}
        if DOOMED in self._deeds and live.health(live.deployment.running[DOOMED].address) != "SERVING":
            return False
        return names <= live.usable(live.gateway)


def _kind(name: str) -> str:
    return name.partition("-")[0]


class Faults:
    """Gives all workers new faults of their next reads and messages, again and again; counts which came about."""

    def __init__(self, live: Live, draw: random.Random) -> None:
        self._live = live
        self._draw = draw
        self.did: Counter[str] = Counter()

    async def work(self, stop: asyncio.Event) -> None:
        """Until `stop` is set; then nobody has any."""
        while not stop.is_set():
            self._put({each.name: self._some() for each in self._live.workers})
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), RULES_S)
        self._put({})

    def _put(self, rules: dict[str, list[Rule]]) -> None:
        self.did.update(f"rule: {line.partition(': ')[2]}" for line in self._live.acted())
        self._live.fault(rules)

    def _some(self) -> list[Rule]:
        draw = self._draw
        reads = [Rule("read", draw.choice(READS), draw.randint(1, 20), 1, draw.uniform(0.05, 0.5)) for _ in range(2)]
        word, deed = f"send {draw.choice(WORDS)}", draw.choice(("delay", "twice"))
        return [*reads, Rule(word, deed, draw.randint(1, 20), 1, draw.uniform(0.05, 0.5))]


async def _until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + BACK_S
    while not await asyncio.to_thread(true):
        if time.monotonic() > end:
            raise TimeoutError("a disturbed process is not back")
        await asyncio.sleep(0.2)


async def disturbed(
    live: Live,
    rate: float,
    seconds: float,
    timeout_s: float,
    draw: random.Random,
    doomed: bool = False,
) -> tuple[list[Asked], Counter[str]]:
    """The load beside all hands; what was asked, and what was done to whom."""
    running = live.deployment.running
    own = [{name: deeds for name in running if _kind(name) == kind} for kind, deeds in DEEDS.items()]
    if doomed:
        own.append({DOOMED: ("kill",)})
    stop = asyncio.Event()
    all_hands: list[Hand | Faults] = [*(Hand(live, deeds, draw) for deeds in own), Faults(live, draw)]
    hurting = asyncio.gather(*(each.work(stop) for each in all_hands))
    asked = await load(live, rate, seconds, timeout_s, draw, doomed)
    stop.set()
    await hurting
    return asked, sum((each.did for each in all_hands), Counter[str]())


def wrong(asked: Sequence[Asked], reference: Chain | Reference) -> int:
    """Requests with a token that is not what it should be, of whatever end."""
    count = 0
    for each in asked:
        want = reference.tokens(each.case.prompt, each.case.sampling)
        got = each.reply.tokens
        same = got == (want if each.fate == "good" else want[: len(got)])
        if same and each.fate == "good":
            same = each.reply.hashes == reference.hashes(each.case.prompt, each.case.sampling)
        count += not same
    return count


def quantile(values: Sequence[float], q: float) -> float:
    """By the nearest rank; 0 of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else 0.0


@dataclass(slots=True)
class Report:
    """A run in peace, one in chaos, one in which a gateway is killed as well, and one in peace again."""

    rate: float
    timeout_s: float
    calm: list[Asked]
    after: list[Asked]
    """In peace again: a machine that others use as well is not as fast all the time."""
    chaos: list[Asked]
    """Of both, without those whose gateway was killed."""
    doomed: list[Asked]
    """These."""
    did: Counter[str]
    wrong: int
    held: list[str]
    errors: list[str]

    def share(self, asked: Sequence[Asked], fate: str) -> float:
        """Percent of those asked."""
        return 100 * sum(each.fate == fate for each in asked) / max(1, len(asked))

    def count(self, fate: str) -> int:
        """Of those asked in chaos."""
        return sum(each.fate == fate for each in self.chaos)

    def strange(self) -> int:
        """Requests whose gateway was killed, and that failed for another reason."""
        return sum(each.fate == "failed" for each in self.doomed)

    def kept(self) -> bool:
        """Whether the promises hold."""
        refused = self.share(self.chaos, "rejected") > self.share(self.calm, "rejected") + MORE_REFUSED
        return not (self.count("failed") or self.strange() or self.wrong or self.held or refused)

    def rows(self, name: str) -> list[Row]:
        """What is promised, and what is reported."""
        good = [each for each in self.chaos if each.fate == "good"]
        hit = [each for each in good if each.reply.last.attempts > 1]
        calm = [each.pause_s for each in self.calm if each.fate == "good"]
        before, after = ([each.latency_s for each in asked if each.fate == "good"] for asked in (self.calm, self.after))
        peace = self.share(self.calm, "rejected")

        def told(case: str, ours: float, unit: str, peer: float | None = None, peer_name: str = "") -> Row:
            return Row(f"{name}: {case}", ours, peer, peer_name, unit, False)

        processes = sum(count for deed, count in self.did.items() if not deed.startswith("rule"))
        rules = sum(count for deed, count in self.did.items() if deed.startswith("rule"))
        return [
            told("requests", len(self.chaos), ""),
            told("processes killed, stopped or drained", processes, ""),
            told("faults of reads and messages", rules, ""),
            told("failed", self.count("failed"), "", 0, "while one worker of each phase lives"),
            told("with a wrong token", self.wrong, "", 0, "none"),
            told("pages held afterwards", len(self.held), "", 0, "none"),
            told("rejected", self.share(self.chaos, "rejected"), "%", peace + MORE_REFUSED, "undisturbed + 2 points"),
            told("placed again at least once", 100 * len(hit) / max(1, len(good)), "%"),
            told("longest pause of a stream, p50", quantile([e.pause_s for e in good], 0.5) * 1e3, "ms"),
            told("longest pause of a stream, p99", quantile([e.pause_s for e in good], 0.99) * 1e3, "ms"),
            told("the same undisturbed, p99", quantile(calm, 0.99) * 1e3, "ms"),
            told("longest pause of one placed again, p99", quantile([e.pause_s for e in hit], 0.99) * 1e3, "ms"),
            told("kills of a gateway", self.did["kill gateway"], ""),
            told("requests through it", len(self.doomed), ""),
            told("ended with it", sum(each.fate == "lost" for each in self.doomed), ""),
            told("ended otherwise than well, by it or by leaving", self.strange(), "", 0, "but for refusals"),
            told("arrivals", self.rate, "requests/s"),
            told("deadline", self.timeout_s, "s"),
            told("latency undisturbed before, p50", quantile(before, 0.5), "s"),
            told("latency undisturbed afterwards, p50", quantile(after, 0.5), "s"),
            told("latency undisturbed, longest", quantile([*before, *after], 1.0), "s", self.timeout_s, "the deadline"),
        ]


def run(engine: str, seconds: float, seed: int, scratch: Path, peace_s: float = 20.0) -> Report:
    """Peace twice for so long, then chaos, for a part of that time with kills of a gateway as well, and peace again."""
    model = make_llama(
        scratch / "llama", vocab=VOCAB, context=CONTEXT, dtype="bfloat16", tokenizer=True, eos=[1, *ENDS[1:]],
        **LLAMA[engine],
    )  # fmt: skip
    how = {"engine": "paced", "pace": 2.0, "stop_rate": 0.002} if engine == "paced" else {"exact": True}
    config = DeploymentConfig(
        model=str(model), port=0, prefill=2, decode=2, gateways=2, page_tokens=16, chunk_tokens=64, max_rows=ROWS,
        threads=1, kv_memory=KV_MEMORY[engine], hash_logits=True, **how,
    )  # fmt: skip
    live = Live(config, model, scratch / "log", faults=scratch / "rules")
    live.torn, live.expected = True, [".*"]
    draw = random.Random(seed)
    live.fault({})
    live.start()
    try:
        most = asyncio.run(capacity(live, peace_s, draw))
        rate = SHARE * most
        calm = asyncio.run(load(live, rate, peace_s, 60.0, random.Random(seed + 1)))
        timeout_s = PATIENCE * quantile([each.latency_s for each in calm if each.fate == "good"], 0.5)
        progress(f"  {most:.1f} requests/s at most; {rate:.1f} for {seconds:.0f} s, each within {timeout_s:.1f} s")
        chaos, did = asyncio.run(disturbed(live, rate, seconds, timeout_s, random.Random(seed + 2)))
        more, also = asyncio.run(disturbed(live, rate, seconds / SHORTER, timeout_s, random.Random(seed + 3), True))
        did += also
        chaos += [each for each in more if not each.doomed]
        doomed = [each for each in more if each.doomed]
        after = asyncio.run(load(live, rate, peace_s, 60.0, random.Random(seed + 4)))
        held = live.held()
        with contextlib.suppress(AssertionError):
            live.wait_empty()
            held = []
        errors = [line["message"] for line in live.lines() if line["level"] == "critical" or "exception" in line]
    finally:
        live.deployment.stop()
    everybody = [*calm, *chaos, *doomed, *after]
    if engine == "paced":
        reference: Chain | Reference = Chain.of(model, VOCAB, CONTEXT, (0, *ENDS), 0.002)
    else:
        reference = Reference(model, exact=True, kv_memory=128 * 2**20)
        reference.learn(((each.case.prompt, each.case.sampling) for each in everybody), ROWS)
    lies = wrong(everybody, reference)
    return Report(rate, timeout_s, calm, after, chaos, doomed, did, lies, held, errors)


def main() -> None:
    """Exit code 1 where a promise does not hold."""
    words = parser("chaos", "what clients lose while processes die, stand still and drain, and reads fail")
    words.add_argument("--minutes", type=float, default=10.0, help="of chaos")
    words.add_argument("--engine", choices=("both", "paced", "torch"), default="both")
    words.add_argument("--seed", type=int, default=0)
    args = words.parse_args()
    seconds, peace_s = (10.0, 3.0) if args.quick else (60 * args.minutes, 20.0)
    parts = {"paced": seconds, "torch": seconds / SHORTER} if args.engine == "both" else {args.engine: seconds}
    if args.quick and len(parts) > 1:
        del parts["torch"]
    rows: list[Row] = []
    kept = True
    for engine, part_s in parts.items():
        with tempfile.TemporaryDirectory() as scratch:
            report = run(engine, part_s, args.seed, Path(scratch), peace_s)
        say(report)
        rows += report.rows(engine)
        kept = kept and report.kept()
    emit("chaos", rows, args.json)
    if not kept:
        raise SystemExit(1)


def say(report: Report) -> None:
    """What was done, who failed, and why others were refused."""
    for deed, count in sorted(report.did.items()):
        progress(f"  {count:5} x {deed}")
    everybody = [*report.chaos, *report.doomed]
    for each in everybody:
        if each.fate == "failed":
            progress(f"  failed after {each.latency_s:.1f} s: {each.reply.code}: {each.reply.details}")
    for why, count in Counter(each.reply.details for each in report.chaos if each.fate == "rejected").most_common():
        progress(f"  {count:5} x rejected: {why}")
    for error in report.errors[:20]:
        progress(f"  logged: {error}")


if __name__ == "__main__":
    main()
