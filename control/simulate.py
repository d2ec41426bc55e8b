"""`baton simulate`: a workload at a deployment that is not there, under one policy or beside others."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from core.errors import LocalError, SetupError
from core.request import Slo
from scheduler.policies import POLICIES, Policy, policy
from scheduler.ratio_events import ANY, Bounds, Decision
from sim.coordinator import Control, Coordinator
from sim.fleet import Build, workers
from sim.goodput import Goal, Goodput, Trial, curve, goodput
from sim.outcome import Outcome, Tally
from sim.report import Requests, write
from sim.run import Settings, Simulation, simulate
from sim.scenario import CALM, Scenario, read, shipped
from sim.source import Source, source
from sim.study import Run, Study, document, figures, means
from sim.timeline import Timeline
from sim.workload import Workload

SAMPLES = 200
"""Of the time line, at least as far as arrivals go."""
QUIET_S = 10.0
"""Between two words of progress where nobody looks at a terminal."""
BAR = 24

FLAGS = (
    "trace", "workers", "cost", "policy", "compare", "slo", "rate", "cv", "requests", "window", "jitter", "think",
    "agent", "scenario", "seed", "seeds", "max_tokens", "page_tokens", "kv_tokens", "lane", "gateways", "ratio",
    "plan", "rates", "goodput", "share", "warm", "cool",
)  # fmt: skip
"""Those that say what is simulated, in the order in which a command names them."""
HEAD = (
    "POLICY", "REQUESTS", "GOOD %", "BY MEAN", "TTFT p50", "p90", "p99 s", "GAP p99 p50", "MEAN p50 s", "REJECTED",
    "FAILED", "TOKENS/S", "PER GPU", "GOOD/S/GPU", "EVENTS", "WALL REQ/S",
)  # fmt: skip


def about() -> str:
    """Policies by name, for the help."""
    width = max(map(len, POLICIES))
    return "policies:\n" + "\n".join(f"  {name:<{width}}  {found.about}" for name, found in POLICIES.items())


def run(args: argparse.Namespace, *, as_json: bool) -> int:
    """Simulate what the flags say; a table or one JSON document on stdout, files below --out."""
    plan = Plan(args)
    if args.out:
        try:
            Path(args.out).mkdir(parents=True, exist_ok=True)
            with ExitStack() as stack:
                study, walls = plan.study(stack.enter_context(Requests(Path(args.out))))
            write(Path(args.out), study)
        except OSError as error:
            raise SetupError(f"out: {error}") from None
    else:
        study, walls = plan.study(None)
    if as_json:
        print(json.dumps({**document(study), "wall": walls}, allow_nan=False))
    else:
        print("\n\n".join(_tables(study, walls)))
    if args.out:
        print(f"wrote {Path(args.out) / 'report.html'}, summary.json, requests.csv, timeline.csv", file=sys.stderr)
    return 0


class Plan:
    """What the flags ask for, checked."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._policies = [find(name) for name in names(args.policy, args.compare)]
        self._settings = Settings(slo=slo(args.slo), gateways=args.gateways, lane=args.lane, max_tokens=args.max_tokens)
        self._builds: tuple[Build, ...] = workers(
            args.workers, args.cost, page_tokens=args.page_tokens, kv=args.kv_tokens, lane=args.lane
        )
        self._source: Source = source(
            args.trace,
            count=args.requests,
            cv=args.cv,
            between=None if args.window is None else between(args.window),
            tick_s=args.jitter,
            think_s=args.think,
            agent=args.agent or "",
        )
        self._scenario = scenario(args.scenario)
        if args.plan and args.ratio != "adaptive":
            raise SetupError("plan: got one for a static ratio, want --ratio adaptive")
        self._control = Control(bounds=planned(args.plan)) if args.ratio == "adaptive" else None
        if self._control and (args.rates is not None or args.goodput):
            raise SetupError("ratio: got adaptive with rates or goodput, want a run at one rate")
        self._rates = [] if args.rates is None else rates(args.rates)
        try:
            self._goal = Goal(share=args.share, warm_s=args.warm, cool_s=args.cool)
        except LocalError as error:
            raise SetupError(str(error)) from None
        self._once = args.rate is not None or not (self._rates or args.goodput)
        """Beside rates and goodput there is a run at one rate, with all its details."""
        self._seeds = tuple(range(args.seed, args.seed + args.seeds))
        self._progress = Progress(sys.stderr)
        # Policies that are compared meet the same workloads.
        self._workload = functools.lru_cache(maxsize=4)(self._made)

    def study(self, requests: Requests | None) -> tuple[Study, dict[str, float]]:
        """Run all of it; the second are requests a second of wall-clock time, by policy."""
        args = self._args
        runs, curves, goodputs, walls = [], {}, {}, {}
        for each in self._policies:
            if self._once:
                before = time.perf_counter()
                runs.append(self._run(each, requests, watched=bool(args.out)))
                walls[each.name] = runs[-1].tally.arrived / (time.perf_counter() - before)
            make = functools.partial(self._shown, each.name)
            said = functools.partial(self._tried, each.name)
            if self._rates:
                curves[each.name] = curve(
                    make, self._rates, self._seeds, self._builds, each, self._settings,
                    replace(self._goal, least=1), scenario=self._scenario, each=said, over=self._progress.tick,
                )  # fmt: skip
            if args.goodput:
                goodputs[each.name] = goodput(
                    make, args.rate or self._source.rate or 1.0, self._seeds, self._builds, each, self._settings,
                    self._goal, scenario=self._scenario, each=said, over=self._progress.tick,
                )  # fmt: skip
        self._progress.end()
        study = Study(
            command=command(args),
            settings=self._assumed(),
            slo=self._settings.slo,
            unit=self._source.unit,
            share=self._goal.share,
            marks=tuple((event.at_s, _event(event)) for event in self._scenario.events),
            runs=tuple(runs),
            curves=curves,
            goodputs=goodputs,
        )
        return study, walls

    def _run(self, which: Policy, requests: Requests | None, *, watched: bool) -> Run:
        """One policy at the rate that was asked for, with every seed."""
        tally, results, timeline = Tally(), [], None
        decisions: tuple[Decision, ...] = ()
        for seed in self._seeds:
            workload = self._workload(self._args.rate, seed)
            self._progress.begin(f"{which.name}, seed {seed}", len(workload))

            def over(one: Outcome, seed: int = seed) -> None:
                tally.add(one)
                if requests is not None:
                    requests.add(which.name, seed, one)
                self._progress.tick(one)

            watch = None
            if watched and timeline is None:
                watch = timeline = Timeline(_round(workload.span_s / SAMPLES))
            coordinators: list[Coordinator] = []
            results.append(
                simulate(
                    workload, self._builds, which, self._settings, scenario=self._scenario, over=over, watch=watch,
                    control=None if self._control is None else functools.partial(_kept, self._control, coordinators),
                )
            )  # fmt: skip
            decisions = decisions or tuple(each for one in coordinators for each in one.decisions)
            if watch is not None:
                watch.end()
        return Run(which.name, which.about, tally, self._seeds, tuple(results), timeline, decisions)

    def _made(self, rate: float | None, seed: int) -> Workload:
        return self._source.at(rate, seed, self._scenario)

    def _shown(self, name: str, rate: float, seed: int) -> Workload:
        workload = self._workload(rate, seed)
        self._progress.begin(f"{name}, seed {seed}, {rate:.4g}/s", len(workload))
        return workload

    def _tried(self, name: str, trial: Trial) -> None:
        self._progress.say(f"{name}, seed {trial.seed}: {trial.rate:.4g}/s, {100 * trial.attained:.1f} % good")

    def _assumed(self) -> dict[str, object]:
        """All settings, for whoever wants to run it again."""
        args, settings = self._args, self._settings
        rate = args.rate if self._once else (self._rates or [self._source.rate or 1.0])[0]
        first = self._workload(rate, self._seeds[0])
        pools = {
            f"{build.role} tp{build.tp}": f"{build.cost.name}, {build.pages:,} pages of {args.page_tokens} tokens"
            for build in self._builds
        }
        return {
            "workload": first.source or first.name,
            "requests": len(first),
            "rates count": self._source.unit,
            "scenario": f"{self._scenario.name}: {self._scenario.about}" if self._scenario.events else "none",
            "workers": args.workers,
            **pools,
            "cost model": args.cost,
            "seeds": ", ".join(map(str, self._seeds)),
            "TTFT goal (s)": settings.slo.ttft_s or "none",
            "gap goal (s)": settings.slo.gap_s or "none",
            "gateways": settings.gateways,
            "ratio": args.ratio,
            "lane": settings.lane,
            "hop (s)": settings.hop_s,
            "a death is noticed after (s)": settings.lost_s,
            "a returning worker loads for (s)": settings.load_s,
            "clients wait (s)": settings.timeout_s,
            "max tokens": "what the answer comes to" if settings.max_tokens is None else settings.max_tokens,
        }


class Progress:
    """A bar on a terminal; elsewhere a line now and then."""

    def __init__(self, stream: TextIO, now: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._now = stream, now
        self._terminal = stream.isatty()
        self._label, self._total, self._count = "", 0, 0
        self._began = self._said = now()

    def begin(self, label: str, total: int) -> None:
        """A run of so many requests."""
        self._label, self._total, self._count = label, total, 0
        self._began = self._now()

    def tick(self, _: Outcome) -> None:
        """One more request is over."""
        self._count += 1
        if self._count % 64 and self._count != self._total:
            return
        now = self._now()
        if now - self._said < (0.1 if self._terminal else QUIET_S):
            return
        self._said = now
        speed = self._count / max(1e-9, now - self._began)
        if self._terminal:
            done = round(BAR * self._count / max(1, self._total))
            bar = "#" * done + " " * (BAR - done)
            text = f"[{bar}] {self._count:,}/{self._total:,} {self._label}, {speed:,.0f} requests/s"
            print(f"\r{text[:110]:<110}", end="", file=self._stream, flush=True)
        else:
            print(f"{self._label}: {self._count:,}/{self._total:,}, {speed:,.0f} requests/s", file=self._stream)

    def say(self, line: str) -> None:
        """A line that stays."""
        self._clear()
        self._said = self._now()
        print(line, file=self._stream, flush=True)

    def end(self) -> None:
        """Nothing more to come."""
        self._clear()

    def _clear(self) -> None:
        if self._terminal:
            print(f"\r{'':<110}\r", end="", file=self._stream, flush=True)


def planned(path: str | None) -> Bounds:
    """What a plan's document, as `baton plan -o json` writes it, says of the ratio; any ratio without one."""
    if not path:
        return ANY
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))["bounds"]
        bounds = None if found is None else Bounds(**found)
    except (OSError, ValueError, KeyError, TypeError, LocalError) as error:
        raise SetupError(f"plan: {path} is no plan as `baton plan -o json` writes it: {error!r}") from None
    if bounds is None:
        raise SetupError(f"plan: {path} has no workers that can change their role")
    return bounds


def _kept(control: Control, coordinators: list[Coordinator], simulation: Simulation) -> Coordinator:
    """For one run, whose decisions are looked at when it is over."""
    coordinators.append(control(simulation))
    return coordinators[-1]


def find(name: str) -> Policy:
    """A policy of that name, or the `POLICY` of a Python file; SetupError where there is none."""
    if not name.endswith(".py"):
        return policy(name)
    spec = importlib.util.spec_from_file_location(f"policy_{Path(name).stem}", name)
    if spec is None or spec.loader is None or not Path(name).is_file():
        raise SetupError(f"policy: got {name!r}, want a Python file that is there")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise SetupError(
            f"policy: {name}: got {type(error).__name__}: {error}, want a file that can be loaded"
        ) from error
    found = getattr(module, "POLICY", None)
    if not isinstance(found, Policy):
        raise SetupError(f"policy: {name}: POLICY: got {found!r}, want a scheduler.policies.Policy")
    return found


def slo(text: str) -> Slo:
    """The goals of "ttft=0.4,gap=0.05", in seconds; either may be left out."""
    values = {"ttft": 0.0, "gap": 0.0}
    for part in text.split(",") if text else ():
        name, _, value = part.partition("=")
        if name.strip() not in values:
            raise SetupError(f"slo: got {part!r}, want ttft=SECONDS,gap=SECONDS")
        values[name.strip()] = _positive("slo", value)
    return Slo(values["ttft"], values["gap"])


def rates(text: str) -> list[float]:
    """Rising, each once."""
    return sorted({_positive("rates", part) for part in text.split(",")})


def between(text: str) -> tuple[float, float]:
    """Seconds of "START:STOP"; either end may be left out."""
    start, colon, stop = text.partition(":")
    try:
        begin, end = float(start or 0), float(stop or "inf")
    except ValueError:
        begin, end = math.nan, math.nan
    if not colon or not 0 <= begin < end:
        raise SetupError(f"window: got {text!r}, want START:STOP in seconds, START below STOP")
    return begin, end


def scenario(name: str | None) -> Scenario:
    """A file's, or one that ships."""
    if name is None:
        return CALM
    return read(Path(name)) if name.endswith(".toml") else shipped(name)


def command(args: argparse.Namespace) -> str:
    """What gives the same again: every flag that says what is simulated, defaults written out."""
    words = ["baton", "simulate"]
    for name in FLAGS:
        value = getattr(args, name)
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif value is not None and value is not False:
            words += [flag, f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)]
    return shlex.join(words)


def names(first: str, others: str | None) -> list[str]:
    """Of policies, each once; `others` with commas between, or all."""
    listed = list(POLICIES) if others == "all" else (others or "").split(",")
    return list(dict.fromkeys(name.strip() for name in (first, *listed) if name.strip()))


def _positive(field: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise SetupError(f"{field}: got {text!r}, want a finite number above 0")
    return value


def _round(seconds: float) -> float:
    """The next of 1, 2 and 5 times a power of ten; a second for no time at all."""
    if seconds <= 0:
        return 1.0
    power = math.floor(math.log10(seconds))
    return next(step for f in (1, 2, 5, 10) if (step := float(f"{f}e{power}")) >= seconds * (1 - 1e-9))


def _event(event: object) -> str:
    """A scenario's event in two words."""
    who = next((str(getattr(event, name)) for name in ("worker", "tenant", "source") if hasattr(event, name)), "")
    return f"{type(event).__name__.lower()} {who}".strip()


def _tables(study: Study, walls: dict[str, float]) -> Iterator[str]:
    if study.runs:
        yield aligned([HEAD, *(_row(run, walls[run.policy]) for run in study.runs)])
    for name, trials in study.curves.items():
        rows = [
            (f"{rate:g} {study.unit}/s", f"{100 * ours.mean:.2f}", f"{100 * by_mean.mean:.2f}")
            for rate, ours, by_mean in means(trials)
        ]
        yield aligned([(name, "GOOD %", "BY MEAN"), *rows])
    if study.goodputs:
        head = ("GOODPUT", f"{study.unit}/s".upper(), "± 95 %", "PER GPU", "BY MEAN", "± 95 %", "PER GPU", "RUNS")
        yield aligned([head, *(_sustained(name, found) for name, found in study.goodputs.items())])


def _sustained(name: str, found: Goodput) -> tuple[str, ...]:
    cells = []
    for estimate in (found.rate, found.rate_by_mean):
        half = "" if estimate.half is None else f"{estimate.half:.3f}"
        cells += [f"{estimate.mean:.3f}", half, f"{estimate.mean / found.devices:.3f}"]
    return name, *cells, str(len(found.trials))


def _row(run: Run, wall: float) -> tuple[str, ...]:
    of = {name: value or 0 for name, value in figures(run).items()}
    return (
        run.policy,
        f"{of['requests']:,}",
        f"{100 * of['attained']:.2f}",
        f"{100 * of['attained_by_mean']:.2f}",
        *(f"{of[f'ttft_{share}_s']:.3f}" for share in ("p50", "p90", "p99")),
        f"{of['gap_p99_p50_s']:.4f}",
        f"{of['gap_mean_p50_s']:.4f}",
        f"{of['rejected']:,}",
        f"{of['failed']:,}",
        f"{of['tokens_per_s']:,.0f}",
        f"{of['tokens_per_s_per_device']:,.0f}",
        f"{of['good_per_s_per_device']:.3f}",
        f"{of['events']:,}",
        f"{wall:,.0f}",
    )


def aligned(rows: Sequence[tuple[str, ...]]) -> str:
    """Names to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
