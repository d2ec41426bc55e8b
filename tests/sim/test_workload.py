"""Workloads: what holds for one, and what scaling, cutting, jittering and combining promise."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import LocalError
from sim.generators import TALKS, talks
from sim.workload import (
    Arrival,
    Workload,
    answered,
    blocks_of,
    concat,
    groups,
    jitter,
    merge,
    quantile,
    resized,
    reusable,
    scale,
    spread,
    summary,
    tagged,
    unused,
    window,
    with_arrivals,
)

ROOT = Path(__file__).resolve().parents[2]

times = st.lists(st.floats(0, 1e6), min_size=1, max_size=40).map(sorted)


def flat(at_s: list[float]) -> Workload:
    """One request for each time; its prompt tells which one it is."""
    return Workload("w", tuple(Arrival(at, 1 + index, 1) for index, at in enumerate(at_s)), "made")


def chat(name: str, begin: float, gaps: list[float]) -> list[Arrival]:
    """A closed-loop session; each prompt is one block longer."""
    turns = list(itertools.accumulate(gaps, initial=begin))
    ids = [hash_of(name) + index for index in range(len(turns))]
    return [
        Arrival(at, 4 * (turn + 1), 1, tuple(ids[: turn + 1]), 4, name, turn, gap)
        for turn, (at, gap) in enumerate(zip(turns, [*gaps, None], strict=True))
    ]


def hash_of(name: str) -> int:
    return 1000 * int.from_bytes(name.encode(), "big")


def together(*sessions: list[Arrival]) -> Workload:
    return Workload("s", tuple(sorted(itertools.chain(*sessions), key=lambda arrival: arrival.at_s)))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"at_s": -1.0}, "at_s: got -1.0, want a finite time of at least 0 s"),
        ({"at_s": float("nan")}, "at_s: got nan"),
        ({"prompt": 0}, "prompt: got 0, want at least 1 token"),
        ({"output": 0}, "output: got 0, want at least 1 token"),
        ({"block_tokens": 4}, "blocks: got '0 ids', want 3 for 10 tokens by 4"),
        ({"blocks": (1,)}, "blocks: got '1 ids', want 0"),
        ({"block_tokens": -1}, "block_tokens: got -1"),
        ({"turn": -1}, "turn: got -1"),
        ({"gap_s": -0.5}, "gap_s: got -0.5"),
        ({"history": 11}, "history: got 11, want 0 to the prompt's 10 tokens"),
    ],
)
def test_a_wrong_arrival_is_refused(change, sentence) -> None:
    with pytest.raises(LocalError) as error:
        replace(Arrival(0.0, 10, 1), **change)
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("arrivals", "sentence"),
    [
        ((Arrival(1, 1, 1), Arrival(0, 1, 1)), "arrivals: got '0 s after 1 s', want times that never fall"),
        ((Arrival(0, 1, 1, session="a"), Arrival(0, 1, 1, session="a")), "turn: got '0 after 0 in a'"),
        ((Arrival(0, 1, 1, gap_s=1.0),), "session: got '', want a name"),
        ((Arrival(0, 1, 1, session="a", gap_s=1.0),), "gap_s: got 1.0, want None, because turn 0 is the last of a"),
    ],
)
def test_a_wrong_workload_is_refused(arrivals, sentence) -> None:
    with pytest.raises(LocalError) as error:
        Workload("w", arrivals)
    assert sentence in str(error.value)


def test_quantiles_lie_linearly_between_ranks() -> None:
    assert [quantile([1, 2, 4], share) for share in (0, 0.25, 0.5, 0.75, 1)] == [1, 1.5, 2, 3, 4]
    assert spread([4, 1, 2, 1]) == spread([1, 1, 2, 4])
    assert (spread([1, 1, 2, 4]).mean, spread([7]).p99) == (2, 7)


def test_a_summary_counts_what_is_there() -> None:
    found = summary(flat([0, 1, 2, 3]))
    assert (found.rows, found.span_s, found.rate, found.gap_cv, found.prompt.max) == (4, 3, 1, 0, 4)
    assert summary(flat([5])).rate == 0


@given(times, st.floats(1e-3, 1e3))
def test_scaling_keeps_order_and_counts(at_s, rate) -> None:
    workload = flat(at_s)
    if workload.rate == 0 or not workload.span_s > 1e-3:
        return
    scaled = scale(workload, rate)
    assert [arrival.prompt for arrival in scaled.arrivals] == [arrival.prompt for arrival in workload.arrivals]
    assert scaled.rate == pytest.approx(rate, rel=1e-6)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: scale(flat([0, 1]), 0), "rate: got 0"),
        (lambda: scale(flat([0, 1]), float("inf")), "rate: got inf"),
        (lambda: scale(flat([2, 2]), 1), "workload: got 'w', want arrivals at more than one time"),
        (lambda: window(flat([0]), 2, 2), "start_s, stop_s: got (2, 2)"),
        (lambda: jitter(flat([0, 1.5]), 1, 1), "at_s: got 1.5, want a multiple of the tick, 1 s"),
        (lambda: jitter(flat([0]), 1, 0), "tick_s: got 0"),
        (lambda: with_arrivals(flat([0]), 0, seed=1), "rate: got 0"),
        (lambda: with_arrivals(flat([0]), 1, seed=1, cv=-1), "cv: got -1"),
        (lambda: with_arrivals(flat([0]), 1, seed=1, count=0), "count: got 0"),
        (lambda: with_arrivals(Workload("none", ()), 1, seed=1), "lengths: got 'none'"),
        (lambda: concat(flat([0]), pause_s=-1), "pause_s: got -1"),
    ],
)
def test_a_wrong_argument_is_named(call, sentence) -> None:
    with pytest.raises(LocalError) as error:
        call()
    assert sentence in str(error.value)


@given(times, st.floats(0, 1e6), st.floats(1e-3, 1e6))
def test_windows_part_a_workload(at_s, start, length) -> None:
    workload, stop = flat(at_s), start + length
    inside = window(workload, start, stop)
    assert [a.prompt for a in inside.arrivals] == [a.prompt for a in workload.arrivals if start <= a.at_s < stop]
    assert all(0 <= arrival.at_s <= length for arrival in inside.arrivals)


def test_a_closed_loop_belongs_to_the_window_in_which_it_begins() -> None:
    workload = together(chat("a", 0, [10, 10]), chat("b", 5, [1]))
    assert [(a.session, a.at_s) for a in window(workload, 0, 5).arrivals] == [("a", 0), ("a", 10), ("a", 20)]
    assert [(a.session, a.at_s) for a in window(workload, 5, 30).arrivals] == [("b", 0), ("b", 1)]


@given(st.lists(st.integers(0, 20), min_size=1, max_size=60).map(sorted), st.integers(0, 99), st.floats(0.01, 100))
def test_jitter_stays_in_its_tick_and_keeps_the_order(ticks, seed, tick_s) -> None:
    workload = flat([tick * tick_s for tick in ticks])
    spread_out = jitter(workload, seed, tick_s)
    assert [arrival.prompt for arrival in spread_out.arrivals] == [arrival.prompt for arrival in workload.arrivals]
    for tick, arrival in zip(ticks, spread_out.arrivals, strict=True):
        assert tick * tick_s <= arrival.at_s <= (tick + 1) * tick_s * (1 + 1e-12)
    assert jitter(workload, seed, tick_s) == spread_out


def test_stamps_that_a_recorder_rounded_are_jittered() -> None:
    found = jitter(flat([0, 2.999, 3.0, 6.001]), 1, 3.0)
    assert [int(arrival.at_s // 3) for arrival in found.arrivals] == [0, 1, 1, 2]


@pytest.mark.parametrize(("cv", "tolerance"), [(0.0, 1e-6), (0.5, 0.05), (1.0, 0.05), (3.0, 0.3)])
def test_arrivals_have_the_rate_and_the_variation_that_were_asked_for(cv, tolerance) -> None:
    found = summary(with_arrivals(flat([0.0] * 10), 5.0, seed=3, cv=cv, count=5000))
    assert found.rows == 5000
    assert found.rate == pytest.approx(5.0, rel=0.05 + tolerance / 3)
    assert found.gap_cv == pytest.approx(cv, abs=tolerance)


def test_all_are_taken_once_before_one_is_taken_again() -> None:
    lengths = together(chat("a", 0, [3]), chat("b", 7, [2, 2]), chat("c", 9, []))
    found = with_arrivals(lengths, 0.1, seed=1, count=7)
    begun = groups(found)
    assert sorted(len(turns) for turns in begun) == sorted([2, 3, 1] * 2 + [len(begun[-1])])
    assert {turns[0].session for turns in begun[:3]} == {"a", "b", "c"}
    assert {turns[0].session for turns in begun[3:6]} == {"a+1", "b+1", "c+1"}
    assert sum(len(turns[-1].blocks) for turns in begun) == len({i for turns in begun for i in turns[-1].blocks})
    for turns in begun:
        again = chat(turns[0].session.partition("+")[0], 0, [turn.gap_s or 0 for turn in turns[:-1]])
        assert [turn.at_s - turns[0].at_s for turn in turns] == pytest.approx([turn.at_s for turn in again])


def test_parts_share_neither_blocks_nor_sessions() -> None:
    one = together(chat("a", 0, [1]), chat("b", 0.5, []))
    after, beside = concat(one, one, pause_s=2), merge(one, tagged(one, "other"))
    for mixed in (after, beside):
        assert len(mixed) == 6
        assert len(groups(mixed)) == 4
        assert reusable(mixed) == pytest.approx(reusable(one))
    assert [arrival.at_s for arrival in after.arrivals] == [0, 0.5, 1, 3, 3.5, 4]
    assert [(arrival.at_s, arrival.tenant) for arrival in beside.arrivals[:2]] == [(0, ""), (0, "other")]


def test_reusable_counts_what_an_unbounded_cache_would_hit() -> None:
    prompts = [(8, (1, 2)), (12, (1, 2, 3)), (6, (1, 9)), (4, (2,))]
    workload = Workload("r", tuple(Arrival(0, tokens, 1, ids, 4) for tokens, ids in prompts))
    # Second: 8 of 12; third: 4 of 6; fourth: block 2 alone is known, and equal ids mean an equal prefix.
    assert reusable(workload) == pytest.approx((8 + 4 + 4) / 30)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 9))
def test_another_length_keeps_the_whole_blocks_that_remain(before, after, block_tokens) -> None:
    ids = tuple(range(-(-before // block_tokens)))
    arrival = Arrival(0, before, 1, ids, block_tokens, session="s", history=before)
    found = resized(arrival, after, 2, unused(Workload("w", (arrival,))))
    common = [id_ for id_ in found.blocks if id_ in ids]
    assert common == list(ids if before == after else ids[: min(before, after) // block_tokens])
    assert found.history == min(before, after)


SCRIPT = """
from sim.generators import AZURE_CONV, ARXIV, AGENT, drift, talks
from sim.scenario import applied, shipped
from sim.workload import jitter, timed, with_arrivals
import hashlib
made = [drift(AZURE_CONV, ARXIV, 7, 300), talks(AGENT, 7, 20, rate=1.0)]
made.append(with_arrivals(made[0], 2.0, seed=7, cv=2.0, count=400))
made.append(jitter(timed(made[0], lambda at_s: at_s // 3 * 3, "rounded"), 7, 3.0))
made.append(applied(shipped("drift-and-burst"), made[1], 7))
print(hashlib.sha256(repr(made).encode()).hexdigest())
"""


def test_the_same_seed_gives_the_same_workload_in_every_process() -> None:
    said = set()
    for seed in ("0", "1234"):
        environ = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT], cwd=ROOT, env=environ, capture_output=True, text=True, check=True
        )
        said.add(done.stdout)
    assert len(said) == 1


@pytest.mark.parametrize(
    ("prompt", "output", "ids", "history", "expected"),
    [
        (10, 7, (0, 1, 5, 6, 7), 17, (0, 1, 5, 6)),  # 17 tokens are 4 blocks: the answer completes one and fills one
        (10, 6, (0, 1, 5, 6), 16, (0, 1, 5, 6)),
        (10, 5, (0, 1, 5, 6), 15, (0, 1, 5)),
        (10, 7, (0, 1, 5, 6, 7), 13, (0, 1, 5)),  # not all of the answer comes again
        (10, 7, (0, 1, 5, 6, 7), 10, ()),
        (10, 7, (0, 9, 5, 6, 7), 17, ()),  # another prompt was made of it since
        (8, 4, (0, 1, 5), 12, (0, 1, 5)),
    ],
)
def test_the_next_turn_tells_how_the_blocks_of_an_answer_are_called(prompt, output, ids, history, expected) -> None:
    before = Arrival(0.0, prompt, output, (0, 1, 2)[: blocks_of(prompt, 4)], 4, session="s")
    after = Arrival(1.0, 4 * len(ids), 1, ids, 4, session="s", turn=1, history=history)
    assert answered(before, after) == expected
    assert answered(before, replace(after, block_tokens=0, blocks=())) == ()


def test_the_answers_of_a_talk_are_where_its_next_prompts_look_for_them() -> None:
    made = talks(TALKS["chat"], 5, 20, rate=1.0)
    kept = 0
    for turns in groups(made):
        for one, two in itertools.pairwise(turns):
            names = answered(one, two)
            assert len(names) == (one.prompt + one.output) // one.block_tokens
            assert two.blocks[: len(names)] == names
            kept += len(names) - one.prompt // one.block_tokens
    assert kept > 50
