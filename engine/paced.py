"""The paced engine: real KV bytes and exact tokens of no model, at the speed of a device that is not there. No torch.

It keeps the contract of `engine.api.Engine` and takes as long as a cost model says, asleep. What it writes is a hash
of all tokens so far; what it draws is a function of the bytes that it reads: all its pages, layers and heads, at each
step. So a wrong, stale, swapped, truncated or missing page gives a wrong token, to the bit and with no floating point;
and however a prompt is cut, batched, laid out, moved or computed again, its tokens are the same:

    c(-1) = START                                                         all numbers modulo 2**64
    c(q)  = stir(c(q-1) + mix(q << 32 | token(q)))                        the chain; stir(x) = (x ^ x >> 32) * STIR
    state = mix(c(p-1) + DRAW)                                            what the token at position p is drawn from
    hash  = state, or with a temperature mix(state + noise.key(seed, p))
    token = ordinary[hash % len(ordinary)]

`mix` is splitmix64's finaliser (`kernels.noise`), `ordinary` the vocabulary without special tokens. While a request's
`min_tokens` are not made, the token is the first one from there on, around the end, that is no stop token of it. Then,
if ``mix(hash + 1) < stop_rate * 2**64``, it is ``stops[mix(hash + 2) % len(stops)]`` of its stop tokens in order.

A position's words of 8 bytes, k = (layer, K|V, head, word), have keys and odd weights. All but the last are hashes of
the chain; the last one makes their weighted sum tell the next link, so that reading adds up to the chain:

    key(k)     = mix(layer << 48 | kv << 40 | head << 24 | word)
    weight(k)  = mix(key(k)) | 1
    word(q, k) = mix(c(q) + key(k))
    c(q) - c(q-1) = STRIDE**q * sum over k of weight(k) * word(q, k)      solved for the last word
    c(p-1)        = START + sum over q < p of that                        what a step reads

Coordinates are absolute and the sum is over all of them: page size and place in the arena are of no account. A flipped
bit always changes it, other wrong bytes but for a chance of about 2**-40. A chunk starts from what it reads of the
positions before it, so KV that was wrong for a while stays wrong; its own bytes are read after all were written.

Of `Sampling`, a temperature other than 0 says only that the seed counts; what would bend logits or cut off their tail
is without effect, because there are none. Logprobs are those of a made-up distribution over the vocabulary: a token
that is r places behind the greedy one, by id and around the end, has a probability in proportion to 1 / (r + 1)**2.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from core.errors import LocalError, ModelError
from core.kv import KvShape
from core.sampling import Logprobs, Sampling
from engine.api import Row, Sampled
from engine.config import ModelConfig
from engine.host import HostPool, runs
from engine.memory import anonymous_memory, page_count
from engine.sequences import Sequence, Sequences
from engine.steps import Parts, Step, whole
from kernels import native, noise

U64 = NDArray[np.uint64]

VERSION = 1
"""Of the definition above: workers of different versions must not exchange KV."""
START = 0x243F6A8885A308D3
DRAW = 0x13198A2E03707344
STIR = 0xD6E8FEB86659FD93
STRIDE = 0x9E3779B97F4A7C15
MASK = 2**64 - 1
LAYERS = 32
"""A step that can be stopped has so many equal parts, as in the simulator."""
LATE_S, IDLE_S = 0.05, 0.01
"""The most that a device makes up for, and how long after the end of a step another one follows at once."""
WORD_NBYTES = 8
_WORD = np.dtype("<u8")
_BLOCK_WORDS = 2**18


class StepCost(Protocol):
    """What a step costs; `scheduler.cost.CostModel` is one."""

    def step_s(self, rows: Seq[tuple[int, int]], batch: int, context: int) -> float:
        """Seconds of a step that prefills rows of (new, cached) tokens, and decodes `batch` over `context` tokens."""
        ...


class Pacer:
    """Keeps a virtual device busy: `wait` returns when a step that was called at `called` would have been done.

    What the thread wakes too late is taken off the steps that follow at once, up to `LATE_S` of it: a device is not
    slower because its host's timer is, or because the host's cores are busy. `clock` and `sleep` are in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep):
        self.clock = clock
        self._sleep = sleep
        self._woke = 0.0
        self._late_s = 0.0

    def wait(self, called: float, seconds: float) -> None:
        """Sleep for what is left of a step of `seconds`."""
        self.sleep(self.due(called, seconds))

    def due(self, called: float, seconds: float) -> float:
        """When a step of `seconds` is over."""
        if called - self._woke > IDLE_S:
            self._late_s = 0.0
        return called + seconds - self._late_s

    def sleep(self, until: float) -> None:
        """Sleep until a step, or a part of it, is over."""
        left = until - self.clock()
        if left > 0:
            self._sleep(left)
        self._woke = self.clock()
        self._late_s = min(LATE_S, max(0.0, self._woke - until))


class PacedEngine:
    """Serves the KV shape, vocabulary and context of a Hugging Face model directory; its weights are not read.

    | parameter | unit | default | meaning |
    |---|---|---|---|
    | kv_memory | bytes | | the arena's size |
    | host_memory | bytes | 0 | for what is swapped out; that takes as long as it takes, not the cost model's time |
    | page_tokens | tokens | 64 | in a page |
    | dtype | | the checkpoint's | of the KV: how many bytes a row has |
    | cost, pace | , factor | None, 1 | a step takes the cost's seconds times this; without a cost, or at 0, no wait |
    | stop_rate | share | 0 | chance of a stop token at each step; at 0 only those are drawn that are ordinary tokens |
    | hash_logits | | False | fill `Sampled.logits_hash` with the state that a token is drawn from |
    | native | | True | read pages by native code where a compiler is at hand: 1.4 to 1.8 times faster, the same sums |

    Raises `ModelError` if the model directory cannot be served, `SetupError` if the arena cannot be had.
    """

    def __init__(
        self,
        model_dir: str | Path,
        *,
        kv_memory: int,
        host_memory: int = 0,
        page_tokens: int = 64,
        dtype: str | None = None,
        cost: StepCost | None = None,
        pace: float = 1.0,
        stop_rate: float = 0.0,
        hash_logits: bool = False,
        native: bool = True,
        pacer: Pacer | None = None,
    ) -> None:
        self.config = ModelConfig.read(model_dir)
        self.ordinary = ordinary_tokens(model_dir, self.config)
        self.hash_logits = hash_logits
        self._stop_below = int(stop_rate * 2**64)
        self._cost = cost if pace > 0 else None
        self._pace = pace
        self._pacer = pacer or Pacer()
        self._kv = kv = self.config.kv(page_tokens, dtype)
        if kv.row_nbytes % WORD_NBYTES:
            raise ModelError(
                f"head_dim: got {kv.head_dim} of {kv.dtype}, want rows of whole words of {WORD_NBYTES} bytes"
            )
        self._pages = page_count(kv, kv_memory)
        memory = anonymous_memory(self._pages * kv.page_nbytes)
        self._memory = memoryview(memory)
        lanes, words = kv.layers * 2 * kv.kv_heads, kv.row_nbytes // WORD_NBYTES
        self._arena = np.frombuffer(memory, _WORD).reshape(self._pages, lanes, page_tokens, words)
        self._pool = HostPool(page_count(kv, host_memory, "host_memory") if host_memory else 0)
        self._host = np.empty((0, *self._arena.shape[1:]), _WORD)
        if host_memory:
            beside = anonymous_memory(self._pool.pages * kv.page_nbytes, "host_memory")
            self._host = np.frombuffer(beside, _WORD).reshape(-1, *self._arena.shape[1:])
        self._keys = _keys(kv, words)
        self._weights = _mixed(self._keys.copy()) | np.uint64(1)
        self._last_inverse = np.uint64(pow(int(self._weights[-1]), -1, 2**64))
        positions = max(self.config.context, page_tokens)
        self._strides = _powers(STRIDE, positions)
        self._strides_back = _powers(pow(STRIDE, -1, 2**64), positions)
        self._page_strides = np.ascontiguousarray(self._strides[::page_tokens])
        slots = self._strides[:page_tokens, None]
        self._page_weights = np.ascontiguousarray(self._weights.reshape(lanes, 1, words) * slots)
        self._weigh = _weigher(native)
        self._sequences = Sequences(Sequence, kv, self._pages, self.config.context, self.config.vocab)
        ranks = np.arange(1, self.config.vocab + 1, dtype=np.float64)
        self._log_total = math.log(float((ranks**-2).sum()))

    @property
    def kv(self) -> KvShape:
        """The shape of a page."""
        return self._kv

    @property
    def pages(self) -> int:
        """Pages in the arena."""
        return self._pages

    @property
    def arena(self) -> memoryview:
        """The arena's bytes, writable, at one address for life."""
        return self._memory

    @property
    def grammar(self) -> str:
        """See `engine.api`."""
        return ""

    def prepare(self, sampling: Sampling) -> None:
        """See `engine.api`."""

    @property
    def host_pages(self) -> int:
        """See `engine.api`."""
        return self._pool.pages

    @property
    def host_pages_used(self) -> int:
        """See `engine.api`."""
        return self._pool.used

    @property
    def context(self) -> int:
        """Most tokens of a sequence."""
        return self.config.context

    def open(
        self,
        sequence: str,
        tokens: Seq[int],
        pages: Seq[int],
        sampling: Sampling,
        prompt: int,
        generated: int = 0,
    ) -> None:
        """See `engine.api`. KV of positions that are not stepped here is taken to be in the pages already."""
        if sampling.constraint is not None:
            raise LocalError(f"sequence {sequence!r}: got a {sampling.constraint.language}, and there are no logits")
        self._sequences.open(sequence, tokens, pages, sampling, prompt, generated)

    def extend(self, sequence: str, pages: Seq[int]) -> None:
        """Append pages to a sequence's page table."""
        self._sequences.extend(sequence, pages)

    def copy(self, source: int, target: int) -> None:
        """See `engine.api`."""
        self._arena[target] = self._arena[source]

    def swap_out(self, sequence: str, pages: Seq[int]) -> None:
        """See `engine.api`."""
        table = self._sequences.table(sequence, pages).tolist()
        for here, there in runs(table, self._pool.take(sequence, len(table))):
            self._host[there] = self._arena[here]
        self._sequences.close(sequence)

    def swap_in(self, sequence: str, pages: Seq[int]) -> None:
        """See `engine.api`."""
        table = self._sequences.table(sequence, pages).tolist()
        for here, there in runs(table, self._pool.of(sequence, len(table))):
            self._arena[here] = self._host[there]
        self._pool.drop(sequence)

    def close(self, sequence: str) -> None:
        """See `engine.api`."""
        self._sequences.close(sequence)
        self._pool.drop(sequence)

    def tokens(self, sequence: str) -> tuple[int, ...]:
        """All tokens of a sequence so far, prompt first."""
        return tuple(self._sequences[sequence].tokens)

    def step(self, rows: Seq[Row]) -> list[Sampled]:
        """See `engine.api`. A `LocalError` is raised before anything is changed."""
        return whole(self._parts(rows, self._sequences.of(rows), 1))

    def begin(self, rows: Seq[Row]) -> Step:
        """See `engine.api`. Its parts are `LAYERS` layers, whose time it passes one by one."""
        known = self._sequences.of(rows)
        return Step(self._parts(rows, known, LAYERS), rows, known, self._sequences)

    def _parts(self, rows: Seq[Row], sequences: list[Sequence], layers: int) -> Parts[list[Sampled]]:
        if not rows:
            return []
        called = self._pacer.clock()
        seconds = self._seconds(rows, sequences)
        links = self._compute(rows, sequences)
        over = self._pacer.due(called, seconds)
        for left in range(layers - 1, 0, -1):
            left_s = seconds * left / layers
            self._pacer.sleep(over - left_s)
            if (yield):
                # A model's other layers would now read and write the same pages, whosever they are by now.
                called = self._pacer.clock()
                links = self._compute(rows, sequences)
                over = self._pacer.due(called, left_s)
        sampled: list[Sampled] = []
        for row, known, link in zip(rows, sequences, links, strict=True):
            if row.stop == len(known.tokens):
                sampled += self._sample(row, known, link)
        self._pacer.sleep(over)
        return sampled

    def _compute(self, rows: Seq[Row], sequences: list[Sequence]) -> list[int]:
        """Read all before the rows, write the rows; the last link of each, as its bytes say."""
        bases = [(START + read) & MASK for read in self._read(rows, sequences)]
        added = self._write(rows, sequences, bases)
        return [(base + more) & MASK for base, more in zip(bases, added, strict=True)]

    def _seconds(self, rows: Seq[Row], sequences: list[Sequence]) -> float:
        """What the step costs; a row is decoded if it is one token behind the prompt."""
        if self._cost is None:
            return 0.0
        prefill, batch, context = [], 0, 0
        for row, known in zip(rows, sequences, strict=True):
            if row.stop - row.start == 1 and row.start >= known.prompt:
                batch, context = batch + 1, context + row.stop
            else:
                prefill.append((row.stop - row.start, row.start))
        return self._cost.step_s(prefill, batch, context) * self._pace

    def _read(self, rows: Seq[Row], sequences: list[Sequence]) -> list[int]:
        """What the bytes of all positions before each row add up to."""
        found = [0] * len(rows)
        later = [at for at, row in enumerate(rows) if row.start]
        if not later:
            return found
        page_tokens = self._kv.page_tokens
        starts = np.array([rows[at].start for at in later])
        counts = -(-starts // page_tokens)
        ends = np.cumsum(counts)
        begins = ends - counts
        pages = np.concatenate([sequences[at].pages[:count] for at, count in zip(later, counts.tolist(), strict=True)])
        slots = np.full(len(pages), page_tokens)
        slots[ends - 1] = starts - (counts - 1) * page_tokens
        sums = self._weigh(self._arena, self._page_weights, pages, slots)
        sums *= self._page_strides[np.arange(len(pages)) - np.repeat(begins, counts)]
        for at, total in zip(later, np.add.reduceat(sums, begins).tolist(), strict=True):
            found[at] = total
        return found

    def _write(self, rows: Seq[Row], sequences: list[Sequence], bases: list[int]) -> list[int]:
        """Write all positions of `rows`, each from the link before it, and tell what their bytes then add up to.

        Notes prompt logprobs on the way.
        """
        page_tokens = self._kv.page_tokens
        tokens: list[int] = []
        positions: list[int] = []
        begins: list[int] = []
        tables = []
        for row, known in zip(rows, sequences, strict=True):
            begins.append(len(tokens))
            tokens += known.tokens[row.start : row.stop]
            positions += range(row.start, row.stop)
            tables.append(known.pages[np.arange(row.start, row.stop) // page_tokens])
        place = np.array(positions)
        pages, slots = np.concatenate(tables), place % page_tokens
        news = _mixed((place.astype(np.uint64) << np.uint64(32)) | np.array(tokens, np.uint64)).tolist()
        links: list[int] = []
        steps: list[int] = []
        for row, known, first, link in zip(rows, sequences, begins, bases, strict=True):
            for new in news[first : first + row.stop - row.start]:
                x = (link + new) & MASK
                x = ((x ^ (x >> 32)) * STIR) & MASK
                steps.append((x - link) & MASK)
                links.append(x)
                link = x
            if known.prompt_logprobs:
                self._note(row, known, links[first:])
        chain, step = np.array(links, np.uint64), np.array(steps, np.uint64) * self._strides_back[place]
        lanes, _, words = self._page_weights.shape
        block = max(1, _BLOCK_WORDS // len(self._keys))
        parts = [slice(at, at + block) for at in range(0, len(place), block)]
        for part in parts:
            held = _mixed(chain[part, None] + self._keys)
            held[:, -1] = (step[part] - held[:, :-1].dot(self._weights[:-1])) * self._last_inverse
            self._arena[pages[part], :, slots[part]] = held.reshape(-1, lanes, words)
        sums = [
            self._arena[pages[part], :, slots[part]].reshape(-1, lanes * words).dot(self._weights) for part in parts
        ]
        found: list[int] = np.add.reduceat(np.concatenate(sums) * self._strides[place], begins).tolist()
        return found

    def _sample(self, row: Row, known: Sequence, link: int) -> list[Sampled]:
        """The next token of each continuation, drawn from the chain's last link."""
        state = noise.mix((link + DRAW) & MASK)
        sampled = []
        for branch in range(known.sampling.n):
            sampling = known.sampling if known.sampling.n == 1 else known.sampling.branch(branch)
            token = self._draw(state, known, sampling, row.stop)
            top = sampling.logprobs
            sampled.append(
                Sampled(
                    row.sequence,
                    row.stop,
                    token,
                    self._sequences.finish(known, token),
                    state if self.hash_logits else 0,
                    logprobs=None if top is None else self._logprobs(state, token, top),
                    prompt_logprobs=tuple(known.prompt_logprobs) if row.stop == known.prompt and not branch else (),
                    branch=branch,
                )
            )
        if known.sampling.n == 1:  # else each goes on as a sequence of its own
            known.tokens.append(token)
        return sampled

    def _draw(self, state: int, known: Sequence, sampling: Sampling, position: int) -> int:
        drawn = state if sampling.greedy else noise.mix((state + noise.key(sampling.seed, position)) & MASK)
        ordinary = self.ordinary
        at = drawn % len(ordinary)
        if known.made < sampling.min_tokens:
            some = (ordinary[(at + more) % len(ordinary)] for more in range(len(ordinary)))
            return next((token for token in some if token not in known.stops), ordinary[at])
        if known.stops and noise.mix((drawn + 1) & MASK) < self._stop_below:
            return sorted(known.stops)[noise.mix((drawn + 2) & MASK) % len(known.stops)]
        return ordinary[at]

    def _note(self, row: Row, known: Sequence, links: list[int]) -> None:
        """Keep how likely the prompt's tokens after those of `row` were, given the links of these."""
        top = known.sampling.prompt_logprobs or 0
        for place, link in zip(range(row.start + 1, row.start + 1 + known.told(row)), links, strict=False):
            state = noise.mix((link + DRAW) & MASK)
            known.prompt_logprobs[place] = self._logprobs(state, known.tokens[place], top)

    def _logprobs(self, state: int, token: int, top: int) -> Logprobs:
        vocab, best = self.config.vocab, self.ordinary[state % len(self.ordinary)]

        def logprob(rank: int) -> float:
            return -2 * math.log(rank + 1) - self._log_total

        ranks = range(min(top, vocab))
        ids = tuple((best + rank) % vocab for rank in ranks)
        return Logprobs(token, logprob((token - best) % vocab), ids, tuple(map(logprob, ranks)))


def ordinary_tokens(model_dir: str | Path, config: ModelConfig) -> tuple[int, ...]:
    """The tokens that stand for text, ascending: those of ``tokenizer.json`` without special, begin and end tokens.

    Without a tokenizer, all but begin and end tokens. `ModelError` if none is left, or the file cannot be read.
    """
    path = Path(model_dir) / "tokenizer.json"
    known = set(range(config.vocab))
    if path.exists():
        try:
            document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            vocab = document["model"]["vocab"]
            known &= set(vocab.values() if isinstance(vocab, dict) else range(len(vocab)))
            known -= {added["id"] for added in document.get("added_tokens") or () if added["special"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{path}: cannot be read as a tokenizer: {error!r}") from None
    known -= {config.bos_token_id, *config.eos_token_ids}
    if not known:
        raise ModelError(f"{path}: got no token that stands for text, want one at least")
    return tuple(sorted(known))


def _keys(kv: KvShape, words: int) -> U64:
    """Keys of a position's words, in the order of a page: (layer, K|V, head, word)."""
    places = np.indices((kv.layers, 2, kv.kv_heads, words)).reshape(4, -1).astype(np.uint64)
    layer, half, head, word = places
    return _mixed(layer << np.uint64(48) | half << np.uint64(40) | head << np.uint64(24) | word)


def _powers(base: int, count: int) -> U64:
    """base**0 to base**(count - 1)."""
    factors = np.full(count, base, np.uint64)
    factors[0] = 1
    powers: U64 = np.multiply.accumulate(factors)
    return powers


def _mixed(values: U64) -> U64:
    """`noise.mix` of each, in place."""
    spare = values >> np.uint64(30)
    values ^= spare
    values *= np.uint64(0xBF58476D1CE4E5B9)
    np.right_shift(values, np.uint64(27), out=spare)
    values ^= spare
    values *= np.uint64(0x94D049BB133111EB)
    np.right_shift(values, np.uint64(31), out=spare)
    values ^= spare
    return values


def _weigher(allowed: bool) -> native.Weights:
    if allowed:
        try:
            return native.page_weights()
        except native.NativeMissing:
            pass  # slower, the same sums
    return _weigh


def _weigh(arena: NDArray[Any], weights: NDArray[Any], pages: NDArray[Any], slots: NDArray[Any]) -> NDArray[Any]:
    """`native.page_weights` in numpy."""
    held = arena[pages]
    for at in np.flatnonzero(slots < weights.shape[1]):
        held[at, :, slots[at] :] = 0
    sums: NDArray[Any] = held.reshape(len(pages), -1).dot(weights.reshape(-1))
    return sums
