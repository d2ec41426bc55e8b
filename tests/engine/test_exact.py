"""Exact mode: a sequence's logits are bit-equal however its work is cut, batched, moved or repeated."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.errors import SetupError
from core.sampling import Sampling
from engine.api import Row
from tests.checkpoints import MODELS
from tests.engine.play import Dealer, alone, chunks, move, poison, side_by_side, with_stops

PROMPTS = [random.Random(length).choices(range(2, 128), k=length) for length in (1, 7, 8, 33, 90, 300, 515)]
SAMPLINGS = [
    Sampling(6),
    Sampling(9, temperature=0.8, seed=11),
    Sampling(7, temperature=1.1, top_k=20, top_p=0.9, seed=2**60),
]
PAIRS = [(prompt, sampling) for prompt in PROMPTS for sampling in SAMPLINGS]


KINDS = [(dtype, native) for dtype in ("float32", "bfloat16") for native in (True, False)]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: f"{kind[0]}-{'native' if kind[1] else 'torch'}")
def exact(request, engine):
    """Three exact engines of one dtype (arenas of NaN, different page sizes), and each pair's text when alone."""
    dtype, native = request.param
    engines = [engine("gqa", dtype=dtype, native=native, exact=True, page_tokens=size) for size in (16, 16, 64)]
    for one in engines:
        poison(one)
    return engines, [alone(engines[0], *pair) for pair in PAIRS]


def strip(samples):
    return [(sample.position, sample.token, sample.finish, sample.logits_hash) for sample in samples]


def at_once(engine, rows, rng):
    return engine.step(rows)


def any_schedule(data, engine, pairs, truth, step=at_once):
    """Some of `pairs` at the same time, chunked and interleaved anyhow on shuffled pages of NaN, give their `truth`."""
    rng = random.Random(data.draw(st.integers(0, 2**32)))
    chosen = data.draw(st.lists(st.integers(0, len(pairs) - 1), min_size=1, max_size=8, unique=True))
    poison(engine)
    dealer = Dealer(engine, rng)
    got: dict[str, list] = {}
    work: dict[str, list[tuple[int, int]]] = {}
    for number in chosen:
        prompt, sampling = pairs[number]
        name = str(number)
        engine.open(name, prompt, dealer.deal(len(prompt) + sampling.max_tokens), sampling, len(prompt))
        work[name] = chunks(0, len(prompt), [rng.choice([1, 3, 8, 31, 64, 200]) for _ in range(1000)])
        got[name] = []
    while work:
        names = [name for name in work if rng.random() < 0.7]
        rng.shuffle(names)
        rows = [Row(name, *work[name][0]) for name in names]
        for name in names:
            work[name].pop(0)
        for sample in step(engine, rows, rng):
            name = sample.sequence
            got[name].append(sample)
            if sample.finish is None:
                work[name].append((sample.position, sample.position + 1))
        work = {name: left for name, left in work.items() if left}
    for number in chosen:
        engine.close(str(number))
        assert strip(got[str(number)]) == strip(truth[number])


def recomputed(engine, pair, truth, sizes):
    """With the first four tokens known, the others come out as before."""
    prompt, sampling = pair
    known = prompt + [sample.token for sample in truth[:4]]
    poison(engine)
    engine.open("s", known, Dealer(engine).deal(len(known) + 8), sampling, len(prompt))
    got = []
    for start, stop in chunks(0, len(known), sizes):
        got += engine.step([Row("s", start, stop)])
    while got[-1].finish is None:
        got += engine.step([Row("s", got[-1].position, got[-1].position + 1)])
    engine.close("s")
    assert strip(got) == strip(truth[4:])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_schedule_gives_the_same_bits(exact, data):
    engines, truth = exact
    any_schedule(data, engines[data.draw(st.sampled_from([0, 2]))], PAIRS, truth)


@pytest.fixture(scope="module")
def exact_model(engine):
    """An exact engine of an architecture, and what each of some pairs gives when alone."""
    made = {}
    pairs = [(prompt, SAMPLINGS[number % 3]) for number, prompt in enumerate(PROMPTS)]

    def get(name, dtype, native):
        if (name, dtype, native) not in made:
            one = engine(name, dtype=dtype, native=native, exact=True, kv_memory=4 * 2**20)
            assert one.backend == ("exact-native" if native else "exact-torch")
            poison(one)
            made[name, dtype, native] = one, pairs, [alone(one, *pair) for pair in pairs]
        return made[name, dtype, native]

    return get


@pytest.mark.parametrize(("dtype", "native"), KINDS)
@pytest.mark.parametrize("name", ["Qwen2, sliding window", "Qwen3", "Gemma 2", "Gemma 3"])
@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_schedule_of_any_architecture_gives_the_same_bits(exact_model, name, dtype, native, data):
    one, pairs, truth = exact_model(name, dtype, native)
    any_schedule(data, one, pairs, truth)
    number = data.draw(st.integers(0, len(pairs) - 1))
    recomputed(one, pairs[number], truth[number], data.draw(st.sampled_from([(10**9,), (5,), (100, 1)])))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_steps_that_stop_anywhere_give_the_same_bits(exact, data):
    engines, truth = exact
    any_schedule(data, engines[data.draw(st.sampled_from([0, 2]))], PAIRS, truth, with_stops)


@pytest.mark.parametrize(("dtype", "native"), KINDS)
@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=2, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_steps_of_any_architecture_that_stop_anywhere_give_the_same_bits(exact_model, name, dtype, native, data):
    one, pairs, truth = exact_model(name, dtype, native)
    any_schedule(data, one, pairs, truth, with_stops)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(number=st.integers(0, len(PAIRS) - 1), after=st.integers(1, 6), seed=st.integers(0, 2**32))
def test_a_move_changes_no_bit(exact, number, after, seed):
    (source, sink, _), truth = exact
    prompt, sampling = PAIRS[number]
    want = truth[number]
    after = min(after, len(want) - 1)
    rng = random.Random(seed)
    poison(sink)
    pages = Dealer(source, rng).deal(len(prompt) + sampling.max_tokens)
    into = Dealer(sink, rng).deal(len(prompt) + sampling.max_tokens)
    source.open("s", prompt, pages, sampling, len(prompt))
    got = source.step([Row("s", 0, len(prompt))])
    while len(got) < after:
        got += source.step([Row("s", got[-1].position, got[-1].position + 1)])
    move("s", source, pages, sink, into)
    source.close("s")
    sink.open("s", prompt + [sample.token for sample in got], into, sampling, len(prompt))
    while got[-1].finish is None:
        got += sink.step([Row("s", got[-1].position, got[-1].position + 1)])
    sink.close("s")
    assert strip(got) == strip(want)


@pytest.mark.parametrize("number", [2, 10, 20])
@pytest.mark.parametrize("sizes", [(10**9,), (5,), (100, 1)])
def test_recomputing_prompt_and_output_changes_no_bit(exact, number, sizes):
    (_, _, other), truth = exact
    recomputed(other, PAIRS[number], truth[number], sizes)


def test_side_by_side_every_text_has_the_bits_that_it_has_alone(exact):
    (_, _, other), truth = exact
    few = PAIRS[:15]
    assert [strip(got) for got in side_by_side(other, few)] == [strip(want) for want in truth[:15]]


def test_a_cpu_that_is_not_exact_is_refused(engine, monkeypatch):
    monkeypatch.setattr(
        "engine.backend.row_independent", lambda product, weight, dtype: weight.rows != 128 or weight.cols != 64
    )
    with pytest.raises(SetupError, match=r"exact: got a CPU whose float32 product with a \[128, 64\] matrix"):
        engine("gqa", exact=True, dtype="float32")


@pytest.mark.parametrize("native", [True, False])
def test_two_threads_keep_their_bits(engine, native):
    before = torch.get_num_threads()
    try:
        one = engine("gqa", dtype="bfloat16", native=native, exact=True, threads=2)
        want = [strip(alone(one, prompt, Sampling(3))) for prompt in PROMPTS]
        assert [strip(alone(one, prompt, Sampling(3), (33, 1, 90))) for prompt in PROMPTS] == want
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["odd", "mqa", "tied", "wide"])
@pytest.mark.parametrize(("dtype", "native"), KINDS)
def test_other_shapes_keep_their_bits(engine, name, dtype, native):
    one = engine(name, dtype=dtype, native=native, exact=True)
    poison(one)
    prompt, sampling = PROMPTS[5], Sampling(5, temperature=0.7, seed=3)
    want = strip(alone(one, prompt, sampling))
    assert strip(alone(one, prompt, sampling, (77, 1, 60))) == want
    short = Sampling(300)
    one.open("beside", PROMPTS[4], Dealer(one).deal(500)[::-1], short, len(PROMPTS[4]))
    one.step([Row("beside", 0, 90)])
    one.open("s", prompt, list(range(one.pages - 25, one.pages)), sampling, len(prompt))
    got, at = [], 90
    for start, stop in [(0, 40), (40, 41), (41, 300)]:
        both = one.step([Row("beside", at, at + 1), Row("s", start, stop)])
        at += 1
        got += both[1:]
    while got[-1].finish is None:
        got += one.step([Row("s", got[-1].position, got[-1].position + 1)])
    assert strip(got) == want
