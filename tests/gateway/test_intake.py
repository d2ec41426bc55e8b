"""What becomes of a client's request before anybody else sees it."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.config import GatewayConfig
from core.errors import RequestError
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


@pytest.mark.parametrize(("decode_tokens", "max_tokens"), [(0, 80), (10_000, 80), (100, 80), (50, 30), (21, 1), (5, 1)])
def test_without_max_tokens_a_request_fills_what_there_is(tokenizer, decode_tokens: int, max_tokens: int):
    request, _ = intake(tokenizer).request(asked(), None, decode_tokens)
    assert request.sampling.max_tokens == max_tokens


def test_max_tokens_that_was_asked_for_is_never_changed(tokenizer):
    request, _ = intake(tokenizer).request(asked(max_tokens=70), None, 30)
    assert request.sampling.max_tokens == 70


def test_text_with_a_token_that_the_model_does_not_know_is_refused(tokenizer):
    """A tokenizer may have more tokens than the model has embeddings."""
    made = inference_pb2.GenerateRequest(text="What does textwrap.dedent do?")
    highest = max(tokenizer.encode(made.text))
    with pytest.raises(RequestError, match=f"prompt: got {highest}, want 0..{highest - 1}"):
        intake(tokenizer, vocabulary=highest).request(made, None, 0)


def test_more_ids_than_a_context_holds_are_not_turned_into_text(tokenizer):
    with pytest.raises(RequestError, match="token_ids: got 101, want at most 100"):
        intake(tokenizer).text_ids([5] * 101)
    assert intake(tokenizer).text_ids([5] * 100) == (5,) * 100


@pytest.mark.parametrize(("call_s", "timeout_s"), [(None, 60.0), (5.0, 5.0), (500.0, 60.0)])
def test_a_request_lives_as_long_as_its_call_or_the_deployment_allows(tokenizer, call_s, timeout_s: float):
    request, _ = intake(tokenizer, timeout_s=60.0).request(asked(), call_s, 0)
    assert request.timeout_s == timeout_s


def test_a_request_without_goals_gets_the_deployments(tokenizer):
    made = asked()
    made.slo.gap_s = 0.5
    request, _ = intake(tokenizer, ttft_s=2.0, gap_s=0.1).request(made, None, 0)
    assert (request.slo.ttft_s, request.slo.gap_s) == (2.0, 0.5)
