"""Sequences that must match something: the same alone, batched, chunked, suspended, moved, swapped, recomputed."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from core.constraint import Constraint, Language
from core.errors import LocalError
from core.sampling import Sampling
from engine.api import NO_TOKEN, Row
from engine.engine import TorchEngine
from engine.grammar import Grammars
from engine.paced import PacedEngine
from tests.checkpoints import make_llama
from tests.engine.plain import choices, close, logprobs
from tests.engine.play import Dealer, alone, chunks, move, poison, with_stops
from tests.engine.test_grammar import END, GBNF, PADDED, VOCAB, WORD, small
from tests.engine.test_sampling_exact import rest
from tests.gateway.tokenizers_made import save

SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "integer", "minimum": -99, "maximum": 99},
        "bb": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
        "abc": {"enum": ["ab", "bc", None]},
    },
    "required": ["a", "bb", "abc"],
    "additionalProperties": False,
}
WORDS = Constraint(Language.REGEX, "(ab|bc){1,7}[.!]?")
CONSTRAINTS = {
    "words": WORDS,
    "schema": Constraint(Language.JSON_SCHEMA, json.dumps(SCHEMA)),
    "grammar": Constraint(Language.GRAMMAR, GBNF),
    "short": Constraint(Language.REGEX, "a[bc]"),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": {"temperature": 0.9, "seed": 5},
    "hot": {"temperature": 30.0, "seed": 2**62},
    "top_p": {"temperature": 2.0, "top_p": 0.6, "seed": 8},
    "top_k": {"temperature": 3.0, "top_k": 3, "min_p": 0.01, "seed": 9},
    "all": {
        "temperature": 1.5, "seed": 3, "top_k": 40, "top_p": 0.9, "min_p": 0.001, "repetition_penalty": 1.3,
        "presence_penalty": 0.4, "frequency_penalty": 0.8, "logit_bias": ((END, 50.0), (260, 5.0), (70, -100.0)),
        "min_tokens": 6, "stop_token_ids": (END, WORD, 264), "logprobs": 4,
    },
}  # fmt: skip
PROMPT = [random.Random(1).randrange(3, VOCAB) for _ in range(40)]
LONG = [random.Random(2).randrange(3, VOCAB) for _ in range(90)]
CASES = {
    f"{name}-{kind}": (
        LONG if number % 2 else PROMPT,
        Sampling(40, constraint=constraint, **{"stop_token_ids": (END,), **options}),
    )
    for number, (name, constraint) in enumerate(CONSTRAINTS.items())
    for kind, options in OPTIONS.items()
} | {
    "free": (PROMPT, Sampling(12, stop_token_ids=(END,))),
    "free-seeded": (LONG, Sampling(12, temperature=1.0, seed=1)),
}
HERE = Path(__file__).resolve().parents[2]


def tokens_of(samples):
    return [sample.token for sample in samples if sample.finish != "stop"]


def strip(samples):
    return [replace(sample, sequence="") for sample in samples]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = make_llama(tmp_path_factory.mktemp("constrained"), vocab=PADDED, eos=END)
    return save(small(), made)


@pytest.fixture(scope="module")
def grammars(folder) -> Grammars:
    return Grammars(folder, PADDED, [END])


@pytest.fixture(scope="module")
def exact(folder, grammars):
    """Three engines of two page sizes, with room in host memory; and what each case gives by itself."""
    options: dict[str, Any] = {"kv_memory": 2 * 2**20, "host_memory": 2**19, "exact": True, "hash_logits": True}
    engines = [TorchEngine(folder, page_tokens=size, grammars=grammars, threads=1, **options) for size in (16, 16, 64)]
    return engines, {name: strip(alone(engines[0], *case)) for name, case in CASES.items()}


def test_every_text_that_ended_matches_and_the_others_can_go_on(exact):
    _, truth = exact
    ended = 0
    for name, samples in truth.items():
        _, sampling = CASES[name]
        if sampling.constraint is None:
            continue
        text = small().decode(tokens_of(samples), skip_special_tokens=False)
        if samples[-1].finish == "length":
            assert len(samples) == 40
            continue
        ended += 1
        match name.split("-")[0]:
            case "words":
                assert re.fullmatch(WORDS.text, text)
            case "short":
                assert text in ("ab", "ac"), "least tokens cannot be had of it"
            case "grammar":
                assert re.fullmatch("(ab|ba) [abc]{1,3}", text)
            case _:
                found = json.loads(text)
                assert found.keys() == {"a", "bb", "abc"}
                assert abs(found["a"]) <= 99
                assert {*map(type, found["bb"])} <= {bool}
                assert len(found["bb"]) <= 3
                assert found["abc"] in ("ab", "bc", None)
    assert ended >= 12
    assert len({tuple(tokens_of(samples)) for samples in truth.values()}) > 12


@pytest.mark.parametrize("name", CASES)
def test_every_token_is_what_the_plain_reference_chooses_of_those_allowed(exact, grammars, monkeypatch, name):
    """Logprobs are of the raw logits, as without a constraint."""
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
    for sample, line in zip(got, lines, strict=True):
        allowed = None
        if sampling.constraint is not None:
            walk = grammars.walk(sampling.constraint, output, sampling.stop_token_ids)
            allowed = {*np.flatnonzero(walk.allowed()).tolist()}
        assert sample.token in choices(line, sampling, sample.position, prompt, output, allowed)
        many = sampling.logprobs
        assert close(sample.logprobs, None if many is None else logprobs(line, sample.token, many))
        output.append(sample.token)
    assert (got[-1].finish == "stop") == (got[-1].token in sampling.stop_token_ids)


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_schedule_gives_the_same(exact, data):
    """Beside each other and beside texts that may be anything, in steps that stop, in and out of host memory."""
    engines, truth = exact
    rng = random.Random(data.draw(st.integers(0, 2**32)))
    chosen = data.draw(st.lists(st.sampled_from(list(CASES)), min_size=2, max_size=7, unique=True))
    one = engines[data.draw(st.sampled_from([0, 2]))]
    poison(one)
    dealer = Dealer(one, rng)
    work, got, tables = {}, {name: [] for name in chosen}, {}
    for name in chosen:
        prompt, sampling = CASES[name]
        tables[name] = dealer.deal(len(prompt) + sampling.max_tokens)
        one.open(name, prompt, tables[name], sampling, len(prompt))
        work[name] = chunks(0, len(prompt), [rng.choice([1, 8, 31, 64]) for _ in range(1000)])
    while work:
        names = [name for name in work if rng.random() < 0.7]
        rng.shuffle(names)
        for sample in with_stops(one, [Row(name, *work[name].pop(0)) for name in names], rng):
            got[sample.sequence].append(sample)
            if sample.finish is None:
                work[sample.sequence].append((sample.position, sample.position + 1))
        work = {name: left for name, left in work.items() if left}
        if work and rng.random() < 0.1:
            name = rng.choice(sorted(work))
            prompt, sampling = CASES[name]
            known = one.tokens(name)
            one.swap_out(name, tables[name])
            one.swap_in(name, tables[name])
            one.open(name, known, tables[name], sampling, len(prompt))
    for name in chosen:
        one.close(name)
        assert strip(got[name]) == truth[name], name


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(list(CASES)), after=st.integers(1, 20), seed=st.integers(0, 2**32))
def test_a_move_takes_tokens_and_pages_and_nothing_else(exact, name, after, seed):
    (source, sink, _), truth = exact
    prompt, sampling = CASES[name]
    rng = random.Random(seed)
    poison(sink)
    pages, into = (Dealer(one, rng).deal(len(prompt) + sampling.max_tokens) for one in (source, sink))
    source.open("s", prompt, pages, sampling, len(prompt))
    got = source.step([Row("s", 0, len(prompt))])
    while len(got) < min(after, len(truth[name]) - 1):
        got += source.step([Row("s", got[-1].position, got[-1].position + 1)])
    move("s", source, pages, sink, into)
    source.close("s")
    sink.open("s", [*prompt, *(sample.token for sample in got)], into, sampling, len(prompt))
    while len(got) < len(truth[name]):
        got += sink.step([Row("s", got[-1].position, got[-1].position + 1)])
    sink.close("s")
    assert strip(got) == truth[name]


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(list(CASES)), after=st.lists(st.integers(1, 20), min_size=1, max_size=2), cut=st.data())
def test_going_on_after_losses_changes_nothing(exact, name, after, cut):
    """Prompt and output so far are computed anew, as one longer prompt, here or elsewhere; twice, too."""
    engines, truth = exact
    prompt, sampling = CASES[name]
    got = truth[name]
    for count in sorted({min(each, len(truth[name]) - 1) for each in after} - {0}):
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


def test_each_continuation_stands_for_itself(exact):
    (one, *_), _ = exact
    prompt, sampling = CASES["words-hot"]
    one.open("s", prompt, Dealer(one).deal(len(prompt)), replace(sampling, n=5), len(prompt))
    samples = one.step([Row("s", 0, len(prompt))])
    one.close("s")
    firsts = []
    for branch, sample in enumerate(samples):
        own = alone(one, prompt, sampling.branch(branch))
        assert (sample.branch, sample.token, sample.finish) == (branch, own[0].token, own[0].finish)
        assert re.fullmatch(WORDS.text, small().decode(tokens_of(own)))
        firsts.append(sample.token)
    assert len({*firsts}) > 1


def test_where_nothing_may_follow_the_text_ends_and_others_go_on(exact, folder, tmp_path):
    """A vocabulary without all letters: after "a" must come one that it lacks."""
    vocabulary = {"<end>": 0, "a": 1, "b": 2}
    poor = Tokenizer(models.BPE(vocabulary, []))
    poor.decoder = decoders.ByteLevel()
    poor.add_special_tokens([AddedToken("<end>", special=True)])
    save(poor, tmp_path)
    one = TorchEngine(folder, kv_memory=2**20, page_tokens=16, grammars=Grammars(tmp_path, PADDED, [END]), threads=1)
    beside = Sampling(6, ignore_eos=True)
    want = alone(one, PROMPT, beside)
    for constraint, said in ((Constraint(Language.REGEX, "ac"), [1]), (Constraint(Language.REGEX, "(a"), [])):
        sampling = Sampling(9, stop_token_ids=(END,), constraint=constraint, logprobs=2)
        dealer = Dealer(one)
        one.open("dead", PROMPT, dealer.deal(60), sampling, len(PROMPT))
        one.open("live", PROMPT, dealer.deal(60), beside, len(PROMPT))
        got, live = [], []
        work = {"dead": (0, len(PROMPT)), "live": (0, len(PROMPT))}
        while work:
            for sample in one.step([Row(name, *span) for name, span in work.items()]):
                (got if sample.sequence == "dead" else live).append(sample)
                work[sample.sequence] = (sample.position, sample.position + 1)
                if sample.finish is not None:
                    del work[sample.sequence]
        one.close("dead")
        one.close("live")
        assert tokens_of(got) == said
        assert (got[-1].token, got[-1].finish, got[-1].logprobs) == (NO_TOKEN, "stop", None)
        assert strip(live) == strip(want)


def test_an_engine_that_cannot_says_so_and_changes_nothing(exact, folder):
    (one, *_), _ = exact
    assert re.fullmatch(r"llguidance 1\.\d+\.\d+", one.grammar)
    sampling = Sampling(5, stop_token_ids=(END,), constraint=WORDS)
    for other in (TorchEngine(folder, kv_memory=2**20, threads=1), PacedEngine(folder, kv_memory=2**20)):
        assert other.grammar == ""
        with pytest.raises(LocalError, match=r"sequence 's': got a regex, and there are no (grammars|logits)"):
            other.open("s", PROMPT, [0, 1, 2], sampling, len(PROMPT))
        other.open("s", PROMPT, [0, 1, 2], replace(sampling, constraint=None), len(PROMPT))


def test_another_process_with_other_hash_seeds_allows_the_same(folder, grammars):
    """All masks along a text, and those of replaying it."""

    def digest(of: Grammars) -> str:
        found = hashlib.sha256()
        for constraint in CONSTRAINTS.values():
            walk, rng, output = of.walk(constraint, [], [END]), random.Random(4), list[int]()
            while (some := np.flatnonzero(walk.allowed()).tolist()) != [END] and len(output) < 30:
                found.update(walk.allowed().tobytes())
                output.append(rng.choice([token for token in some if token != END]))
                walk.add(output[-1])
                assert (of.walk(constraint, output, [END]).allowed() == walk.allowed()).all()
        return found.hexdigest()

    script = f"""
import hashlib, random, numpy as np
from core.constraint import Constraint, Language
from engine.grammar import Grammars
of, END, found = Grammars({str(folder)!r}, {PADDED}, [{END}]), {END}, hashlib.sha256()
for language, text in {[(each.language.value, each.text) for each in CONSTRAINTS.values()]!r}:
    walk, rng, output = of.walk(Constraint(Language(language), text), [], [END]), random.Random(4), []
    while (some := np.flatnonzero(walk.allowed()).tolist()) != [END] and len(output) < 30:
        found.update(walk.allowed().tobytes())
        output.append(rng.choice([token for token in some if token != END]))
        walk.add(output[-1])
print(found.hexdigest())
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=HERE, env={**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": str(HERE)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == digest(grammars)
