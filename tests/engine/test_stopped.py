"""Steps that stop between operators and go on later: what every engine keeps and refuses, how long it takes."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from core.errors import LocalError
from core.sampling import Sampling
from engine.api import Row
from engine.engine import TorchEngine
from engine.paced import LAYERS, Pacer
from tests.engine.conftest import ENGINES
from tests.engine.play import alone, chunks, poison, with_stops
from tests.engine.test_exact import strip
from tests.engine.test_paced import Cost, Device

DEMO = Path(__file__).parents[2] / "deploy" / "demo" / "model"
PROMPT = random.Random(3).choices(range(2, 128), k=90)
OTHER = random.Random(4).choices(range(2, 128), k=20)
SAMPLINGS = [Sampling(6), Sampling(6, temperature=0.9, seed=7)]
PAUSES = {"torch": 4, "paced": LAYERS - 1}
"""How often a step of the small model, which has two layers, asks whether it is to stop."""


@pytest.fixture(params=[*ENGINES])
def one(engine, request):
    made = engine("gqa", request.param, **({"exact": True} if request.param == "torch" else {}))
    made.kind = request.param
    poison(made)
    return made


def after(count):
    """Says no so many times, then yes once, then no."""
    asked = iter([False] * count + [True])
    return lambda: next(asked, False)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "seeded"])
def test_wherever_a_step_stops_the_text_is_the_same(one, sampling):
    want = alone(one, PROMPT, sampling)
    aside = alone(one, OTHER, Sampling(1))
    for at in range(PAUSES[one.kind]):
        poison(one)
        one.open("s", PROMPT, range(9, 15), sampling, len(PROMPT))
        one.step([Row("s", 0, 40)])
        step = one.begin([Row("s", 40, 90)])
        assert step.run(after(at)) is None
        one.open("o", OTHER, [20, 3], Sampling(1), len(OTHER))
        assert strip(one.step([Row("o", 0, 20)])) == strip(aside)
        one.close("o")
        got = step.run(lambda: False)
        while got[-1].finish is None:
            got += one.step([Row("s", got[-1].position, got[-1].position + 1)])
        one.close("s")
        assert strip(got) == strip(want)
    one.open("s", PROMPT, range(9, 15), sampling, len(PROMPT))
    assert one.begin([Row("s", 0, 90)]).run(after(PAUSES[one.kind])) is not None, "it asked once more"


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "seeded"])
def test_the_demo_model_says_the_same_however_its_steps_are_stopped(sampling):
    one = TorchEngine(DEMO, kv_memory=2**21, page_tokens=16, exact=True, hash_logits=True, threads=1)
    prompt = random.Random(5).choices(range(3, one.config.vocab), k=150)
    want, rng = alone(one, prompt, sampling), random.Random(6)
    for often in (0.1, 0.5, 1.0):
        poison(one)
        one.open("s", prompt, range(2, 12), sampling, len(prompt))
        got = []
        for start, stop in chunks(0, 150, (60,)):
            got += with_stops(one, [Row("s", start, stop)], rng, often)
        while got[-1].finish is None:
            got += with_stops(one, [Row("s", got[-1].position, got[-1].position + 1)], rng, often)
        one.close("s")
        assert strip(got) == strip(want)


def test_nothing_is_computed_before_it_runs(one):
    one.open("s", PROMPT, range(6), Sampling(2), 90)
    before = bytes(one.arena)
    one.begin([Row("s", 0, 90)])
    assert bytes(one.arena) == before
    (sample,) = one.step([Row("s", 0, 90)])
    assert one.tokens("s")[90:] == (sample.token,)


def test_a_step_of_nothing_is_over_at_once(one):
    assert one.begin([]).run(lambda: True) == []


def test_bad_rows_are_refused_before_they_run(one):
    with pytest.raises(LocalError, match="is not open"):
        one.begin([Row("s", 0, 1)])


def test_a_sequence_is_in_one_step_at_a_time(one):
    for name, page in (("s", 0), ("t", 6)):
        one.open(name, PROMPT[:80], range(page, page + 6), Sampling(2), 80)
    both = one.begin([Row("s", 0, 80), Row("t", 0, 80)])
    assert both.run(after(0)) is None
    for call in (one.step, one.begin):
        with pytest.raises(LocalError, match="'t' is in a suspended step"):
            call([Row("t", 0, 80)])
    found = both.run(lambda: False)
    assert [sample.sequence for sample in found] == ["s", "t"]
    with pytest.raises(LocalError, match="step: got one that is over"):
        both.run(lambda: False)
    assert one.step([Row("t", 0, 81)]), "it is free again"


@pytest.mark.parametrize("again", [True, False])
def test_a_step_whose_sequence_was_closed_is_over_and_lets_go_of_all(one, again):
    for name, page in (("s", 0), ("t", 6)):
        one.open(name, PROMPT, range(page, page + 6), Sampling(2), 90)
    both = one.begin([Row("s", 0, 90), Row("t", 0, 90)])
    assert both.run(after(1)) is None
    one.close("t")
    if again:
        one.open("t", PROMPT, range(6, 12), Sampling(2), 90)
    before = bytes(one.arena)
    with pytest.raises(LocalError, match="'t' was closed before its step was over"):
        both.run(lambda: False)
    assert bytes(one.arena) == before
    assert both._parts.gi_frame is None, "hidden states are kept"
    with pytest.raises(LocalError, match="over"):
        both.run(lambda: False)
    assert one.step([Row("s", 0, 90)]), "the other one may be computed again"


def test_logprobs_of_a_prompt_come_in_parts_that_can_stop(one, monkeypatch):
    monkeypatch.setattr("engine.engine.PROMPT_LOGITS_NBYTES", 1)
    sampling = Sampling(1, logprobs=2, prompt_logprobs=2)
    want = alone(one, PROMPT, sampling)
    poison(one)
    one.open("s", PROMPT, range(6), sampling, 90)
    step, stops = one.begin([Row("s", 0, 90)]), 0
    while (found := step.run(lambda: True)) is None:
        stops += 1
    assert [(each.logprobs, each.prompt_logprobs) for each in found] == [(want[0].logprobs, want[0].prompt_logprobs)]
    assert stops == (3 if one.kind == "torch" else 1) * PAUSES[one.kind], "each forward pass can stop"


def test_an_engine_that_fails_lets_go_of_all(engine):
    one = engine("gqa", exact=True)
    one.open("s", PROMPT, range(6), Sampling(2), 90)
    one.step([Row("s", 0, 40)])
    step = one.begin([Row("s", 40, 90)])
    assert step.run(after(0)) is None
    poison(one)
    with pytest.raises(LocalError, match="not finite"):
        step.run(lambda: False)
    with pytest.raises(LocalError, match="over"):
        step.run(lambda: False)
    one.step([Row("s", 0, 90)])


# The paced engine.
def test_pages_that_change_while_a_step_has_stopped_make_a_wrong_token(engine):
    one = engine("gqa", "paced")
    want = alone(one, PROMPT, Sampling(2))
    words = np.frombuffer(one.arena, np.uint64).reshape(one.pages, -1)
    for page in (0, 3):
        one.open("s", PROMPT, range(6), Sampling(2), 90)
        one.step([Row("s", 0, 40)])
        step = one.begin([Row("s", 40, 90)])
        assert step.run(after(20)) is None
        words[page, 7] ^= np.uint64(1 << 40)
        (sample,) = step.run(lambda: False)
        one.close("s")
        wrong = sample.logits_hash != want[0].logits_hash
        assert wrong == (page == 0), "pages before the step are read again, those of it are written again"


def test_pages_that_were_given_away_too_early_are_written_all_the_same(engine):
    one = engine("gqa", "paced")
    want = alone(one, OTHER, Sampling(3))
    one.open("s", PROMPT, range(6), Sampling(2), 90)
    step = one.begin([Row("s", 0, 90)])
    assert step.run(after(20)) is None
    one.open("o", OTHER, [3, 4], Sampling(3), 20)
    (first,) = one.step([Row("o", 0, 20)])
    assert strip([first]) == strip(want[:1])
    step.run(lambda: False)
    (second,) = one.step([Row("o", 20, 21)])
    assert second.logits_hash != want[1].logits_hash


def test_a_step_that_stops_takes_its_time_in_all(engine):
    device = Device(0.0)
    one = engine("gqa", "paced", cost=Cost(), pacer=Pacer(device.clock, device.sleep))
    one.open("s", PROMPT, range(6), Sampling(2), 90)
    one.open("o", OTHER, [7, 8], Sampling(2), 20)
    step = one.begin([Row("s", 0, 90)])
    assert step.run(after(7)) is None
    assert device.now == pytest.approx(100 + 0.25 * 8 / LAYERS)
    one.step([Row("o", 0, 20)])
    device.now += 3.0
    assert step.run(lambda: False) is not None
    assert device.now == pytest.approx(100 + 2 * 0.25 + 3.0)


def test_late_wake_ups_of_layers_do_not_add_up(engine):
    device = Device(0.001)
    one = engine("gqa", "paced", cost=Cost(), pacer=Pacer(device.clock, device.sleep))
    one.open("s", PROMPT, range(6), Sampling(2), 90)
    assert one.begin([Row("s", 0, 90)]).run(lambda: False) is not None
    assert device.now == pytest.approx(100 + 0.25 + 0.001)
