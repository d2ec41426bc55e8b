"""The readers: what they make of a line, how they refuse a wrong one, and the statistics of the public traces."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.errors import LocalError, SetupError
from sim import traces
from sim.traces import AGENTS, AZURE, LENGTHS, MOONCAKE_TICK_S, OFFSETS, REFERENCE
from sim.workload import Arrival, groups, jitter, reusable, spread, summary

APEX, SERVING = OFFSETS

MOON = {"timestamp": 3000, "input_length": 1025, "output_length": 7, "hash_ids": [0, 5, 9]}


def public(name: str) -> Path:
    """The path of a public trace; where there is none the test is skipped."""
    path = traces.folder() / name
    if not path.is_file():
        pytest.skip("needs the public traces (BATON_TRACES)")
    return path


def written(folder: Path, header: tuple[str, ...], *rows: str) -> Path:
    path = folder / "t.csv"
    path.write_text("\r\n".join([",".join(header), *rows]), encoding="utf-8")
    return path


def moon(folder: Path, *rows: object) -> Path:
    path = folder / "t.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_mooncake_ids_become_blocks(tmp_path) -> None:
    path = moon(tmp_path, MOON, {**MOON, "timestamp": 6001, "input_length": 512, "hash_ids": [0]})
    first, second = traces.read(path).arrivals
    assert (first.at_s, first.prompt, first.output, first.blocks, first.block_tokens) == (3, 1025, 7, (0, 5, 9), 512)
    assert (second.at_s, second.blocks) == (6.001, (0,))


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ("", "line: got '', want a JSON object"),
        ("[1]", "line: got '[1]', want a JSON object"),
        ("{", "line: got '{', want a JSON object"),
        ("[" * 100000, "want a JSON object"),
        ({"timestamp": 1}, "fields: got ['timestamp'], want exactly timestamp, input_length"),
        ({**MOON, "chat_id": 1}, "fields: got ['chat_id'"),
        ({**MOON, "timestamp": -1}, "timestamp: got -1, want an integer of at least 0"),
        ({**MOON, "timestamp": 3000.5}, "timestamp: got 3000.5"),
        ({**MOON, "timestamp": 10**400}, "timestamp: got 1000"),
        ({**MOON, "timestamp": True}, "timestamp: got True"),
        ({**MOON, "input_length": 0}, "input_length: got 0, want an integer of at least 1"),
        ({**MOON, "output_length": 0}, "output_length: got 0, want an integer of at least 1"),
        ({**MOON, "input_length": 1024}, "hash_ids: got '3 ids', want 2 for 1024 tokens in blocks of 512"),
        ({**MOON, "hash_ids": [0, 5]}, "hash_ids: got '2 ids', want 3 for 1025 tokens"),
        ({**MOON, "hash_ids": [0, 5, "9"]}, "hash_ids: got \"[0, 5, '9']\", want a list of integers"),
        ({**MOON, "hash_ids": None}, "hash_ids: got 'None', want a list of integers"),
        ({**MOON, "timestamp": 2999}, "timestamp: got '2.999 s from the begin', want at least the line before's, 3.0"),
    ],
)
def test_a_wrong_mooncake_line_is_one_sentence(tmp_path, row, sentence) -> None:
    path = moon(tmp_path, MOON, row, MOON)
    with pytest.raises(SetupError) as error:
        traces.mooncake(path)
    assert str(error.value).startswith(f"{path}:2: ")
    assert sentence in str(error.value)


def test_azure_stamps_count_from_the_first(tmp_path) -> None:
    path = written(tmp_path, AZURE, "2024-02-28 23:59:59.2500000,31,41", "2024-02-29 00:00:01.2500007,5,6")
    assert [(a.at_s, a.prompt, a.output) for a in traces.read(path).arrivals] == [(0, 31, 41), (2.0000007, 5, 6)]


def test_offsets_have_their_units(tmp_path) -> None:
    for header, rows in (
        (APEX, ("1500000000,3,4",)),
        (SERVING, ("1500000000,3,4",)),
        (REFERENCE, ("0,1.5,3,4",)),
    ):
        assert traces.read(written(tmp_path, header, *rows)).arrivals == (Arrival(1.5, 3, 4),)


WRONG_ROWS = [
    (AZURE, "2024-05-06T10:20:36,1,2", "TIMESTAMP: got '2024-05-06T10:20:36', want YYYY-MM-DD HH:MM:SS"),
    (AZURE, "2024-13-06 10:20:36,1,2", "TIMESTAMP: got '2024-13-06 10:20:36'"),
    (AZURE, "2024-05-06 10:20:35,1,2", "TIMESTAMP: got '-1.0 s from the begin', want at least the line before's"),
    (AZURE, "2024-05-06 10:20:36,0,2", "ContextTokens: got '0', want an integer of at least 1"),
    (AZURE, "2024-05-06 10:20:36,1,-2", "GeneratedTokens: got '-2', want an integer of at least 1"),
    (AZURE, "2024-05-06 10:20:36,1", "fields: got 2, want 3: TIMESTAMP,ContextTokens,GeneratedTokens"),
    (AZURE, "", "fields: got 0, want 3"),
    (AZURE, '2024-05-06 10:20:36,1,"2', "line: got 'unexpected end of data'"),
    (APEX, "1.5,1,2", "StartTimeOffset: got '1.5', want an integer of at least 0"),
    (APEX, "5,٣,2", "ContextTokens: got '٣'"),
    (APEX, f"5,{'9' * 5000},2", "ContextTokens: got '999"),
    (REFERENCE, "2,0.5,1,2", "idx: got '2', want 1"),
    (REFERENCE, "1,nan,1,2", "unit_rate_arrival_s: got 'nan', want a finite decimal number"),
    (REFERENCE, "1,1e999,1,2", "unit_rate_arrival_s: got '1e999', want a finite decimal number"),
    (LENGTHS, "4,2,7,2.0", "num_total_tokens: got '7', want 6, the sum of both"),
    (LENGTHS, "4,2,6,3.0", "pd_ratio: got '3.0', want 2.0"),
    (AGENTS, "a,s,2,5,4,4,0,0", "seq: got 2, want 1, the session's next"),
    (AGENTS, "a,s,1,4,4,4,0,0", "timestamp_us: got 4, want at least the call before's, 5"),
    (AGENTS, "a,s,1,5,9,4,0,5", "prefix_chars_any: got 5, want at most 4"),
    (AGENTS, "a,s,1,5,4,4,3,2", "prefix_chars_prev: got 3, want at most 2"),
    (AGENTS, "a,s,1,5,x,4,0,0", "input_chars: got 'x', want an integer of at least 0"),
]
GOOD_ROW = {
    AZURE: "2024-05-06 10:20:36,1,2",
    APEX: "5,1,2",
    REFERENCE: "0,0.0,1,2",
    LENGTHS: "4,2,6,2.0",
    AGENTS: "a,s,0,5,4,4,0,0",
}


@pytest.mark.parametrize(("header", "row", "sentence"), WRONG_ROWS)
def test_a_wrong_row_is_one_sentence(tmp_path, header, row, sentence) -> None:
    path = written(tmp_path, header, GOOD_ROW[header], row, "")
    with pytest.raises(SetupError) as error:
        traces.read(path)
    assert f"{path}:3: " in str(error.value)
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("t.csv", b"a,b\n1,2\n", "t.csv:1: header: got 'a,b', want a JSON object or one of TIMESTAMP,"),
        ("t.csv", b"", "t.csv:1: header: got ''"),
        ("t.csv", ",".join(AZURE).encode(), "t.csv: requests: got none, want at least one"),
        ("t.csv", b"\xff\xfe", "want UTF-8 text, in gzip if its name ends in .gz"),
        ("t.csv.gz", b"plain", "want UTF-8 text, in gzip"),
        ("t.csv.gz", gzip.compress(b"a" * 1000, mtime=0)[:-9], "want UTF-8 text, in gzip"),
        (None, b"", "No such file or directory"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path, name, content, sentence) -> None:
    path = tmp_path / (name or "none.csv")
    if name:
        path.write_bytes(content)
    with pytest.raises(SetupError) as error:
        traces.read(path)
    assert sentence in str(error.value)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(st.sampled_from(list(GOOD_ROW)), st.text(max_size=60))
def test_whatever_stands_in_a_file_is_read_or_refused(tmp_path, header, text) -> None:
    path = tmp_path / "t.csv"
    path.write_text(f"{','.join(header)}\n{GOOD_ROW[header]}\n{text}", encoding="utf-8", errors="replace")
    said = ""
    try:
        assert len(traces.read(path)) >= 1
    except SetupError as error:
        said = str(error)
    assert not said or said.startswith(f"{path}:")


def test_rows_that_continue_become_one_conversation(tmp_path) -> None:
    rows = ["10,6,16,1.6666667", "20,4,24,5.0", "24,1,25,24.0", "24,1,25,24.0"]
    found = traces.conversations(written(tmp_path, LENGTHS, *rows), think_s=2.0, block_tokens=4)
    one, two = groups(found)
    assert [(a.at_s, a.turn, a.gap_s, a.history) for a in one] == [(0, 0, 2, 0), (2, 1, 2, 16), (4, 2, None, 24)]
    assert [a.blocks for a in one] == [(0, 1, 2), (0, 1, 3, 4, 5), (0, 1, 3, 4, 5, 6)]
    assert (two[0].gap_s, two[0].history, set(two[0].blocks) & set(one[2].blocks)) == (None, 0, set())


def test_agents_share_what_was_recorded(tmp_path) -> None:
    rows = ["a,s,0,0,80,0,0,0", "a,s,1,2000000,20,16,0,0", "a,s,2,3000000,120,4,4,70", "b,u,0,9000000,1,1,0,0"]
    path = written(tmp_path, AGENTS, *rows)
    found = traces.agents(path, token_s=0.25, block_tokens=4)
    one, two = groups(found)
    assert [(a.prompt, a.output) for a in one] == [(20, 1), (5, 4), (30, 1)]
    # 2 s less one token; 1 s less four; the last.
    assert [a.gap_s for a in one] == [1.75, 0, None]
    # The third call's 17 tokens are not the second's, so they are the first's: four whole blocks.
    assert one[2].history == 17
    assert one[2].blocks[:5] == (*one[0].blocks[:4], 7)
    assert not set(one[2].blocks) & set(one[1].blocks)
    assert (two[0].at_s, two[0].session) == (9, "b/u")
    assert [a.session for a in traces.agents(path, "b").arrivals] == ["b/u"]


@pytest.mark.parametrize(
    ("call", "kind", "sentence"),
    [
        (lambda path: traces.agents(path, "c"), SetupError, "agent: got 'c', want one that the file has"),
        (lambda path: traces.agents(path, chars_per_token=0), LocalError, "chars_per_token: got 0"),
        (lambda path: traces.agents(path, token_s=-1), LocalError, "token_s: got -1"),
        (lambda path: traces.agents(path, block_tokens=0), LocalError, "block_tokens: got 0"),
        (lambda path: traces.conversations(path, think_s=-1), LocalError, "think_s: got -1"),
        (lambda path: traces.conversations(path, think_s=1, block_tokens=0), LocalError, "block_tokens: got 0"),
        (lambda path: traces.offsets(path), SetupError, "header: got 'agent,session_id,"),
        (lambda path: traces.azure(path), SetupError, "header: got 'agent,session_id,"),
    ],
)
def test_a_wrong_argument_is_named(tmp_path, call, kind, sentence) -> None:
    with pytest.raises(kind) as error:
        call(written(tmp_path, AGENTS, GOOD_ROW[AGENTS]))
    assert sentence in str(error.value)


def test_the_traces_are_where_the_environment_says(tmp_path) -> None:
    (tmp_path / "a.csv").touch()
    assert traces.find("a.csv", {"BATON_TRACES": str(tmp_path)}) == tmp_path / "a.csv"
    with pytest.raises(SetupError, match=r"BATON_TRACES: got no file .*b\.csv, want the folder that holds b\.csv"):
        traces.find("b.csv", {"BATON_TRACES": str(tmp_path)})
    assert traces.folder({}) == Path(traces.__file__).resolve().parents[2] / "shared" / "traces"
    assert traces.folder({"BATON_TRACES": ""}) == traces.folder({})


# File: rows, seconds, requests/s, variation of the gaps, then mean, 50, 90, 99 % and maximum of prompt and output.
# As published or measured with other tools; of Mooncake there is the first half hour. None: not published.
Row = tuple[int, float, float, float | None, tuple, tuple]
STATISTICS: dict[str, Row] = {
    "mooncake_conversation_first30min.jsonl.gz": (
        5719,
        1797,
        3.182,
        2.92,
        (12870, 7640, 28638, 91207, 123192),
        (346, 356, 608, 1105, 2000),
    ),
    "azure_llm_2023_conv.csv.gz": (
        19366,
        3502,
        5.53,
        1.09,
        (1155, 1020, 2734, 4142, 14050),
        (211, 129, 424, 601, 1000),
    ),
    "sharegpt_8k_llama2_lengths.csv.gz": (
        30731,
        0,
        0,
        None,
        (2340, 1730, 5696, 7434, 8141),
        (439, 415, 834, 998, 1024),
    ),
    "arxiv_summarization_llama2_lengths.csv.gz": (
        28257,
        0,
        0,
        None,
        (2588, 2730, 3702, 3933, 4054),
        (291, 167, 372, 3271, 4056),
    ),
    "apex_lmsys_llama_rate0.5.csv.gz": (
        1024,
        2023,
        0.506,
        1.0,
        (None, 17, 177, 586, 1037),
        (None, 117, 389, 533, 761),
    ),
    "apex_creation_llama_rate0.5.csv.gz": (
        512,
        1097,
        0.466,
        0.96,
        (None, 309, 400, 566, 1232),
        (None, 1106, 1708, 2341, 3501),
    ),
    "llmservingsim_sharegpt_llama31_300.csv.gz": (
        300,
        29,
        10.26,
        0.94,
        (None, 732, 1460, 2765, 3998),
        (None, 632, 770, 784, 1021),
    ),
    "reference_simdistserve_requests_seed0.csv": (
        500,
        504,
        0.99,
        1.01,
        (None, 522, 1347, 1819, 2043),
        (None, 366, 790, 979, 1024),
    ),
}


@pytest.mark.parametrize("name", STATISTICS)
def test_a_public_trace_has_its_statistics(name) -> None:
    rows, span_s, rate, cv, *tokens = STATISTICS[name]
    found = summary(traces.read(public(name)))
    assert found.rows == rows
    assert found.span_s == pytest.approx(span_s, abs=0.5)
    assert found.rate == pytest.approx(rate, rel=0.005)
    assert cv is None or found.gap_cv == pytest.approx(cv, abs=0.006)
    for ours, (mean, *quantiles) in zip((found.prompt, found.output), tokens, strict=True):
        assert mean is None or ours.mean == pytest.approx(mean, abs=0.51)
        assert [ours.p50, ours.p90, ours.p99, ours.max] == pytest.approx(quantiles, abs=0.51)


def test_the_mooncake_trace_shares_prefixes_and_is_jittered() -> None:
    workload = traces.read(public("mooncake_conversation_first30min.jsonl.gz"))
    assert reusable(workload) == pytest.approx(0.347, abs=0.0005)
    assert all(arrival.blocks[0] == 0 for arrival in workload.arrivals)
    found = summary(jitter(workload, 1, MOONCAKE_TICK_S))
    assert found.gap_cv == pytest.approx(1.0, abs=0.15)
    assert (found.rows, found.prompt) == (5719, summary(workload).prompt)


def test_the_sharegpt_rows_are_conversations() -> None:
    found = traces.conversations(public("sharegpt_8k_llama2_lengths.csv.gz"), think_s=10, block_tokens=512)
    sessions = groups(found)
    turns = spread(len(session) for session in sessions)
    assert (len(sessions), turns.p50, turns.p90, turns.p99, turns.max) == (5678, 4, 12, 23, 56)
    assert sum(len(session) > 1 for session in sessions) / len(sessions) == pytest.approx(0.80, abs=0.005)
    first = spread(session[0].prompt for session in sessions)
    adds = spread(arrival.prompt - arrival.history for arrival in found.arrivals if arrival.turn)
    assert (first.p50, first.p90, adds.p50, adds.p90) == (64, 600, 26, 230)
    again = sum(a.history for a in found.arrivals) / sum(a.prompt for a in found.arrivals)
    assert again == pytest.approx(0.935, abs=0.0006)


@pytest.mark.parametrize(
    ("agent", "sessions", "calls", "median", "waits", "shared"),
    [
        ("miniswe", 20, 402, 22, (1.08, 2.0, 2.7), 0.936),
        ("magagent", 25, 746, 33, (5.6, 11.9, 109), 0.83),
        ("taubench", 24, 471, 20, (0.3, 0.5, 1.5), 0.87),
    ],
)
def test_the_agents_sessions_have_their_statistics(agent, sessions, calls, median, waits, shared) -> None:
    # By characters, so that they compare with what was measured on text.
    found = traces.agents(
        public("agent_sessions_chars.csv.gz"), agent, chars_per_token=1.0, block_tokens=1 if agent == "taubench" else 64
    )
    assert (len(groups(found)), len(found)) == (sessions, calls)
    assert spread(len(session) for session in groups(found)).p50 == median
    gaps = spread(arrival.gap_s for arrival in found.arrivals if arrival.gap_s is not None)
    assert (gaps.p50, gaps.p90, gaps.p99) == pytest.approx(waits, rel=0.06)
    total = sum(arrival.prompt for arrival in found.arrivals)
    assert sum(arrival.history for arrival in found.arrivals) / total == pytest.approx(shared, abs=0.004)
    if agent == "taubench":
        assert reusable(found) == pytest.approx(shared, abs=0.004)
