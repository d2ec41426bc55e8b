"""From a client's GenerateRequest to a Request: defaults, limits, tokens. All refusals are typed."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from core.config import GatewayConfig
from core.constraint import Constraint, Language
from core.errors import RequestError
from core.prefix import page_hashes
from core.request import Request, Slo
from core.sampling import Sampling
from engine.grammar import GrammarMissing, Grammars
from gateway.chat import ChatTemplate
from gateway.text import Tokenizer
from protos.baton.v1 import inference_pb2
from runtime import wire
from scheduler.placement import MostTokens

MAX_STOPS = 64
MAX_CHOICES = 1024
ANY_OBJECT = '{"type": "object"}'
MAX_NAME = 256
MAX_PROMPT_LOGPROBS = 65_536
"""Most numbers that are given of a prompt: about 1 MB, so that tokens do not wait long behind them."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the gateway knows of the model, read without its weights."""

    name: str
    fingerprint: str
    context: int
    vocabulary: int
    eos: tuple[int, ...]


class Intake:
    """Reads and checks what clients send."""

    def __init__(
        self, config: GatewayConfig, facts: ModelFacts, tokenizer: Tokenizer, chat: ChatTemplate | None
    ) -> None:
        self._config = config
        self._facts = facts
        self._tokenizer = tokenizer
        self._chat = chat
        self._grammars: Grammars | None = None

    def model(self, name: str) -> None:
        """Refuse a model that is not served; an empty name is ours."""
        if name not in ("", self._facts.name):
            raise RequestError("NOT_FOUND", f"model: got {name!r}, want {self._facts.name!r}")

    def tokens(
        self, kind: str | None, prompt: inference_pb2.GenerateRequest | inference_pb2.TokenizeRequest
    ) -> tuple[int, ...]:
        """The prompt's token ids, from ids, text or chat messages."""
        match kind:
            case "token_ids":
                return self.ids("token_ids", prompt.token_ids.ids)  # type: ignore[union-attr]
            case "text":
                return self._encode(prompt.text)
            case "chat":
                if self._chat is None:
                    raise RequestError("FAILED_PRECONDITION", f"chat: {self._facts.name} has no chat template")
                messages = [{"role": m.role, "content": m.content} for m in prompt.chat.messages]
                return self._encode(self._chat.render(messages), special=False)
            case _:
                raise RequestError("INVALID_ARGUMENT", "prompt: got none, want text, token_ids or chat")

    def _encode(self, text: str, special: bool = True) -> tuple[int, ...]:
        """The ids of a text, unless it is so long that not even counting them is worth the time and memory."""
        least, context = self._tokenizer.least_tokens(text), self._facts.context
        if least >= context:
            want = f"want at most {context - 1}, as the context holds {context}"
            raise RequestError("INVALID_ARGUMENT", f"prompt: got at least {least} tokens, {want}")
        ids = self._tokenizer.encode(text, special)
        # A tokenizer may know added tokens for which the model has no embedding.
        return self.ids("prompt", ids)

    def ids(self, field: str, ids: Sequence[int]) -> tuple[int, ...]:
        """Token ids of a request's `field`, if all of them are in the vocabulary."""
        wrong = next((i for i in ids if not 0 <= i < self._facts.vocabulary), None)
        if wrong is not None:
            raise RequestError("INVALID_ARGUMENT", f"{field}: got {wrong}, want 0..{self._facts.vocabulary - 1}")
        return tuple(ids)

    def text_ids(self, ids: Sequence[int]) -> tuple[int, ...]:
        """Token ids to be turned into text: not more than a context holds."""
        if len(ids) > self._facts.context:
            raise RequestError("INVALID_ARGUMENT", f"token_ids: got {len(ids)}, want at most {self._facts.context}")
        return self.ids("token_ids", ids)

    def request(
        self,
        asked: inference_pb2.GenerateRequest,
        remaining_s: float | None,
        most_tokens: MostTokens,
        page_tokens: int = 0,
    ) -> tuple[Request, tuple[str, ...]]:
        """The request and its stop strings; without `max_tokens` it may fill the context or the largest decode worker.

        `remaining_s` is the call's deadline, `most_tokens` says the largest `max_tokens` that
        workers have room for, given the prompt's tokens and `n`. Pages of so many tokens are named, for those who keep
        them; 0: none is, and nothing of this prompt is kept or taken from others. Tenants share nothing.
        """
        self.model(asked.model)
        prompt = self.tokens(asked.WhichOneof("prompt"), asked)
        context = self._facts.context
        if not prompt:
            raise RequestError("INVALID_ARGUMENT", "prompt: got 0 tokens, want at least 1")
        if len(prompt) >= context:
            raise RequestError(
                "INVALID_ARGUMENT",
                f"prompt: got {len(prompt)} tokens, want at most {context - 1}, as the context holds {context}",
            )
        room = context - len(prompt)
        if asked.HasField("max_tokens") and asked.max_tokens > room:
            raise RequestError(
                "INVALID_ARGUMENT",
                f"max_tokens: got {asked.max_tokens}, want at most {room}, as the prompt has {len(prompt)} tokens "
                f"and the context holds {context}",
            )
        n = asked.n if asked.HasField("n") else 1

        def implied() -> int:
            """All that context and memory hold."""
            most = most_tokens(len(prompt), n) if n > 0 else None
            return room if most is None else min(room, most)

        stops = self._stops(asked.stop)
        constraint = self.constraint(asked)
        biased = sorted(asked.logit_bias)
        ends = () if asked.ignore_eos else self._facts.eos
        sampling = Sampling(
            max_tokens=asked.max_tokens if asked.HasField("max_tokens") else implied(),
            temperature=asked.temperature if asked.HasField("temperature") else 0.0,
            top_k=asked.top_k if asked.HasField("top_k") else 0,
            top_p=asked.top_p if asked.HasField("top_p") else 1.0,
            seed=asked.seed if asked.HasField("seed") else secrets.randbits(63),
            stop_token_ids=tuple(dict.fromkeys((*self.ids("stop_token_ids", asked.stop_token_ids), *ends))),
            ignore_eos=asked.ignore_eos,
            n=n,
            min_p=asked.min_p,
            repetition_penalty=asked.repetition_penalty if asked.HasField("repetition_penalty") else 1.0,
            presence_penalty=asked.presence_penalty,
            frequency_penalty=asked.frequency_penalty,
            logit_bias=tuple((token, asked.logit_bias[token]) for token in self.ids("logit_bias", biased)),
            min_tokens=asked.min_tokens,
            logprobs=asked.logprobs if asked.HasField("logprobs") else None,
            prompt_logprobs=asked.prompt_logprobs if asked.HasField("prompt_logprobs") else None,
            constraint=constraint,
        )
        if constraint is not None:  # last: it takes longer than all else
            self._compiler(constraint).check(constraint)
        if sampling.prompt_logprobs is not None:
            most = MAX_PROMPT_LOGPROBS // len(prompt) - 1
            if sampling.prompt_logprobs > most:
                want = f"at most {most}" if most >= 0 else "none"
                raise RequestError(
                    "INVALID_ARGUMENT",
                    f"prompt_logprobs: got {sampling.prompt_logprobs}, want {want} for {len(prompt)} tokens",
                )
        timeout_s = self._config.timeout_s if remaining_s is None else min(remaining_s, self._config.timeout_s)
        slo = self._slo(wire.slo_from(asked.slo), asked.hints.group)
        name = asked.request_id or f"req-{secrets.token_hex(8)}"
        hints = asked.hints
        for field in ("session", "tenant", "group", "tool"):
            self._short(f"hints.{field}", getattr(hints, field))
        if hints.program_step < 0:
            raise RequestError("INVALID_ARGUMENT", f"hints.program_step: got {hints.program_step}, want at least 0")
        self._short("request_id", name)
        # A prompt whose logprobs are wanted is computed in full.
        named = page_tokens > 0 and sampling.prompt_logprobs is None
        prefix = page_hashes(prompt, page_tokens, hints.tenant) if named else ()
        known = wire.hints_from(hints)
        request = Request(name, prompt, sampling, timeout_s, slo, known, 0, prefix, page_tokens if prefix else 0)
        return request, stops

    def _slo(self, asked: Slo, group: str) -> Slo:
        """What a client asked for, else what its group or the deployment promises; a class is chosen by its field."""
        for field in ("ttft_s", "gap_s", "deadline_s"):
            goal_s = getattr(asked, field)
            if not 0 <= goal_s < math.inf:
                raise RequestError("INVALID_ARGUMENT", f"slo.{field}: got {goal_s}, want a finite time of at least 0")
            if goal_s and asked.batch:
                raise RequestError("INVALID_ARGUMENT", f"slo.{field}: got {goal_s}, want 0 with slo.batch")
        if asked.batch or asked.deadline_s:
            return asked
        config, ttft_s, gap_s = self._config, asked.ttft_s, asked.gap_s
        own = next((each for each in config.group if each.name == group), None)
        if own is not None:
            ttft_s, gap_s = ttft_s or own.ttft_s, gap_s or own.gap_s
        if config.deadline_s and not (ttft_s or gap_s):
            return Slo(deadline_s=config.deadline_s)
        return Slo(ttft_s or config.ttft_s, gap_s or config.gap_s)

    def constraint(self, asked: inference_pb2.GenerateRequest) -> Constraint | None:
        """What the text must match, not compiled yet."""
        match asked.WhichOneof("constraint"):
            case "json_schema":
                return Constraint(Language.JSON_SCHEMA, asked.json_schema)
            case "json_object":
                return Constraint(Language.JSON_SCHEMA, ANY_OBJECT) if asked.json_object else None
            case "regex":
                return Constraint(Language.REGEX, asked.regex)
            case "grammar":
                return Constraint(Language.GRAMMAR, asked.grammar)
            case "choice":
                return self._choice(asked.choice.texts)
            case _:
                return None

    def _choice(self, texts: Sequence[str]) -> Constraint:
        if not 1 <= len(texts) <= MAX_CHOICES or not all(texts):
            got = f"{len(texts)} texts" if all(texts) else "an empty text"
            raise RequestError("INVALID_ARGUMENT", f"choice: got {got}, want 1 to {MAX_CHOICES} that are not empty")
        written = " | ".join(json.dumps(text, ensure_ascii=False) for text in dict.fromkeys(texts))
        return Constraint(Language.GRAMMAR, f"start: {written}")

    def _compiler(self, constraint: Constraint) -> Grammars:
        """Made for the first request that needs it: that takes a while, and memory."""
        if self._grammars is None:
            try:
                self._grammars = Grammars(self._config.model, self._facts.vocabulary, self._facts.eos)
            except GrammarMissing as missing:
                raise RequestError("UNIMPLEMENTED", f"{constraint.language}: {missing}") from None
        return self._grammars

    def _short(self, field: str, name: str) -> None:
        """Names travel with every offer and stand in every log line."""
        if len(name) > MAX_NAME:
            raise RequestError("INVALID_ARGUMENT", f"{field}: got {len(name)} characters, want at most {MAX_NAME}")

    def _stops(self, stops: Sequence[str]) -> tuple[str, ...]:
        if len(stops) > MAX_STOPS:
            raise RequestError("INVALID_ARGUMENT", f"stop: got {len(stops)} strings, want at most {MAX_STOPS}")
        if any(not stop for stop in stops):
            raise RequestError("INVALID_ARGUMENT", "stop: got an empty string, want text")
        return tuple(stops)
