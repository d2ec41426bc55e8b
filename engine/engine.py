"""The engine: sequences, their page tables and one forward pass a step. Implements `engine.api.Engine` with torch."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from core.errors import LocalError, ModelError
from core.kv import KvShape
from core.sampling import Logprobs, Sampling
from engine import backend
from engine.api import Row, Sampled
from engine.arena import Arena
from engine.config import ModelConfig
from engine.model import Decoder
from engine.penalties import Penalties
from engine.sampler import Sampler, logprobs
from engine.weights import Progress, load
from kernels.batch import Batch, Segment
from kernels.exact_attention import BLOCK_TOKENS

PROMPT_LOGITS_NBYTES = 128 * 2**20
"""Logits of a prompt are computed for as many rows at a time as fit into this."""


@dataclass(slots=True)
class _Sequence:
    """One running sequence: all tokens known so far and where their KV lies."""

    tokens: list[int]
    pages: NDArray[np.int64]
    sampling: Sampling
    stops: frozenset[int]
    prompt: int
    cleared: int = field(default=-1)
    """The last page (by its place in the table) whose slots behind the newest token were cleared."""
    penalties: Penalties | None = field(default=None)
    """None if its logits are taken as they are."""
    prompt_logprobs: list[Logprobs | None] = field(default_factory=list)
    """One for each prompt token, if asked for; None for the first, and for those not computed here so far."""

    @property
    def made(self) -> int:
        """Tokens generated since the prompt."""
        return len(self.tokens) - self.prompt

    def told(self, row: Row) -> int:
        """Positions from `row.start` on whose logits say how likely the prompt's next token was."""
        return max(0, min(row.stop, len(self.prompt_logprobs) - 1) - row.start)


class TorchEngine:
    """Runs a Hugging Face checkpoint over page-major KV, on the CPU or on a GPU (`device` "cuda").

    `kv_memory` is the arena's size in bytes. `dtype` is the compute and KV dtype (``float32``, ``bfloat16``, on a GPU
    also ``float16``); by default the checkpoint's, but on a CPU bf16 only if it is multiplied in hardware, else fp32.
    With `exact`, a sequence's logits are bit-equal alone, batched, chunked anyhow, moved or recomputed, on workers with
    equal `threads`, CPU and `backend`. `native` allows native code where a compiler is at hand; `backend` says what
    came of it. `threads` sets torch's thread count for the whole process. `hash_logits` fills `Sampled.logits_hash`.
    Raises `ModelError` if the model directory cannot be served, `SetupError` if the arena cannot be had.
    """

    def __init__(
        self,
        model_dir: str | Path,
        *,
        kv_memory: int,
        page_tokens: int = 64,
        dtype: str | None = None,
        device: str = "cpu",
        exact: bool = False,
        native: bool = True,
        threads: int | None = None,
        hash_logits: bool = False,
        progress: Progress | None = None,
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.config = ModelConfig.read(model_dir)
        if device not in backend.DEVICES:
            raise ModelError(f"device: got {device!r}, want one of {sorted(backend.DEVICES)}")
        self.dtype = dtype or backend.default_dtype(self.config.dtype, device)
        if self.dtype not in backend.DEVICES[device]:
            want = " or ".join(map(repr, backend.DEVICES[device]))
            raise ModelError(f"dtype: got {self.dtype!r}, want {want} on {device}")
        if exact and BLOCK_TOKENS % page_tokens:
            raise ModelError(f"page_tokens: got {page_tokens}, want a divisor of {BLOCK_TOKENS} in exact mode")
        self.exact = exact
        self.hash_logits = hash_logits
        self._kv = self.config.kv(page_tokens, self.dtype)
        ops, self.backend = backend.choose(self.config, device, exact, native)
        where = backend.place(device)
        self._arena = Arena(self._kv, kv_memory, device=where)
        self._skips_unwritten = device == "cuda"
        """Its kernels never read a slot behind a sequence's newest token."""
        with torch.inference_mode():
            weights = load(model_dir, self.config, ops, self.dtype, progress, device=where)
            if exact:
                backend.prove(weights, self.dtype)
            self._model = Decoder(self.config, weights, ops, self._arena)
            longest = min(self._kv.pages_for(self.config.context), self._arena.count)
            self._forward = backend.forward(self._model, device, longest)
        self._sampler = Sampler(self.config.vocab)
        self._sequences: dict[str, _Sequence] = {}

    @property
    def kv(self) -> KvShape:
        """The shape of a page."""
        return self._kv

    @property
    def pages(self) -> int:
        """Pages in the arena."""
        return self._arena.count

    @property
    def arena(self) -> memoryview:
        """The arena's bytes, writable, at one address for life; those of a GPU's are not the host's."""
        if self._arena.memory is None:
            raise LocalError("arena: got a GPU's, want the host's")
        return self._arena.memory

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
        if sequence in self._sequences:
            raise LocalError(f"sequence {sequence!r} is open already")
        if not 1 <= prompt <= len(tokens):
            raise LocalError(f"sequence {sequence!r}: prompt: got {prompt}, want 1 to {len(tokens)} tokens")
        if not 0 <= generated <= prompt:
            raise LocalError(f"sequence {sequence!r}: generated: got {generated}, want 0 to {prompt} tokens")
        if len(tokens) > self.config.context:
            raise LocalError(f"sequence {sequence!r}: got {len(tokens)} tokens, the context is {self.config.context}")
        if min(tokens) < 0 or max(tokens) >= self.config.vocab:
            raise LocalError(f"sequence {sequence!r}: got a token outside [0, {self.config.vocab})")
        table = self._table(sequence, pages)
        known = _Sequence(list(tokens), table, sampling, frozenset(sampling.stop_token_ids), prompt)
        if sampling.bends:
            asked = prompt - generated
            known.penalties = Penalties(sampling, tokens[:asked], tokens[asked:], self.config.vocab)
        if sampling.prompt_logprobs is not None:
            known.prompt_logprobs = [None] * prompt
        self._sequences[sequence] = known

    def extend(self, sequence: str, pages: Seq[int]) -> None:
        """Append pages to a sequence's page table."""
        known = self._known(sequence)
        known.pages = np.concatenate([known.pages, self._table(sequence, pages)])

    def copy(self, source: int, target: int) -> None:
        """See `engine.api`."""
        self._arena.pages[target] = self._arena.pages[source]

    def close(self, sequence: str) -> None:
        """Forget a sequence; unknown names are ignored."""
        self._sequences.pop(sequence, None)

    def tokens(self, sequence: str) -> tuple[int, ...]:
        """All tokens of a sequence so far, prompt first."""
        return tuple(self._known(sequence).tokens)

    @torch.inference_mode()
    def step(self, rows: Seq[Row]) -> list[Sampled]:
        """See `engine.api`. A `LocalError` is raised before anything is changed."""
        if not rows:
            return []
        sequences = self._check(rows)
        if any(known.prompt_logprobs for known in sequences):
            rows = [self._tell(row, known) for row, known in zip(rows, sequences, strict=True)]
        logits = self._forward(self._batch(rows, sequences))
        if logits is None:
            return []
        lines = iter(logits)
        chosen: list[tuple[Row, _Sequence, NDArray[np.float32], int, int]] = []
        for row, known in zip(rows, sequences, strict=True):
            if known.prompt_logprobs:
                self._note(row, known, lines)
            if row.stop == len(known.tokens):
                line = next(lines)
                for branch in range(known.sampling.n):
                    chosen.append((row, known, line, branch, self._choose(row, known, line, branch)))
        sampled = []
        for row, known, line, branch, token in chosen:
            finish = self._finish(known, token)
            if known.sampling.n == 1:  # else each goes on as a sequence of its own
                known.tokens.append(token)
                if known.penalties is not None:
                    known.penalties.add(token)
            top = known.sampling.logprobs
            sampled.append(
                Sampled(
                    row.sequence,
                    row.stop,
                    token,
                    finish,
                    _hash(line) if self.hash_logits else 0,
                    logprobs=None if top is None else logprobs(line, token, top),
                    prompt_logprobs=tuple(known.prompt_logprobs) if row.stop == known.prompt and not branch else (),
                    branch=branch,
                )
            )
        return sampled

    def _choose(self, row: Row, known: _Sequence, line: NDArray[np.float32], branch: int) -> int:
        bent = line if known.penalties is None else known.penalties.apply(line, known.made)
        sampling = known.sampling if known.sampling.n == 1 else known.sampling.branch(branch)
        token = self._sampler.choose(bent, sampling, row.stop)
        if not np.isfinite(line[token]):
            raise LocalError(f"sequence {row.sequence!r}: the logits at position {row.stop} are not finite")
        return token

    def _tell(self, row: Row, known: _Sequence) -> Row:
        """Compute the first rows of a prompt whose logprobs are wanted, as long as not all their logits may be held."""
        rows = max(self._model.ops.row_tile, PROMPT_LOGITS_NBYTES // (4 * self.config.vocab))
        start = row.start
        while start + rows < row.stop and start < len(known.prompt_logprobs) - 1:
            part = Row(row.sequence, start, start + rows)
            logits = self._forward(self._batch([part], [known]))
            assert logits is not None
            self._note(part, known, iter(logits))
            start = part.stop
        return Row(row.sequence, start, row.stop)

    def _note(self, row: Row, known: _Sequence, lines: Iterator[NDArray[np.float32]]) -> None:
        """Keep how likely the prompt's tokens after those of `row` were, by as many of the next `lines`."""
        top = known.sampling.prompt_logprobs or 0
        for place in range(row.start + 1, row.start + 1 + known.told(row)):
            found = logprobs(next(lines), known.tokens[place], top)
            if math.isnan(found.logprob):
                raise LocalError(f"sequence {row.sequence!r}: the logits at position {place} are not finite")
            known.prompt_logprobs[place] = found

    def _finish(self, known: _Sequence, token: int) -> str | None:
        """Why the sequence ends with its next token, if it does."""
        if token in known.stops:
            return "stop"
        ends = known.made + 1 >= known.sampling.max_tokens or len(known.tokens) + 1 >= self.config.context
        return "length" if ends else None

    def _known(self, sequence: str) -> _Sequence:
        try:
            return self._sequences[sequence]
        except KeyError:
            raise LocalError(f"sequence {sequence!r} is not open") from None

    def _table(self, sequence: str, pages: Seq[int]) -> NDArray[np.int64]:
        table = np.asarray(pages, dtype=np.int64).reshape(-1)
        if len(table) and not (table.min() >= 0 and table.max() < self.pages):
            raise LocalError(f"sequence {sequence!r}: got a page outside [0, {self.pages})")
        return table

    def _check(self, rows: Seq[Row]) -> list[_Sequence]:
        seen: set[str] = set()
        sequences = []
        for row in rows:
            known = self._known(row.sequence)
            if row.sequence in seen:
                raise LocalError(f"sequence {row.sequence!r} is twice in one step")
            seen.add(row.sequence)
            if not 0 <= row.start < row.stop <= len(known.tokens):
                raise LocalError(
                    f"sequence {row.sequence!r}: got rows [{row.start}, {row.stop}), want some of "
                    f"[0, {len(known.tokens)})"
                )
            if row.stop > min(len(known.pages) * self._kv.page_tokens, self.config.context):
                raise LocalError(
                    f"sequence {row.sequence!r}: got rows up to {row.stop}, its {len(known.pages)} pages hold "
                    f"{len(known.pages) * self._kv.page_tokens} tokens and the context is {self.config.context}"
                )
            sequences.append(known)
        return sequences

    def _batch(self, rows: Seq[Row], sequences: list[_Sequence]) -> Batch:
        page_tokens, tile = self._kv.page_tokens, self._model.ops.row_tile
        count = sum(row.stop - row.start for row in rows)
        padded = -(-count // tile) * tile
        tokens, positions = np.zeros(padded, np.int64), np.zeros(padded, np.int64)
        page, slot = np.empty(count, np.int64), np.empty(count, np.int64)
        segments: list[Segment] = []
        sample: list[int] = []
        at = 0
        for row, known in zip(rows, sequences, strict=True):
            span = slice(at, at + row.stop - row.start)
            tokens[span] = known.tokens[row.start : row.stop]
            positions[span] = np.arange(row.start, row.stop)
            np.divmod(positions[span], page_tokens, out=(page[span], slot[span]))
            page[span] = known.pages[page[span]]
            newest = row.stop == len(known.tokens)
            segments.append(Segment(at, row.stop - row.start, row.start, known.pages, newest))
            sample += range(at, at + known.told(row))
            if newest:
                sample.append(span.stop - 1)
                self._clear_behind(known, row.stop)
            at = span.stop
        samples = len(sample)
        sample += [0] * (-samples % tile)
        as_tensor = torch.from_numpy
        return Batch(
            rows=count,
            tokens=as_tensor(tokens),
            positions=as_tensor(positions),
            page=as_tensor(page),
            slot=as_tensor(slot),
            segments=segments,
            sample=torch.tensor(sample, dtype=torch.int64),
            samples=samples,
        )

    def _clear_behind(self, known: _Sequence, stop: int) -> None:
        """Zero the slots behind a sequence's newest token, once a page: nobody owns them, and they may hold NaN."""
        place, slot = divmod(stop - 1, self._kv.page_tokens)
        if known.cleared < place and not self._skips_unwritten:
            self._arena.clear(int(known.pages[place]), slot + 1)
            known.cleared = place


def _hash(line: NDArray[np.float32]) -> int:
    """64 bits of a row of logits."""
    return int.from_bytes(hashlib.blake2b(line.tobytes(), digest_size=8).digest(), "little")
