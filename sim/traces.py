"""Readers of recorded workloads, each strict: a wrong line is one sentence with file, line, field, got and want.

That sentence is a SetupError, a wrong argument a LocalError.
A file may be plain or gzip (`.gz`). docs/workloads.md says where each format comes from.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from core.errors import SetupError
from sim.recordings import is_recording, recorded
from sim.workload import Arrival, Workload, bad, blocks_of

VARIABLE = "BATON_TRACES"
MOONCAKE_BLOCK = 512
"""Tokens in one of Mooncake's hashed blocks."""
MOONCAKE_TICK_S = 3.0
"""What the stamps of Mooncake's conversation trace are rounded to."""
CHARS_PER_TOKEN = 4.0
"""What English text and code come to, near enough, with today's vocabularies."""

AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
LENGTHS = ("num_prefill_tokens", "num_decode_tokens", "num_total_tokens", "pd_ratio")
AGENTS = (
    "agent",
    "session_id",
    "seq",
    "timestamp_us",
    "input_chars",
    "output_chars",
    "prefix_chars_prev",
    "prefix_chars_any",
)
# What is in the columns, and how many of the first column's units are a second.
OFFSETS: dict[tuple[str, ...], float] = {
    ("StartTimeOffset", "ContextTokens", "GeneratedTokens"): 1e9,
    ("arrival_time_ns", "input_toks", "output_toks"): 1e9,
}
REFERENCE = ("idx", "unit_rate_arrival_s", "prompt_len", "output_len")

_STAMP = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)(?:\.(\d{1,9}))?", re.ASCII)
_DECIMAL = re.compile(r"\d+(\.\d+)?(e-?\d+)?", re.ASCII)


def folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Where the public traces are: $BATON_TRACES, or shared/traces beside the repository."""
    return Path(environ.get(VARIABLE) or Path(__file__).resolve().parents[2] / "shared" / "traces")


def find(name: str, environ: Mapping[str, str] = os.environ) -> Path:
    """The public trace of this file name; SetupError where it is not there."""
    path = folder(environ) / name
    if not path.is_file():
        raise SetupError(f"{VARIABLE}: got no file {path}, want the folder that holds {name} (docs/workloads.md)")
    return path


def read(path: Path) -> Workload:
    """The workload in a file of any of the formats below, told by its first line, or in recordings (a directory).

    Length files have no times: everything arrives at 0 s, for `with_arrivals`. Sessions come by the defaults.
    """
    if path.is_dir():
        return recorded(path)
    first = _text(path).partition("\n")[0].strip()
    if is_recording(first):
        return recorded(path)
    columns = tuple(first.split(","))
    if first.startswith("{"):
        return mooncake(path)
    if columns == AZURE:
        return azure(path)
    if columns in OFFSETS or columns == REFERENCE:
        return offsets(path)
    if columns == LENGTHS:
        return lengths(path)
    if columns == AGENTS:
        return agents(path)
    known = "; ".join(",".join(names) for names in (AZURE, *OFFSETS, REFERENCE, LENGTHS, AGENTS))
    raise SetupError(f"{path}:1: header: got {first[:80]!r}, want a JSON object or one of {known}")


def mooncake(path: Path, *, block_tokens: int = MOONCAKE_BLOCK) -> Workload:
    """Mooncake's JSON lines: `timestamp` in ms, `input_length`, `output_length`, `hash_ids` of the prompt's blocks.

    Stamps of the conversation trace are rounded: `jitter(workload, seed, MOONCAKE_TICK_S)` spreads them.
    """
    arrivals: list[Arrival] = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        where = Line(path, number)
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise where.wrong("line", line[:80], "a JSON object") from None
        if not isinstance(row, dict):
            raise where.wrong("line", line[:80], "a JSON object")
        names = ("timestamp", "input_length", "output_length", "hash_ids")
        if set(row) != set(names):
            raise where.wrong("fields", sorted(row), f"exactly {', '.join(names)}")
        at_ms, prompt, output = (
            where.integer(name, row[name], least) for name, least in zip(names, (0, 1, 1), strict=False)
        )
        ids = row["hash_ids"]
        if not isinstance(ids, list) or not all(type(id_) is int and id_ >= 0 for id_ in ids):
            raise where.wrong("hash_ids", str(ids)[:80], "a list of integers of at least 0")
        want = blocks_of(prompt, block_tokens)
        if len(ids) != want:
            raise where.wrong("hash_ids", f"{len(ids)} ids", f"{want} for {prompt} tokens in blocks of {block_tokens}")
        where.rises("timestamp", at_ms / 1e3, arrivals)
        arrivals.append(Arrival(at_ms / 1e3, prompt, output, tuple(ids), block_tokens))
    return _made(path, arrivals)


def azure(path: Path) -> Workload:
    """Azure's CSV of 2023: a UTC stamp with up to nine decimals, prompt and output tokens; the first comes at 0 s."""
    arrivals: list[Arrival] = []
    begin = 0
    for where, row in _rows(path, AZURE):
        match = _STAMP.fullmatch(row["TIMESTAMP"])
        try:
            if match is None:
                raise ValueError
            whole = datetime.fromisoformat(match[1] + "+00:00").timestamp()
        except ValueError:
            raise where.wrong("TIMESTAMP", row["TIMESTAMP"], "YYYY-MM-DD HH:MM:SS with up to 9 decimals") from None
        # In integers: a float of seconds since 1970 would lose the last digits.
        at_ns = round(whole) * 10**9 + int((match[2] or "").ljust(9, "0"))
        begin = begin if arrivals else at_ns
        at_s = (at_ns - begin) / 1e9
        where.rises("TIMESTAMP", at_s, arrivals)
        arrivals.append(Arrival(at_s, where.number(row, AZURE[1], 1), where.number(row, AZURE[2], 1)))
    return _made(path, arrivals)


def offsets(path: Path) -> Workload:
    """CSV with the time since the begin in nanoseconds (APEX, LLMServingSim) or, with an index, in seconds."""
    header = tuple(_text(path).partition("\n")[0].strip().split(","))
    columns = REFERENCE if header == REFERENCE else header if header in OFFSETS else next(iter(OFFSETS))
    time, prompt, output = columns[-3:]
    arrivals: list[Arrival] = []
    for where, row in _rows(path, columns):
        if columns == REFERENCE:
            if where.number(row, "idx") != len(arrivals):
                raise where.wrong("idx", row["idx"], str(len(arrivals)))
            at_s = where.decimal(row, time)
        else:
            at_s = where.number(row, time) / OFFSETS[columns]
        where.rises(time, at_s, arrivals)
        arrivals.append(Arrival(at_s, where.number(row, prompt, 1), where.number(row, output, 1)))
    return _made(path, arrivals)


def lengths(path: Path) -> Workload:
    """CSV of prompt and output tokens without times (ShareGPT, arXiv): all at 0 s, for `with_arrivals`."""
    arrivals: list[Arrival] = []
    for where, row in _rows(path, LENGTHS):
        prompt, output = where.number(row, LENGTHS[0], 1), where.number(row, LENGTHS[1], 1)
        if where.number(row, LENGTHS[2]) != prompt + output:
            raise where.wrong(LENGTHS[2], row[LENGTHS[2]], f"{prompt + output}, the sum of both")
        if not math.isclose(where.decimal(row, LENGTHS[3]), prompt / output, rel_tol=1e-6):
            raise where.wrong(LENGTHS[3], row[LENGTHS[3]], f"{prompt / output}, the one by the other")
        arrivals.append(Arrival(0.0, prompt, output))
    return _made(path, arrivals)


def conversations(path: Path, *, think_s: float, block_tokens: int = 64) -> Workload:
    """A length file whose rows are turns in order (ShareGPT), as closed-loop sessions with shared history.

    A row belongs to the session of the row above if its prompt holds at least that one's prompt and output. The
    file has no times: a next turn comes `think_s` after the last token of the one before. Blocks that lie whole in
    the prompt above keep their ids; `history` counts the output above as well.
    """
    if not 0 <= think_s < math.inf:
        raise bad("think_s", think_s, "a finite time of at least 0 s")
    if block_tokens < 1:
        raise bad("block_tokens", block_tokens, "at least 1")
    rows = lengths(path).arrivals
    made: list[Arrival] = []
    ids: tuple[int, ...] = ()
    next_id = session = 0
    for index, row in enumerate(rows):
        before = made[-1] if made else None
        history = 0 if before is None else before.prompt + before.output
        follows = before is not None and row.prompt >= history
        kept = made[-1].prompt // block_tokens if follows else 0
        session += 0 if follows else 1
        want = blocks_of(row.prompt, block_tokens)
        ids = (*ids[:kept], *range(next_id, next_id + want - kept))
        next_id += want - kept
        last = index + 1 == len(rows) or rows[index + 1].prompt < row.prompt + row.output
        turn = made[-1].turn + 1 if follows else 0
        made.append(
            Arrival(
                at_s=turn * think_s,
                prompt=row.prompt,
                output=row.output,
                blocks=ids,
                block_tokens=block_tokens,
                session=f"chat-{session}",
                turn=turn,
                gap_s=None if last else think_s,
                history=history if follows else 0,
            )
        )
    made.sort(key=lambda arrival: arrival.at_s)
    return _made(path, made)


def agents(
    path: Path,
    agent: str = "",
    *,
    chars_per_token: float = CHARS_PER_TOKEN,
    token_s: float = 0.0,
    block_tokens: int = 64,
) -> Workload:
    """The agents' calls as closed-loop sessions; one kind of agent, or all.

    Characters become tokens by `chars_per_token`, rounded up and at least 1 (a call may carry no text). A recorded
    gap lies between the begins of two calls and so holds the model's own time: `token_s` for each output token is
    taken off it. Which earlier call a prompt repeats is not recorded where it is not the one before: the latest
    that is long enough is taken, so that what is shared comes out as recorded. Sessions begin as recorded, the
    first at 0 s; `with_arrivals` lets them begin at a rate.
    """
    if not 0 < chars_per_token < math.inf:
        raise bad("chars_per_token", chars_per_token, "a finite number above 0")
    if not 0 <= token_s < math.inf:
        raise bad("token_s", token_s, "a finite time of at least 0 s")
    if block_tokens < 1:
        raise bad("block_tokens", block_tokens, "at least 1")
    calls: dict[str, list[_Call]] = {}
    for where, row in _rows(path, AGENTS):
        session = f"{row['agent']}/{row['session_id']}"
        numbers = [where.number(row, name) for name in AGENTS[2:]]
        call = _Call(*numbers)
        earlier = calls.setdefault(session, [])
        if call.seq != len(earlier):
            raise where.wrong("seq", call.seq, f"{len(earlier)}, the session's next")
        if earlier and call.at_us < earlier[-1].at_us:
            raise where.wrong("timestamp_us", call.at_us, f"at least the call before's, {earlier[-1].at_us}")
        longest = max((other.prompt for other in earlier), default=0)
        limits = {"prefix_chars_any": (call.shared, min(call.prompt, longest))}
        limits["prefix_chars_prev"] = (call.shared_before, call.shared)
        for name, (got, most) in limits.items():
            if got > most:
                raise where.wrong(name, got, f"at most {most}")
        earlier.append(call)
    if agent:
        calls = {name: turns for name, turns in calls.items() if name.partition("/")[0] == agent}
        if not calls:
            raise SetupError(f"{path}: agent: got {agent!r}, want one that the file has")
    begin = min((turns[0].at_us for turns in calls.values()), default=0)
    arrivals: list[Arrival] = []
    next_id = 0
    for session, turns in calls.items():
        for arrival in _program(session, turns, chars_per_token, token_s, block_tokens, next_id):
            at_s = (turns[arrival.turn].at_us - begin) / 1e6
            arrivals.append(replace(arrival, at_s=at_s))
            next_id = max(next_id, 1 + max(arrival.blocks))
    arrivals.sort(key=lambda arrival: arrival.at_s)
    return _made(path, arrivals)


@dataclass(frozen=True, slots=True)
class _Call:
    seq: int
    at_us: int
    prompt: int
    output: int
    shared_before: int
    shared: int


def _program(
    session: str, turns: list[_Call], chars: float, token_s: float, block_tokens: int, next_id: int
) -> Iterator[Arrival]:
    made: list[Arrival] = []
    for turn, call in enumerate(turns):
        prompt, output = (max(1, math.ceil(n / chars)) for n in (call.prompt, call.output))
        history = min(prompt, math.floor(call.shared / chars))
        like = turn - 1
        if call.shared > call.shared_before:
            like = next(at for at in reversed(range(turn)) if turns[at].prompt >= call.shared)
        kept = history // block_tokens
        want = blocks_of(prompt, block_tokens)
        shared = made[like].blocks[:kept] if kept else ()
        gap_s = None
        if turn + 1 < len(turns):
            gap_s = max(0.0, (turns[turn + 1].at_us - call.at_us) / 1e6 - output * token_s)
        ids = (*shared, *range(next_id, next_id + want - kept))
        next_id += want - kept
        made.append(Arrival(0.0, prompt, output, ids, block_tokens, session, turn, gap_s, history))
    yield from made


@dataclass(frozen=True, slots=True)
class Line:
    """A place in a file, which knows how to complain."""

    path: Path
    at: int

    def wrong(self, field: str, got: object, want: str) -> SetupError:
        return SetupError(f"{self.path}:{self.at}: {field}: got {got!r}, want {want}")

    def integer(self, field: str, got: object, least: int = 0) -> int:
        if type(got) is not int or not least <= got < 2**63:
            raise self.wrong(field, got, f"an integer of at least {least}")
        return got

    def number(self, row: Mapping[str, str], field: str, least: int = 0) -> int:
        text = row[field]
        # The limit keeps out what Python refuses to convert, and what no counter holds.
        whole = int(text) if text.isascii() and text.isdigit() and len(text) < 20 else text
        if isinstance(whole, str) or whole < least:
            raise self.wrong(field, text, f"an integer of at least {least}")
        return whole

    def decimal(self, row: Mapping[str, str], field: str) -> float:
        text = row[field]
        if _DECIMAL.fullmatch(text) is None or not math.isfinite(float(text)):
            raise self.wrong(field, text, "a finite decimal number of at least 0")
        return float(text)

    def rises(self, field: str, at_s: float, arrivals: list[Arrival]) -> None:
        if arrivals and at_s < arrivals[-1].at_s:
            raise self.wrong(field, f"{at_s} s from the begin", f"at least the line before's, {arrivals[-1].at_s} s")


def _text(path: Path) -> str:
    try:
        raw = path.read_bytes()
        if path.suffix == ".gz":
            raw = gzip.decompress(raw)
        return raw.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise SetupError(f"{path}: got {error}, want UTF-8 text, in gzip if its name ends in .gz") from None


def _rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[Line, dict[str, str]]]:
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        for index, cells in enumerate(reader):
            where = Line(path, reader.line_num)
            if index == 0:
                if tuple(cells) != columns:
                    raise where.wrong("header", ",".join(cells)[:80], ",".join(columns))
            elif len(cells) != len(columns):
                raise where.wrong("fields", len(cells), f"{len(columns)}: {','.join(columns)}")
            else:
                yield where, dict(zip(columns, cells, strict=True))
    except csv.Error as error:
        raise Line(path, reader.line_num).wrong("line", str(error), "comma-separated values") from None


def _made(path: Path, arrivals: list[Arrival]) -> Workload:
    if not arrivals:
        raise SetupError(f"{path}: requests: got none, want at least one")
    return Workload(path.name.partition(".")[0], tuple(arrivals), path.name)
