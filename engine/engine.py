"""The engine: sequences, their page tables and one forward pass a step. Implements `engine.api.Engine` with torch."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from core.errors import LocalError, ModelError
from core.kv import KvShape
from core.sampling import Sampling
from engine import backend
from engine.api import NO_TOKEN, Row, Sampled
from engine.arena import Arena
from engine.backend import Logits
from engine.config import ModelConfig
from engine.grammar import Grammars, Mask, Walk
from engine.host import HostPool, runs
from engine.model import Decoder
from engine.penalties import Penalties
from engine.sampler import Sampler, logprobs
from engine.sequences import Sequence, Sequences
from engine.steps import Parts, Step, whole
from engine.weights import Progress, load
from kernels.batch import Batch, Segment
from kernels.exact_attention import BLOCK_TOKENS

log = logging.getLogger("baton.engine")

PROMPT_LOGITS_NBYTES = 128 * 2**20
"""Logits of a prompt are computed for as many rows at a time as fit into this."""


@dataclass(slots=True)
class _Sequence(Sequence):
    """One running sequence, and what else this engine keeps of it."""

    cleared: int = -1
    """The last page (by its place in the table) whose slots behind the newest token were cleared."""
    penalties: Penalties | None = None
    """None if its logits are taken as they are."""
    walk: Walk | None = None
    """None if its text may be anything."""


class TorchEngine:
    """Runs a Hugging Face checkpoint over page-major KV, on the CPU or on a GPU (`device` "cuda").

    `kv_memory` is the arena's size in bytes, `host_memory` that of what is swapped out. `dtype` is the compute and KV
    dtype (``float32``, ``bfloat16``, on a GPU also ``float16``); by default the checkpoint's, but on a CPU bf16 only if
    it is multiplied in hardware, else fp32.
    With `exact`, a sequence's logits are bit-equal alone, batched, chunked anyhow, moved or recomputed, on workers with
    equal `threads`, CPU and `backend`. `native` allows native code where a compiler is at hand; `backend` says what
    came of it. `threads` sets torch's thread count for the whole process. `hash_logits` fills `Sampled.logits_hash`.
    `grammars`, made for this model, let it take sequences with a constraint.
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
        device: str = "cpu",
        exact: bool = False,
        native: bool = True,
        threads: int | None = None,
        hash_logits: bool = False,
        progress: Progress | None = None,
        grammars: Grammars | None = None,
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
        self._host = Arena(self._kv, host_memory, setting="host_memory").pages if host_memory else self._arena.pages[:0]
        self._pool = HostPool(len(self._host))
        self._skips_unwritten = device == "cuda"
        """Its kernels never read a slot behind a sequence's newest token."""
        with torch.inference_mode():
            weights = load(model_dir, self.config, ops, self.dtype, progress, device=where)
            if exact:
                backend.prove(ops, weights, self.dtype)
            self._model = Decoder(self.config, weights, ops, self._arena)
            longest = min(self._kv.pages_for(self.config.context), self._arena.count)
            self._forward = backend.forward(self._model, device, longest)
        self._sampler = Sampler(self.config.vocab)
        self._grammars = grammars
        self._sequences = Sequences(_Sequence, self._kv, self.pages, self.config.context, self.config.vocab)

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
    def grammar(self) -> str:
        """See `engine.api`."""
        return "" if self._grammars is None else self._grammars.version

    def prepare(self, sampling: Sampling) -> None:
        """See `engine.api`."""
        if sampling.constraint is not None and self._grammars is not None:
            self._grammars.prepare(sampling.constraint)

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
        constraint = sampling.constraint
        if constraint is not None and self._grammars is None:
            raise LocalError(f"sequence {sequence!r}: got a {constraint.language}, and there are no grammars")
        known = self._sequences.open(sequence, tokens, pages, sampling, prompt, generated)
        asked = prompt - generated
        if constraint is not None and self._grammars is not None:
            known.walk = self._grammars.walk(constraint, tokens[asked:], sampling.stop_token_ids)
        if sampling.bends:
            known.penalties = Penalties(sampling, tokens[:asked], tokens[asked:], self.config.vocab)

    def extend(self, sequence: str, pages: Seq[int]) -> None:
        """Append pages to a sequence's page table."""
        self._sequences.extend(sequence, pages)

    def copy(self, source: int, target: int) -> None:
        """See `engine.api`."""
        self._arena.pages[target] = self._arena.pages[source]

    def swap_out(self, sequence: str, pages: Seq[int]) -> None:
        """See `engine.api`."""
        table = self._sequences.table(sequence, pages).tolist()
        for here, there in runs(table, self._pool.take(sequence, len(table))):
            self._host[there].copy_(self._arena.pages[here])
        self._sequences.close(sequence)

    def swap_in(self, sequence: str, pages: Seq[int]) -> None:
        """See `engine.api`."""
        table = self._sequences.table(sequence, pages).tolist()
        for here, there in runs(table, self._pool.of(sequence, len(table))):
            self._arena.pages[here].copy_(self._host[there])
        self._pool.drop(sequence)

    def close(self, sequence: str) -> None:
        """See `engine.api`."""
        self._sequences.close(sequence)
        self._pool.drop(sequence)

    def tokens(self, sequence: str) -> tuple[int, ...]:
        """All tokens of a sequence so far, prompt first."""
        return tuple(self._sequences[sequence].tokens)

    @torch.inference_mode()
    def step(self, rows: Seq[Row]) -> list[Sampled]:
        """See `engine.api`. A `LocalError` is raised before anything is changed."""
        return whole(self._parts(rows, self._sequences.of(rows), self._at_once))

    def begin(self, rows: Seq[Row]) -> Step:
        """See `engine.api`."""
        known = self._sequences.of(rows)
        return Step(self._parts(rows, known, self._forward.parts), rows, known, self._sequences, torch.inference_mode)

    def _at_once(self, batch: Batch) -> Parts[Logits]:
        """A forward pass in one part."""
        yield from ()
        return self._forward.whole(batch)

    def _parts(
        self, rows: Seq[Row], sequences: list[_Sequence], forward: Callable[[Batch], Parts[Logits]]
    ) -> Parts[list[Sampled]]:
        if not rows:
            return []
        if any(known.prompt_logprobs for known in sequences):
            told = []
            for row, known in zip(rows, sequences, strict=True):
                told.append((yield from self._tell(row, known, forward)))
            rows = told
        logits = yield from forward(self._batch(rows, sequences))
        if logits is None:
            return []
        lines = iter(logits)
        chosen: list[tuple[Row, _Sequence, NDArray[np.float32], int, int]] = []
        for row, known in zip(rows, sequences, strict=True):
            if known.prompt_logprobs:
                self._note(row, known, lines)
            if row.stop == len(known.tokens):
                line = next(lines)
                allowed = known.walk.allowed() if known.walk is not None else None
                for branch in range(known.sampling.n):
                    chosen.append((row, known, line, branch, self._choose(row, known, line, branch, allowed)))
        sampled = []
        for row, known, line, branch, token in chosen:
            finish = self._sequences.finish(known, token)
            if known.sampling.n == 1:  # else each goes on as a sequence of its own
                known.tokens.append(token)
                if known.penalties is not None:
                    known.penalties.add(token)
                if known.walk is not None and token != NO_TOKEN:
                    known.walk.add(token)
            top = known.sampling.logprobs if token != NO_TOKEN else None
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

    def _choose(self, row: Row, known: _Sequence, line: NDArray[np.float32], branch: int, allowed: Mask | None) -> int:
        bent = line if known.penalties is None else known.penalties.apply(line, known.made, allowed)
        if allowed is not None:
            if not allowed.any():
                failed = known.walk is not None and bool(known.walk.error)
                what = "the compiler failed" if failed else "the grammar lets nothing follow"
                log.warning("%s: %s after %d tokens", row.sequence, what, known.made)
                return NO_TOKEN
            bent = np.where(allowed, bent, np.float32(-np.inf))
        sampling = known.sampling if known.sampling.n == 1 else known.sampling.branch(branch)
        token = self._sampler.choose(bent, sampling, row.stop)
        if not np.isfinite(line[token]):
            raise LocalError(f"sequence {row.sequence!r}: the logits at position {row.stop} are not finite")
        return token

    def _tell(self, row: Row, known: _Sequence, forward: Callable[[Batch], Parts[Logits]]) -> Parts[Row]:
        """Compute the first rows of a prompt whose logprobs are wanted, as long as not all their logits may be held."""
        rows = max(self._model.ops.row_tile, PROMPT_LOGITS_NBYTES // (4 * self.config.vocab))
        start = row.start
        while start + rows < row.stop and start < len(known.prompt_logprobs) - 1:
            part = Row(row.sequence, start, start + rows)
            logits = yield from forward(self._batch([part], [known]))
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
