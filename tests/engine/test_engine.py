"""The engines' contract: what they refuse without changing anything, when text ends, what they read and write.

Tests with the fixture `one`, or with `KINDS` or `MODES`, are what the model's engine and the paced one must agree on.
"""

from __future__ import annotations

import ctypes
import time

import numpy as np
import pytest

from core.errors import LocalError
from core.sampling import Sampling
from engine.api import Engine, Row
from engine.engine import TorchEngine
from kernels.native import NativeMissing
from tests.checkpoints import make_llama
from tests.engine.conftest import ENGINES
from tests.engine.play import alone, poison

PROMPT = list(range(2, 42))
KINDS = [*ENGINES]
MODES = [
    *({"native": native, "exact": exact} for native in (True, False) for exact in (True, False)),
    *({"kind": "paced", "native": native} for native in (True, False)),
]


@pytest.fixture(scope="module", params=KINDS)
def one(engine, request):
    return engine("gqa", request.param)


@pytest.fixture
def opened(one):
    one.open("s", PROMPT, [0, 1, 2], Sampling(50), len(PROMPT))
    yield one
    one.close("s")


def test_it_is_an_engine(one):
    protocol: Engine = one
    assert protocol.pages == len(protocol.arena) // protocol.kv.page_nbytes
    assert not protocol.arena.readonly
    address = ctypes.addressof(ctypes.c_char.from_buffer(protocol.arena))
    assert address == (one._arena.pages.data_ptr() if isinstance(one, TorchEngine) else one._arena.ctypes.data)


ROWS = [
    ([Row("unknown", 0, 1)], "is not open"),
    ([Row("s", 0, 41)], r"got rows \[0, 41\), want some of \[0, 40\)"),
    ([Row("s", -1, 3)], "got rows"),
    ([Row("s", 3, 3)], "got rows"),
    ([Row("s", 0, 3), Row("s", 3, 5)], "is twice in one step"),
    ([Row("s", 0, 3), Row("short", 0, 20)], "its 1 pages hold 16 tokens"),
]


@pytest.mark.parametrize(("rows", "message"), ROWS)
def test_bad_rows_change_nothing(opened, rows, message):
    opened.open("short", PROMPT, [5], Sampling(5), len(PROMPT))
    before = bytes(opened.arena)
    with pytest.raises(LocalError, match=message):
        opened.step(rows)
    opened.close("short")
    assert bytes(opened.arena) == before
    assert opened.tokens("s") == tuple(PROMPT)


OPENS = [
    (("s", [1], [0], 1), "is open already"),
    (("t", [], [0], 0), "prompt: got 0"),
    (("t", [1, 2], [0], 3), "prompt: got 3"),
    (("t", [1, 128], [0], 1), r"got a token outside \[0, 128\)"),
    (("t", [-1], [0], 1), "got a token outside"),
    (("t", [1] * 4097, [0], 1), "got 4097 tokens, the context is 4096"),
    (("t", [1], [10**6], 1), "got a page outside"),
    (("t", [1], [-1], 1), "got a page outside"),
]


@pytest.mark.parametrize(("call", "message"), OPENS)
def test_bad_opens(opened, call, message):
    name, tokens, pages, prompt = call
    with pytest.raises(LocalError, match=message):
        opened.open(name, tokens, pages, Sampling(1), prompt)
    opened.close("t")
    opened.close("never there")


def test_only_rows_that_reach_the_newest_token_are_sampled(opened):
    assert opened.step([]) == []
    assert opened.step([Row("s", 0, 39)]) == []
    (sample,) = opened.step([Row("s", 39, 40)])
    assert (sample.sequence, sample.position, sample.finish) == ("s", 40, None)
    assert opened.tokens("s") == (*PROMPT, sample.token)


def test_pages_can_be_appended(one):
    one.open("grow", PROMPT, [0, 1, 2], Sampling(20), len(PROMPT))
    want = [sample.token for sample in alone(one, PROMPT, Sampling(20))]
    got = one.step([Row("grow", 0, 40)])
    while got[-1].finish is None:
        position = got[-1].position
        if position == 48:
            with pytest.raises(LocalError):
                one.step([Row("grow", position, position + 1)])
            one.extend("grow", [7])
        got += one.step([Row("grow", position, position + 1)])
    one.close("grow")
    assert [sample.token for sample in got] == want
    with pytest.raises(LocalError, match="is not open"):
        one.extend("grow", [1])


def test_text_ends_at_a_stop_token_or_at_its_length(one):
    want = alone(one, PROMPT, Sampling(12))
    assert [sample.finish for sample in want] == [None] * 11 + ["length"]
    tokens = [sample.token for sample in want]
    stop = tokens[5]
    got = alone(one, PROMPT, Sampling(12, stop_token_ids=(stop,)))
    assert [sample.token for sample in got] == tokens[: tokens.index(stop) + 1]
    assert got[-1].finish == "stop"
    got = alone(one, PROMPT, Sampling(6, stop_token_ids=(stop,)))
    assert got[-1].finish == "stop"


@pytest.mark.parametrize("kind", KINDS)
def test_text_ends_where_the_context_ends(kind, tmp_path):
    one = ENGINES[kind](make_llama(tmp_path, context=44), kv_memory=2**20, page_tokens=16)
    got = alone(one, PROMPT, Sampling(100))
    assert (got[-1].position, got[-1].finish, len(got)) == (43, "length", 4)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_decoder_needs_only_the_bytes_of_the_pages(engine, mode):
    """The engine that goes on with a sequence has computed none of it, and the pages lie elsewhere."""
    source, sink = engine("gqa", **mode), engine("gqa", **mode)
    poison(sink)
    want = alone(source, PROMPT, Sampling(8))
    sink.open("s", [*PROMPT, want[0].token], [9, 4, 30], Sampling(8), len(PROMPT))
    size = sink.kv.page_nbytes
    for page, into in enumerate((9, 4, 30)):
        sink.arena[into * size : (into + 1) * size] = source.arena[page * size : (page + 1) * size]
    # what lies behind the prompt in the last page may be anything, so it is NaN again
    tail = np.frombuffer(sink.arena, np.uint32).reshape(sink.pages, 2, 2, 2, 16, 16)
    tail[30, :, :, :, 8:] = 0xFFFFFFFF
    got = [want[0]]
    while got[-1].finish is None:
        got += sink.step([Row("s", got[-1].position, got[-1].position + 1)])
    assert [sample.token for sample in got] == [sample.token for sample in want]


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_nan_in_the_arena_reaches_nobody(engine, mode):
    clean, dirty = engine("gqa", **mode), engine("gqa", **mode)
    poison(dirty)
    for sizes in ((10**9,), (1,), (7, 30)):
        want = alone(clean, PROMPT, Sampling(30), sizes)
        assert alone(dirty, PROMPT, Sampling(30), sizes) == want


@pytest.mark.parametrize("native", [True, False])
def test_broken_kv_is_refused_not_sampled(engine, native):
    one = engine("gqa", native=native)
    one.open("bad", PROMPT, [50, 51, 52], Sampling(5), len(PROMPT))
    one._arena.pages[50].fill_(float("nan"))
    with pytest.raises(LocalError, match="'bad': the logits at position 40 are not finite"):
        one.step([Row("bad", 39, 40)])
    assert one.tokens("bad") == tuple(PROMPT)
    one._arena.pages[50].zero_()
    one._arena.pages[50, 0, 0, 0, 3, 5] = float("nan")  # one number of one key
    with pytest.raises(LocalError, match="'bad': the logits at position 40 are not finite"):
        one.step([Row("bad", 39, 40)])


def test_a_seed_gives_one_text_and_another_gives_another(one):
    def text(seed):
        return [sample.token for sample in alone(one, PROMPT, Sampling(20, temperature=1.0, seed=seed))]

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_without_a_compiler_torch_serves(engine, monkeypatch):
    def missing():
        raise NativeMissing("no C++ compiler")

    monkeypatch.setattr("kernels.native_cpu.library", missing)
    assert engine("gqa").backend == "torch: no C++ compiler"
    assert engine("gqa", native=False).backend == "torch"
    assert engine("gqa", exact=True).backend == "exact-torch: no C++ compiler"


@pytest.mark.parametrize("kind", KINDS)
def test_hashes_are_of_logits_only_if_asked(engine, kind):
    hashes = [sample.logits_hash for sample in alone(engine("gqa", kind), PROMPT, Sampling(3))]
    assert len({*hashes, 0}) == 4
    silent = engine("gqa", kind, hash_logits=False)
    assert not any(sample.logits_hash for sample in alone(silent, PROMPT, Sampling(3)))


def test_each_continuation_goes_on_as_a_sequence_of_its_own(one):
    sampling = Sampling(9, temperature=1.0, seed=3, n=3)
    one.open("s", PROMPT, [0, 1, 2], sampling, len(PROMPT))
    firsts = one.step([Row("s", 0, 40)])
    assert one.tokens("s") == tuple(PROMPT)
    one.close("s")
    assert [(first.position, first.branch, first.finish) for first in firsts] == [
        (40, 0, None),
        (40, 1, None),
        (40, 2, None),
    ]
    for branch, first in enumerate(firsts):
        want = alone(one, PROMPT, sampling.branch(branch))
        one.copy(2, 9)
        one.open("b", [*PROMPT, first.token], [0, 1, 9], sampling.branch(branch), len(PROMPT))
        got = [first]
        while got[-1].finish is None:
            got += one.step([Row("b", got[-1].position, got[-1].position + 1)])
        one.close("b")
        assert [(each.token, each.finish) for each in got] == [(each.token, each.finish) for each in want]
    assert len({first.token for first in firsts}) > 1


def test_one_token_ends_at_its_length_in_every_continuation(one):
    one.open("s", PROMPT, [0, 1, 2], Sampling(1, n=2), len(PROMPT))
    assert [each.finish for each in one.step([Row("s", 0, 40)])] == ["length", "length"]
    one.close("s")


def test_no_stop_token_is_chosen_before_its_time(one):
    stops = tuple(range(2, 120))
    got = alone(one, PROMPT, Sampling(30, min_tokens=7, stop_token_ids=stops))
    assert [each.token in stops for each in got[:7]] == [False] * 7
    assert len(got) < 30
    assert got[-1].finish == "stop"


def test_logprobs_come_if_asked_and_those_of_the_prompt_once(one):
    plain = alone(one, PROMPT, Sampling(3))
    assert not any(each.logprobs or each.prompt_logprobs for each in plain)
    got = alone(one, PROMPT, Sampling(3, logprobs=2, prompt_logprobs=1), (7, 20, 1))
    assert [each.token for each in got] == [each.token for each in plain]
    for each in got:
        assert each.logprobs.token == each.token == each.logprobs.top_ids[0]
        assert 0 > each.logprobs.logprob == each.logprobs.top_logprobs[0] >= each.logprobs.top_logprobs[1]
        assert len(each.logprobs.top_ids) == 2
    first, *later = got
    assert not any(each.prompt_logprobs for each in later)
    assert first.prompt_logprobs[0] is None
    assert [told.token for told in first.prompt_logprobs[1:]] == PROMPT[1:]
    assert all(told.logprob < 0 and len(told.top_ids) == 1 for told in first.prompt_logprobs[1:])


def test_output_of_earlier_attempts_is_prompt(one):
    """Another sequence with the tokens so far goes on as the first would have, counts from there, and ends as it."""
    want = alone(one, PROMPT, Sampling(12))
    known = PROMPT + [each.token for each in want[:5]]
    one.open("s", known, [0, 1, 2, 3], Sampling(7), len(known), 5)
    got = one.step([Row("s", 0, len(known))])
    while got[-1].finish is None:
        got += one.step([Row("s", got[-1].position, got[-1].position + 1)])
    one.close("s")
    assert [(each.position, each.token, each.finish) for each in got] == [
        (each.position, each.token, each.finish) for each in want[5:]
    ]
    with pytest.raises(LocalError, match="generated: got 3, want 0 to 2 tokens"):
        one.open("s", [5, 6], [0], Sampling(2), 2, 3)


@pytest.mark.parametrize("native", [True, False])
def test_a_long_prompt_prefills_in_chunks_and_does_not_slow_its_neighbours(tmp_path, native):
    """32,000 tokens on 2 layers; then one long row beside 31 short ones costs about what its keys cost."""
    folder = make_llama(tmp_path, hidden=64, heads=2, kv_heads=1, context=40000)
    one = TorchEngine(folder, kv_memory=64 * 2**20, page_tokens=64, native=native)
    long = [2 + place * 7919 % 120 for place in range(32000)]
    one.open("long", long, range(501), Sampling(50), len(long))
    out = []
    for start in range(0, len(long), 2048):
        out += one.step([Row("long", start, min(start + 2048, len(long)))])
    at = {"long": out[0].position}
    for number in range(31):
        name = f"short{number}"
        one.open(name, PROMPT, [502 + 2 * number, 503 + 2 * number], Sampling(50), len(PROMPT))
        at[name] = one.step([Row(name, 0, 40)])[0].position

    def seconds(names: list[str]) -> float:
        """The best of some steps of these rows."""
        taken = []
        for _ in range(5):
            started = time.perf_counter()
            for sample in one.step([Row(name, at[name], at[name] + 1) for name in names]):
                at[sample.sequence] = sample.position
            taken.append(time.perf_counter() - started)
        return min(taken)

    # Padded to its longest row, the mixed batch would cost 32 times the long row; a ratio within one run is no timing.
    assert seconds(list(at)) < 8 * (seconds(["long"]) + seconds([name for name in at if name != "long"]))
