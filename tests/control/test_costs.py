"""What a worker's steps take: profiled on its engine, kept, read again, and made anew if what is kept is no good."""

from __future__ import annotations

import json
import logging
import threading
import time
from dataclasses import replace

import pytest

from control import costs
from core.config import WorkerConfig
from core.errors import LocalError
from core.worker import Numerics, Role
from engine.paced import PacedEngine, Pacer
from scheduler.cost import CostModel
from scheduler.profile import Room, shapes
from tests.checkpoints import make_llama

NUMERICS = Numerics(False, "bfloat16", 1, "a CPU")
TRUTH = CostModel("truth", ((4e-3, 3e-5, 3e-8, 2e-4),), ((3e-3, 1e-4, 4e-7),))
VOCAB = 64


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_llama(tmp_path_factory.mktemp("model") / "tiny", vocab=VOCAB, context=4096, dtype="bfloat16")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache directory."""
    monkeypatch.setenv("BATON_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "costs"


class Clock:
    """Stands still but for those who sleep, so that a paced engine takes exactly what its cost says."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def engine_of(model, clock=None) -> PacedEngine:
    """Half of the context in memory; `clock`: it waits by that."""
    clock = clock or Clock()
    pacer = Pacer(clock, clock.sleep)
    return PacedEngine(model, kv_memory=2**20, page_tokens=16, cost=TRUTH, pacer=pacer, native=False)


def config_of(model, **settings) -> WorkerConfig:
    return WorkerConfig("w", Role.DECODE, "", str(model), "m", chunk_tokens=256, max_rows=32, **settings)


def test_a_profile_finds_what_the_engine_takes_and_leaves_it_empty(model):
    clock = Clock()
    engine = engine_of(model, clock)
    room = Room(engine.pages, 16, engine.context, 256, 32)
    prior = costs.guess(engine.config, NUMERICS)
    found = costs.profile(engine, VOCAB, room, prior, 30.0, "it", clock)
    for shape in shapes(room):
        assert shape.seconds(found) == pytest.approx(shape.seconds(TRUTH), rel=0.15)
    assert max(shape.seconds(prior) / shape.seconds(TRUTH) for shape in shapes(room)) < 0.5, "the guess was another"
    with pytest.raises(LocalError, match="not open"):
        engine.tokens("profile 0")
    assert clock.now < 30.0


def test_a_step_that_fails_ends_the_profile_and_leaves_the_engine_empty(model, monkeypatch):
    engine = engine_of(model)
    monkeypatch.setattr(engine, "step", lambda rows: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        costs.profile(engine, VOCAB, Room(engine.pages, 16, 4096, 256, 32), TRUTH, 1.0, "it", Clock())
    with pytest.raises(LocalError, match="not open"):
        engine.tokens("profile 0")


def test_a_paced_engines_costs_are_those_that_it_sleeps_by_and_nothing_is_kept(model, cache):
    found = costs.cost(config_of(model, engine="paced", pace=3.0), engine_of(model), NUMERICS, "f", 4096)
    once = costs.cost(config_of(model, engine="paced"), engine_of(model), NUMERICS, "f", 4096)
    assert found.prefill_s([(512, 0)]) == pytest.approx(3 * once.prefill_s([(512, 0)]))
    assert found.decode_s(8, 4000) == pytest.approx(3 * once.decode_s(8, 4000))
    assert costs.cost(config_of(model, engine="paced", pace=0.0), engine_of(model), NUMERICS, "f", 4096) == once
    assert not cache.exists()


def test_without_time_for_a_profile_it_guesses_and_keeps_nothing(model, cache):
    engine = engine_of(model)
    found = costs.cost(config_of(model, profile_s=0.0), engine, NUMERICS, "f", 4096)
    assert found == costs.guess(engine.config, NUMERICS)
    assert not cache.exists()
    wide = costs.guess(engine.config, replace(NUMERICS, threads=8))
    exact = costs.guess(engine.config, replace(NUMERICS, exact=True))
    single = costs.guess(engine.config, replace(NUMERICS, dtype="float32"))
    prompt = [(2048, 0)]
    assert wide.prefill_s(prompt) < found.prefill_s(prompt) < min(exact.prefill_s(prompt), single.prefill_s(prompt))


def profiles(monkeypatch) -> list[str]:
    """The names of the models that are profiled from now on, without an engine that is slow."""
    asked: list[str] = []

    def profile(engine, vocab, room, prior, budget_s, name, clock=None):
        asked.append(name)
        return replace(TRUTH, name=name)

    monkeypatch.setattr(costs, "profile", profile)
    return asked


def test_what_was_profiled_is_read_at_the_next_start(model, cache, monkeypatch, caplog):
    asked = profiles(monkeypatch)
    with caplog.at_level(logging.INFO):
        found = [costs.cost(config_of(model), engine_of(model), NUMERICS, "f", 4096) for _ in range(2)]
    assert len(asked) == 1
    assert found[0] == found[1] == replace(TRUTH, name=asked[0])
    assert "steps: from" in caplog.text


@pytest.mark.parametrize(
    "other",
    [
        {"fingerprint": "g"},
        {"numerics": replace(NUMERICS, exact=True)},
        {"numerics": replace(NUMERICS, threads=2)},
        {"numerics": replace(NUMERICS, dtype="float32")},
        {"chunk_tokens": 512},
    ],
    ids=lambda other: next(iter(other)),
)
def test_another_kind_of_worker_has_a_profile_of_its_own(model, cache, monkeypatch, other):
    asked = profiles(monkeypatch)
    costs.cost(config_of(model), engine_of(model), NUMERICS, "f", 4096)
    config = replace(config_of(model), chunk_tokens=other.get("chunk_tokens", 256))
    numerics, fingerprint = other.get("numerics", NUMERICS), other.get("fingerprint", "f")
    costs.cost(config, engine_of(model), numerics, fingerprint, 4096)
    assert len(asked) == 2
    assert len(list(cache.glob("*.json"))) == 2


def foreign(text: str) -> str:
    document = json.loads(text)
    document["kind"]["fingerprint"] = "another"
    return json.dumps(document)


def negative(text: str) -> str:
    document = json.loads(text)
    document["cost"]["decode"][0][0] = -1.0
    return json.dumps(document)


@pytest.mark.parametrize(
    "spoil",
    [lambda text: "", lambda text: text[:99], lambda text: "[1]", lambda text: '{"kind": 3}', foreign, negative,
     lambda text: text.replace('"prefill"', '"x"')],
    ids=["empty", "cut short", "a list", "no profile", "another kind", "negative", "a field is missing"],
)  # fmt: skip
def test_what_cannot_be_used_is_said_and_made_anew(model, cache, monkeypatch, caplog, spoil):
    asked = profiles(monkeypatch)
    good = costs.cost(config_of(model), engine_of(model), NUMERICS, "f", 4096)
    (path,) = cache.glob("*.json")
    text = path.read_text()
    path.write_text(spoil(text))
    assert costs.cost(config_of(model), engine_of(model), NUMERICS, "f", 4096) == good
    assert len(asked) == 2
    assert "cannot be used, profiling again" in caplog.text
    assert path.read_text() == text
    assert [each.name for each in cache.iterdir() if each.suffix not in (".json", ".lock")] == []


def test_where_nothing_can_be_kept_it_profiles_all_the_same(model, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BATON_CACHE", str(tmp_path / "file"))
    asked = profiles(monkeypatch)
    assert costs.cost(config_of(model), engine_of(model), NUMERICS, "f", 4096).decode == TRUTH.decode
    assert len(asked) == 1
    assert "cannot be kept" in caplog.text


def test_two_workers_take_turns_and_the_second_reads_what_the_first_found(model, cache, monkeypatch):
    engines, asked, inside = [engine_of(model), engine_of(model)], [], []
    begun = threading.Event()

    def profile(engine, vocab, room, prior, budget_s, name, clock=None):
        asked.append(name)
        inside.append(1)
        begun.set()
        time.sleep(0.2)
        assert inside == [1]
        inside.clear()
        return TRUTH

    monkeypatch.setattr(costs, "profile", profile)
    found = []

    def start(engine):
        found.append(costs.cost(config_of(model), engine, NUMERICS, "f", 4096))

    first, second = (threading.Thread(target=start, args=(engine,)) for engine in engines)
    first.start()
    begun.wait()
    second.start()
    first.join()
    second.join()
    assert len(asked) == 1
    assert found == [TRUTH, TRUTH]


def test_one_who_waited_in_vain_profiles_by_itself(model, cache, monkeypatch):
    monkeypatch.setattr(costs, "TURN_S", 0.0)
    asked = profiles(monkeypatch)
    config = config_of(model, profile_s=0.05)
    path = cache / "any.json"
    monkeypatch.setattr(costs, "_digest", lambda kind: "any")
    with costs._turn(path, 1.0):  # a worker that was stopped in the middle of its profile
        assert costs.cost(config, engine_of(model), NUMERICS, "f", 4096).decode == TRUTH.decode
    assert len(asked) == 1


def test_profiles_are_kept_where_the_user_keeps_such_things(monkeypatch):
    monkeypatch.setenv("BATON_CACHE", "/a")
    assert str(costs.directory()) == "/a/costs"
    monkeypatch.delenv("BATON_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert str(costs.directory()) == "/b/baton/costs"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/c")
    assert str(costs.directory()) == "/c/.cache/baton/costs"
