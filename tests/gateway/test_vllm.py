"""The front door for OpenAI HTTP servers translates faithfully, both ways, and refuses by name what it cannot do."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib.util
import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import grpc
import pytest
import tokenizers
from smg_grpc_proto import vllm_engine_pb2 as pb
from smg_grpc_proto import vllm_engine_pb2_grpc
from smg_grpc_proto.generated import common_pb2

from control import http
from core.errors import RequestError, SetupError
from core.request import Phase
from gateway import vllm
from protos.baton.v1 import inference_pb2
from tests.gateway.scripted import Scripted, serve
from tests.gateway.tokenizers_made import byte_level, save

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "bos_token_id": 7}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save(byte_level(), tmp_path_factory.mktemp("model"), {"chat_template": "{{ messages }}"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def piece(*ids: int, index: int = 0, text: str = "x", likely: bool = False) -> inference_pb2.GenerateResponse:
    response = inference_pb2.GenerateResponse(token_ids=ids, index=index, text=text)
    for token in ids if likely else ():
        response.logprobs.add(token_id=token, logprob=-0.5, top_ids=(token, 9), top_logprobs=(-0.5, -2.0))
    return response


def end(count: int, index: int = 0, **fields) -> inference_pb2.GenerateResponse:
    last = inference_pb2.End(
        finish_reason="length", prompt_tokens=3, completion_tokens=count, cached_tokens=2, **fields
    )  # fmt: skip
    return inference_pb2.GenerateResponse(index=index, end=last)


def plays(*responses: inference_pb2.GenerateResponse | Exception):
    async def play(asked):
        for response in responses:
            if isinstance(response, Exception):
                raise response
            yield response

    return play


def request(stream: bool = True, **sampling) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        request_id="mine",
        tokenized=pb.TokenizedInput(original_text="abc", input_ids=(5, 6, 7)),
        sampling_params=pb.SamplingParams(**sampling),
        stream=stream,
    )


def called(model: Path, play, call, prepare=lambda scripted: None):
    """What `call(stub, scripted)` returns against a server on loopback."""

    async def run():
        scripted = Scripted(model, play)
        prepare(scripted)
        server = await serve(scripted, model)
        try:
            async with grpc.aio.insecure_channel(server.address) as channel:
                return await call(vllm_engine_pb2_grpc.VllmEngineStub(channel), scripted)
        finally:
            await server.stop(0.0)

    return asyncio.run(run())


def answers(model: Path, asked: pb.GenerateRequest, *responses: inference_pb2.GenerateResponse | Exception):
    async def call(stub, scripted):
        return [each async for each in stub.Generate(asked)]

    return called(model, plays(*responses), call)


# ---------------------------------------------------------------- requests


def test_unset_fields_take_the_callers_defaults():
    ours = vllm.asked(request())
    assert ours == inference_pb2.GenerateRequest(
        request_id="mine",
        token_ids=inference_pb2.TokenIds(ids=(5, 6, 7)),
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        repetition_penalty=1.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        min_tokens=0,
        n=1,
    )


def test_every_field_arrives():
    ours = vllm.asked(
        request(
            temperature=0.5, top_p=0.25, top_k=4, min_p=0.125, frequency_penalty=0.5, presence_penalty=-0.5,
            repetition_penalty=1.25, max_tokens=9, min_tokens=2, stop=["a", "b"], stop_token_ids=[3, 4],
            ignore_eos=True, n=2, logprobs=5, prompt_logprobs=0, seed=11, logit_bias={6: -100.0},
            skip_special_tokens=True, spaces_between_special_tokens=True, include_stop_str_in_output=True,
        )
    )  # fmt: skip
    assert ours == inference_pb2.GenerateRequest(
        request_id="mine",
        token_ids=inference_pb2.TokenIds(ids=(5, 6, 7)),
        temperature=0.5, top_p=0.25, top_k=4, min_p=0.125, frequency_penalty=0.5, presence_penalty=-0.5,
        repetition_penalty=1.25, max_tokens=9, min_tokens=2, stop=["a", "b"], stop_token_ids=[3, 4],
        ignore_eos=True, n=2, logprobs=5, prompt_logprobs=0, seed=11, logit_bias={6: -100.0},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"json_schema": '{"type": "null"}'}, {"json_schema": '{"type": "null"}'}),
        ({"json_object": True}, {"json_object": True}),
        ({"json_object": False}, {"json_object": False}),
        ({"regex": "a*"}, {"regex": "a*"}),
        ({"grammar": "root ::= a"}, {"grammar": "root ::= a"}),
        ({"choice": pb.ChoiceConstraint(choices=["a", "b"])}, {"choice": inference_pb2.Choice(texts=["a", "b"])}),
        ({"choice": pb.ChoiceConstraint()}, {"choice": inference_pb2.Choice()}),
        ({"regex": "b", "grammar_from_first_token": True}, {"regex": "b"}),
    ],
)
def test_what_a_text_must_match_arrives(theirs, ours):
    plain = vllm.asked(request())
    plain.MergeFrom(inference_pb2.GenerateRequest(**ours))
    assert vllm.asked(request(**theirs)) == plain
    assert plain.WhichOneof("constraint") == next(iter(ours))


def test_a_temperature_of_zero_is_not_unset_and_a_negative_seed_is_a_seed():
    assert vllm.asked(request(temperature=0.0)).temperature == 0.0
    assert vllm.asked(request(seed=-1)).seed == 2**63 - 1
    assert not vllm.asked(request()).HasField("seed")


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("structural_tag", {"structural_tag": "{}"}),
        ("truncate_prompt_tokens", {"truncate_prompt_tokens": 5}),
    ],
)
def test_sampling_that_is_not_supported_is_refused_by_its_name(name, fields):
    with pytest.raises(RequestError, match=f"^{name}: is not supported") as refused:
        vllm.asked(request(**fields))
    assert refused.value.code == "INVALID_ARGUMENT"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mm_inputs", pb.MultimodalInputs()),
        ("extra_mm_inputs", [pb.MultimodalInputs()]),
        ("media_refs", pb.MediaRefs()),
        ("kv_transfer_params", pb.KvTransferParams()),
        ("kv_transfer_params_json", "{}"),
        ("data_parallel_rank", 0),
    ],
)
def test_what_is_not_supported_beside_sampling_is_refused_by_its_name(name, value):
    asked = pb.GenerateRequest(text="a", **{name: value})
    with pytest.raises(RequestError, match=f"^{name}: is not supported"):
        vllm.asked(asked)


def test_no_field_of_theirs_is_ignored():
    """A field that a new release of the stubs adds is refused until somebody decides about it."""
    known = vllm.REQUEST | vllm.SAMPLING
    refused = {"structural_tag", "truncate_prompt_tokens", "mm_inputs", "extra_mm_inputs"}
    refused |= {"media_refs", "kv_transfer_params", "kv_transfer_params_json", "data_parallel_rank"}
    theirs = {f.name for message in (pb.GenerateRequest, pb.SamplingParams) for f in message.DESCRIPTOR.fields}
    assert theirs == known | refused
    assert not known & refused


@pytest.mark.parametrize("name", ["top_k", "max_tokens", "min_tokens", "n", "stop_token_ids"])
def test_a_number_that_does_not_fit_is_refused_by_its_name(name):
    value: Any = [2**32 - 1] if name == "stop_token_ids" else 2**32 - 1
    with pytest.raises(RequestError, match=f"^{name}: got 4294967295, want at most 2147483647"):
        vllm.asked(request(**{name: value}))


def test_a_token_that_does_not_fit_is_refused():
    asked = pb.GenerateRequest(tokenized=pb.TokenizedInput(input_ids=[2**31]))
    with pytest.raises(RequestError, match=r"^input_ids: got 2147483648"):
        vllm.asked(asked)


def test_a_text_is_tokenized_so_that_its_tokens_can_be_counted(model):
    async def call(stub, scripted):
        got = [each async for each in stub.Generate(pb.GenerateRequest(text="fox", stream=True))]
        return got, scripted.asked[0], scripted.intake.tokens("text", inference_pb2.GenerateRequest(text="fox"))

    got, asked, ids = called(model, plays(piece(5), end(1)), call)
    assert tuple(asked.token_ids.ids) == ids
    assert got[0].chunk.prompt_tokens == len(ids)


# ---------------------------------------------------------------- answers


def test_a_stream_is_new_tokens_and_then_one_complete_with_all(model):
    got = answers(model, request(), piece(10, 11), piece(text="held"), piece(12), end(3))
    chunks, complete = [each.chunk for each in got[:-1]], got[-1].complete
    assert [list(chunk.token_ids) for chunk in chunks] == [[10, 11], [12]]
    assert [(chunk.prompt_tokens, chunk.completion_tokens) for chunk in chunks] == [(3, 2), (3, 3)]
    assert complete == pb.GenerateComplete(
        output_ids=(10, 11, 12), finish_reason="length", prompt_tokens=3, completion_tokens=3, cached_tokens=2
    )


def test_tokens_beside_the_end_are_streamed_before_it(model):
    last = end(2)
    last.token_ids.extend((10, 11))
    got = answers(model, request(), last)
    assert [each.WhichOneof("response") for each in got] == ["chunk", "complete"]
    assert list(got[0].chunk.token_ids) == list(got[1].complete.output_ids) == [10, 11]


def test_without_stream_there_is_only_the_complete(model):
    got = answers(model, request(stream=False), piece(10), piece(11), end(2))
    assert [list(each.complete.output_ids) for each in got] == [[10, 11]]


def test_nothing_generated_is_one_empty_complete(model):
    (got,) = answers(model, request(), end(0, stop_token_id=1))
    assert (list(got.complete.output_ids), got.complete.matched_token_id) == ([], 1)


@pytest.mark.parametrize("stream", [True, False])
def test_continuations_are_told_apart_and_each_is_complete_once(model, stream):
    got = answers(
        model,
        request(stream, n=3),
        piece(10), piece(20, index=1), piece(11), piece(30, 31, index=2), end(2, index=2), end(2), piece(21, index=1),
        end(2, index=1),
    )  # fmt: skip
    completes = {each.complete.index: list(each.complete.output_ids) for each in got if each.HasField("complete")}
    assert completes == {0: [10, 11], 1: [20, 21], 2: [30, 31]}
    order = [each.complete.index for each in got if each.HasField("complete")]
    assert order == ([2, 0, 1] if stream else [0, 1, 2])
    streamed: dict[int, list[int]] = {}
    for each in got:
        if each.HasField("chunk"):
            streamed.setdefault(each.chunk.index, []).extend(each.chunk.token_ids)
            assert each.chunk.completion_tokens == len(streamed[each.chunk.index])
    assert streamed == (completes if stream else {})


def test_what_stopped_it_is_said(model):
    (by_string,) = answers(model, request(stream=False), end(0, stop_string="\n"))
    assert by_string.complete.matched_stop_str == "\n"
    (by_nothing,) = answers(model, request(stream=False), end(0))
    assert by_nothing.complete.WhichOneof("matched_stop") is None


def test_log_probabilities_are_those_of_the_chunk_and_in_the_end_all(model):
    got = answers(model, request(logprobs=2), piece(10, likely=True), piece(11, 12, likely=True), end(3))
    assert [list(each.chunk.output_logprobs.token_ids) for each in got[:-1]] == [[10], [11, 12]]
    whole = got[-1].complete.output_logprobs
    assert list(whole.token_ids) == [10, 11, 12]
    assert list(whole.token_logprobs) == [-0.5] * 3
    assert [list(top.token_ids) for top in whole.top_logprobs] == [[10, 9], [11, 9], [12, 9]]
    assert list(whole.top_logprobs[0].values) == [-0.5, -2.0]


def test_without_top_tokens_there_are_none(model):
    bare = piece(10)
    bare.logprobs.add(token_id=10, logprob=-0.5)
    got = answers(model, request(logprobs=0), bare, end(1))
    assert list(got[0].chunk.output_logprobs.token_logprobs) == [-0.5]
    assert not got[0].chunk.output_logprobs.top_logprobs
    assert not answers(model, request(), piece(10), end(1))[0].chunk.HasField("output_logprobs")


def test_log_probabilities_wait_for_the_text_that_carries_them(model):
    half, rest = piece(10, text="", likely=True), piece(11, text="é", likely=True)
    got = answers(model, request(logprobs=1), half, rest, piece(12, text="", likely=True), end(3))
    assert [list(each.chunk.token_ids) for each in got[:-1]] == [[10, 11], [12]]
    assert [list(each.chunk.output_logprobs.token_ids) for each in got[:-1]] == [[10, 11], [12]]
    assert got[-1].complete.completion_tokens == 3


@pytest.mark.parametrize("stream", [True, False])
def test_the_prompts_log_probabilities_are_in_the_first_chunk_and_complete(model, stream):
    first = inference_pb2.GenerateResponse()
    first.prompt_logprobs.add()
    first.prompt_logprobs.add(token_id=6, logprob=-1.5, top_ids=(6,), top_logprobs=(-1.5,))
    first.prompt_logprobs.add(token_id=7, logprob=-2.5, top_ids=(8,), top_logprobs=(-0.5,))
    got = answers(
        model, request(stream, prompt_logprobs=1, n=2),
        first, piece(10), piece(11), piece(20, index=1), end(2), end(1, index=1),
    )  # fmt: skip
    chunks = [each.chunk for each in got if each.HasField("chunk")]
    assert [chunk.HasField("input_logprobs") for chunk in chunks] == ([True, False, False] if stream else [])
    complete, other = (each.complete for each in got if each.HasField("complete"))
    assert not other.HasField("input_logprobs"), "once is enough: they may be many"
    known = complete.input_logprobs
    assert list(known.token_ids) == [5, 6, 7]
    assert [each.value if each.HasField("value") else None for each in known.token_logprobs] == [None, -1.5, -2.5]
    assert [list(top.token_ids) for top in known.top_logprobs] == [[], [6], [8]]


def test_an_answer_that_is_not_read_can_be_hung_up_on(model):
    async def call(stub, scripted):
        stream = stub.Generate(request())
        await stream.read()
        await written.wait()  # or gRPC, told to abort, would send the headers once more, which it refuses
        with contextlib.suppress(grpc.aio.AbortError):
            await scripted.refuse(RequestError("ABORTED", "not read"))
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await stream.read()
        return failed.value.code()

    written = asyncio.Event()

    async def play(asked):
        yield piece(10)
        written.set()
        await asyncio.sleep(3600)

    assert called(model, play, call) is grpc.StatusCode.ABORTED


@pytest.mark.parametrize(
    "code", ["INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "INTERNAL"]
)
@pytest.mark.parametrize("stream", [True, False])
def test_a_refusal_is_the_first_thing_that_is_heard(model, code, stream):
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        answers(model, request(stream), RequestError(code, "field: got this, want that", retry_s=1.0))
    assert (refused.value.code().name, refused.value.details()) == (code, "field: got this, want that")


def test_our_own_limits_are_refusals_before_anything_is_generated(model):
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        answers(model, request(truncate_prompt_tokens=5), piece(10), end(1))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_failure_after_the_first_token_is_a_status_behind_it(model):
    async def call(stub, scripted):
        stream = stub.Generate(request())
        first = await stream.read()
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await stream.read()
        return first.WhichOneof("response"), failed.value.code()

    play = plays(piece(10), RequestError("UNAVAILABLE", "workers: got none"))
    assert called(model, play, call) == ("chunk", grpc.StatusCode.UNAVAILABLE)


# ---------------------------------------------------------------- ending early, and what is known


async def forever(asked):
    yield piece(10)
    await asyncio.Event().wait()


def test_abort_ends_each_request_that_it_names(model):
    async def call(stub, scripted):
        await stub.Abort(pb.AbortRequest(request_ids=["a", "b"]))
        return scripted.aborted

    assert called(model, forever, call) == ["a", "b"]


def test_a_cancelled_call_ends_its_request(model):
    async def call(stub, scripted):
        stream = stub.Generate(request())
        await stream.read()
        stream.cancel()
        return await scripted.left.get()

    assert called(model, forever, call) == "mine"


def test_a_calls_deadline_is_the_requests(model):
    async def call(stub, scripted):
        [each async for each in stub.Generate(request(), timeout=50)]
        [each async for each in stub.Generate(request())]
        return scripted.remaining_s

    limited, free = called(model, plays(end(0)), call)
    assert 40 < limited < 60
    assert free is None


def test_health_is_readiness_and_names_what_is_missing(model):
    async def call(stub, scripted):
        good = await stub.HealthCheck(pb.HealthCheckRequest())
        scripted.lacks = "a decode worker"
        return good, await stub.HealthCheck(pb.HealthCheckRequest())

    good, bad = called(model, plays(), call)
    assert good == pb.HealthCheckResponse(healthy=True, message="ready")
    assert bad == pb.HealthCheckResponse(healthy=False, message="a decode worker")


def test_what_is_said_of_the_model(model):
    async def call(stub, scripted):
        return await stub.GetModelInfo(pb.GetModelInfoRequest())

    assert called(model, plays(), call) == pb.GetModelInfoResponse(
        model_path=str(model),
        is_generation=True,
        max_context_length=8192,
        vocab_size=320,
        served_model_name="tiny",
        tokenizer_path=str(model),
        model_type="llama",
        architectures=["LlamaForCausalLM"],
        eos_token_ids=(1, 310),
        bos_token_id=7,
        max_req_input_len=8191,
    )


def test_what_is_said_of_server_and_load(model):
    def busy(scripted):
        scripted.live.update({Phase.QUEUED: 3, Phase.OFFERED: 1, Phase.PREFILLING: 1, Phase.DECODING: 5})

    async def call(stub, scripted):
        info = await stub.GetServerInfo(pb.GetServerInfoRequest())
        loads = await stub.GetLoads(pb.GetLoadsRequest(include=["core"]))
        return info, loads, await stub.GetLoads(pb.GetLoadsRequest(dp_rank=1))

    info, loads, other = called(model, plays(), call, busy)
    assert (info.active_requests, info.server_type, info.kv_connector) == (10, "vllm-grpc", "")
    assert info.data_parallel_size == 1
    assert list(loads.loads) == [pb.SchedulerLoad(num_running_reqs=6, num_waiting_reqs=4, num_total_reqs=10)]
    assert (loads.version, loads.dp_rank_count) == ("1.2.3", 1)
    assert not other.loads


def test_the_tokenizer_comes_as_a_zip_whose_last_part_has_its_digest(model, monkeypatch):
    monkeypatch.setattr(vllm, "CHUNK_NBYTES", 1000)

    async def call(stub, scripted):
        return [each async for each in stub.GetTokenizer(common_pb2.GetTokenizerRequest())]

    parts = called(model, plays(), call)
    whole = b"".join(part.data for part in parts)
    assert len(parts) == -(-len(whole) // 1000) > 1
    assert [part.sha256 for part in parts] == [""] * (len(parts) - 1) + [hashlib.sha256(whole).hexdigest()]
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        assert archive.namelist() == ["config.json", "tokenizer.json", "tokenizer_config.json"]
        held = tokenizers.Tokenizer.from_str(archive.read("tokenizer.json").decode())
    assert held.encode("The quick brown fox").ids == byte_level().encode("The quick brown fox").ids
    assert vllm.bundle(model) == whole


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("Embed", pb.EmbedRequest()),
        ("FlushCache", common_pb2.FlushCacheRequest()),
        ("StartProfile", common_pb2.StartProfileRequest()),
        ("StopProfile", common_pb2.StopProfileRequest()),
        ("SubscribeKvEvents", common_pb2.SubscribeKvEventsRequest()),
    ],
)
def test_the_rest_is_not_implemented(model, method, message):
    async def call(stub, scripted):
        answer = getattr(stub, method)(message)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await (answer.read() if method == "SubscribeKvEvents" else answer)
        return refused.value

    refused = called(model, plays(), call)
    assert (refused.code(), refused.details()) == (grpc.StatusCode.UNIMPLEMENTED, f"{method}: is not offered here")


def test_every_method_is_offered_or_refused():
    methods = pb.DESCRIPTOR.services_by_name["VllmEngine"].methods_by_name
    assert [name for name in methods if not hasattr(vllm.VllmEngine, name)] == []


# ---------------------------------------------------------------- without the extra


def test_without_the_stubs_a_gateway_does_without_the_service():
    code = (
        "import sys\nsys.modules['smg_grpc_proto'] = None\n"
        "from gateway.gateway import vllm_door\nassert vllm_door() is None\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_http_without_its_packages_is_one_sentence(monkeypatch):
    http.require()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SetupError) as missing:
        http.require()
    assert str(missing.value) == "http: needs smg and smg-grpc-proto; run `make demo` to install the extra http"
    assert missing.value.exit_code == 2
