"""Files of a study: figures are those of the outcomes, text is escaped, nothing is fetched."""

from __future__ import annotations

import csv
import functools
import json
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from core.request import Phase, Slo
from scheduler.policies import policy
from sim.fleet import workers
from sim.generators import LMSYS, generate
from sim.goodput import Edge, Estimate, Goodput, Trial
from sim.outcome import Outcome, Tally
from sim.page import _distributions
from sim.report import OUTCOME, Requests, flat, write
from sim.run import Result, Settings, simulate
from sim.study import Run, Study, document, figures, means
from sim.timeline import Timeline
from sim.workload import scale

BUILDS = workers("1 prefill, 1 decode", "h200-llama-3.1-8b", kv=20_000)
EVIL = "\"><script>alert('&')</script>"
VOID = {"meta"}


@functools.cache
def ran() -> tuple[Run, tuple[Outcome, ...]]:
    """Two seeds of a small run, watched."""
    tally, found, results = Tally(), [], []
    timeline = Timeline(0.5)
    for seed in (1, 2):
        workload = scale(generate(LMSYS, seed, 30), 8.0)

        def over(one: Outcome) -> None:
            tally.add(one)
            found.append(one)

        watch = timeline if seed == 1 else None
        settings = Settings(slo=Slo(0.01, 0.05))
        results.append(simulate(workload, BUILDS, policy("fcfs"), settings, over=over, watch=watch))
    timeline.end()
    return Run("fcfs", "the first", tally, (1, 2), tuple(results), timeline), tuple(found)


def study(name: str = "fcfs") -> Study:
    trials = tuple(Trial(rate, seed, 1000, 1 - rate / 20, 1 - rate / 25) for seed in (1, 2) for rate in (1.0, 2.0, 4.0))
    found = Goodput(
        Estimate.of([2.0, 2.2]),
        Estimate.of([2.5, 2.5]),
        (Edge(2.0, 2.02), Edge(2.2, None)),
        (Edge(2.5, 2.6),) * 2,
        trials,
        2,
    )
    run = replace(ran()[0], policy=name, about=f"about {name}")
    return Study(
        command=f"baton simulate {name}",
        settings={"workload": name, "seeds": 2},
        slo=Slo(0.02, 0.05),
        unit="requests",
        share=0.9,
        marks=((1.0, f"lose {name}"), (1e9, "never")),
        runs=(run, replace(run, policy="other", timeline=None)),
        curves={name: trials},
        goodputs={name: found},
    )


class Page(HTMLParser):
    """Tags that do not close, and what a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.loads: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.loads += [str(value) for name, value in attrs if name in ("src", "href", "xlink:href", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_figures_are_those_of_the_outcomes() -> None:
    run, outcomes = ran()
    of = figures(run)
    assert of["requests"] == len(outcomes) == 60
    assert of["attained"] == pytest.approx(sum(one.good for one in outcomes) / 60)
    assert 0 < run.tally.good < 60
    assert of["attained_by_mean"] == pytest.approx(sum(one.good_by_mean for one in outcomes) / 60)
    assert of["done"] == sum(one.phase is Phase.DONE for one in outcomes)
    assert of["tokens"] == sum(one.tokens for one in outcomes)
    seconds = sum(result.seconds for result in run.results)
    assert of["seconds"] == pytest.approx(seconds)
    assert of["tokens_per_s_per_device"] == pytest.approx(sum(one.tokens for one in outcomes) / seconds / 2)
    assert of["good_per_s_per_device"] == pytest.approx(sum(one.good for one in outcomes) / seconds / 2)
    ttfts = sorted(one.ttft_s for one in outcomes if one.ttft_s is not None)
    assert of["ttft_p50_s"] == pytest.approx(ttfts[29], rel=0.011)
    shares = [result.tally.attainment for result in run.results]
    assert of["attained_half"] == Estimate.of(shares).half
    assert figures(replace(run, seeds=(1,), results=run.results[:1]))["attained_half"] is None


def test_a_curve_is_the_mean_over_seeds() -> None:
    trials = [Trial(2.0, 1, 10, 0.4, 0.5), Trial(1.0, 1, 10, 1.0, 1.0), Trial(2.0, 2, 10, 0.6, 0.5)]
    assert [(rate, ours.mean, by_mean.mean) for rate, ours, by_mean in means(trials)] == [
        (1.0, 1.0, 1.0),
        (2.0, 0.5, 0.5),
    ]


def test_requests_are_a_line_each(tmp_path: Path) -> None:
    _, outcomes = ran()
    with Requests(tmp_path) as requests:
        for one in outcomes:
            requests.add("fcfs", 1, one)
    with (tmp_path / "requests.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == ("policy", "seed", *OUTCOME)
    assert len(rows) == len(outcomes)
    for row, one in zip(rows, outcomes, strict=True):
        assert float(row["at_s"]) == one.at_s
        assert row["ttft_s"] == ("" if one.ttft_s is None else repr(one.ttft_s))
        assert row["good"] == str(one.good)
        assert row["phase"] == one.phase.value


def test_the_files_hold_everything_and_are_the_same_twice(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    write(tmp_path / "a", study())
    write(tmp_path / "b", study())
    for name in ("summary.json", "timeline.csv", "report.html"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert summary == json.loads(json.dumps(document(study())))
    assert summary["command"] == "baton simulate fcfs"
    assert [one["policy"] for one in summary["runs"]] == ["fcfs", "other"]
    assert [one["seed"] for one in summary["runs"][0]["seeds"]] == [1, 2]
    assert summary["goodput"]["fcfs"]["per_device"] == pytest.approx(2.1 / 2)
    assert len(summary["curves"]["fcfs"]) == 6
    timeline = ran()[0].timeline
    assert timeline is not None
    with (tmp_path / "a" / "timeline.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["policy", "at_s", "who", "what", "value"]
    assert len(rows) == 1 + len(list(flat(timeline)))
    assert {row[2] for row in rows[1:]} == {"all", "prefill-0", "decode-0"}
    kinds = {row[3].partition(".")[0] for row in rows[1:]}
    assert kinds == {"under_way", "phase", "command", "alive", "queue", "pages"}


def test_the_page_is_well_formed_loads_nothing_and_escapes(tmp_path: Path) -> None:
    write(tmp_path, study(EVIL))
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    page.close()
    assert page.open == []
    assert page.loads == []
    assert page.tags["script"] == page.tags["link"] == page.tags["img"] == 0
    assert not re.search(r"url\(|@import|https?://", text)
    assert f"baton simulate {EVIL}" in page.text
    # Goodput, two curves, three distributions, requests under way, then of two workers and of their machines.
    assert page.tags["svg"] >= 1 + 2 + 3 + 1 + 4 + 5
    assert "prefers-color-scheme:dark" in text


def test_every_chart_has_its_units_and_goals_are_marked(tmp_path: Path) -> None:
    write(tmp_path, study())
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    charts = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    for chart in charts:
        assert re.search(
            r"rotate\(-90\)\">(requests/s per GPU|share of arrived requests \(%\)|requests|arena \(%\)|commands/s)<",
            chart,
        )
        if "per GPU" not in chart:
            assert re.search(r">(rate \(requests/s\)|seconds|time \(s\))<", chart)
    assert ">goal 0.02 s<" in text
    assert ">goal 0.05 s<" in text
    assert ">90 %<" in text
    assert ">lose fcfs<" in text
    assert ">never<" not in text


def test_a_distribution_is_of_all_that_arrived() -> None:
    run, outcomes = ran()
    tally = Tally()
    served = next(one for one in outcomes if one.phase is Phase.DONE)
    tally.add(served)
    tally.add(replace(served, phase=Phase.REJECTED, ttft_s=None, tokens=0))
    chart = next(_distributions(replace(study(), runs=(replace(run, tally=tally),))))
    height = {text: float(y) - 4 for y, text in re.findall(r'y="([\d.]+)" text-anchor="end">([\d]+)<', chart)}
    level = float(re.findall(r'class="line l0" d="M[\d.]+ ([\d.]+)"', chart)[-1])
    assert level == pytest.approx((height["0"] + height["100"]) / 2, abs=0.2)


def test_a_study_of_one_kind_of_question_is_a_page_too(tmp_path: Path) -> None:
    whole = study()
    for part in (replace(whole, runs=()), replace(whole, curves={}, goodputs={}), replace(whole, runs=(), curves={})):
        write(tmp_path, part)
        page = Page()
        page.feed((tmp_path / "report.html").read_text(encoding="utf-8"))
        assert page.open == []
        assert (tmp_path / "timeline.csv").read_text().startswith("policy,at_s")
    assert isinstance(ran()[0].results[0], Result)
