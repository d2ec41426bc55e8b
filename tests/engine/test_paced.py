"""The paced engine says what its definition says, from the bytes of its pages; other bytes give other tokens."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import ModelError, SetupError
from core.sampling import Sampling
from engine.api import Row
from engine.paced import PacedEngine, Pacer
from kernels.native import NativeMissing
from tests.checkpoints import make_llama
from tests.engine.chain import Chain, rows
from tests.engine.play import alone, move, poison, with_stops
from tests.engine.test_exact import any_schedule, at_once, recomputed, strip

VOCAB, CONTEXT = 128, 4096
ENDS = (0, 1)
"""The begin and the end token of the test's checkpoints: no text."""
CHAIN = Chain(VOCAB, range(2, VOCAB), CONTEXT)
PROMPTS = [random.Random(length).choices(range(2, 128), k=length) for length in (1, 7, 16, 33, 90, 300, 515)]
SAMPLINGS = {
    "greedy": Sampling(20),
    "seeded": Sampling(20, temperature=0.8, seed=11),
    "far seed": Sampling(20, temperature=1.1, top_k=20, top_p=0.9, seed=2**63 - 1),
    "stops": Sampling(60, stop_token_ids=tuple(range(2, 30))),
    "no stop yet": Sampling(60, stop_token_ids=tuple(range(2, 100)), min_tokens=12),
    "nothing but stops": Sampling(30, stop_token_ids=tuple(range(VOCAB)), min_tokens=3),
    "logprobs": Sampling(5, temperature=0.5, seed=3, logprobs=4, prompt_logprobs=2),
}
PAIRS = [(prompt, sampling) for prompt in PROMPTS for sampling in (Sampling(6), Sampling(9, temperature=1.0, seed=5))]
TRUTH = [CHAIN.samples(*pair) for pair in PAIRS]


@pytest.fixture(scope="module", params=[True, False], ids=["native", "numpy"])
def make(request, engine) -> Callable[..., PacedEngine]:
    """A new paced engine whose arena is full of ones; with native reading, and without."""

    def made(**options) -> PacedEngine:
        one = engine("gqa", "paced", native=request.param, **options)
        poison(one)
        return one

    return made


@pytest.fixture
def one(make) -> PacedEngine:
    return make()


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=[*SAMPLINGS])
@pytest.mark.parametrize("shape", [{}, {"page_tokens": 64, "dtype": "bfloat16"}], ids=["16xfp32", "64xbf16"])
def test_every_sample_is_what_the_definition_says(make, shape, sampling):
    one = make(**shape)
    for prompt in PROMPTS[:5]:
        want = CHAIN.samples(prompt, sampling)
        for sizes in ((10**9,), (5, 1, 40)):
            got = alone(one, prompt, sampling, sizes)
            assert [about(each) for each in got] == [about(each) for each in want]


def about(sample):
    """All of a sample, its numbers rounded."""

    def rounded(told):
        return told and (told.token, round(told.logprob, 9), told.top_ids, [round(x, 9) for x in told.top_logprobs])

    told = [rounded(each) for each in sample.prompt_logprobs]
    return replace(sample, logprobs=None, prompt_logprobs=()), rounded(sample.logprobs), told


def test_continuations_are_those_of_their_seeds(one):
    sampling = Sampling(4, temperature=1.0, seed=9, n=5, logprobs=1, prompt_logprobs=0)
    one.open("alone", PROMPTS[3], [0, 1, 2], sampling, 33)
    got = one.step([Row("alone", 0, 33)])
    want = [CHAIN.samples(PROMPTS[3], sampling, branch=branch)[0] for branch in range(5)]
    assert [about(each) for each in got] == [about(each) for each in want]


def test_the_context_ends_a_text(tmp_path):
    one = PacedEngine(make_llama(tmp_path, context=50), kv_memory=2**20, page_tokens=16, hash_logits=True)
    chain = Chain(VOCAB, range(2, VOCAB), 50)
    assert alone(one, PROMPTS[3], Sampling(400)) == chain.samples(PROMPTS[3], Sampling(400))


def test_stop_tokens_are_drawn_at_their_rate(tmp_path):
    folder = make_llama(tmp_path)
    sampling = Sampling(400, stop_token_ids=(1, 0), min_tokens=2)
    lengths = []
    for rate in (0.05, 1.0):
        one = PacedEngine(folder, kv_memory=2**20, page_tokens=16, hash_logits=True, stop_rate=rate)
        chain = Chain(VOCAB, range(2, VOCAB), CONTEXT, rate)
        for prompt in PROMPTS:
            got = alone(one, prompt, sampling)
            assert got == chain.samples(prompt, sampling)
            assert got[-1].finish == "stop"
            lengths.append(len(got))
    assert lengths[7:] == [3] * 7
    assert 20 < sum(lengths[:7]) < 400


@pytest.mark.parametrize(("dtype", "words"), [("float32", 8), ("bfloat16", 4)])
def test_the_bytes_of_a_page_are_what_the_definition_says(make, dtype, words):
    one = make(dtype=dtype)
    one.open("s", PROMPTS[3], [7, 2, 5], Sampling(10), 33)
    for start, stop in ((0, 20), (20, 21), (21, 33)):
        one.step([Row("s", start, stop)])
    lanes = np.frombuffer(one.arena, np.uint8).reshape(one.pages, 8, 16, words * 8)
    for position, want in enumerate(rows(PROMPTS[3], 2, 2, words)):
        page, slot = (7, 2, 5)[position // 16], position % 16
        assert [lanes[page, lane, slot].tobytes() for lane in range(8)] == want
    behind = lanes[5, :, 1:]
    assert (behind == 0xFF).all(), "nothing is written behind the newest token"
    assert (np.delete(lanes, (7, 2, 5), 0) == 0xFF).all()


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_schedule_gives_the_same(engine, data):
    size, native = data.draw(st.sampled_from([(16, True), (64, True), (8, False)]))
    step = data.draw(st.sampled_from([at_once, with_stops]))
    any_schedule(data, engine("gqa", "paced", page_tokens=size, native=native), PAIRS, TRUTH, step)
    number = data.draw(st.integers(0, len(PAIRS) - 1))
    one = engine("gqa", "paced", page_tokens=size, native=native)
    recomputed(one, PAIRS[number], TRUTH[number], data.draw(st.sampled_from([(10**9,), (5,), (100, 1)])))


@pytest.mark.parametrize("number", range(len(PAIRS)))
def test_a_move_changes_nothing(make, number):
    """Also between pages of different sizes: a position's bytes are the same in each."""
    (prompt, sampling), want = PAIRS[number], TRUTH[number]
    source, sink, other = make(), make(), make(page_tokens=64)
    count = source.kv.pages_for(len(prompt) + 3)
    source.open("s", prompt, range(count, 2 * count), sampling, len(prompt))
    got = source.step([Row("s", 0, len(prompt))])
    while len(got) < 3:
        got += source.step([Row("s", got[-1].position, got[-1].position + 1)])
    move("s", source, range(count, 2 * count), sink, range(3, 3 + count))
    small = arrays(source)[count : 2 * count]
    for place in range(count):
        arrays(other)[place // 4, :, place % 4 * 16 : place % 4 * 16 + 16] = small[place]
    for one, pages in ((sink, [*range(3, 3 + count), 0]), (other, [*range(count // 4 + 2)])):
        one.open("s", prompt + [each.token for each in got], pages, sampling, len(prompt))
        rest = list(got)
        while rest[-1].finish is None:
            rest += one.step([Row("s", rest[-1].position, rest[-1].position + 1)])
        assert strip(rest) == strip(want)


def arrays(one):
    """The arena as words ``[page, lane, slot, word]``."""
    kv = one.kv
    return np.frombuffer(one.arena, np.uint64).reshape(one.pages, -1, kv.page_tokens, kv.row_nbytes // 8)


# Whatever is done to the three pages 10, 11, 12 of 45 tokens. 20, 21, 22 are another sequence's, 30 to 32 are the same
# sequence's as they were before the last two tokens; the others are full of ones.
CORRUPTIONS: dict[str, Callable[[np.ndarray], object]] = {
    "swapped pages": lambda a: swap(a, (10,), (11,)),
    "another sequence's page": lambda a: put(a, (11,), a[21]),
    "another sequence's last page": lambda a: put(a, (12,), a[22]),
    "a page twice": lambda a: put(a, (11,), a[10]),
    "an unwritten page of ones": lambda a: put(a, (10,), a[50]),
    "a page of zeros": lambda a: put(a, (11,), np.uint64(0)),
    "a stale last page": lambda a: put(a, (12,), a[32]),
    "half a page missing": lambda a: put(a, (11, slice(4, 8)), np.uint64(2**64 - 1)),
    "one row missing": lambda a: put(a, (10, 7, 15), np.uint64(0)),
    "the newest row missing": lambda a: put(a, (12, slice(None), 12), a[50, :, 0]),
    "K for V": lambda a: swap(a, (10, 0), (10, 2)),
    "heads swapped": lambda a: swap(a, (11, 4), (11, 5)),
    "layers swapped": lambda a: swap(a, (11, slice(0, 4)), (11, slice(4, 8))),
    "tokens swapped": lambda a: swap(a, (10, slice(None), 3), (10, slice(None), 4)),
    "words swapped": lambda a: swap(a, (10, 3, 3, 0), (10, 3, 3, 1)),
    "one position later": lambda a: put(a, (10, slice(None), slice(1, 16)), a[10, :, :15].copy()),
    "a bit of the first word": lambda a: flip(a, (10, 0, 0, 0), 0),
    "a high bit": lambda a: flip(a, (10, 0, 0, 0), 63),
    "a bit of the newest row": lambda a: flip(a, (12, 7, 12, 7), 63),
    "a bit of the last word": lambda a: flip(a, (11, 7, 15, 7), 40),
}


def put(arena, place, value):
    arena[place] = value


def swap(arena, here, there):
    arena[here], arena[there] = arena[there].copy(), arena[here].copy()


def flip(arena, place, bit):
    arena[place] ^= np.uint64(1 << bit)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_what_is_wrong_with_a_page_shows_at_the_next_token_and_ever_after(one, name):
    prompt, other = (random.Random(seed).choices(range(2, 128), k=43) for seed in (1, 2))
    want = CHAIN.samples(prompt, Sampling(12))
    one.open("other", other, [20, 21, 22], Sampling(5), 43)
    one.open("s", prompt, [10, 11, 12, 13], Sampling(12), 43)
    got = one.step([Row("other", 0, 43), Row("s", 0, 43)])[1:]
    for at in range(3):
        one.copy(10 + at, 30 + at)
    for position in (43, 44):
        got += one.step([Row("s", position, position + 1)])
    assert strip(got) == strip(want[:3])
    CORRUPTIONS[name](arrays(one))
    while got[-1].finish is None:
        got += one.step([Row("s", got[-1].position, got[-1].position + 1)])
    assert got[3].token != want[3].token
    assert not {each.logits_hash for each in got[3:]} & {each.logits_hash for each in want}


@settings(max_examples=60, deadline=None)
@given(place=st.integers(0, 45 * 64 - 1), bit=st.integers(0, 63))
def test_no_bit_is_left_out(engine, place, bit):
    one = engine("gqa", "paced", kv_memory=2**16)
    prompt = PROMPTS[4][:45]
    one.open("s", prompt, [3, 1, 0, 2], Sampling(12), 45)
    (first,) = one.step([Row("s", 0, 45)])
    one.open("t", [*prompt, first.token], [3, 1, 0, 2], Sampling(12), 45)
    token, lane, word = place // 64, place // 8 % 8, place % 8
    flip(arrays(one), ((3, 1, 0)[token // 16], lane, token % 16, word), bit)
    (got,) = one.step([Row("t", 45, 46)])
    assert got.logits_hash != CHAIN.samples(prompt, Sampling(12))[1].logits_hash


def test_what_lies_behind_the_newest_token_is_of_no_account(one):
    want = alone(one, PROMPTS[3], Sampling(20))
    one.open("s", PROMPTS[3], [0, 1, 2, 3], Sampling(20), 33)
    got = one.step([Row("s", 0, 33)])
    while got[-1].finish is None:
        position = got[-1].position
        arrays(one)[position // 16, :, position % 16 :] = random.Random(position).getrandbits(64)
        got += one.step([Row("s", position, position + 1)])
    assert strip(got) == strip(want)


def test_what_was_wrong_while_a_chunk_was_computed_stays_wrong(one):
    """The page is as it should be again, but what was computed from it is not."""
    for bit in (0, 63):
        one.open("s", PROMPTS[4], range(10), Sampling(3), 90)
        one.step([Row("s", 0, 40)])
        flip(arrays(one), (1, 3, 3, 3), bit)
        one.step([Row("s", 40, 80)])
        flip(arrays(one), (1, 3, 3, 3), bit)
        (got,) = one.step([Row("s", 80, 90)])
        one.close("s")
        want = CHAIN.samples(PROMPTS[4], Sampling(3))[0]
        assert got.logits_hash != want.logits_hash
        assert got.token != want.token


def test_a_page_that_two_sequences_hold_shows(one):
    first, second = PROMPTS[3], PROMPTS[4][:33]
    one.open("a", first, [0, 1, 2], Sampling(5), 33)
    one.open("b", second, [3, 1, 5], Sampling(5), 33)
    got = one.step([Row("a", 0, 33), Row("b", 0, 33)])
    want = [CHAIN.samples(prompt, Sampling(5))[0].token for prompt in (first, second)]
    assert [each.token != token for each, token in zip(got, want, strict=True)] == [True, False]


def test_a_page_that_is_twice_in_a_table_shows_at_once(one):
    one.open("a", PROMPTS[3], [4, 4, 2], Sampling(5), 33)
    (got,) = one.step([Row("a", 0, 33)])
    assert got.token != CHAIN.samples(PROMPTS[3], Sampling(5))[0].token


def test_rows_of_many_words_are_written_in_blocks(make, monkeypatch):
    monkeypatch.setattr("engine.paced._BLOCK_WORDS", 64 * 10)
    prompt = PROMPTS[4]
    assert strip(alone(make(), prompt, Sampling(4), (37,))) == strip(CHAIN.samples(prompt, Sampling(4)))


class Device:
    """Time that passes by sleeping, which is always a little too long, and by what the test says."""

    def __init__(self, late_s: float) -> None:
        self.now, self.late_s = 100.0, late_s

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds + self.late_s


class Cost:
    """Remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[object, ...]] = []

    def step_s(self, rows, batch, context) -> float:
        self.asked.append((list(rows), batch, context))
        return 0.25


@pytest.mark.parametrize(("pace", "steps_s"), [(1.0, 0.25), (2.0, 0.5), (0.01, 0.0025)])
def test_a_step_takes_what_it_costs(engine, pace, steps_s):
    device, cost = Device(0.001), Cost()
    one = engine("gqa", "paced", cost=cost, pace=pace, pacer=Pacer(device.clock, device.sleep))
    got = alone(one, PROMPTS[4], Sampling(11), (60,))
    assert len(got) == 11
    assert device.now == pytest.approx(100 + 12 * steps_s + 0.001), "late wake-ups do not add up"
    assert cost.asked == [([(60, 0)], 0, 0), ([(30, 60)], 0, 0), *(([], 1, end) for end in range(91, 101))]


def test_prompts_and_rows_of_one_step_are_told_apart(engine):
    cost, device = Cost(), Device(0.0)
    one = engine("gqa", "paced", cost=cost, pacer=Pacer(device.clock, device.sleep))
    one.open("a", PROMPTS[3], [0, 1, 2], Sampling(5), 33)
    one.step([Row("a", 0, 33)])
    one.open("b", PROMPTS[4], range(3, 10), Sampling(5), 90)
    one.open("one", [5], [10], Sampling(5), 1)
    one.open("handed", [*PROMPTS[1], 9], [11], Sampling(5), 7)
    one.step([Row("a", 33, 34), Row("b", 0, 64), Row("one", 0, 1), Row("handed", 7, 8)])
    assert cost.asked[1] == ([(64, 0), (1, 0)], 2, 34 + 8)


def test_what_a_thread_wakes_too_late_is_made_up_for_at_once():
    device = Device(0.04)
    pacer = Pacer(device.clock, device.sleep)
    pacer.wait(device.now, 1.0)
    device.late_s = 0.0
    ends = []
    for _ in range(4):
        pacer.wait(device.now, 0.03)
        ends.append(round(device.now - 100, 6))
    assert ends == [1.04, 1.06, 1.09, 1.12]


@pytest.mark.parametrize(("late_s", "idle_s", "took_s"), [(0.04, 0.02, 1.0), (0.04, 0.005, 0.96), (7.0, 0.0, 0.95)])
def test_what_is_made_up_for_is_bounded_and_forgotten_by_a_pause(late_s, idle_s, took_s):
    device = Device(late_s)
    pacer = Pacer(device.clock, device.sleep)
    pacer.wait(device.now, 1.0)
    device.late_s = 0.0
    device.now += idle_s
    called = device.now
    pacer.wait(called, 1.0)
    assert device.now - called == pytest.approx(took_s)


def test_without_a_pace_nobody_sleeps(engine):
    def sleep(seconds):
        pytest.fail(f"slept {seconds}")

    cost = Cost()
    one = engine("gqa", "paced", cost=cost, pace=0, pacer=Pacer(sleep=sleep))
    assert len(alone(one, PROMPTS[1], Sampling(5))) == 5
    assert cost.asked == []


def test_without_a_compiler_numpy_reads(engine, monkeypatch):
    def missing():
        raise NativeMissing("no C++ compiler")

    monkeypatch.setattr("kernels.native.library", missing)
    assert alone(engine("gqa", "paced"), *PAIRS[8]) == TRUTH[8]


def test_only_tokens_that_stand_for_text_are_drawn(tmp_path):
    from tokenizers import Tokenizer

    folder = make_llama(tmp_path, vocab=320, tokenizer=True, eos=[1, 310])
    one = PacedEngine(folder, kv_memory=2**20, page_tokens=16)
    chain = Chain.of(folder, 320, CONTEXT, (0, 1, 310))
    assert list(one.ordinary) == chain.ordinary
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert all(tokenizer.id_to_token(token) is not None for token in one.ordinary)
    assert not {0, 1, 310} & {*one.ordinary}
    assert len(one.ordinary) >= 256
    assert [each.token for each in alone(one, PROMPTS[4], Sampling(50))] == chain.tokens(PROMPTS[4], Sampling(50))


def test_what_cannot_be_served(tmp_path):
    folder = make_llama(tmp_path / "narrow", head_dim=2, dtype="bfloat16")
    with pytest.raises(ModelError, match="head_dim: got 2 of bfloat16, want rows of whole words of 8 bytes"):
        PacedEngine(folder, kv_memory=2**20)
    with pytest.raises(SetupError, match="kv_memory: got 100 bytes, want at least one page"):
        PacedEngine(make_llama(tmp_path / "small"), kv_memory=100)
    with pytest.raises(ModelError, match="no such file"):
        PacedEngine(tmp_path / "none", kv_memory=2**20)
    for text, why in (
        ("[]", "cannot be read as a tokenizer"),
        ('{"model": {"vocab": {"a": 1}}}', "no token that stands"),
    ):
        (folder / "tokenizer.json").write_text(text)
        with pytest.raises(ModelError, match=why):
            PacedEngine(folder, kv_memory=2**20, dtype="float32")


def test_it_runs_without_torch(tmp_path):
    folder = make_llama(tmp_path)
    script = (
        "import sys\n"
        "from core.config import WorkerConfig\n"
        "from core.worker import Role\n"
        "from control.engines import load\n"
        "load(WorkerConfig('p', Role.PREFILL, '', sys.argv[1], 'tiny', kv_memory=2**20, engine='paced'))\n"
        "print('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
