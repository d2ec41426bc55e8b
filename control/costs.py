"""What steps take on this worker: a profile at the start, kept for the next start, or a guess from its sizes.

Which shapes are timed and what is made of them is decided in scheduler/profile.py; what is learned later, in
scheduler/learning.py. Workers of one kind on one machine take turns: one profiles alone, the others read what it found.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from core.config import WorkerConfig
from core.sampling import Sampling
from core.worker import Numerics
from engine.api import Engine, Row
from engine.config import ModelConfig
from scheduler import roofline
from scheduler.cost import CostModel
from scheduler.profile import Profile, Room, Shape
from sim.fleet import resolve

log = logging.getLogger("baton.costs")

FORMAT = 1
"""Of a kept profile; raised when the profile itself changes."""
SAY_S = 0.5
"""Between two words about how far a profile is."""
TURN_S = 5.0
"""Beyond the profile's own time, that another worker's is waited for."""

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Kind:
    """Everything that a step's time depends on: profiles of equal kinds are one."""

    machine: str
    cores: int
    numerics: Numerics
    hash_logits: bool
    fingerprint: str
    room: Room
    version: int = FORMAT


def cost(config: WorkerConfig, engine: Engine, numerics: Numerics, fingerprint: str, context: int) -> CostModel:
    """The cost model that a worker starts with; on the engine's thread, before it serves.

    A paced engine's is the one by which it sleeps. Another's is profiled, unless that was done before: for
    `profile_s` seconds, or not at all if that is 0. What is in the cache and cannot be read is logged and made anew.
    """
    if config.engine == "paced":
        model, _, _ = resolve(config.cost, None, "tcp")
        return model.at(config.pace, config.pace) if config.pace > 0 else model
    room = Room(engine.pages, engine.kv.page_tokens, context, config.chunk_tokens, config.max_rows)
    kind = Kind(machine(), os.cpu_count() or 1, numerics, config.hash_logits, fingerprint, room)
    if config.profile_s <= 0:
        return guess(ModelConfig.read(config.model), numerics)
    path = directory() / f"{_digest(kind)}.json"
    with _turn(path, config.profile_s + TURN_S):
        kept = read(path, kind)
        if kept is not None:
            log.info("steps: from %s: %s", path, said(kept))
            return kept
        sizes = ModelConfig.read(config.model)
        prior = guess(sizes, numerics)
        found = profile(engine, sizes.vocab, room, prior, config.profile_s, prior.name)
        write(path, kind, found)
    log.info("steps: profiled: %s", said(found))
    return found


def guess(config: ModelConfig, numerics: Numerics) -> CostModel:
    """What the roofline says of a model on this CPU."""
    nbytes = 4 if numerics.dtype == "float32" else 2
    sizes = roofline.Sizes(
        config.layers,
        config.hidden,
        config.intermediate,
        config.heads,
        config.kv_heads,
        config.head_dim,
        config.vocab,
        value_bytes=nbytes,
    )
    hardware = roofline.cpu(numerics.threads, nbytes=nbytes, exact=numerics.exact)
    return roofline.roofline(f"{config.architecture} on {hardware.name}", sizes, hardware, lines=2)


def profile(
    engine: Engine,
    vocab: int,
    room: Room,
    prior: CostModel,
    budget_s: float,
    name: str,
    clock: Clock = time.monotonic,
) -> CostModel:
    """Time the engine's steps; nobody may use it meanwhile, and what its pages hold afterwards is of no account."""
    going = Profile(room, prior, budget_s)
    spoken_at = clock()
    log.info("profiling steps for up to %g s: %d shapes", budget_s, len(going.shapes))
    at: Shape | None = None
    stage: _Stage | None = None
    try:
        while (shape := going.next()) is not None:
            if stage is None or shape is not at:
                if stage is not None:
                    stage.close()
                at, stage = shape, _Stage(engine, shape, room, vocab, going.repeats)
            rows = stage.rows()
            began = clock()
            engine.step(rows)
            now = clock()
            going.took(now - began)
            if now - spoken_at >= SAY_S:
                spoken_at = now
                log.info("profiling steps: %d of %d shapes, %.1f s", going.done, len(going.shapes), going.spent_s)
    finally:
        if stage is not None:
            stage.close()
    return going.model(name)


class _Stage:
    """The sequences of one shape, each on pages of its own as long as there are any.

    A decoding one grows a token a step; a prompt is opened anew for each, so that its last token is sampled each time.
    """

    def __init__(self, engine: Engine, shape: Shape, room: Room, vocab: int, repeats: int) -> None:
        self._engine = engine
        self._shape = shape
        self._context = room.context
        self._opened: list[tuple[str, list[int], list[int]]] = []
        """Names, tokens and pages."""
        self._taken = 0
        page = 0
        for number, (new, cached) in enumerate(shape.rows):
            name = f"profile {number}"
            count = -(-(new + cached + repeats + 2) // room.page_tokens)
            pages = [at % engine.pages for at in range(page, page + count)]
            page += count
            tokens = [(at * 7919 + number * 104_729) % vocab for at in range(new + cached)]
            self._opened.append((name, tokens, pages))
        self._open()

    def rows(self) -> list[Row]:
        """The next step."""
        decodes = self._shape.decodes
        if self._taken and not decodes:
            self.close()
            self._open()
        grown = self._taken if decodes else 0
        self._taken += 1
        pairs = zip(self._opened, self._shape.rows, strict=True)
        return [Row(name, cached + grown, cached + grown + new) for (name, _, _), (new, cached) in pairs]

    def close(self) -> None:
        """Their pages are free again."""
        for name, _, _ in self._opened:
            self._engine.close(name)

    def _open(self) -> None:
        for name, tokens, pages in self._opened:
            prompt = max(1, len(tokens) - (1 if self._shape.decodes else 0))
            self._engine.open(name, tokens, pages, Sampling(max_tokens=self._context, ignore_eos=True), prompt)


def said(model: CostModel) -> str:
    """A model in a few numbers, for a log."""
    prompt, row, batch = model.prefill_s([(512, 0)]), model.decode_s(1, 512), model.decode_s(16, 16 * 512)
    sure = f"9 in 10 within {model.margin('prefill', 0.9):.0%} and {model.margin('decode', 0.9):.0%}"
    return f"512 prompt tokens {prompt * 1e3:.3g} ms, 1 row {row * 1e3:.3g} ms, 16 rows {batch * 1e3:.3g} ms; {sure}"


# ------------------------------------------------------------------------------------------------------------ the cache


def directory() -> Path:
    """Where profiles are kept: $BATON_CACHE, or the user's cache directory."""
    chosen = os.environ.get("BATON_CACHE")
    if chosen:
        return Path(chosen) / "costs"
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "baton" / "costs"


def read(path: Path, kind: Kind) -> CostModel | None:
    """The kept profile of this kind, None if there is none; what is there and is none is logged."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["kind"] != _document(kind):
            raise ValueError("it is of another kind of worker")
        return CostModel.of(document["cost"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        log.warning("steps: %s cannot be used, profiling again: %s: %s", path, type(error).__name__, error)
        return None


def write(path: Path, kind: Kind, model: CostModel) -> None:
    """Keep a profile; where that cannot be, the next start profiles again."""
    document = {"kind": _document(kind), "cost": model.document()}
    spare = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        spare.write_text(json.dumps(document, indent=1), encoding="utf-8")
        os.replace(spare, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            spare.unlink()
        log.warning("steps: cannot be kept in %s: %s", path, error.strerror)


def machine() -> str:
    """What this machine's processor calls itself."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _document(kind: Kind) -> object:
    """As it comes back from a file."""
    return json.loads(json.dumps(asdict(kind)))


def _digest(kind: Kind) -> str:
    return hashlib.sha256(json.dumps(_document(kind), sort_keys=True).encode()).hexdigest()[:16]


@contextlib.contextmanager
def _turn(path: Path, most_s: float) -> Iterator[None]:
    """Alone with this file among the workers of this machine; after `most_s`, or where files cannot be locked, not."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held = path.with_suffix(".lock").open("w")
    except OSError:
        yield
        return
    with held:
        until = time.monotonic() + most_s
        while True:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() >= until:
                    break
                time.sleep(0.05)
        yield
