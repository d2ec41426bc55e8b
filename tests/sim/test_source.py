"""A workload by name: rates, counts and seeds do what the table says, sessions stay whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.errors import LocalError, SetupError
from sim.generators import AGENT
from sim.scenario import shipped
from sim.source import COUNT, first, source
from sim.workload import Arrival, Workload, groups

COLUMNS = "agent,session_id,seq,timestamp_us,input_chars,output_chars,prefix_chars_prev,prefix_chars_any"
CALLS = [(agent, session, turn) for agent, session in (("a", 0), ("b", 1), ("a", 2)) for turn in range(3)]
SESSIONS = "\n".join(
    (
        COLUMNS,
        *(f"{a},{s},{t},{(s * 10 + t) * 10**6},{400 * t + 400},40,{400 * t},{400 * t}" for a, s, t in CALLS),
    )
)


def lengths(workload: Workload) -> list[tuple[int, int]]:
    return [(one.prompt, one.output) for one in workload.arrivals]


def test_a_shape_keeps_its_lengths_at_any_rate() -> None:
    found = source("lmsys", count=50)
    slow, fast = found.at(2.0, 1), found.at(8.0, 1)
    assert lengths(slow) == lengths(fast)
    assert [slow.rate, fast.rate] == pytest.approx([2.0, 8.0])
    assert lengths(found.at(2.0, 2)) != lengths(slow)
    assert (found.unit, found.rate) == ("requests", 0.506)
    assert len(source("lmsys").at(None, 1)) == COUNT


def test_sessions_are_drawn_whole_and_begin_at_the_rate() -> None:
    found = source("agent", count=200)
    slow, fast = found.at(0.5, 1), found.at(2.0, 1)
    assert found.unit == "sessions"
    assert len(groups(slow)) == round(200 / AGENT.turns.mean)
    begins = [[turns[0].at_s for turns in groups(each)] for each in (slow, fast)]
    assert begins[0] == pytest.approx([4 * at_s for at_s in begins[1]])
    with pytest.raises(SetupError, match="rate: got none, want sessions a second"):
        found.at(None, 1)


def test_a_file_of_sessions_begins_as_recorded_or_anew(tmp_path: Path) -> None:
    path = tmp_path / "agents.csv"
    path.write_text(SESSIONS)
    found = source(str(path))
    assert found.unit == "sessions"
    assert found.rate == pytest.approx(2 / 20)
    assert [turns[0].at_s for turns in groups(found.at(None, 1))] == [0.0, 10.0, 20.0]
    assert len(found.at(3.0, 1)) == 9
    assert found.at(3.0, 1) != found.at(3.0, 2)
    assert len(source(str(path), agent="a").at(None, 1)) == 6
    assert len(groups(source(str(path), count=30).at(1.0, 1))) == 10


def test_stamps_are_spread_before_they_are_scaled(tmp_path: Path) -> None:
    path = tmp_path / "rounded.csv"
    path.write_text(
        "arrival_time_ns,input_toks,output_toks\n" + "".join(f"{3 * (at // 4) * 10**9},10,5\n" for at in range(40))
    )
    found = source(str(path), tick_s=3.0)
    made = found.at(5.0, 1)
    assert made.rate == pytest.approx(5.0)
    assert len({one.at_s for one in made.arrivals}) == 40
    assert made != found.at(5.0, 2)
    plain = source(str(path))
    assert plain.at(5.0, 1) == plain.at(5.0, 2)
    with pytest.raises(SetupError, match="jitter"):
        source(str(path), tick_s=3.0, cv=1.0)
    with pytest.raises(SetupError, match="at_s: got"):
        source(str(path), tick_s=2.0).at(5.0, 1)


def test_a_scenario_is_in_the_workload() -> None:
    found = source("lmsys", count=400)
    assert found.at(4.0, 1, shipped("load-step")).span_s < found.at(4.0, 1).span_s
    assert found.at(4.0, 1, shipped("worker-loss")).arrivals == found.at(4.0, 1).arrivals


def test_the_first_are_whole_sessions() -> None:
    turns = [Arrival(float(at), 10, 1, session="s", turn=at, gap_s=1.0 if at < 2 else None) for at in range(3)]
    alone = [Arrival(0.5, 10, 1), Arrival(1.5, 10, 1)]
    workload = Workload("w", tuple(sorted([*turns, *alone], key=lambda one: one.at_s)))
    assert [one.at_s for one in first(workload, 1).arrivals] == [0.0, 1.0, 2.0]
    assert [one.at_s for one in first(workload, 4).arrivals] == [0.0, 0.5, 1.0, 2.0]
    with pytest.raises(LocalError, match="requests: got 6"):
        first(workload, 6)


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "lengths.csv"
    path.write_text("num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio\n20,10,30,2.0\n")
    for words, sentence in (
        ({"count": 0}, "requests: got 0"),
        ({"between": (0.0, 1.0)}, "has no times"),
        ({"tick_s": 3.0}, "jitter: got 3.0"),
    ):
        with pytest.raises(SetupError, match=sentence):
            source(str(path), **words)
    for option in ({"think_s": 1.0}, {"agent": "a"}, {"tick_s": 1.0}):
        with pytest.raises(SetupError, match="is no file"):
            source("azure-conv", **option)
    with pytest.raises(SetupError, match="want a file"):
        source("nothing")
