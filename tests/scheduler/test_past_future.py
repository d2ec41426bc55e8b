"""Admission by worst case and by future peak, held against what memory comes to when it is played step by step."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.past_future import Claim, PastFuture, WorstCase, whole_pages

PAGE = 4


def played(claims: list[Claim], step: int) -> int:
    """The most pages held together from `step` on, when every row ends as predicted."""
    last = max((claim.step + claim.left for claim in claims), default=step)
    fixed = sum(claim.fixed for claim in claims)
    return max(
        fixed
        + sum(
            -(-(claim.tokens + now - claim.step) // PAGE) * claim.rows
            for claim in claims
            if claim.step + claim.left >= now
        )
        for now in range(step, last + 1)
    )


def filled(rule, claims):
    for claim in claims:
        rule.add(replace(claim))
    return rule


claims = st.lists(
    st.builds(
        Claim,
        key=st.just(""),
        tokens=st.integers(1, 40),
        step=st.just(10),
        left=st.integers(1, 50),
        rows=st.sampled_from([1, 1, 1, 1, 0, 3]),
        fixed=st.sampled_from([0, 0, 5]),
    ),
    min_size=1,
    max_size=8,
).map(lambda made: [replace(claim, key=str(number)) for number, claim in enumerate(made)])


def test_rows_that_end_one_after_the_other_share_memory():
    """Three rows of 8 tokens that will be 24, 16 and 12: together 52, but never more than 36 at a time."""
    rows = [Claim("a", 8, 0, 16), Claim("b", 8, 0, 8), Claim("c", 8, 0, 4)]
    rule = filled(PastFuture(1), rows)
    assert rule.peak(0) == 36  # at step 4: 12 + 12 + 12; at step 8: 16 + 16; at step 16: 24
    assert sum(whole_pages(claim, 1) for claim in rows) == 52
    assert filled(PastFuture(1), rows[:2]).fits(rows[2], 36, 0)
    assert not filled(PastFuture(1), rows[:2]).fits(rows[2], 35, 0)
    assert not filled(WorstCase(1), rows[:2]).fits(rows[2], 51, 0)
    assert filled(WorstCase(1), rows[:2]).fits(rows[2], 52, 0)


def test_what_was_to_end_by_now_is_counted_as_if_it_joined_now():
    rule = filled(PastFuture(1), [Claim("a", 10, 0, 5)])
    assert rule.peak(0) == 15
    assert rule.peak(100) == 15
    rule.remove("a")
    assert rule.peak(100) == 0


@given(claims, st.integers(0, 60))
def test_who_fits_never_needs_more_than_there_is(made, room):
    *others, claim = made
    rule = filled(PastFuture(PAGE), others)
    if rule.fits(claim, room, 10):
        assert played(made, 10) <= room
    assert rule.peak(10) >= played(others, 10) if others else rule.peak(10) == 0


@given(claims, st.integers(10, 80))
def test_it_survives_json(made, step):
    rule = filled(PastFuture(PAGE), made)
    again = PastFuture.of(json.loads(json.dumps(rule.document())))
    assert again.document() == rule.document()
    assert again.peak(step) == rule.peak(step)
    for claim in made:
        rule.remove(claim.key)
        again.remove(claim.key)
        assert again.peak(step) == rule.peak(step)


def test_another_format_is_refused():
    with pytest.raises(ValueError, match="format"):
        PastFuture.of({**PastFuture(1).document(), "format": 2})


@given(claims)
def test_the_peak_is_too_high_by_less_than_two_pages_a_row(made):
    rows = sum(claim.rows for claim in made)
    assert filled(PastFuture(PAGE), made).peak(10) <= played(made, 10) + 2 * rows


@given(claims, st.integers(0, 200))
def test_a_test_changes_nothing_and_removing_undoes_adding(made, room):
    *others, claim = made
    rule, worst = filled(PastFuture(PAGE), others), filled(WorstCase(PAGE), others)
    before, total = rule.peak(10), worst.promised
    assert worst.fits(claim, room, 10) <= rule.fits(claim, room, 10), "the worst case fits, the forecast does not"
    assert (rule.peak(10), worst.promised, rule.promised) == (before, total, 0)
    for each in (rule, worst):
        each.add(claim)
        each.remove(claim.key)
    assert (rule.peak(10), worst.promised) == (before, total)
    assert worst.promised == sum(whole_pages(other, PAGE) for other in others)
