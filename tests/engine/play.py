"""Plays sequences through an engine: chunks, batches, moves between engines, with pages dealt in any order."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

import numpy as np

from core.sampling import Sampling
from engine.api import Engine, Row, Sampled


class Dealer:
    """Hands out an arena's pages in a shuffled or ascending order."""

    def __init__(self, engine: Engine, shuffle: random.Random | None = None) -> None:
        self.engine = engine
        self.free = list(range(engine.pages))
        if shuffle is not None:
            shuffle.shuffle(self.free)
        else:
            self.free.reverse()

    def deal(self, tokens: int) -> list[int]:
        """Pages for so many tokens."""
        return [self.free.pop() for _ in range(self.engine.kv.pages_for(tokens))]

    def back(self, pages: Iterable[int]) -> None:
        """Take pages back."""
        self.free.extend(pages)


def poison(engine: Engine) -> None:
    """Fill the arena with NaN (all bits set is NaN in fp32 and in bf16)."""
    np.frombuffer(engine.arena, dtype=np.uint8)[:] = 0xFF


def chunks(start: int, stop: int, sizes: Iterable[int]) -> list[tuple[int, int]]:
    """[start, stop) cut into pieces of `sizes`, the last size repeating."""
    out, size = [], 0
    source = iter(sizes)
    while start < stop:
        size = next(source, size)
        out.append((start, min(start + size, stop)))
        start = out[-1][1]
    return out


def alone(
    engine: Engine, prompt: Sequence[int], sampling: Sampling, sizes: Sequence[int] = (10**9,), name: str = "alone"
) -> list[Sampled]:
    """Everything that one sequence gives when it runs by itself, pages ascending."""
    pages = list(range(engine.kv.pages_for(len(prompt) + sampling.max_tokens)))
    engine.open(name, prompt, pages, sampling, len(prompt))
    out: list[Sampled] = []
    for start, stop in chunks(0, len(prompt), sizes):
        out += engine.step([Row(name, start, stop)])
    while out[-1].finish is None:
        out += engine.step([Row(name, out[-1].position, out[-1].position + 1)])
    engine.close(name)
    return out


def side_by_side(engine: Engine, asked: Sequence[tuple[Sequence[int], Sampling]]) -> list[list[Sampled]]:
    """Everything that each gives when they decode side by side, after one prompt each."""
    out: list[list[Sampled]] = []
    first = 0
    for number, (prompt, sampling) in enumerate(asked):
        pages = engine.kv.pages_for(len(prompt) + sampling.max_tokens)
        engine.open(str(number), prompt, range(first, first + pages), sampling, len(prompt))
        first += pages
        out.append(engine.step([Row(str(number), 0, len(prompt))]))
    while going := [number for number, samples in enumerate(out) if samples[-1].finish is None]:
        places = [(number, out[number][-1].position) for number in going]
        found = engine.step([Row(str(number), place, place + 1) for number, place in places])
        for number, sample in zip(going, found, strict=True):
            out[number].append(sample)
    for number in range(len(out)):
        engine.close(str(number))
    return out


def with_stops(engine: Engine, rows: Sequence[Row], rng: random.Random, often: float | None = None) -> list[Sampled]:
    """A step of some of `rows` that stops now and then, and steps of the others while it does."""
    count = rng.randint(1, len(rows)) if rows else 0
    step, others = engine.begin(rows[:count]), list(rows[count:])
    often = often or rng.choice([0.05, 0.3, 1.0])
    out: list[Sampled] = []
    while (found := step.run(lambda: rng.random() < often)) is None:
        now = rng.randint(0, len(others))
        others, next_rows = others[now:], others[:now]
        out += with_stops(engine, next_rows, rng) if rng.random() < 0.3 else engine.step(next_rows)
    return out + found + engine.step(others)


def move(sequence: str, source: Engine, pages: Sequence[int], sink: Engine, into: Sequence[int]) -> None:
    """Copy a sequence's pages into another engine's arena, byte for byte."""
    size = source.kv.page_nbytes
    for page, target in zip(pages, into, strict=False):
        sink.arena[target * size : (target + 1) * size] = source.arena[page * size : (page + 1) * size]
