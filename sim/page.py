"""A study as one HTML page: what was run, a table, and charts. No script, nothing from elsewhere, all text escaped."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from html import escape

from core.pages import Owner
from scheduler.ratio_events import explain
from sim.plot import CSS, LIGHT, Axis, Bar, Series, bars, lines, stack
from sim.study import Run, Study, figures, means
from sim.timeline import Sample, Timeline

SMALL = (440, 170)
STRETCHES = 60
"""Points of a line of decisions."""
TABLE = (
    ("policy", ""),
    ("requests", ""),
    ("attained", "%"),
    ("± (95 %)", "points"),
    ("by mean gap", "%"),
    ("TTFT p50", "s"),
    ("TTFT p90", "s"),
    ("TTFT p99", "s"),
    ("gap p99, median", "s"),
    ("gap p99, p90", "s"),
    ("mean gap, median", "s"),
    ("rejected", ""),
    ("failed", ""),
    ("tokens/s", ""),
    ("tokens/s/GPU", ""),
    ("good/s/GPU", ""),
    ("from cache", "%"),
    ("KV moved", "GB"),
)
STYLE = """
body{background:var(--bg);color:var(--fg);font:15px/1.5 system-ui,sans-serif}
body{margin:2rem auto;max-width:74rem;padding:0 1rem}
pre{background:var(--grid);padding:.7rem;overflow-x:auto;white-space:pre-wrap}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}td,th{padding:.15rem .6rem;text-align:right}
td:first-child,th:first-child{text-align:left}th{font-weight:600;border-bottom:1px solid var(--dim)}
.wide{overflow-x:auto}.grid{display:flex;flex-wrap:wrap;gap:1rem}.note{color:var(--dim)}
svg .title{font-weight:600}
"""


def page(study: Study) -> str:
    """The whole page."""
    body = "\n".join(_body(study))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>baton simulate</title>\n<style>\n{CSS}\n{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _body(study: Study) -> Iterator[str]:
    yield "<h1>Simulation</h1>"
    yield f"<pre>{escape(study.command)}</pre>"
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(_said(value))}</td></tr>" for name, value in study.settings.items()
    )
    yield f"<details><summary>All settings</summary><table>{rows}</table></details>"
    if study.runs:
        yield "<h2>Outcomes</h2>"
        yield _table(study.runs)
        yield f'<p class="note">{escape(_goals(study))}</p>'
    if study.goodputs:
        yield "<h2>Goodput</h2>"
        yield _goodput(study)
    if study.curves:
        yield "<h2>Attainment over rate</h2>"
        yield f'<div class="grid">{_curve(study, by_mean=False)}{_curve(study, by_mean=True)}</div>'
    if study.runs:
        yield "<h2>Distributions</h2>"
        yield f'<div class="grid">{"".join(_distributions(study))}</div>'
    timelines = [(run.policy, run.timeline) for run in study.runs if run.timeline is not None]
    changes = {run.policy: run.changes for run in study.runs}
    decided = {run.policy: run.decisions for run in study.runs}
    if timelines:
        yield "<h2>Over time</h2>"
        ends_s = max(timeline.samples[-1].at_s for _, timeline in timelines)
        yield lines(
            "Requests under way",
            [Series(name, [(s.at_s, s.under_way) for s in timeline.samples]) for name, timeline in timelines],
            Axis("time (s)", low=0.0),
            Axis("requests", low=0.0),
            marks=[mark for mark in study.marks if mark[0] <= ends_s],
        )
    for index, (name, timeline) in enumerate(timelines):
        opened = " open" if index == 0 else ""
        yield f"<details{opened}><summary><b>{escape(name)}</b>: workers and decisions</summary>"
        marks = [mark for mark in (*study.marks, *changes[name]) if mark[0] <= timeline.samples[-1].at_s]
        yield "<h3>Queues</h3>" + _grid(_queues(timeline, marks))
        yield "<h3>KV memory</h3>" + _grid(_memory(timeline, marks))
        yield "<h3>Decisions</h3>" + _grid(_decisions(timeline, marks))
        yield from (f"<pre>{escape(explain(each))}</pre>" for each in decided[name] if each.scores)
        yield "</details>"


def _goals(study: Study) -> str:
    slo = study.slo
    goals = [f"{name} within {value:g} s" for name, value in (("TTFT", slo.ttft_s), ("gaps", slo.gap_s)) if value]
    return (
        f"Goals: {' and '.join(goals) or 'none'}. Attained: share of arrived requests that were served with their "
        "first token and the 99th percentile of their gaps within the goals; by mean gap: the same with the mean of "
        "the gaps. GPUs are all devices of the deployment."
    )


def _table(runs: Sequence[Run]) -> str:
    head = "".join(f"<th>{escape(name)}{f' ({unit})' if unit and '/' not in name else ''}</th>" for name, unit in TABLE)
    rows = []
    for run in runs:
        of = {name: value or 0 for name, value in figures(run).items()}
        half = figures(run)["attained_half"]
        cells = (
            f"{run.policy}",
            f"{of['requests']:,}",
            f"{100 * of['attained']:.2f}",
            "" if half is None else f"{100 * half:.2f}",
            f"{100 * of['attained_by_mean']:.2f}",
            *(f"{of[f'ttft_{q}_s']:.3f}" for q in ("p50", "p90", "p99")),
            *(f"{of[name]:.4f}" for name in ("gap_p99_p50_s", "gap_p99_p90_s", "gap_mean_p50_s")),
            f"{of['rejected']:,}",
            f"{of['failed']:,}",
            f"{of['tokens_per_s']:,.0f}",
            f"{of['tokens_per_s_per_device']:,.1f}",
            f"{of['good_per_s_per_device']:.3f}",
            f"{100 * of['cached_tokens'] / max(1, of['prompt_tokens']):.1f}",
            f"{of['moved_nbytes'] / 1e9:,.1f}",
        )
        rows.append(
            f'<tr title="{escape(run.about)}">' + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
        )
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _goodput(study: Study) -> str:
    groups = []
    for name, found in study.goodputs.items():
        pair = []
        for label, estimate in (("p99 gap", found.rate), ("mean gap", found.rate_by_mean)):
            mean, half = estimate.mean / found.devices, None if estimate.half is None else estimate.half / found.devices
            ends = (None, None) if half is None else (max(0.0, mean - half), mean + half)
            pair.append(Bar(label, mean, *ends))
        groups.append((name, pair))
    return bars(
        f"Highest rate at which {100 * study.share:g} % are good, per GPU",
        groups,
        Axis(f"{study.unit}/s per GPU"),
        size=(max(680, 110 * len(groups)), 320),
    )


def _curve(study: Study, *, by_mean: bool) -> str:
    series = [
        Series(
            name,
            [(rate, 100 * (mean if by_mean else ours).mean) for rate, ours, mean in means(trials)],
            dots=True,
        )
        for name, trials in study.curves.items()
    ]
    title = "Good requests, by the mean gap" if by_mean else "Good requests, by the p99 gap"
    return lines(
        title,
        series,
        Axis(f"rate ({study.unit}/s)"),
        Axis("share of arrived requests (%)", low=0.0, high=100.0),
        levels=[(100 * study.share, f"{100 * study.share:g} %")],
        size=(560, 320),
    )


def _distributions(study: Study) -> Iterator[str]:
    goals = ((study.slo.ttft_s,), (study.slo.gap_s,), (study.slo.gap_s,))
    titles = ("Time to first token", "99th percentile of a request's gaps", "Mean of a request's gaps")
    for title, (goal,), what in zip(titles, goals, ("ttft", "gap_p99", "gap_mean"), strict=True):
        series = []
        for run in study.runs:
            spread = getattr(run.tally, what)
            # Of all that arrived: who refuses does not come out faster.
            share = 100 * spread.count / max(1, run.tally.arrived)
            series.append(Series(run.policy, [(value, share * below) for value, below in spread.cdf() if value > 0]))
        yield lines(
            title,
            series,
            Axis("seconds", log=True),
            Axis("share of arrived requests (%)", low=0.0, high=100.0),
            marks=[(goal, f"goal {goal:g} s")] if goal else (),
            size=(560, 320),
        )


def _queues(timeline: Timeline, marks: Sequence[tuple[float, str]]) -> Iterator[str]:
    for name in timeline.total_pages:
        found = [(sample.at_s, sample.workers[name]) for sample in timeline.samples]
        states = dict.fromkeys(state for _, gauge in found if gauge is not None for state in gauge.queue)
        series = [
            Series(state, [(at_s, gauge.queue.get(state, 0) if gauge else 0) for at_s, gauge in found])
            for state in states
        ]
        yield lines(name, series, Axis("time (s)", low=0.0), Axis("requests", low=0.0), marks=marks, size=SMALL)


def _memory(timeline: Timeline, marks: Sequence[tuple[float, str]]) -> Iterator[str]:
    gauges = [gauge for sample in timeline.samples for gauge in sample.workers.values() if gauge is not None]
    # One order and one colour each, whatever a worker began with.
    owners = [str(owner) for owner in Owner if any(owner in gauge.pages for gauge in gauges)]
    for name, total in timeline.total_pages.items():
        found = [(sample.at_s, sample.workers[name]) for sample in timeline.samples]
        series = [
            Series(owner, [(at_s, 100 * (gauge.pages.get(owner, 0) if gauge else 0) / total) for at_s, gauge in found])
            for owner in owners
            if owner != "free"
        ]
        title = f"{name} ({total:,} pages)"
        y = Axis("arena (%)", low=0.0, high=100.0)
        yield stack(title, series, Axis("time (s)", low=0.0), y, marks=marks, size=SMALL)


def _decisions(timeline: Timeline, marks: Sequence[tuple[float, str]]) -> Iterator[str]:
    samples = timeline.samples
    merged = max(1, len(samples) // STRETCHES)
    names = sorted({command for sample in samples for command in sample.commands})
    machines: dict[str, list[str]] = {}
    for name in names:
        machines.setdefault(name.partition(".")[0], []).append(name)
    for machine, commands in machines.items():
        totals = {name: sum(sample.commands.get(name, 0) for sample in samples) for name in commands}
        often = sorted(commands, key=lambda name: (-totals[name], name))[: len(LIGHT)]
        series = [
            Series(f"{name.partition('.')[2]} ({totals[name]:,})", _per_s(samples, name, merged)) for name in often
        ]
        y = Axis("commands/s", low=0.0)
        yield lines(machine, series, Axis("time (s)", low=0.0), y, marks=marks, size=(560, 220))


def _per_s(samples: Sequence[Sample], name: str, merged: int) -> list[tuple[float, float]]:
    """Commands a second over so many intervals at a time, at the end of each; single ones are too ragged to read."""
    found = []
    counts = list(itertools.accumulate(sample.commands.get(name, 0) for sample in samples))
    for low, high in itertools.pairwise([*range(0, len(samples) - 1, merged), len(samples) - 1]):
        if (seconds := samples[high].at_s - samples[low].at_s) > 0:
            found.append((samples[high].at_s, (counts[high] - counts[low]) / seconds))
    return found


def _grid(charts: Iterator[str]) -> str:
    return f'<div class="grid">{"".join(charts)}</div>'


def _said(value: object) -> str:
    return "none" if value is None else str(value)
