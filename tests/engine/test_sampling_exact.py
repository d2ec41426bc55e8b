"""Every sampling option: as the plain reference says; the same alone, batched, chunked anyhow, moved, recomputed."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.errors import LocalError
from core.sampling import Sampling
from engine.api import Row
from tests.engine.plain import choices, close, logprobs
from tests.engine.play import Dealer, alone, chunks, move, poison

HALF = tuple(range(64))
"""Half of the vocabulary ends the text, where there is a least length."""
OPTIONS: dict[str, dict[str, Any]] = {
    "min_p": {"min_p": 0.8},
    "repetition": {"repetition_penalty": 1.4},
    "encouraged": {"repetition_penalty": 0.7, "frequency_penalty": -1.0},
    "presence": {"presence_penalty": -2.0},
    "frequency": {"frequency_penalty": 0.9},
    "bias": {"logit_bias": ((3, -100.0), (7, 2.5), (11, 2.5), (90, 100.0)), "presence_penalty": 2.0},
    "min_tokens": {"min_tokens": 5, "stop_token_ids": HALF},
    "logprobs": {"logprobs": 5},
    "prompt_logprobs": {"prompt_logprobs": 2, "logprobs": 0},
    "all": {
        "min_p": 0.05,
        "top_k": 60,
        "top_p": 0.95,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.3,
        "logit_bias": ((5, 1.0), (99, -3.0)),
        "min_tokens": 6,
        "stop_token_ids": (1, 2, *range(40, 60)),
        "logprobs": 3,
        "prompt_logprobs": 1,
    },
}
KINDS: dict[str, dict[str, Any]] = {"greedy": {}, "seeded": {"temperature": 0.4, "seed": 7}}
LENGTHS = (1, 300, 40, 17, 90, 64)
CASES = {
    f"{name}-{kind}": (random.Random(number).choices(range(2, 30), k=length), Sampling(16, **options, **KINDS[kind]))
    for number, ((name, options), kind, length) in enumerate(
        zip([each for each in OPTIONS.items() for _ in KINDS], [*KINDS] * len(OPTIONS), LENGTHS * 4, strict=False)
    )
}


@pytest.fixture(scope="module", params=[("float32", True), ("bfloat16", False)], ids=["fp32-native", "bf16-torch"])
def exact(request, engine):
    """Three exact engines (two page sizes), and what each case gives alone."""
    dtype, native = request.param
    threads = torch.get_num_threads()
    engines = [
        engine("gqa", dtype=dtype, native=native, exact=True, page_tokens=size, threads=1) for size in (16, 16, 64)
    ]
    yield engines, {name: strip(alone(engines[0], *case)) for name, case in CASES.items()}
    torch.set_num_threads(threads)


def strip(samples):
    return [replace(sample, sequence="") for sample in samples]


def rest(prompt, sampling, done):
    """What a router asks for once `done` were given: prompt, sampling, and how much of the prompt was output."""
    count = len(done)
    least = max(0, sampling.min_tokens - count)
    left = replace(sampling, max_tokens=sampling.max_tokens - count, min_tokens=least, prompt_logprobs=None)
    return prompt + done, left, count


@pytest.mark.parametrize("name", CASES)
def test_every_token_is_what_the_plain_reference_chooses(exact, monkeypatch, name):
    (one, *_), truth = exact
    prompt, sampling = CASES[name]
    lines = []
    forward = one._model.forward

    def keep(batch):
        logits = forward(batch)
        lines.extend(logits.numpy().copy())
        return logits

    monkeypatch.setattr(one._model, "forward", keep)
    got = alone(one, prompt, sampling)
    assert strip(got) == truth[name]
    output = []
    if (top := sampling.prompt_logprobs) is not None:
        told, lines = lines[: len(prompt) - 1], lines[len(prompt) - 1 :]
        want = [None, *(logprobs(line, token, top) for line, token in zip(told, prompt[1:], strict=True))]
        assert all(map(close, got[0].prompt_logprobs, want))
        assert len(got[0].prompt_logprobs) == len(prompt)
    for sample, line in zip(got, lines, strict=True):
        assert sample.token in choices(line, sampling, sample.position, prompt, output)
        many = sampling.logprobs
        assert close(sample.logprobs, None if many is None else logprobs(line, sample.token, many))
        output.append(sample.token)
    assert not any(sample.prompt_logprobs for sample in got[1:])
    ends = [sample.token in sampling.stop_token_ids for sample in got]
    assert not any(ends[: sampling.min_tokens])
    assert (got[-1].finish == "stop") == ends[-1]


def test_each_option_changes_the_text(exact):
    """Else the cases above would show nothing."""
    (one, *_), truth = exact
    for name, (prompt, sampling) in CASES.items():
        if "logprobs" not in name and name != "min_p-greedy":
            plain = Sampling(16, temperature=sampling.temperature, seed=sampling.seed)
            tokens = [sample.token for sample in alone(one, prompt, plain)]
            assert [sample.token for sample in truth[name]] != tokens, name


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_schedule_gives_the_same(exact, data):
    engines, truth = exact
    rng = random.Random(data.draw(st.integers(0, 2**32)))
    chosen = data.draw(st.lists(st.sampled_from(list(CASES)), min_size=1, max_size=8, unique=True))
    source = engines[data.draw(st.sampled_from([0, 2]))]
    poison(source)
    dealer = Dealer(source, rng)
    work, got = {}, {name: [] for name in chosen}
    for name in chosen:
        prompt, sampling = CASES[name]
        source.open(name, prompt, dealer.deal(len(prompt) + sampling.max_tokens), sampling, len(prompt))
        work[name] = chunks(0, len(prompt), [rng.choice([1, 3, 8, 31, 64, 200]) for _ in range(1000)])
    while work:
        names = [name for name in work if rng.random() < 0.7]
        rng.shuffle(names)
        for sample in source.step([Row(name, *work[name].pop(0)) for name in names]):
            got[sample.sequence].append(sample)
            if sample.finish is None:
                work[sample.sequence].append((sample.position, sample.position + 1))
        work = {name: left for name, left in work.items() if left}
    for name in chosen:
        source.close(name)
        assert strip(got[name]) == truth[name]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(list(CASES)), after=st.integers(1, 11), seed=st.integers(0, 2**32))
def test_a_move_changes_nothing(exact, name, after, seed):
    (source, sink, _), truth = exact
    prompt, sampling = CASES[name]
    done = truth[name][: min(after, len(truth[name]) - 1)]
    rng = random.Random(seed)
    poison(sink)
    pages, into = (Dealer(one, rng).deal(len(prompt) + sampling.max_tokens) for one in (source, sink))
    source.open("s", prompt, pages, sampling, len(prompt))
    got = source.step([Row("s", 0, len(prompt))])
    while len(got) < len(done):
        got += source.step([Row("s", got[-1].position, got[-1].position + 1)])
    move("s", source, pages, sink, into)
    source.close("s")
    sink.open("s", [*prompt, *(sample.token for sample in got)], into, sampling, len(prompt))
    while len(got) < len(truth[name]):
        got += sink.step([Row("s", got[-1].position, got[-1].position + 1)])
    sink.close("s")
    assert strip(got) == truth[name]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(list(CASES)), after=st.lists(st.integers(1, 11), min_size=1, max_size=2), cut=st.data())
def test_going_on_after_losses_changes_nothing(exact, name, after, cut):
    """Prompt and output so far are computed anew, as one longer prompt, here or elsewhere; twice, too."""
    engines, truth = exact
    prompt, sampling = CASES[name]
    got = []
    for count in sorted({min(each, len(truth[name]) - 1) for each in after}):
        got = truth[name][:count]
        known, left, generated = rest(prompt, sampling, [sample.token for sample in got])
        one = engines[cut.draw(st.sampled_from([1, 2]))]
        poison(one)
        one.close("s")
        one.open("s", known, Dealer(one).deal(len(known) + left.max_tokens), left, len(known), generated)
        for start, stop in chunks(0, len(known), [cut.draw(st.sampled_from([7, 64, 500]))]):
            got = got + one.step([Row("s", start, stop)])
        while got[-1].finish is None:
            got += one.step([Row("s", got[-1].position, got[-1].position + 1)])
        one.close("s")
        assert strip(got) == truth[name]


def test_the_logits_of_a_long_prompt_are_never_held_at_once(exact, monkeypatch):
    (one, *_), truth = exact
    monkeypatch.setattr("engine.engine.PROMPT_LOGITS_NBYTES", 4 * 128 * 40)
    held = []
    forward = one._model.forward

    def count(batch):
        held.append(batch.samples)
        return forward(batch)

    monkeypatch.setattr(one._model, "forward", count)
    name = "prompt_logprobs-seeded"
    assert strip(alone(one, *CASES[name])) == truth[name]
    assert max(held) <= 41
    # Known output in the same row: nothing is told of it.
    prompt, sampling = CASES[name]
    known = prompt + [sample.token for sample in truth[name][:5]]
    one.open("s", known, Dealer(one).deal(len(known) + 8), sampling, len(prompt))
    (sample,) = one.step([Row("s", 0, len(known))])
    one.close("s")
    assert strip([sample]) == truth[name][5:6]


def test_no_more_can_have_been_generated_than_there_is(exact):
    (one, *_), _ = exact
    with pytest.raises(LocalError, match="generated: got 3, want 0 to 2 tokens"):
        one.open("s", [5, 6], [0], Sampling(2), 2, 3)


@pytest.mark.parametrize("sampling", [Sampling(5, prompt_logprobs=0), Sampling(5, temperature=1.0, min_p=0.1)])
def test_logits_that_are_not_finite_are_refused(exact, sampling):
    (one, *_), _ = exact
    prompt = list(range(2, 42))
    one.open("bad", prompt, [50, 51, 52], sampling, len(prompt))
    one.step([Row("bad", 0, 20)])
    one._arena.pages[50].fill_(float("nan"))
    with pytest.raises(LocalError, match=r"'bad': the logits at position \d+ are not finite"):
        one.step([Row("bad", 20, 40)])
    one.close("bad")
    one._arena.pages[50].zero_()
