"""What is remembered of programs: for how long their KV is worth its memory, and that memory of them is bounded."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from scheduler.programs import Pauses, Programs, ProgramsConfig
from tests.cast import QUICK, efforts
from tests.scheduler.twins import doubled, written

ROOT = Path(__file__).parents[2]


def seen(pauses, tool: str = "grep", **how) -> Programs:
    """Programs of one pause each."""
    programs = Programs(ProgramsConfig(**{"least": 4, "window": 16, "fresh": 1, **how}))
    for number, pause_s in enumerate(pauses):
        programs.came(f"{tool}{number}", 0.0)
        programs.left(f"{tool}{number}", tool, 0.0)
        programs.came(f"{tool}{number}", pause_s)
    return programs


@pytest.mark.parametrize(
    ("pauses", "worth_s", "want"),
    [
        ([], 5.0, 10.0),  # too few are known
        ([1, 2, 3], 5.0, 10.0),
        ([1, 1, 1, 1], 5.0, 1.0),  # all come back within a second
        ([1, 1, 1, 1], 0.5, 0.0),  # which costs more than it brings
        ([1, 1, 1, 40], 50.0, 1.0),  # a quarter of 50 s is less than 39 more
        ([1, 1, 1, 40], 200.0, 40.0),
        ([1, 1, 1, 400], 9e9, 1.0),  # it was gone for so long that it counts as never back
        ([1, 1, 1, 90], 9e9, 60.0),  # nothing is kept longer
        ([400, 400, 400, 400], 9e9, 0.0),  # nobody comes back
        ([9, 10, 10, 10], 12.0, 10.0),  # the first step is dearer than the next: both or none
        ([9, 10, 10, 10], 9.0, 0.0),
    ],
)
def test_kv_is_kept_as_long_as_that_is_worth_its_memory(pauses, worth_s, want):
    assert seen(pauses).keeps_s("grep", worth_s, 0.0, 1.0) == want


@pytest.mark.parametrize(
    ("reload_s", "wait_s", "share", "want"),
    [(4.0, 0.0, 0.5, 5.0), (1.0, 0.0, 0.5, 0.0), (1.0, 3.0, 0.5, 5.0), (1.0, 0.0, 0.1, 5.0), (0.0, 0.0, 0.0, 5.0)],
)
def test_worth_is_what_is_saved_over_the_share_of_the_arena(reload_s, wait_s, share, want):
    assert seen([5, 5, 5, 5]).keeps_s("grep", reload_s, wait_s, share) == want


def test_tools_differ_and_a_strange_one_is_like_all():
    programs = seen([1] * 8)
    for number in range(4):
        programs.came(f"make{number}", 0.0)
        programs.left(f"make{number}", "make", 0.0)
        programs.came(f"make{number}", 30.0)
    kept = [programs.keeps_s(tool, 100.0, 0.0, 1.0) for tool in ("grep", "make", "never seen")]
    assert kept == [1.0, 30.0, 30.0]
    kept = [programs.keeps_s(tool, 20.0, 0.0, 1.0) for tool in ("grep", "make", "never seen")]
    assert kept == [1.0, 0.0, 1.0]


def test_a_program_that_does_not_come_back_is_learned_from():
    programs = seen([5] * 4, window=8)
    for number in range(8):
        programs.came(f"lost{number}", 10.0)
        programs.left(f"lost{number}", "grep", 10.0)
    assert programs.keeps_s("grep", 6.0, 0.0, 1.0) == 5.0
    for at_s in range(8):
        programs.came("another", 311.0 + at_s)
    assert len(programs) == 5, "those that were lost are forgotten"
    assert programs.keeps_s("grep", 6.0, 0.0, 1.0) == 0.0


def test_a_program_is_as_old_as_its_first_turn():
    programs = Programs()
    programs.came("a", 1.0)
    programs.left("a", "make", 3.0)
    programs.left("stranger", "make", 5.0)
    assert (len(programs), programs.get("stranger")) == (1, None)
    found = programs.came("a", 4.0)
    assert (found.came_at, found.paused_at, found.tool) == (1.0, -1.0, "make")


def test_a_program_that_was_elsewhere_before_is_as_old_as_so_many_turns_of_others():
    programs = Programs(ProgramsConfig(forget=0.5))
    assert programs.came("before anything is known", 1.0, 3).came_at == 1.0
    for at_s in (2.0, 6.0, 8.0):  # 4 s from turn to turn, then 2: 3 on average
        programs.came("a", at_s)
        programs.left("a", "make", at_s + 1.0)
    programs.came("a", 400.0)  # whose tool took too long to say anything
    assert programs.came("b", 402.0, 2).came_at == 396.0
    assert programs.came("b", 403.0, 5).came_at == 396.0
    assert programs.came("c", 402.0).came_at == 402.0


pauses_ = st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.0, 7.0, 20.0, math.inf]), min_size=1, max_size=20)


@settings(QUICK)
@given(pauses=pauses_, worth_s=st.sampled_from([0.1, 0.9, 1.7, 3.3, 11.0, 37.0, 1000.0]))
def test_no_other_time_is_better(pauses, worth_s):
    """The envelope's answer against all there are."""
    known = Pauses()
    for pause_s in pauses:
        known.add(pause_s, 100, 1)

    def merit(time_s: float) -> float:
        return sum(pause_s <= time_s for pause_s in pauses) / len(pauses) * worth_s - time_s

    best = max(merit(time_s) for time_s in [0.0, *pauses] if time_s < math.inf)
    # Nothing is kept for 0 s, not even for those who are back at once.
    found = known.best_s(worth_s)
    assert merit(found) == pytest.approx(best)


class Town(RuleBasedStateMachine):
    """Programs that come, go and never return; what is remembered stays bounded, and a copy answers alike."""

    def __init__(self):
        super().__init__()
        self.programs = Programs(ProgramsConfig(window=6, tools=3, programs=5, least=2, fresh=2, over_s=20.0))
        self.now = 0.0

    @rule(
        session=st.sampled_from("abcdefgh"),
        wait_s=st.sampled_from([0.0, 1.0, 5.0, 30.0]),
        step=st.sampled_from([0, 0, 1, 7]),
    )
    def came(self, session, wait_s, step):
        self.now += wait_s
        known = self.programs.get(session)
        came_at = self.programs.came(session, self.now, step).came_at
        if known is not None:
            assert came_at == known.came_at
        else:
            assert came_at <= self.now
            assert step or came_at == self.now

    @rule(session=st.sampled_from("abcdefgh"), tool=st.sampled_from(["", "x", "y", "z", "w"]))
    def left(self, session, tool):
        self.programs.left(session, tool, self.now)

    @rule(
        tool=st.sampled_from(["", "x", "y", "z", "w"]),
        reload_s=st.sampled_from([0.0, 0.1, 3.0]),
        share=st.sampled_from([0.0, 0.01, 1.0]),
    )
    def asked(self, tool, reload_s, share):
        assert 0 <= self.programs.keeps_s(tool, reload_s, 0.0, share) <= 60.0

    @rule(sure=st.sampled_from([False, False, True]))
    def restored(self, sure):
        if sure:
            self.programs, _ = doubled(self.programs)

    @invariant()
    def sound(self):
        self.programs.check()


@efforts
def test_memory_of_programs_is_bounded_and_goes_to_json(effort):
    run_state_machine_as_test(Town, settings=settings(effort, max_examples=effort.max_examples // 4))


def test_a_check_that_finds_nothing_would_find_this():
    programs = seen([1] * 4)
    programs._all.ordered.pop()
    with pytest.raises(AssertionError):
        programs.check()


def told() -> str:
    """A long life in a line."""
    rng = random.Random(7)
    programs = Programs(ProgramsConfig(programs=50, tools=4))
    kept = []
    for number in range(200):
        session, tool, now = f"s{rng.randrange(80)}", f"t{rng.randrange(6)}", float(number)
        programs.came(session, now, number % 3)
        if rng.random() < 0.9:
            programs.left(session, tool, now + rng.random())
        kept.append(programs.keeps_s(tool, rng.random(), rng.random(), rng.random()))
    return repr((kept, written(programs)))


def test_another_process_with_another_hash_seed_remembers_the_same():
    code, want = "from tests.scheduler.test_programs import told; print(told())", told()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed}
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.strip() == want
