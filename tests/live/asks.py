"""Random prompts, their requests, and the sampling with which one engine answers them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from core.sampling import Sampling
from protos.baton.v1 import inference_pb2
from tests.engine.chain import Chain
from tests.live.cluster import Reference, Reply, ask

ENDS = (1, 310, 311, 312, 313)
"""The model's end tokens."""


@dataclass(frozen=True)
class Case:
    """A request and all that is needed to check its reply."""

    prompt: tuple[int, ...]
    sampling: Sampling
    request: inference_pb2.GenerateRequest

    def check(self, reply: Reply, reference: Reference | Chain) -> None:
        """The reply is what one engine says, and its counts are right."""
        assert reply.code == "OK", f"{reply.code}: {reply.details}"
        assert reply.tokens == reference.tokens(self.prompt, self.sampling)
        end, last = reply.last, reference.samples(self.prompt, self.sampling)[-1]
        assert end.finish_reason == last.finish
        assert (end.prompt_tokens, end.completion_tokens) == (len(self.prompt), len(reply.tokens))
        assert (end.stop_token_id if end.HasField("stop_token_id") else None) == (
            last.token if last.finish == "stop" else None
        )


def prompt(length: int, number: int = 0) -> tuple[int, ...]:
    """Random tokens, the same for the same arguments."""
    return tuple(random.Random(length * 100_000 + number).choices(range(2, 300), k=length))


def case(
    length: int, max_tokens: int, number: int = 0, *, forever: bool = False, request_id: str = "", **options: Any
) -> Case:
    """A prompt of `length` tokens; `options` are the sampling's; `forever` goes on past end tokens."""
    tokens = prompt(length, number)
    sampling = Sampling(max_tokens, stop_token_ids=() if forever else ENDS, ignore_eos=forever, **options)
    return Case(tokens, sampling, ask(tokens, max_tokens, ignore_eos=forever, request_id=request_id, **options))
