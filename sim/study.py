"""A question put to the simulator and its answers: which policies, at which rates, and what came of it in numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from core.request import Phase, Slo
from scheduler.ratio_events import Act, Decision, explain
from sim.goodput import Estimate, Goodput, Trial
from sim.outcome import Tally
from sim.run import Result
from sim.timeline import Timeline


@dataclass(frozen=True, slots=True)
class Run:
    """One policy at one rate."""

    policy: str
    about: str
    tally: Tally
    """Of all seeds."""
    seeds: tuple[int, ...]
    results: tuple[Result, ...]
    """By seed."""
    timeline: Timeline | None = None
    """Of the first seed."""
    decisions: tuple[Decision, ...] = ()
    """About the ratio, of the first seed."""

    @property
    def changes(self) -> tuple[tuple[float, str], ...]:
        """When the ratio was changed, and to what."""
        return tuple(
            (each.at_s, f"{each.chosen.act}, from {each.inputs.ratio}")
            for each in self.decisions
            if each.chosen.act is not Act.KEEP
        )


@dataclass(frozen=True, slots=True)
class Study:
    """A question and its answers."""

    command: str
    """Gives the same files again."""
    settings: dict[str, Any]
    """All that was assumed, in words and numbers."""
    slo: Slo
    unit: str
    """What rates count: requests or sessions."""
    share: float
    """Of the requests that must be good."""
    marks: tuple[tuple[float, str], ...] = ()
    """What the scenario does and when."""
    runs: tuple[Run, ...] = ()
    curves: dict[str, tuple[Trial, ...]] = field(default_factory=dict)
    """By policy."""
    goodputs: dict[str, Goodput] = field(default_factory=dict)


def figures(run: Run) -> dict[str, float | int | None]:
    """A run in numbers; names carry the units. Shares are of the requests that arrived."""
    tally, results = run.tally, run.results
    seconds = sum(result.seconds for result in results)
    devices = results[0].devices
    per_s = 1 / seconds if seconds > 0 else 0.0
    attained = Estimate.of([result.tally.attainment for result in results])
    return {
        "devices": devices,
        "requests": tally.arrived,
        "rate_per_s": sum(result.rate for result in results) / len(results),
        "seconds": seconds,
        "attained": tally.attainment,
        "attained_half": attained.half,
        "attained_by_mean": tally.attainment_by_mean,
        "ttft_p50_s": tally.ttft.quantile(0.5),
        "ttft_p90_s": tally.ttft.quantile(0.9),
        "ttft_p99_s": tally.ttft.quantile(0.99),
        "gap_p99_p50_s": tally.gap_p99.quantile(0.5),
        "gap_p99_p90_s": tally.gap_p99.quantile(0.9),
        "gap_mean_p50_s": tally.gap_mean.quantile(0.5),
        "e2e_p50_s": tally.e2e.quantile(0.5),
        "done": tally.phases[Phase.DONE],
        "rejected": tally.phases[Phase.REJECTED],
        "failed": tally.phases[Phase.FAILED],
        "cancelled": tally.phases[Phase.CANCELLED],
        "retried": tally.retried,
        "prompt_tokens": tally.prompt_tokens,
        "cached_tokens": tally.cached_tokens,
        "tokens": tally.tokens,
        "tokens_per_s": tally.tokens * per_s,
        "tokens_per_s_per_device": tally.tokens * per_s / devices,
        "good_per_s_per_device": tally.good * per_s / devices,
        "moved_nbytes": sum(result.moved_nbytes for result in results),
        "events": sum(result.events for result in results),
        "runs": sum(result.runs for result in results),
        "steps": sum(result.steps for result in results),
    }


def _decided(decision: Decision) -> dict[str, Any]:
    """A decision about the ratio, in numbers and in words."""
    return {
        "at_s": decision.at_s,
        "ratio": str(decision.inputs.ratio),
        "act": str(decision.chosen.act),
        "worker": decision.chosen.worker.name if decision.chosen.worker is not None else None,
        "why": str(decision.why),
        "scores": {str(each): score.good for each, score in zip(decision.candidates, decision.scores, strict=False)},
        "feasible": decision.feasible,
        "words": explain(decision),
    }


def means(trials: Sequence[Trial]) -> Iterator[tuple[float, Estimate, Estimate]]:
    """Rate, attainment and attainment by mean over seeds, by rate."""
    for rate in sorted({trial.rate for trial in trials}):
        here = [trial for trial in trials if trial.rate == rate]
        yield rate, Estimate.of([one.attained for one in here]), Estimate.of([one.attained_by_mean for one in here])


def document(study: Study) -> dict[str, Any]:
    """All of it but single requests and the time line, for JSON."""
    return {
        "command": study.command,
        "settings": study.settings,
        "unit": study.unit,
        "runs": [
            {
                "policy": run.policy,
                "about": run.about,
                **figures(run),
                **({"decisions": [_decided(each) for each in run.decisions]} if run.decisions else {}),
                "codes": dict(sorted(run.tally.codes.items())),
                "classes": [
                    {"class": kind, "tenant": tenant, **asdict(part), "attained": part.attainment}
                    for (kind, tenant), part in sorted(run.tally.parts.items())
                ],
                "seeds": [
                    {
                        "seed": seed,
                        "attained": result.tally.attainment,
                        "attained_by_mean": result.tally.attainment_by_mean,
                    }
                    for seed, result in zip(run.seeds, run.results, strict=True)
                ],
            }
            for run in study.runs
        ],
        "curves": {name: [asdict(trial) for trial in trials] for name, trials in study.curves.items()},
        "goodput": {
            name: {
                "per_device": found.rate.mean / found.devices,
                "per_device_by_mean": found.rate_by_mean.mean / found.devices,
                **asdict(found),
            }
            for name, found in study.goodputs.items()
        },
    }
