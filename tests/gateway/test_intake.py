"""What becomes of a client's request before anybody else sees it."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest

from core.config import GatewayConfig
from core.constraint import Language
from core.errors import RequestError
from core.group import Group
from core.prefix import page_hashes
from core.request import Slo
from core.sampling import Sampling
from engine.grammar import Grammars
from gateway.intake import Intake, ModelFacts
from gateway.text import Tokenizer
from protos.baton.v1 import inference_pb2

DEMO = Path(__file__).resolve().parents[2] / "deploy" / "demo" / "model"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(DEMO)


def intake(tokenizer: Tokenizer, vocabulary: int = 2048, context: int = 100, **settings) -> Intake:
    config = GatewayConfig("gateway-0", "127.0.0.1:1", str(DEMO), "m", **settings)
    return Intake(config, ModelFacts("m", "f", context, vocabulary, (1,)), tokenizer, None)


def asked(**fields) -> inference_pb2.GenerateRequest:
    made = inference_pb2.GenerateRequest(**fields)
    made.token_ids.ids.extend(range(4, 24))
    return made


def nobody(prompt: int, n: int) -> None:
    """No worker is there to say how much it holds."""


@pytest.mark.parametrize(("most", "max_tokens"), [(None, 80), (10_000, 80), (80, 80), (30, 30), (1, 1)])
@pytest.mark.parametrize("n", [1, 3])
def test_without_max_tokens_a_request_fills_what_there_is(tokenizer, most: int | None, max_tokens: int, n: int):
    told = []

    def room(prompt: int, n: int) -> int | None:
        told.append((prompt, n))
        return most

    request, _ = intake(tokenizer).request(asked(n=n), None, room)
    assert request.sampling.max_tokens == max_tokens
    assert told == [(20, n)]


@pytest.mark.parametrize("field", ["request_id", "session", "tenant", "group", "tool"])
def test_a_name_of_any_length_is_not_carried_about(tokenizer, field: str):
    hints = {} if field == "request_id" else {"hints": {field: "x" * 257}}
    made = asked(max_tokens=5, **hints, **({field: "x" * 257} if not hints else {}))
    with pytest.raises(RequestError, match=f"{field}: got 257 characters, want at most 256"):
        intake(tokenizer).request(made, None, nobody)


def test_a_step_before_the_first_is_refused(tokenizer):
    with pytest.raises(RequestError, match=r"^hints.program_step: got -1, want at least 0") as error:
        intake(tokenizer).request(asked(max_tokens=5, hints={"program_step": -1}), None, nobody)
    assert error.value.code == "INVALID_ARGUMENT"


def test_max_tokens_that_was_asked_for_is_never_changed(tokenizer):
    request, _ = intake(tokenizer).request(asked(max_tokens=70), None, lambda prompt, n: 30)
    assert request.sampling.max_tokens == 70


def test_every_option_of_sampling_reaches_it(tokenizer):
    made = asked(
        max_tokens=70,
        temperature=0.5,
        top_k=9,
        top_p=0.5,
        seed=3,
        stop_token_ids=[7],
        min_p=0.25,
        repetition_penalty=1.5,
        presence_penalty=-0.5,
        frequency_penalty=0.75,
        logit_bias={9: 1.5, 4: -100.0},
        min_tokens=11,
        logprobs=0,
        prompt_logprobs=20,
        n=1,
    )
    request, _ = intake(tokenizer).request(made, None, nobody)
    assert request.sampling == Sampling(
        70,
        temperature=0.5,
        top_k=9,
        top_p=0.5,
        seed=3,
        stop_token_ids=(7, 1),
        min_p=0.25,
        repetition_penalty=1.5,
        presence_penalty=-0.5,
        frequency_penalty=0.75,
        logit_bias=((4, -100.0), (9, 1.5)),
        min_tokens=11,
        logprobs=0,
        prompt_logprobs=20,
    )
    plain, _ = intake(tokenizer).request(asked(max_tokens=70, seed=3), None, nobody)
    assert plain.sampling == Sampling(70, seed=3, stop_token_ids=(1,))
    assert not plain.sampling.bends


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"min_p": -0.5}, r"^min_p: got -0.5, want in \[0, 1\]"),
        ({"min_p": math.nan}, "^min_p: got nan"),
        ({"repetition_penalty": 0.0}, "^repetition_penalty: got 0.0, want a finite number above 0"),
        ({"repetition_penalty": math.inf}, "^repetition_penalty: got inf"),
        ({"presence_penalty": 2.5}, r"^presence_penalty: got 2.5, want in \[-2, 2\]"),
        ({"frequency_penalty": math.nan}, "^frequency_penalty: got nan"),
        ({"logit_bias": {2048: 1.0}}, r"^logit_bias: got 2048, want 0\.\.2047"),
        ({"logit_bias": {-1: 1.0}}, "^logit_bias: got -1"),
        ({"logit_bias": {5: 101.0}}, r"^logit_bias: got 101.0 for token 5, want in \[-100, 100\]"),
        ({"logit_bias": {5: math.nan}}, "^logit_bias: got nan for token 5"),
        ({"logit_bias": dict.fromkeys(range(1025), 1.0)}, "^logit_bias: got 1025 tokens, want at most 1024"),
        ({"min_tokens": -1}, "^min_tokens: got -1"),
        ({"min_tokens": 71}, "^min_tokens: got 71, want 0 to max_tokens, 70"),
        ({"logprobs": 21}, "^logprobs: got 21, want 0 to 20"),
        ({"prompt_logprobs": -1}, "^prompt_logprobs: got -1, want 0 to 20"),
        ({"n": 0}, "^n: got 0, want 1 to 64"),
        ({"n": 65}, "^n: got 65, want 1 to 64"),
    ],
)
def test_a_bad_option_is_the_callers_error_and_says_what_was_wanted(tokenizer, fields, message):
    with pytest.raises(RequestError, match=message) as error:
        intake(tokenizer).request(asked(max_tokens=70, **fields), None, nobody)
    assert error.value.code == "INVALID_ARGUMENT"


SCHEMA = '{"type": "object", "properties": {"a": {"type": "integer"}}}'


@pytest.mark.parametrize(
    ("fields", "language", "text"),
    [
        ({"json_schema": SCHEMA}, Language.JSON_SCHEMA, SCHEMA),
        ({"json_object": True}, Language.JSON_SCHEMA, '{"type": "object"}'),
        ({"regex": "[a-z]+"}, Language.REGEX, "[a-z]+"),
        ({"grammar": 'start: "a" start | "b"'}, Language.GRAMMAR, 'start: "a" start | "b"'),
        ({"grammar": 'root ::= "a" | "b"'}, Language.GRAMMAR, 'root ::= "a" | "b"'),
        ({"choice": {"texts": ["no", "yes\n", 'é " [x]', "no"]}}, Language.GRAMMAR, None),
    ],
)
def test_what_the_text_must_match_reaches_it(tokenizer, fields, language, text):
    request, _ = intake(tokenizer).request(asked(max_tokens=9, **fields), None, nobody)
    constraint = request.sampling.constraint
    assert constraint is not None
    assert constraint.language is language
    if text is None:
        text = 'start: "no" | "yes\\n" | "é \\" [x]"'
    assert constraint.text == text


def test_an_unset_constraint_is_none(tokenizer):
    for fields in ({}, {"json_object": False}):
        request, _ = intake(tokenizer).request(asked(max_tokens=9, **fields), None, nobody)
        assert request.sampling.constraint is None


@pytest.mark.parametrize("text", ["no", "a.b*", 'é "[x]"\n', "\\d", "/x/i", "日本"])
def test_a_choice_is_its_text_and_nothing_else(tokenizer, text):
    """Not what its letters would mean in a grammar or in a regular expression."""
    made = asked(max_tokens=9, choice={"texts": [text, "other"]})
    constraint = intake(tokenizer).request(made, None, nobody)[0].sampling.constraint
    assert constraint is not None
    walk = Grammars(DEMO, 2048, [1]).walk(constraint, tokenizer.encode(text, special=False), [1])
    assert np.flatnonzero(walk.allowed()).tolist() == [1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"json_schema": "{"}, "^json_schema: ."),
        ({"json_schema": ""}, "^json_schema: ."),
        ({"json_schema": '{"type": "wrong"}'}, "^json_schema: .*wrong"),
        ({"regex": "(a"}, "^regex: ."),
        ({"grammar": "start: missing"}, "^grammar: .*missing"),
        ({"regex": "a" * 65_537}, "^regex: got 65537 characters, want at most 65536"),
        ({"choice": {}}, "^choice: got 0 texts, want 1 to 1024"),
        ({"choice": {"texts": ["a"] * 1025}}, "^choice: got 1025 texts"),
        ({"choice": {"texts": ["a", ""]}}, "^choice: got an empty text"),
        ({"regex": "a", "ignore_eos": True}, "^ignore_eos: got True, want False with a regex"),
    ],
)
def test_what_cannot_be_matched_is_the_callers_error(tokenizer, fields, message):
    with pytest.raises(RequestError, match=message) as error:
        intake(tokenizer).request(asked(max_tokens=70, **fields), None, nobody)
    assert error.value.code == "INVALID_ARGUMENT"
    assert "\n" not in error.value.message


def test_without_the_extra_it_is_named_and_all_else_is_served(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    here = intake(tokenizer)
    with pytest.raises(RequestError, match=r"^regex: llguidance is not installed: it comes with the extra") as error:
        here.request(asked(regex="a"), None, nobody)
    assert error.value.code == "UNIMPLEMENTED"
    assert here.request(asked(), None, nobody)


@pytest.mark.parametrize(("length", "most"), [(20, 20), (3120, 20), (3121, 19), (65536, 0)])
def test_no_more_numbers_are_given_of_a_prompt_than_fit_into_a_message(tokenizer, length: int, most: int):
    made = inference_pb2.GenerateRequest(max_tokens=1, prompt_logprobs=most)
    made.token_ids.ids.extend([5] * length)
    here = intake(tokenizer, context=200_000)
    assert here.request(made, None, nobody)[0].sampling.prompt_logprobs == most
    made.prompt_logprobs = most + 1
    if most < 20:
        with pytest.raises(RequestError, match=f"got {most + 1}, want at most {most} for {length} tokens"):
            here.request(made, None, nobody)
    made.token_ids.ids.extend([5] * 65536)
    made.prompt_logprobs = 0
    with pytest.raises(RequestError, match="prompt_logprobs: got 0, want none for"):
        here.request(made, None, nobody)


def test_text_with_a_token_that_the_model_does_not_know_is_refused(tokenizer):
    """A tokenizer may have more tokens than the model has embeddings."""
    made = inference_pb2.GenerateRequest(text="What does textwrap.dedent do?")
    highest = max(tokenizer.encode(made.text))
    with pytest.raises(RequestError, match=f"prompt: got {highest}, want 0..{highest - 1}"):
        intake(tokenizer, vocabulary=highest).request(made, None, nobody)


def test_more_ids_than_a_context_holds_are_not_turned_into_text(tokenizer):
    with pytest.raises(RequestError, match="token_ids: got 101, want at most 100"):
        intake(tokenizer).text_ids([5] * 101)
    assert intake(tokenizer).text_ids([5] * 100) == (5,) * 100


@pytest.mark.parametrize(("call_s", "timeout_s"), [(None, 60.0), (5.0, 5.0), (500.0, 60.0)])
def test_a_request_lives_as_long_as_its_call_or_the_deployment_allows(tokenizer, call_s, timeout_s: float):
    request, _ = intake(tokenizer, timeout_s=60.0).request(asked(), call_s, nobody)
    assert request.timeout_s == timeout_s


def test_a_request_without_goals_gets_the_deployments(tokenizer):
    made = asked()
    made.slo.gap_s = 0.5
    request, _ = intake(tokenizer, ttft_s=2.0, gap_s=0.1).request(made, None, nobody)
    assert (request.slo.ttft_s, request.slo.gap_s) == (2.0, 0.5)


def test_a_group_has_goals_of_its_own(tokenizer):
    groups = (Group("chat", 1, 1, ttft_s=0.4), Group("", 1, 1))
    here = intake(tokenizer, ttft_s=2.0, gap_s=0.1, group=groups)
    made = asked()
    assert here.request(made, None, nobody)[0].slo == Slo(2.0, 0.1)
    made.hints.group = "chat"
    assert here.request(made, None, nobody)[0].slo == Slo(0.4, 0.1), "what it does not say is the deployment's"
    made.slo.ttft_s = 0.2
    assert here.request(made, None, nobody)[0].slo == Slo(0.2, 0.1), "a request that brings goals has its own"


def test_a_class_is_chosen_by_its_field(tokenizer):
    here, plain = intake(tokenizer, ttft_s=2.0, gap_s=0.1), asked()
    plain.slo.deadline_s = 9.0
    assert here.request(plain, None, nobody)[0].slo == Slo(deadline_s=9.0)
    plain.slo.ttft_s = 1.0
    assert here.request(plain, None, nobody)[0].slo == Slo(1.0, deadline_s=9.0)
    made = asked()
    made.slo.batch = True
    assert here.request(made, None, nobody)[0].slo == Slo(batch=True)
    late = intake(tokenizer, ttft_s=2.0, deadline_s=30.0)
    assert late.request(asked(), None, nobody)[0].slo == Slo(deadline_s=30.0)
    made = asked()
    made.slo.gap_s = 0.5
    assert late.request(made, None, nobody)[0].slo == Slo(2.0, 0.5), "who brings a goal has its own"


@pytest.mark.parametrize("field", ["ttft_s", "gap_s", "deadline_s"])
def test_goals_that_cannot_be_are_refused(tokenizer, field):
    for wrong in (-1.0, float("inf"), float("nan")):
        made = asked()
        setattr(made.slo, field, wrong)
        with pytest.raises(RequestError, match=f"slo.{field}: got"):
            intake(tokenizer).request(made, None, nobody)
    made = asked()
    made.slo.batch = True
    setattr(made.slo, field, 1.0)
    with pytest.raises(RequestError, match=f"slo.{field}: got 1.0, want 0 with slo.batch"):
        intake(tokenizer).request(made, None, nobody)


def test_the_pages_of_a_prompt_are_named_for_its_tenant(tokenizer):
    here = intake(tokenizer)
    plain = here.request(asked(max_tokens=5), None, nobody, 8)[0]
    mine = here.request(asked(max_tokens=5, hints={"tenant": "mine"}), None, nobody, 8)[0]
    assert plain.prefix == page_hashes(plain.prompt, 8)
    assert plain.prefix_page_tokens == 8
    assert mine.prefix == page_hashes(plain.prompt, 8, "mine")
    assert len(plain.prefix) == 2
    assert here.request(asked(max_tokens=5, prompt_logprobs=1), None, nobody, 8)[0].prefix == ()
    assert here.request(asked(max_tokens=5), None, nobody)[0].prefix == ()
