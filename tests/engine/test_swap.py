"""Pages that go to host memory and come back: bit for bit, into any others, and what every engine refuses."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.errors import LocalError, SetupError
from core.sampling import Sampling
from engine.api import Row
from engine.host import HostPool, runs
from tests.checkpoints import MODELS
from tests.engine.conftest import ENGINES
from tests.engine.play import Dealer, alone, chunks, poison
from tests.engine.test_exact import KINDS as MODES
from tests.engine.test_exact import SAMPLINGS, strip

PROMPTS = [random.Random(length).choices(range(2, 128), k=length) for length in (1, 16, 33, 90)]
PAIRS = [(prompt, SAMPLINGS[number % 3]) for number, prompt in enumerate(PROMPTS)]
ROOM = 12
"""Pages of host memory."""
KINDS = [
    *(("gqa", {"exact": True, "dtype": dtype, "native": native}) for dtype, native in MODES),
    *((name, {"exact": True}) for name in MODELS),
    ("gqa", {"kind": "paced"}),
]


def with_room(engine, name="gqa", pages=ROOM, **options):
    """An engine with host memory for so many pages and a half."""
    size = engine(name, **options).kv.page_nbytes
    return engine(name, host_memory=pages * size + size // 2, **options)


def rows_of(one, pages):
    return np.frombuffer(one.arena, np.uint8).reshape(one.pages, -1)[list(pages)]


@pytest.fixture(params=[*ENGINES])
def one(engine, request):
    made = with_room(engine, kind=request.param)
    poison(made)
    return made


@pytest.fixture
def opened(one):
    """33 tokens in pages 2, 0, 1."""
    one.open("s", PROMPTS[2], [2, 0, 1], Sampling(5), 33)
    one.step([Row("s", 0, 33)])
    return one


def test_bytes_come_back_as_they_were_into_other_pages(opened):
    assert (opened.host_pages, opened.host_pages_used) == (ROOM, 0)
    before = rows_of(opened, [2, 0, 1])
    tokens = opened.tokens("s")
    opened.swap_out("s", [2, 0, 1])
    assert opened.host_pages_used == 3
    with pytest.raises(LocalError, match="is not open"):
        opened.step([Row("s", 33, 34)])
    poison(opened)
    opened.swap_in("s", [7, 9, 8])
    assert opened.host_pages_used == 0
    assert (rows_of(opened, [7, 9, 8]) == before).all()
    assert (np.delete(rows_of(opened, range(opened.pages)), [7, 8, 9], 0) == 0xFF).all()
    opened.open("s", tokens, [7, 9, 8], Sampling(5), 33)
    want = alone(opened, PROMPTS[2], Sampling(5))
    assert strip(opened.step([Row("s", 33, 34)])) == strip(want[1:2])


@pytest.mark.parametrize(("name", "options"), KINDS, ids=str)
@settings(max_examples=2, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_sequences_that_are_swapped_at_any_time_say_the_same(engine, name, options, seed):
    one, rng = with_room(engine, name, **options), random.Random(seed)
    truth = [strip(alone(one, *pair)) for pair in PAIRS]
    poison(one)
    dealer = Dealer(one, rng)
    got: dict[str, list] = {str(number): [] for number in range(len(PAIRS))}
    work, tables, away = {}, {}, {}
    for number, (prompt, sampling) in enumerate(PAIRS):
        sequence = str(number)
        tables[sequence] = dealer.deal(len(prompt) + sampling.max_tokens)
        one.open(sequence, prompt, tables[sequence], sampling, len(prompt))
        work[sequence] = chunks(0, len(prompt), [rng.choice([3, 20, 64]) for _ in range(99)])
    while work:
        for sequence in list(work):
            if sequence in away:
                if rng.random() < 0.5:
                    tokens, (prompt, sampling) = away.pop(sequence), PAIRS[int(sequence)]
                    tables[sequence] = dealer.deal(len(prompt) + sampling.max_tokens)
                    one.swap_in(sequence, tables[sequence])
                    one.open(sequence, tokens, tables[sequence], sampling, len(prompt))
            elif rng.random() < 0.3 and one.host_pages_used + len(tables[sequence]) <= ROOM:
                away[sequence] = one.tokens(sequence)
                one.swap_out(sequence, tables[sequence])
                rows = np.frombuffer(one.arena, np.uint8).reshape(one.pages, -1)
                rows[tables[sequence]] = 0xFF
                dealer.back(tables[sequence])
                rng.shuffle(dealer.free)
        here = [sequence for sequence in work if sequence not in away]
        for sample in one.step([Row(sequence, *work[sequence].pop(0)) for sequence in here]):
            got[sample.sequence].append(sample)
            if sample.finish is None:
                work[sample.sequence].append((sample.position, sample.position + 1))
        for sequence in [sequence for sequence, left in work.items() if not left]:
            del work[sequence]
            one.close(sequence)
    assert [strip(got[str(number)]) for number in range(len(PAIRS))] == truth
    assert one.host_pages_used == 0


REFUSED = [
    (lambda one: one.swap_out("t", range(ROOM - 2)), f"got {ROOM - 2} pages for host memory, {ROOM - 3} are free"),
    (lambda one: one.swap_out("s", [5]), "'s' is in host memory already"),
    (lambda one: one.swap_out("t", [10**6]), "got a page outside"),
    (lambda one: one.swap_out("t", [-1]), "got a page outside"),
    (lambda one: one.swap_in("t", [5]), "'t' is not in host memory"),
    (lambda one: one.swap_in("s", [5, 6]), "got 2 pages for the 3 in host memory"),
    (lambda one: one.swap_in("s", [5, 6, 10**6]), "got a page outside"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_cannot_be_swapped_is_refused_and_changes_nothing(opened, call, message):
    opened.open("t", PROMPTS[0], [4], Sampling(5), 1)
    kept = rows_of(opened, [2, 0, 1])
    opened.swap_out("s", [2, 0, 1])
    before = bytes(opened.arena)
    with pytest.raises(LocalError, match=message):
        call(opened)
    assert bytes(opened.arena) == before
    assert opened.host_pages_used == 3
    assert opened.tokens("t") == (*PROMPTS[0],), "it is open"
    opened.swap_in("s", [7, 9, 8])
    assert (rows_of(opened, [7, 9, 8]) == kept).all()


def test_what_is_closed_is_not_kept(opened):
    opened.swap_out("s", [2, 0, 1])
    opened.close("s")
    assert opened.host_pages_used == 0
    with pytest.raises(LocalError, match="is not in host memory"):
        opened.swap_in("s", [2, 0, 1])
    opened.swap_out("never opened", range(ROOM))
    assert opened.host_pages_used == ROOM


@pytest.mark.parametrize("kind", ENGINES)
def test_without_host_memory_nothing_is_swapped(engine, kind):
    one = engine("gqa", kind)
    assert (one.host_pages, one.host_pages_used) == (0, 0)
    with pytest.raises(LocalError, match="got 1 pages for host memory, 0 are free"):
        one.swap_out("s", [1])
    with pytest.raises(SetupError, match="host_memory: got 100 bytes, want at least one page of"):
        engine("gqa", kind, host_memory=100)


def test_pages_of_the_pool_are_used_again_and_never_twice():
    pool, rng, held = HostPool(20), random.Random(1), {}
    for turn in range(500):
        if held and rng.random() < 0.5:
            name = rng.choice([*held])
            assert pool.of(name, len(held[name])) == held[name]
            pool.drop(name)
            del held[name]
        else:
            count = rng.randint(0, 5)
            if count <= pool.pages - pool.used:
                held[str(turn)] = pool.take(str(turn), count)
        out = [page for pages in held.values() for page in pages]
        assert len(out) == len(set(out)) == pool.used
        assert set(out) <= set(range(20))


@pytest.mark.parametrize(
    ("pages", "held", "found"),
    [
        ([], [], []),
        ([5], [0], [((5, 6), (0, 1))]),
        ([5, 6, 7], [1, 2, 3], [((5, 8), (1, 4))]),
        ([5, 6, 8], [1, 2, 3], [((5, 7), (1, 3)), ((8, 9), (3, 4))]),
        ([5, 6, 7], [1, 3, 4], [((5, 6), (1, 2)), ((6, 8), (3, 5))]),
        ([2, 1, 0], [0, 1, 2], [((2, 3), (0, 1)), ((1, 2), (1, 2)), ((0, 1), (2, 3))]),
    ],
)
def test_pages_that_are_neighbours_on_both_sides_are_copied_at_once(pages, held, found):
    assert [((a.start, a.stop), (b.start, b.stop)) for a, b in runs(pages, held)] == found
