"""`baton plan`: how many devices a workload needs, in which pools, with how many ranks and stages; and why."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from control.simulate import aligned, between, find, slo
from core.errors import ModelError, SetupError
from engine.config import ModelConfig
from scheduler.layout import Cluster
from scheduler.plan import Ask, Evaluate, Evaluated, Option, Plan, Planned
from scheduler.planner import Planner
from scheduler.roofline import LANES, Sizes
from sim.fleet import DEVICES, MODELS
from sim.planning import Costs, Site, Trials, load
from sim.source import Source, source
from sim.workload import Workload

SAMPLE = 1000
"""Requests that bounds are computed from."""
ROUND = 100
"""Numbers of requests are multiples of it, so that workloads are made once."""
QUIET_S = 10.0
BAR = 24
SHOWN = 6
"""Dominated options of a table; JSON has all."""


def run(args: argparse.Namespace, *, as_json: bool) -> int:
    """Search, and print the plan: a table, or one JSON document."""
    began = time.process_time(), time.perf_counter()
    trials, planner = prepared(args)
    bar = Bar(sys.stderr)
    found = searched(planner, trials, args.jobs or len(os.sched_getaffinity(0)), bar)
    bar.end()
    if as_json:
        spent = {"cpu_s": time.process_time() - began[0], "wall_s": time.perf_counter() - began[1]}
        print(json.dumps({**found.document(), "spent": spent}, allow_nan=False))
    else:
        print("\n\n".join(tables(found)))
    return 0 if found.layout is not None else 1


def prepared(args: argparse.Namespace) -> tuple[Trials, Planner]:
    """What the flags ask for, checked; nothing is simulated yet."""
    if args.gpu not in DEVICES:
        raise SetupError(f"gpu: got {args.gpu!r}, want one of {', '.join(DEVICES)}")
    if not 0 < args.share <= 1:
        raise SetupError(f"share: got {args.share!r}, want above 0, at most 1")
    if not 0 < args.off < 1:
        raise SetupError(f"off: got {args.off!r}, want above 0, below 1")
    lanes = [lane.name for lane in LANES]
    if args.lane not in lanes:
        raise SetupError(f"lane: got {args.lane!r}, want one of {', '.join(lanes)}")
    name, sizes = model(args.model)
    ask = Ask(args.rate, slo(args.slo), args.share, args.gpu_hour, args.off, segments=args.segments)
    cluster = Cluster(args.gpus, args.per_node, args.stages, far=args.lane)
    make = workloads(args)
    known = load(make(args.rate, SAMPLE))
    apart, mixed = find(args.policy), find(args.mixed_policy)
    if apart.colocated or not mixed.colocated:
        wrong, got = ("policy", apart.name) if apart.colocated else ("mixed-policy", mixed.name)
        want = "one for prefill and decode workers" if apart.colocated else "one for colocated workers"
        raise SetupError(f"{wrong}: got {got!r}, want {want}")
    site = Site(cluster, Costs(f"{args.gpu}-{name}", sizes, DEVICES[args.gpu]), apart, mixed, args.page_tokens)
    if args.requests is not None:
        site = replace(site, least=args.requests, most=args.requests)
    trials = Trials(site, ask, make, known)
    return trials, Planner(ask, cluster, known, trials.fits())


def model(name: str) -> tuple[str, Sizes]:
    """The sizes of a known model, or of a Hugging Face directory's config.json."""
    if name in MODELS:
        return name, MODELS[name]
    if not (Path(name) / "config.json").is_file():
        raise SetupError(f"model: got {name!r}, want a directory with a config.json, or one of {', '.join(MODELS)}")
    try:
        config = ModelConfig.read(name)
    except ModelError as error:
        raise SetupError(str(error)) from None
    sizes = Sizes(
        config.layers, config.hidden, config.intermediate, config.heads, config.kv_heads, config.head_dim, config.vocab
    )
    # Tables go by name: only what has a known model's sizes may have its name.
    known = next((each for each, other in MODELS.items() if other == sizes), None)
    return known or f"config of {Path(name).resolve().name}", sizes


def workloads(args: argparse.Namespace) -> Callable[[float, int], Workload]:
    """Of a rate and at least so many requests, or all that a file has."""
    kept: dict[int, Source] = {}

    def at(rate: float, count: int) -> Workload:
        rounded = -(-count // ROUND) * ROUND
        if rounded not in kept:
            kept[rounded] = sourced(args, rounded)
        return kept[rounded].at(rate, args.seed)

    return at


def sourced(args: argparse.Namespace, count: int) -> Source:
    """The source with so many requests, or with all it has."""

    def of(number: int | None) -> Source:
        return source(
            args.trace,
            count=number,
            cv=args.cv,
            between=None if args.window is None else between(args.window),
            tick_s=args.jitter,
            think_s=args.think,
            agent=args.agent or "",
        )

    try:
        return of(count)
    except SetupError:
        return of(None)  # says what is wrong if it is not the number


def searched(planner: Planner, trials: Trials, jobs: int, bar: Bar) -> Plan:
    """Drive the planner; its questions of one round are answered side by side."""
    with ExitStack() as stack:
        answer: Callable[[Sequence[Evaluate]], Iterator[float]]
        if jobs > 1:
            # Forked, so that children have the trials without taking them along.
            _Child.trials = trials
            pool = stack.enter_context(multiprocessing.get_context("fork").Pool(min(jobs, 8)))
            answer = lambda commands: pool.imap(_Child.attained, commands)  # noqa: E731
        else:
            answer = lambda commands: map(trials.attained, commands)  # noqa: E731
        commands = planner.on(None, 0.0)
        while True:
            asked = [each for each in commands if isinstance(each, Evaluate)]
            if not asked:
                (last,) = commands
                assert isinstance(last, Planned)
                return last.plan
            bar.show(planner.progress, 0, asked)
            commands = []
            for done, (command, attained) in enumerate(zip(asked, answer(asked), strict=True), 1):
                commands += planner.on(Evaluated(command.number, attained), 0.0)
                bar.show(planner.progress, done, asked)


class _Child:
    """What a forked process finds."""

    trials: Trials

    @classmethod
    def attained(cls, command: Evaluate) -> float:
        return cls.trials.attained(command)


class Bar:
    """How far a search is: on a terminal a line that changes, elsewhere a line now and then."""

    def __init__(self, stream: TextIO, now: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._now = stream, now
        self._terminal = stream.isatty()
        self._said = now()

    def show(self, stage: str, done: int, asked: Sequence[Evaluate]) -> None:
        """So many of this round's questions are answered."""
        now = self._now()
        if not self._terminal and now - self._said < QUIET_S:
            return
        self._said = now
        filled = round(BAR * done / len(asked))
        text = f"[{'#' * filled}{' ' * (BAR - filled)}] {stage}, {asked[min(done, len(asked) - 1)].layout.name}"
        if self._terminal:
            print(f"\r{text[:110]:<110}", end="", file=self._stream, flush=True)
        else:
            print(text, file=self._stream, flush=True)

    def end(self) -> None:
        """Nothing more to come."""
        if self._terminal:
            print(f"\r{'':<110}\r", end="", file=self._stream, flush=True)


def tables(plan: Plan) -> Iterator[str]:
    """What was decided, and beside it what was not."""
    yield plan.verdict
    if plan.layout is None:
        for choice in plan.choices:
            yield _options(choice.question, choice.options)
        return
    first, *cells = plan.choices
    yield _options(f"at {plan.rate:.4g}/s", (*first.options, plan.equal))
    for choice in cells:
        yield _options(choice.question, choice.options)
    rows = [("if", "RATE", "GOOD %", "HOLDS")]
    for case in plan.cases:
        rows.append((case.name, f"{case.rate:.4g}/s", f"{100 * case.attained:.1f}", "yes" if case.holds else "no"))
    yield aligned(rows)
    if plan.costs:
        money = [("MONEY", "A MILLION OUTPUT TOKENS", "A MILLION TOKENS")]
        yield aligned([*money, *((f"{c.rate:.4g}/s", f"{c.output:.4f}", f"{c.all:.4f}") for c in plan.costs)])
    yield f"from {plan.next_rate:.4g}/s on: {plan.next_device}"


def _options(title: str, options: Sequence[Option]) -> str:
    """A line each; of cells that need many more devices than others only how many there are."""
    kept = [each for each in options if each.why != "dominated"]
    kept += sorted((each for each in options if each.why == "dominated"), key=lambda each: each.devices)[:SHOWN]
    left = len(options) - len(kept)
    options = [each for each in options if each in kept]
    rows = [(title.upper(), "DEVICES", "GOOD %", "")]
    for each in options:
        devices = "" if not each.devices else f"{'' if each.exact else '>='}{each.devices}"
        good = "" if each.attained is None else f"{100 * each.attained:.1f}"
        rows.append((each.name, devices, good, each.why))
    said = aligned(rows).splitlines()
    width = max(map(len, said))
    lines = [said[0], *(f"{line:<{width}}  {o.reason}" for line, o in zip(said[1:], options, strict=True))]
    return "\n".join([*lines, *([f"{left} more that need as many or more"] if left else [])])
