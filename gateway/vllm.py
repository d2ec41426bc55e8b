"""The front door for OpenAI HTTP servers: vllm.grpc.engine.VllmEngine, which `smg` calls, over our own messages.

Its stubs are smg-grpc-proto's, in the extra `http`; nothing else imports this file. What a request asks and we cannot
do is refused by its name, never ignored. Text is the caller's affair: it gets token ids, all those that complete a stop
string included, so what it leaves out of the text or keeps in it is as it likes.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import time
import zipfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
from smg_grpc_proto import vllm_engine_pb2 as pb
from smg_grpc_proto import vllm_engine_pb2_grpc
from smg_grpc_proto.generated import common_pb2

from core.errors import RequestError
from core.request import Phase
from core.sampling import MAX_SEED
from protos.baton.v1 import inference_pb2
from runtime import rpc

if TYPE_CHECKING:
    from gateway.gateway import Gateway

SERVICE = "vllm.grpc.engine.VllmEngine"
CHUNK_NBYTES = 65_536
MAX_INT32 = 2**31 - 1
TOKENIZER_FILES = (
    "*.jinja", "chat_template.json", "config.json", "generation_config.json", "merges.txt", "special_tokens_map.json",
    "tokenizer.json", "tokenizer_config.json", "vocab.json",
)  # fmt: skip
WAITING = (Phase.QUEUED, Phase.OFFERED)

# What we read; a set field beside these is one that we cannot honour.
REQUEST = {"request_id", "tokenized", "text", "sampling_params", "stream"}
COPIED = ("top_k", "min_p", "frequency_penalty", "presence_penalty", "min_tokens", "ignore_eos")
OPTIONAL = ("max_tokens", "logprobs", "prompt_logprobs")
CONSTRAINTS = ("json_schema", "json_object", "regex", "grammar")
OF_TEXT = {"skip_special_tokens", "spaces_between_special_tokens", "include_stop_str_in_output"}
SAMPLING = {
    *COPIED, *OPTIONAL, *OF_TEXT, *CONSTRAINTS, "choice",
    "grammar_from_first_token",  # ours do, whoever asks
    "temperature", "top_p", "repetition_penalty", "n", "seed", "stop", "stop_token_ids", "logit_bias",
}  # fmt: skip


def add(gateway: Gateway, model: Path, build: str, server: grpc.aio.Server) -> None:
    """Offer the service on a server; `model` is the directory of the tokenizer."""
    vllm_engine_pb2_grpc.add_VllmEngineServicer_to_server(VllmEngine(gateway, model, build), server)


def asked(request: Any) -> inference_pb2.GenerateRequest:
    """Their request as ours; `RequestError` names what we cannot do."""
    sampling = request.sampling_params
    for message, known in ((request, REQUEST), (sampling, SAMPLING)):
        for given, _ in message.ListFields():
            if given.name not in known:
                raise RequestError("INVALID_ARGUMENT", f"{given.name}: is not supported")
    for name in ("top_k", "max_tokens", "min_tokens", "n"):
        _fit(name, (getattr(sampling, name),))
    _fit("stop_token_ids", sampling.stop_token_ids)
    _fit("input_ids", request.tokenized.input_ids)
    # Where their field cannot say that it is unset, 0 does.
    ours = inference_pb2.GenerateRequest(
        request_id=request.request_id,
        temperature=sampling.temperature if sampling.HasField("temperature") else 1.0,
        top_p=sampling.top_p or 1.0,
        repetition_penalty=sampling.repetition_penalty or 1.0,
        n=sampling.n or 1,
        stop=sampling.stop,
        stop_token_ids=sampling.stop_token_ids,
        logit_bias=sampling.logit_bias,
        **{name: getattr(sampling, name) for name in COPIED},
        **{name: getattr(sampling, name) for name in OPTIONAL if sampling.HasField(name)},
    )
    if sampling.HasField("seed"):
        ours.seed = sampling.seed % (MAX_SEED + 1)
    match sampling.WhichOneof("constraint"):
        case "choice":
            ours.choice.texts.extend(sampling.choice.choices)
            ours.choice.SetInParent()
        case None:
            pass
        case name:
            setattr(ours, name, getattr(sampling, name))
    match request.WhichOneof("input"):
        case "tokenized":
            ours.token_ids.ids.extend(request.tokenized.input_ids)
            ours.token_ids.SetInParent()
        case "text":
            ours.text = request.text
    return ours


def _fit(name: str, values: Sequence[int]) -> None:
    if max(values, default=0) > MAX_INT32:
        raise RequestError("INVALID_ARGUMENT", f"{name}: got {max(values)}, want at most {MAX_INT32}")


@dataclass(slots=True)
class _Reply:
    """One continuation as it grows."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[inference_pb2.TokenLogprobs] = field(default_factory=list)
    sent: int = 0


class Replies:
    """The continuations of one request, from our messages to theirs."""

    def __init__(self, prompt: Sequence[int], stream: bool) -> None:
        self._prompt = prompt
        self._stream = stream
        self._of: dict[int, _Reply] = {}
        self._prompt_logprobs: list[inference_pb2.TokenLogprobs] = []
        self._done: list[Any] = []

    def take(self, response: inference_pb2.GenerateResponse) -> Iterator[Any]:
        """What to send for one message of ours, if streamed: new tokens, and at a continuation's end all of them."""
        reply = self._of.setdefault(response.index, _Reply())
        reply.ids.extend(response.token_ids)
        reply.logprobs.extend(response.logprobs)
        if response.prompt_logprobs:
            self._prompt_logprobs = list(response.prompt_logprobs)
        # smg drops log-probabilities of a chunk that makes no text, such as half a character: they wait for the rest.
        due = response.text or not reply.logprobs or response.HasField("end")
        if self._stream and due and reply.sent < len(reply.ids):
            chunk = pb.GenerateStreamChunk(
                token_ids=reply.ids[reply.sent :],
                prompt_tokens=len(self._prompt),
                completion_tokens=len(reply.ids),
                output_logprobs=output_logprobs(reply.logprobs[reply.sent :]),
                input_logprobs=None if reply.sent or response.index else self._input_logprobs(),
                index=response.index,
            )
            reply.sent = len(reply.ids)
            yield pb.GenerateResponse(chunk=chunk)
        if response.HasField("end"):
            complete = self._complete(response.index, response.end)
            if self._stream:
                yield pb.GenerateResponse(complete=complete)
            else:
                self._done.append(complete)

    def rest(self) -> Iterator[Any]:
        """What to send at the end, if not streamed: in order, because smg counts choices as they come."""
        for complete in sorted(self._done, key=lambda complete: complete.index):
            yield pb.GenerateResponse(complete=complete)

    def _complete(self, index: int, end: inference_pb2.End) -> Any:
        reply = self._of[index]
        complete = pb.GenerateComplete(
            output_ids=reply.ids,
            finish_reason=end.finish_reason,
            prompt_tokens=end.prompt_tokens,
            completion_tokens=end.completion_tokens,
            cached_tokens=end.cached_tokens,
            output_logprobs=output_logprobs(reply.logprobs),
            input_logprobs=None if index else self._input_logprobs(),
            index=index,
        )
        match end.WhichOneof("matched"):
            case "stop_token_id":
                complete.matched_token_id = end.stop_token_id
            case "stop_string":
                complete.matched_stop_str = end.stop_string
        return complete

    def _input_logprobs(self) -> Any:
        if not self._prompt_logprobs:
            return None
        first, *rest = self._prompt_logprobs  # the first token has nothing before it
        return pb.InputLogProbs(
            token_logprobs=[pb.InputTokenLogProb(), *(pb.InputTokenLogProb(value=each.logprob) for each in rest)],
            token_ids=self._prompt,
            top_logprobs=[_top(each) for each in (first, *rest)],
        )


def output_logprobs(known: Iterable[inference_pb2.TokenLogprobs]) -> Any:
    """Log-probabilities of generated tokens; None without any."""
    each = list(known)
    if not each:
        return None
    return pb.OutputLogProbs(
        token_logprobs=[token.logprob for token in each],
        token_ids=[token.token_id for token in each],
        top_logprobs=[_top(token) for token in each] if any(token.top_ids for token in each) else (),
    )


def _top(token: inference_pb2.TokenLogprobs) -> Any:
    return pb.TopLogProbs(values=token.top_logprobs, token_ids=token.top_ids)


def bundle(model: Path) -> bytes:
    """A zip of the files that make the tokenizer and the chat template; the same bytes for the same files."""
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted({path for pattern in TOKENIZER_FILES for path in model.glob(pattern)}):
            entry = zipfile.ZipInfo(path.name)
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, path.read_bytes())
    return held.getvalue()


def _not_offered(method: str) -> Callable[..., Awaitable[Any]]:
    async def refuse(self: VllmEngine, request: Any, context: grpc.aio.ServicerContext) -> Any:
        await _refuse(context, method)

    return refuse


async def _refuse(context: grpc.aio.ServicerContext, method: str) -> Any:
    await rpc.refuse(context, RequestError("UNIMPLEMENTED", f"{method}: is not offered here"))


class VllmEngine:
    """See proto/vllm_engine.proto in smg-grpc-proto."""

    def __init__(self, gateway: Gateway, model: Path, build: str) -> None:
        self._gateway = gateway
        self._model = model
        self._config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        self._build = build
        self._started = time.monotonic()

    async def Generate(self, request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        try:
            ours = await self._gateway.aside(request, asked, request)
            if ours.WhichOneof("prompt") == "text":
                ids = await self._gateway.aside(ours, self._gateway.intake.tokens, "text", ours)
                ours.token_ids.ids.extend(ids)
            replies = Replies(ours.token_ids.ids, request.stream)
            refuse = partial(rpc.refuse, context)
            async with aclosing(self._gateway.generate(ours, context.time_remaining(), refuse)) as responses:
                async for response in responses:
                    for reply in replies.take(response):
                        yield reply
            for reply in replies.rest():
                yield reply
        except RequestError as error:
            await rpc.refuse(context, error)

    async def Abort(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        for request_id in request.request_ids:
            self._gateway.abort(request_id)
        return pb.AbortResponse()

    async def HealthCheck(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        missing = self._gateway.missing()
        return pb.HealthCheckResponse(healthy=missing is None, message=missing or "ready")

    async def GetModelInfo(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        facts, config = self._gateway.facts, self._config
        return pb.GetModelInfoResponse(
            model_path=str(self._model),
            is_generation=True,
            max_context_length=facts.context,
            vocab_size=facts.vocabulary,
            served_model_name=facts.name,
            tokenizer_path=str(self._model),
            model_type=config.get("model_type", ""),
            architectures=config.get("architectures", ()),
            eos_token_ids=facts.eos,
            pad_token_id=config.get("pad_token_id") or 0,
            bos_token_id=config.get("bos_token_id") or 0,
            max_req_input_len=facts.context - 1,
        )

    async def GetServerInfo(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        return pb.GetServerInfoResponse(
            active_requests=sum(self._gateway.phases().values()),
            uptime_seconds=time.monotonic() - self._started,
            server_type="vllm-grpc",
            data_parallel_size=1,
        )

    async def GetLoads(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        phases = self._gateway.phases()
        total, waiting = sum(phases.values()), sum(phases.get(phase, 0) for phase in WAITING)
        load = pb.SchedulerLoad(
            num_running_reqs=total - waiting, num_waiting_reqs=waiting, num_total_reqs=total
        )  # fmt: skip
        return pb.GetLoadsResponse(
            timestamp=datetime.now(UTC).isoformat(),
            version=self._build,
            dp_rank_count=1,
            loads=[] if request.dp_rank else [load],
        )

    async def GetTokenizer(self, request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        data = await asyncio.to_thread(bundle, self._model)
        for at in range(0, len(data), CHUNK_NBYTES):
            last = at + CHUNK_NBYTES >= len(data)
            yield common_pb2.GetTokenizerChunk(
                data=data[at : at + CHUNK_NBYTES], sha256=hashlib.sha256(data).hexdigest() if last else ""
            )

    async def SubscribeKvEvents(self, request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        yield await _refuse(context, "SubscribeKvEvents")

    Embed = _not_offered("Embed")
    FlushCache = _not_offered("FlushCache")
    StartProfile = _not_offered("StartProfile")
    StopProfile = _not_offered("StopProfile")
