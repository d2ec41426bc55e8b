"""Texts that must match something, over separate processes: they do, and bit for bit they are what one engine says.

Only tokens cross from worker to worker, whether rows are handed over, move, or are lost with their worker.
"""

from __future__ import annotations

import asyncio
import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from control import cli
from core.constraint import Constraint, Language
from core.sampling import Sampling
from engine.grammar import Grammars
from protos.baton.v1 import inference_pb2
from tests.live.asks import ENDS, prompt
from tests.live.cluster import SECRET, Client, Live, Reference, ask, several, together
from tests.live.test_moving import ARENA, EDGE
from tests.live.test_sampling import Case, Told, told

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 4},
        "kind": {"enum": ["small", "large", None]},
    },
    "required": ["name", "sizes", "kind"],
    "additionalProperties": False,
}
PICKY: dict[str, tuple[dict[str, Any], Constraint]] = {
    "schema": ({"json_schema": json.dumps(SCHEMA)}, Constraint(Language.JSON_SCHEMA, json.dumps(SCHEMA))),
    "regex": ({"regex": "([a-f]{2}-){3,9}[xyz]"}, Constraint(Language.REGEX, "([a-f]{2}-){3,9}[xyz]")),
    "grammar": (
        {"grammar": 'root ::= "(" root ")" | [0-9]'},
        Constraint(Language.GRAMMAR, 'root ::= "(" root ")" | [0-9]'),
    ),
    "choice": (
        {"choice": {"texts": ["perhaps", "per se"]}},
        Constraint(Language.GRAMMAR, 'start: "perhaps" | "per se"'),
    ),
}
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": {"temperature": 0.9, "seed": 5},
    "all": {
        "temperature": 1.5, "seed": 6, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.2, "frequency_penalty": 0.5,
        "min_tokens": 9, "logprobs": 2,
    },
}  # fmt: skip
NUMBERS = r"\[(-?[1-9][0-9]{0,2},){110}0\]"
"""A list of 111 numbers: some 400 tokens."""


def picky(name: str, kind: str, number: int = 0, n: int = 1) -> Case:
    fields, constraint = PICKY[name]
    tokens = prompt((17, 64, 130)[number % 3], 70 + number)
    sampling = Sampling(200, stop_token_ids=ENDS, n=n, constraint=constraint, **KINDS[kind])
    return Case(tokens, sampling, ask(tokens, 200, n=n, **fields, **KINDS[kind]))


CASES = {
    f"{name}-{kind}": picky(name, kind, number) for number, name in enumerate(PICKY) for kind in KINDS
}  # fmt: skip
FREE = {
    f"free-{number}": Case(prompt(40, number), Sampling(60, stop_token_ids=ENDS), ask(prompt(40, number), 60))
    for number in range(4)
}
LONG = Case(
    prompt(90, 3),
    Sampling(1000, stop_token_ids=ENDS, temperature=1.2, seed=3, constraint=Constraint(Language.REGEX, NUMBERS)),
    ask(prompt(90, 3), 1000, regex=NUMBERS, temperature=1.2, seed=3),
)


def fits(name: str, text: str) -> bool:
    """Whether it is what was asked for."""
    match name:
        case "schema":
            found = json.loads(text)
            sizes, kind = found["sizes"], found["kind"]
            good = all(type(each) is int and 0 <= each <= 99 for each in sizes) and kind in ("small", "large", None)
            return good and len(sizes) <= 4 and len(found["name"]) <= 12 and len(found) == 3
        case "regex":
            return re.fullmatch(PICKY[name][0]["regex"], text) is not None
        case "grammar":
            found = re.fullmatch(r"(\(*)[0-9](\)*)", text)
            return found is not None and len(found[1]) == len(found[2])
        case _:
            return text in ("perhaps", "per se")


@pytest.fixture(scope="module")
def started(launch, model):
    """One prefill and two decode workers between which long rows move; exact mode."""
    live = launch(
        "constrained", model, decode=2, dtype="float32", exact=True, hash_logits=True, chunk_tokens=32,
        kv_memory=str(ARENA), migrate=True, migrate_below_steps=EDGE, migrate_above_steps=EDGE,
    )  # fmt: skip
    live.torn = True
    yield live
    live.stop()


@pytest.fixture(scope="module")
def reference(model):
    return Reference(model, dtype="float32", exact=True, grammars=Grammars(model, 320, ENDS))


def test_each_is_what_one_process_says_beside_texts_that_are_free(started: Live, reference: Reference):
    cases = CASES | FREE

    async def run() -> list[Told]:
        async with Client(started.gateway) as client:
            return list(await asyncio.gather(*(told(client, each.request) for each in cases.values())))

    ended = set()
    for (name, each), reply in zip(cases.items(), asyncio.run(run()), strict=True):
        each.check(reply, reference)
        if name in CASES and reply.last.finish_reason == "stop":
            ended.add(name.split("-")[0])
            assert fits(name.split("-")[0], reply.text), reply.text
    assert ended >= {"regex", "choice"}
    started.wait_empty()


def test_continuations_are_constrained_each_for_itself(started: Live, reference: Reference):
    each = picky("regex", "seeded", 5, n=4)
    replies = several(started, each.request)
    for branch, reply in enumerate(replies):
        assert reply.tokens == reference.tokens(each.tokens, each.sampling.branch(branch))
        assert fits("regex", reply.text)
    assert len({reply.text for reply in replies}) > 1
    started.wait_empty()


def test_what_cannot_be_compiled_is_refused_before_anybody_works_for_it(started: Live):
    before = started.total("baton_prefill_tokens")
    bad = [
        ask("x", 5, json_schema='{"type": "tuple"}'), ask("x", 5, regex=f"({SECRET}"), ask("x", 5, grammar="start: a"),
        ask("x", 5, choice={}), ask("x", 5, regex="a", ignore_eos=True),
    ]  # fmt: skip

    async def run():
        async with Client(started.gateway) as client:
            info = await client.stub.GetModelInfo(inference_pb2.GetModelInfoRequest())
            return info.constrains, await together(*(client.generate(each) for each in bad))

    constrains, replies = asyncio.run(run())
    assert constrains
    assert [reply.code for reply in replies] == ["INVALID_ARGUMENT"] * 5
    said = [reply.details.split(":")[0] for reply in replies]
    assert said == ["json_schema", "regex", "grammar", "choice", "ignore_eos"]
    assert started.total("baton_prefill_tokens") == before


def test_the_command_line_asks_for_it(started: Live, tmp_path: Path, capsys):
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    (tmp_path / "rules").write_text(PICKY["grammar"][0]["grammar"])
    for name, asked in (
        ("schema", ("--json-schema", str(tmp_path / "schema.json"))),
        ("regex", ("--regex", PICKY["regex"][0]["regex"])),
        ("grammar", ("--grammar", str(tmp_path / "rules"))),
    ):
        words = ["generate", "--gateway", started.gateway, "--max-tokens", "400", "--temperature", "1", "--seed", "9"]
        with pytest.raises(SystemExit) as ended:
            cli.main([*words, *asked, "-o", "json", "x"])
        document = json.loads(capsys.readouterr().out)
        assert (ended.value.code, document["end"]["finish_reason"]) == (0, "stop")
        assert fits(name, document["text"])
    for flag, code, said in (("--regex", 1, "regex: unclosed group"), ("--json-schema", 2, "(a: cannot be read")):
        with pytest.raises(SystemExit) as ended:
            cli.main([*words, flag, "(a", "x"])
        assert ended.value.code == code
        assert said in capsys.readouterr().err


def test_a_row_that_moves_and_loses_its_worker_still_matches(started: Live, reference: Reference):
    async def run() -> Told:
        async with Client(started.gateway) as client:
            reply = Told()
            stream = client.responses(LONG.request, reply)
            while started.total("baton_rows_offered", outcome="moved") == moved:
                for _ in range(60):
                    reply.take(await anext(stream))
            name = started.metric("decode-0", "baton_requests", phase="decode", state="running") > 0
            started.kill("decode-0" if name else "decode-1", signal.SIGKILL)
            async for response in stream:
                reply.take(response)
            return reply

    for _ in range(5):  # it may be between the two at that moment
        moved = started.total("baton_rows_offered", outcome="moved")
        reply = asyncio.run(run())
        LONG.check(reply, reference)
        assert len(json.loads(reply.text)) == 111
        if reply.last.attempts > 1:
            break
        started.restart(*started.deployment.ended())
    assert reply.last.attempts == 2
    started.wait_empty()
