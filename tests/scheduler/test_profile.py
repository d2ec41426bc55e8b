"""A profile: which steps are timed in how much time, and how near the model of them comes to the engine's own."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler import roofline
from scheduler.cost import CostModel
from scheduler.profile import Profile, Room, Shape, shapes
from tests.cast import QUICK

ROOM = Room(pages=4096, page_tokens=16, context=8192, chunk_tokens=512, max_rows=64)
PRIOR = roofline.roofline("prior", roofline.RANDOM_100M, roofline.CPU)
# Other slopes than the prior's, not only another level.
TRUTH = CostModel(
    "truth",
    ((4e-3, 2e-5, 3e-8, 2e-4), (0.0, 5e-5, 3e-8, 4e-4)),
    ((3e-3, 1e-4, 4e-7), (1e-3, 3e-4, 5e-7)),
)


def play(profile: Profile, truth: CostModel, rng: random.Random, noise: float = 0.0) -> list[Shape]:
    """Take every step that it asks for."""
    taken = []
    while (shape := profile.next()) is not None:
        taken.append(shape)
        profile.took(shape.seconds(truth) * (1 + noise * rng.random()))
    return taken


def error(model: CostModel, truth: CostModel, room: Room = ROOM) -> float:
    """The worst of all shapes that fit."""
    return max(abs(shape.seconds(model) / shape.seconds(truth) - 1) for shape in shapes(room))


def test_the_phases_take_turns_and_short_and_long_ones_come_first():
    found = shapes(ROOM)
    assert [shape.decodes for shape in found[:6]] == [False, True] * 3
    assert [shape.rows for shape in found if not shape.decodes][:2] == [((64, 0),), ((512, 0),)]
    assert [(shape.batch, shape.context) for shape in found if shape.decodes][:2] == [(1, 65), (16, 16 * 513)]
    assert len(found) == len(set(found)) > 20
    assert any(cached for shape in found if not shape.decodes for _, cached in shape.rows)
    assert any(len(shape.rows) > 1 for shape in found if not shape.decodes)


@QUICK
@given(
    st.builds(Room, st.integers(1, 500), st.sampled_from((1, 16, 64)), st.integers(3, 9000), st.integers(1, 4096),
              st.integers(1, 300))
)  # fmt: skip
def test_no_step_is_more_than_the_engine_can_do(room):
    found = shapes(room, repeats=3)
    for shape in found:
        tokens = [new + cached + (4 if shape.decodes else 1) for new, cached in shape.rows]
        assert sum(-(-count // room.page_tokens) for count in tokens) <= room.pages
        assert max(tokens) <= room.context
        assert len(shape.rows) <= room.max_rows
        assert shape.decodes or sum(new for new, _ in shape.rows) <= room.chunk_tokens
        assert all(new > 0 and cached >= 0 for new, cached in shape.rows)


def test_with_time_enough_every_shape_is_timed_and_the_model_is_the_engines():
    profile = Profile(ROOM, PRIOR, 60.0)
    taken = play(profile, TRUTH, random.Random(1))
    assert profile.done == len(profile.shapes)
    assert profile.skipped == 0
    assert len(taken) == 4 * len(profile.shapes), "once to warm up, and three times"
    model = profile.model("it")
    assert model.name == "it"
    assert error(model, TRUTH) < 0.15
    assert error(PRIOR, TRUTH) > 0.5, "the prior would have done"
    assert model.lanes == PRIOR.lanes


@pytest.mark.parametrize("slowness", [0.01, 1.0, 30.0])
def test_two_seconds_are_enough_to_know_the_level_of_any_engine(slowness):
    truth = TRUTH.at(slowness, slowness)
    profile = Profile(ROOM, PRIOR, 2.0)
    play(profile, truth, random.Random(2), noise=0.1)
    assert profile.spent_s < 2.0 + max(shape.seconds(truth) for shape in profile.shapes)
    assert error(profile.model("it"), truth) < 1.0
    if slowness <= 1:
        assert error(profile.model("it"), truth) < 0.25


def test_steps_that_would_take_too_long_are_skipped():
    truth = TRUTH.at(30.0, 30.0)
    profile = Profile(ROOM, PRIOR, 2.0)
    taken = play(profile, truth, random.Random(3))
    assert profile.skipped
    rest = [shape for shape in taken[8:] if shape.seconds(truth) > 0.5]
    assert not rest, "known to be slow by then"


def test_time_that_is_over_at_once_still_tells_the_level_of_what_was_begun():
    truth = TRUTH.at(100.0, 100.0)
    profile = Profile(ROOM, PRIOR, 0.001)
    (only,) = play(profile, truth, random.Random(4))
    assert only.seconds(profile.model("it")) == pytest.approx(only.seconds(truth), rel=0.2)
    level = truth.decode_s(4, 4000) / profile.model("it").decode_s(4, 4000)
    assert 0.05 < level < 20, "the other phase is taken to be as much slower"
    assert Profile(ROOM, PRIOR, 0.0).model("it").prefill_s([(64, 0)]) == pytest.approx(
        PRIOR.prefill_s([(64, 0)]), rel=0.1
    )


def test_the_first_step_of_a_shape_is_not_counted():
    profile = Profile(ROOM, PRIOR, 60.0)
    seen = set()
    while (shape := profile.next()) is not None:
        profile.took(shape.seconds(TRUTH) * (1.0 if shape in seen else 20.0))
        seen.add(shape)
    assert error(profile.model("it"), TRUTH) < 0.15


def test_margins_are_what_was_off():
    calm, rough = Profile(ROOM, PRIOR, 60.0), Profile(ROOM, PRIOR, 60.0)
    play(calm, TRUTH, random.Random(5))
    play(rough, TRUTH, random.Random(5), noise=1.0)
    for phase in ("prefill", "decode"):
        assert calm.model("it").margin(phase, 0.9) < 0.15
        assert rough.model("it").margin(phase, 0.9) > 0.2


def test_margins_are_no_wider_than_the_priors():
    profile, rng = Profile(ROOM, PRIOR, 60.0), random.Random(7)
    while (shape := profile.next()) is not None:
        profile.took(shape.seconds(TRUTH) * (5.0 if rng.random() < 0.3 else 1.0))
    for phase in ("prefill", "decode"):
        assert profile.model("it").margin(phase, 0.99) == PRIOR.margin(phase, 0.99)


def test_the_same_times_give_the_same_model():
    models = []
    for _ in range(2):
        profile = Profile(replace(ROOM, max_rows=32), PRIOR, 1.0)
        play(profile, TRUTH, random.Random(6), noise=0.3)
        models.append(profile.model("it"))
    assert models[0] == models[1]
