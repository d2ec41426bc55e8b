"""OpenAI's API as its own client meets it: openai -> smg -> our gateways, all of them as installed."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from control import http
from control.launcher import environment
from core.config import HttpConfig, to_json
from core.errors import RequestError
from gateway import vllm
from protos.baton.v1 import inference_pb2
from tests.gateway.scripted import Scripted, serve
from tests.live.cluster import MODEL, SECRET, Client, Live, Reply, until

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "deploy" / "demo" / "model"
PROMPTS = [each["messages"] for each in json.loads((DEMO.parent / "prompts.json").read_text())]
ROOM = {"kv_memory": "8M", "max_rows": 64, "page_tokens": 64, "max_queue_s": 600.0, "check": False}
"""Nothing is refused because a busy machine is slow; checking 256 requests at each event would make it slower yet."""
SCHEMA = {
    "type": "object",
    "properties": {"answer": {"type": "integer", "minimum": 0, "maximum": 99}, "sure": {"enum": ["yes", "no"]}},
    "required": ["answer", "sure"],
    "additionalProperties": False,
}
NO = {"type": "no type"}
LONG: dict[str, Any] = {"max_tokens": 800, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def live(launch) -> Iterator[Live]:
    """Two prefill workers and one decode worker with the demo's model, bit-exact, behind HTTP."""
    started = launch("http", DEMO, prefill=2, decode=1, exact=True, http=0, **ROOM)
    yield started
    started.stop()


@pytest.fixture(scope="module")
def client(live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(**reach(live.deployment.http), http_client=openai.DefaultHttpxClient(trust_env=False)) as made:
        yield made


def reach(address: str) -> dict[str, Any]:
    return {"base_url": f"http://{address}/v1", "api_key": "none", "max_retries": 0}


def asynchronous(address: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(**reach(address), http_client=openai.DefaultAsyncHttpxClient(trust_env=False))


def said(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def direct(live: Live, messages: list[Any], **fields: Any) -> Reply:
    """What the gateway answers to the same chat over its own protocol, greedily."""
    chat = inference_pb2.Chat(messages=[inference_pb2.ChatMessage(**message) for message in messages])

    async def run() -> Reply:
        async with Client(live.gateway) as client:
            return await client.generate(inference_pb2.GenerateRequest(chat=chat, **fields))

    return asyncio.run(run())


def counts(usage: Any) -> tuple[int, int, int]:
    return usage.prompt_tokens, usage.completion_tokens, usage.total_tokens


def same_counts(reply: Reply) -> tuple[int, int, int]:
    prompt, completion = reply.last.prompt_tokens, reply.last.completion_tokens
    return prompt, completion, prompt + completion


def test_the_model_is_listed_by_its_served_name(client):
    assert [model.id for model in client.models.list()] == [MODEL]


@pytest.mark.parametrize("messages", PROMPTS[:3])
def test_a_chat_is_what_the_gateway_says(live, client, messages):
    want = direct(live, messages)
    got = client.chat.completions.create(model=MODEL, messages=messages, temperature=0)
    (choice,) = got.choices
    assert choice.message.content == want.text
    assert choice.finish_reason == "stop" == want.last.finish_reason
    assert counts(got.usage) == same_counts(want)


def test_a_streamed_chat_is_the_same_in_pieces(live, client):
    messages = PROMPTS[3]
    want = direct(live, messages)
    text, reasons, usage = "", [], None
    pieces = 0
    for chunk in client.chat.completions.create(
        model=MODEL, messages=messages, temperature=0, stream=True, stream_options={"include_usage": True}
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            pieces += bool(choice.delta.content)
            reasons += [choice.finish_reason] if choice.finish_reason else []
    assert text == want.text
    assert pieces > 3
    assert reasons == ["stop"]
    assert counts(usage) == same_counts(want)


def test_a_completion_and_its_stream(live, client):
    """smg adds no special token to a prompt: whoever wants one writes it."""
    text = "The bisect module"
    asked = {"model": MODEL, "prompt": f"<|bos|>{text}", "max_tokens": 20, "temperature": 0}

    async def run() -> Reply:
        async with Client(live.gateway) as direct:
            return await direct.generate(inference_pb2.GenerateRequest(text=text, max_tokens=20))

    want = asyncio.run(run())
    got = client.completions.create(**asked)
    assert got.choices[0].text == want.text
    assert got.choices[0].finish_reason == want.last.finish_reason
    assert counts(got.usage) == same_counts(want)
    streamed = client.completions.create(**asked, stream=True)
    assert "".join(choice.text for chunk in streamed for choice in chunk.choices) == want.text


def test_several_prompts_are_several_choices(client):
    prompts = ["The bisect module", "The heapq module", "The json module"]
    each = [
        client.completions.create(model=MODEL, prompt=one, max_tokens=8, temperature=0).choices[0].text
        for one in prompts
    ]
    got = client.completions.create(model=MODEL, prompt=prompts, max_tokens=8, temperature=0)
    assert [choice.text for choice in sorted(got.choices, key=lambda choice: choice.index)] == each


@pytest.mark.parametrize("stream", [True, False])
def test_a_stop_string_ends_the_text_before_it(live, client, stream):
    whole = direct(live, PROMPTS[0]).text
    stop = whole[len(whole) // 2 :][:4]
    asked = {"model": MODEL, "messages": PROMPTS[0], "temperature": 0, "stop": [stop]}
    want = direct(live, PROMPTS[0], stop=[stop])
    if stream:
        chunks = list(client.chat.completions.create(**asked, stream=True))
        text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
        reason = chunks[-1].choices[0].finish_reason
    else:
        got = client.chat.completions.create(**asked)
        text, reason = got.choices[0].message.content, got.choices[0].finish_reason
        assert counts(got.usage) == same_counts(want)
    assert text == want.text == whole[: whole.index(stop)]
    assert reason == "stop"


def test_a_limit_of_tokens_is_kept_and_said(live, client):
    got = client.chat.completions.create(model=MODEL, messages=PROMPTS[0], temperature=0, max_tokens=4)
    assert got.choices[0].finish_reason == "length"
    assert got.usage.completion_tokens == 4
    assert got.choices[0].message.content == direct(live, PROMPTS[0], max_tokens=4).text


def test_a_seed_gives_the_same_text_again_and_another_seed_another(client):
    def text(seed: int) -> str | None:
        got = client.chat.completions.create(
            model=MODEL, messages=said("Explain something."), temperature=1.5, seed=seed, max_tokens=40
        )
        return got.choices[0].message.content

    first = text(7)
    assert first == text(7)
    assert first != text(8)
    assert text(-7) == text(-7)


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (openai.NotFoundError, {"model": "other"}),
        (openai.BadRequestError, {"messages": said("word " * 20_000)}),
        (openai.BadRequestError, {"max_tokens": 1_000_000}),
        (openai.BadRequestError, {"temperature": -1}),
        (
            openai.BadRequestError,
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": NO}}},
        ),
        (openai.BadRequestError, {"extra_body": {"regex": "(a"}}),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
def test_what_cannot_be_done_is_said_before_anything_else(client, error, asked, stream):
    with pytest.raises(error):
        client.chat.completions.create(**{"model": MODEL, "messages": said(SECRET), "stream": stream, **asked})


def test_an_answer_fits_its_schema_and_is_what_the_gateway_says(live, client):
    asked: dict[str, Any] = {
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    }
    want = direct(live, PROMPTS[0], json_schema=json.dumps(SCHEMA), max_tokens=200)
    got = client.chat.completions.create(model=MODEL, messages=PROMPTS[0], temperature=0, max_tokens=200, **asked)
    text = got.choices[0].message.content
    assert text == want.text
    assert (got.choices[0].finish_reason, counts(got.usage)) == ("stop", same_counts(want))
    found = json.loads(text)
    assert found.keys() == {"answer", "sure"}
    assert 0 <= found["answer"] <= 99
    assert found["sure"] in ("yes", "no")
    streamed = client.chat.completions.create(
        model=MODEL, messages=PROMPTS[0], temperature=0, max_tokens=200, stream=True, **asked
    )
    assert "".join(choice.delta.content or "" for chunk in streamed for choice in chunk.choices) == text


@pytest.mark.parametrize(
    ("theirs", "matches"),
    [
        ({"extra_body": {"regex": "[a-c]{3}-[0-9]{1,3}x"}}, "[a-c]{3}-[0-9]{1,3}x"),
        ({"extra_body": {"ebnf": 'root ::= "left" | "right" root'}}, "(right)*left"),
        ({"response_format": {"type": "json_object"}}, r"\{.*"),
    ],
)
def test_an_answer_matches_in_chats_and_completions(client, theirs, matches):
    """The last may be cut short: the demo's model knows no JSON, and a key may have any length."""
    chat = client.chat.completions.create(
        model=MODEL, messages=PROMPTS[1], temperature=1.0, seed=3, max_tokens=60, **theirs
    )
    assert re.fullmatch(matches, chat.choices[0].message.content, re.DOTALL)
    if "extra_body" in theirs:
        assert chat.choices[0].finish_reason == "stop"
        plain = client.completions.create(model=MODEL, prompt="<|bos|>x", max_tokens=60, **theirs)
        assert re.fullmatch(matches, plain.choices[0].text)


def test_a_tool_that_is_required_gets_arguments_that_fit(client):
    """smg makes a schema of it that lets more follow, so how the text ends is the model's affair."""
    tool = {"type": "function", "function": {"name": "grade", "parameters": SCHEMA}}
    got = client.chat.completions.create(
        model=MODEL, messages=PROMPTS[0], temperature=0, max_tokens=300, tools=[tool], tool_choice="required"
    )
    message = got.choices[0].message
    calls = [f'"grade" {call.function.arguments}' for call in message.tool_calls or ()]
    found = re.match(r'[^{}]*(?:{\s*"name"\s*:\s*)?"grade"[^{}]*({[^{}]*})', calls[0] if calls else message.content)
    assert found, message
    arguments = json.loads(found[1])
    assert arguments.keys() == {"answer", "sure"}
    assert 0 <= arguments["answer"] <= 99


def test_a_body_that_is_none_is_refused_and_not_logged(live):
    for body in (f'{{"model": "{MODEL}", "messages": {SECRET}', f'{{"model": 3, "messages": "{SECRET}"}}', SECRET):
        request = urllib.request.Request(
            f"http://{live.deployment.http}/v1/chat/completions", body.encode(), {"content-type": "application/json"}
        )
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request)
        assert refused.value.code in (400, 422)
        refused.value.close()


def test_a_client_that_leaves_ends_its_work(live, client):
    live.torn = True
    stream = client.chat.completions.create(model=MODEL, messages=said(SECRET), stream=True, **LONG)
    for _ in range(3):
        next(iter(stream))
    assert live.phases()
    stream.close()
    until(lambda: not live.phases(), "the stream's request is gone", more=live.phases)

    async def asked_and_left() -> None:
        async with asynchronous(live.deployment.http) as client:
            create = client.chat.completions.create(model=MODEL, messages=said(SECRET), **LONG)
            task = asyncio.create_task(create)
            await asyncio.to_thread(until, lambda: bool(live.phases()), "it is at work")
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(asked_and_left())
    until(lambda: not live.phases(), "the request is gone", more=live.phases)
    live.wait_empty()


@pytest.mark.slow
def test_256_streams_at_once_lose_nothing(live):
    """Each gets its own text in order, and the counts are exact."""
    wanted = {number: direct(live, messages, max_tokens=16) for number, messages in enumerate(PROMPTS)}

    async def one(client: openai.AsyncOpenAI, number: int) -> None:
        text, usage = "", None
        async for chunk in await client.chat.completions.create(
            model=MODEL,
            messages=PROMPTS[number],
            temperature=0,
            max_tokens=16,
            stream=True,
            stream_options={"include_usage": True},
        ):
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
            usage = chunk.usage or usage
        assert text == wanted[number].text
        assert counts(usage) == same_counts(wanted[number])

    async def run() -> None:
        async with asynchronous(live.deployment.http) as client:
            await asyncio.gather(*(one(client, n % len(PROMPTS)) for n in range(256)))

    asyncio.run(run())


def resident_kb(live: Live) -> dict[str, int]:
    """Memory of each process."""
    found = {}
    for name, each in live.deployment.running.items():
        status = Path(f"/proc/{each.process.pid}/status").read_text()
        found[name] = int(status.partition("VmRSS:")[2].split()[0])
    return found


@pytest.mark.slow
def test_memory_is_flat_over_2000_requests(live):
    """Streams and not, long and short, refused and left: what 2,000 leave behind is nothing that grows."""
    live.torn = True

    async def one(client: openai.AsyncOpenAI, number: int) -> None:
        messages = said(f"{PROMPTS[number % len(PROMPTS)][-1]['content']} {number}")
        asked: dict[str, Any] = {"model": MODEL, "messages": messages, "max_tokens": 8 + number % 16}
        match number % 10:
            case 0:
                with pytest.raises(openai.NotFoundError):
                    await client.chat.completions.create(**{**asked, "model": "other"})
            case 1:
                with pytest.raises(openai.BadRequestError):
                    await client.chat.completions.create(**{**asked, "max_tokens": 10**6})
            case 2:
                stream = await client.chat.completions.create(**{**asked, **LONG}, stream=True)
                await anext(aiter(stream))
                await stream.close()
            case 3 | 4 | 5:
                await client.chat.completions.create(**asked)
            case _:
                async for _ in await client.chat.completions.create(**asked, stream=True):
                    pass

    async def run(numbers: range) -> None:
        async with asynchronous(live.deployment.http) as client:
            for at in range(numbers.start, numbers.stop, 16):
                await asyncio.gather(*(one(client, n) for n in range(at, min(at + 16, numbers.stop))))

    seen = []
    for step in range(6):
        asyncio.run(run(range(500 * step, 500 * (step + 1))))
        until(lambda: not live.phases(), "nothing is live")
        live.wait_empty()
        seen.append(resident_kb(live))
        print(step, seen[-1])
    warm, last = seen[1], seen[-1]
    grown = {name: last[name] - warm[name] for name in warm}
    assert {name: kb for name, kb in grown.items() if kb > max(4096, warm[name] // 50)} == {}, seen


# ---------------------------------------------------------------- smg before gateways that answer as they are told


class Stage:
    """Scripted gateways in a thread of this process, and smg before them."""

    def __init__(self, model: Path, log: Path, gateways: int = 1) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.gateways = [Scripted(model, hello) for _ in range(gateways)]
        self.servers = [self.run(serve(scripted, model)) for scripted in self.gateways]
        self.log = log
        self.front = self._start(",".join(server.address for server in self.servers))
        word = json.loads(self.front.stdout.readline())
        self.address = word["address"]
        self.client = openai.OpenAI(
            **reach(self.address), http_client=openai.DefaultHttpxClient(trust_env=False)
        )  # fmt: skip

    def run(self, work: Any) -> Any:
        """The result of a coroutine in the gateways' loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    def chat(self, **asked: Any) -> Any:
        return self.client.chat.completions.create(model="tiny", messages=said("hi"), **asked)

    def close(self) -> int:
        """End smg as its launcher's death does; its exit code."""
        self.client.close()
        self.front.stdin.close()
        code = self.front.wait(30)
        self.front.stdout.close()
        for server in self.servers:
            self.run(server.stop(0.0))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        return code

    def _start(self, gateways: str) -> subprocess.Popen[str]:
        with self.log.open("w") as err:
            return subprocess.Popen(
                [sys.executable, "-m", "control.http", to_json(HttpConfig("http", gateways))],
                cwd=ROOT, env=environment(1), text=True, start_new_session=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=err,
            )  # fmt: skip


def tokens(*ids: int, text: str = "x", **fields: Any) -> inference_pb2.GenerateResponse:
    return inference_pb2.GenerateResponse(token_ids=ids, text=text, **fields)


def over(count: int, **fields: Any) -> inference_pb2.GenerateResponse:
    end = inference_pb2.End(finish_reason="stop", prompt_tokens=4, completion_tokens=count, cached_tokens=1)
    return inference_pb2.GenerateResponse(end=end, **fields)


async def hello(asked):
    for index in range(asked.n):
        for token in (70, 71, 72):
            yield tokens(token + index, index=index)
    for index in range(asked.n):
        yield over(3, index=index)


def fails(code: str, after: int = 0):
    async def play(asked):
        for _ in range(after):
            yield tokens(70)
        raise RequestError(code, f"field: got {code}, want that", retry_s=2.0)

    return play


@pytest.fixture(scope="module")
def stage(model, tmp_path_factory) -> Iterator[Stage]:
    made = Stage(model, tmp_path_factory.mktemp("http") / "http.log")
    yield made
    assert made.close() == 0
    lines = [json.loads(line) for line in made.log.read_text().splitlines()]
    assert [line for line in lines if line["worker"] != "http" or line["level"] == "error"] == []


CODES = {
    "INVALID_ARGUMENT": 400,
    "FAILED_PRECONDITION": 400,
    "OUT_OF_RANGE": 400,
    "NOT_FOUND": 404,
    "ABORTED": 409,
    "ALREADY_EXISTS": 409,
    "RESOURCE_EXHAUSTED": 429,
    "INTERNAL": 500,
    "UNKNOWN": 500,
    "UNIMPLEMENTED": 501,
    "CANCELLED": 502,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}


@pytest.mark.parametrize(("code", "status"), CODES.items())
@pytest.mark.parametrize("stream", [True, False])
def test_a_refusal_is_the_status_that_clients_expect_and_is_asked_once(stage, code, status, stream):
    (gateway,) = stage.gateways
    gateway.play, gateway.asked = fails(code), []
    with pytest.raises(openai.APIStatusError) as refused:
        stage.chat(stream=stream)
    assert refused.value.status_code == status
    assert f"got {code}, want that" in str(refused.value)
    assert len(gateway.asked) == 1, "a refusal that is tried again multiplies the load that it is to hold off"


def test_twenty_refusals_close_no_door(stage):
    (gateway,) = stage.gateways
    gateway.play = fails("UNAVAILABLE")
    for _ in range(20):
        with pytest.raises(openai.InternalServerError):
            stage.chat()
    gateway.play = hello
    assert stage.chat().choices[0].message.content


def test_a_failure_in_the_middle_of_a_stream_is_an_error_and_not_an_end(stage):
    (gateway,) = stage.gateways
    gateway.play = fails("UNAVAILABLE", after=2)
    with pytest.raises(openai.APIError, match="got UNAVAILABLE"):
        list(stage.chat(stream=True))
    with pytest.raises(openai.InternalServerError):
        stage.chat()


@pytest.mark.parametrize("stream", [True, False])
def test_two_continuations_are_two_choices_of_one_prompt(stage, stream):
    (gateway,) = stage.gateways
    gateway.play = hello
    if stream:
        texts, usage = {0: "", 1: ""}, None
        for chunk in stage.chat(n=2, stream=True, stream_options={"include_usage": True}):
            usage = chunk.usage or usage
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
    else:
        got = stage.chat(n=2)
        usage, texts = got.usage, {choice.index: choice.message.content for choice in got.choices}
    detokenize = gateway.intake._tokenizer.decode
    assert texts == {0: detokenize((70, 71, 72)), 1: detokenize((71, 72, 73))}
    assert counts(usage) == (4, 6, 10)
    assert gateway.asked[-1].n == 2


@pytest.mark.parametrize("stream", [True, False])
def test_log_probabilities_reach_the_client_for_every_token(stage, stream):
    """Also for those of a character that takes two tokens."""
    (gateway,) = stage.gateways
    ids = gateway.intake._tokenizer.encode("né!", False)

    async def play(asked):
        for token, text in zip(ids, ("n", "", "é", "!"), strict=True):
            piece = tokens(token, text=text)
            piece.logprobs.add(token_id=token, logprob=-0.5, top_ids=(token, 70), top_logprobs=(-0.5, -3.0))
            yield piece
        yield over(len(ids))

    gateway.play = play
    asked = {"logprobs": True, "top_logprobs": 2}
    if stream:
        choices = [choice for chunk in stage.chat(**asked, stream=True) for choice in chunk.choices]
        likely = [each for choice in choices if choice.logprobs for each in choice.logprobs.content]
    else:
        likely = stage.chat(**asked).choices[0].logprobs.content
    assert gateway.asked[-1].logprobs == 2
    assert [each.logprob for each in likely] == [-0.5] * len(ids)
    assert [len(each.top_logprobs) for each in likely] == [2] * len(ids)
    assert likely[0].token == likely[0].top_logprobs[0].token == "n"


def test_every_knob_of_openai_arrives(stage):
    (gateway,) = stage.gateways
    gateway.play = hello
    stage.chat(
        temperature=0.5, top_p=0.25, max_tokens=9, presence_penalty=0.5, frequency_penalty=-0.5, seed=3, stop=["q"],
        extra_body={"top_k": 4, "min_p": 0.125, "repetition_penalty": 1.25, "ignore_eos": True},
    )  # fmt: skip
    asked = gateway.asked[-1]
    want = inference_pb2.GenerateRequest(
        request_id=asked.request_id, token_ids=asked.token_ids, n=1, min_tokens=0,
        temperature=0.5, top_p=0.25, max_tokens=9, presence_penalty=0.5, frequency_penalty=-0.5, seed=3, stop=["q"],
        top_k=4, min_p=0.125, repetition_penalty=1.25, ignore_eos=True,
    )  # fmt: skip
    assert asked == want
    assert gateway.intake._tokenizer.decode(asked.token_ids.ids) == "[user]hi>"


def test_a_tokenizer_that_is_not_on_its_disk_is_asked_of_the_gateway(model, tmp_path, monkeypatch):
    """And of nobody else, though smg would ask huggingface.co first."""
    elsewhere = tmp_path / "elsewhere"
    fetched = []
    real, started = vllm.bundle, vllm.VllmEngine.__init__

    def bundle(folder: Path) -> bytes:
        fetched.append(folder)
        return real(model)

    def far(self: Any, gateway: Any, folder: Path, build: str) -> None:
        started(self, gateway, folder, build)
        self._model = elsewhere

    monkeypatch.setattr(vllm, "bundle", bundle)
    monkeypatch.setattr(vllm.VllmEngine, "__init__", far)
    stage = Stage(model, tmp_path / "http.log")
    try:
        assert stage.chat().choices[0].message.content
        assert fetched == [elsewhere]
    finally:
        assert stage.close() == 0


def test_all_gateways_are_used_and_one_that_is_gone_is_left_alone(model, tmp_path):
    stage = Stage(model, tmp_path / "http.log", gateways=2)
    try:
        for _ in range(6):
            stage.chat()
        assert [len(gateway.asked) for gateway in stage.gateways] == [3, 3]
        stage.run(stage.servers[1].stop(0.0))

        def served() -> bool:
            try:
                return all(stage.chat() for _ in range(4))
            except openai.APIStatusError:
                return False

        until(served, "the other gateway has all requests")
    finally:
        assert stage.close() == 0


def test_it_ends_with_its_launcher_and_by_a_signal(model, tmp_path):
    """`Stage.close` is the launcher's death; this is `baton down`."""
    stage = Stage(model, tmp_path / "http.log")
    os.kill(stage.front.pid, signal.SIGTERM)
    assert stage.front.wait(30) == 0
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(stage.address.rpartition(":")[2])))
    assert stage.close() == 0


def test_a_port_in_use_is_one_sentence():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = subprocess.run(
            [sys.executable, "-m", "control.http", to_json(HttpConfig("http", "127.0.0.1:1", address))],
            cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 4
    assert json.loads(done.stdout)["error"] == f"http: cannot listen on {address}; is the port in use?"


def test_nobody_but_its_launcher_names_gateways_to_it(stage):
    assert http.get(f"http://{stage.address}/workers") is None
    assert http.ready(stage.address)


# ---------------------------------------------------------------- more than one plain continuation, by the real system


@pytest.mark.parametrize("stream", [True, False])
def test_greedy_continuations_are_equal_and_their_prompt_is_counted_once(live, client, stream):
    want = direct(live, PROMPTS[0])
    asked: dict[str, Any] = {"model": MODEL, "messages": PROMPTS[0], "temperature": 0, "n": 2}
    if stream:
        texts, usage = {0: "", 1: ""}, None
        for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
            usage = chunk.usage or usage
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
    else:
        got = client.chat.completions.create(**asked)
        usage, texts = got.usage, {choice.index: choice.message.content for choice in got.choices}
    assert texts == {0: want.text, 1: want.text}
    assert counts(usage)[:2] == (want.last.prompt_tokens, 2 * want.last.completion_tokens)


def test_the_first_of_several_draws_is_the_one_alone(client):
    asked: dict[str, Any] = {
        "model": MODEL, "messages": said("Explain something."), "temperature": 1.5, "seed": 7, "max_tokens": 30
    }  # fmt: skip
    alone = client.chat.completions.create(**asked).choices[0].message.content
    several = client.chat.completions.create(**asked, n=3).choices
    assert next(choice for choice in several if choice.index == 0).message.content == alone
    assert len({choice.message.content for choice in several}) == 3


@pytest.mark.parametrize("stream", [True, False])
def test_greedy_tokens_are_the_most_likely_ones(client, stream):
    asked: dict[str, Any] = {
        "model": MODEL, "messages": PROMPTS[0], "temperature": 0, "logprobs": True, "top_logprobs": 3
    }  # fmt: skip
    if stream:
        choices = [choice for chunk in client.chat.completions.create(**asked, stream=True) for choice in chunk.choices]
        text = "".join(choice.delta.content or "" for choice in choices)
        likely = [each for choice in choices if choice.logprobs for each in choice.logprobs.content]
    else:
        got = client.chat.completions.create(**asked)
        text, likely = got.choices[0].message.content, got.choices[0].logprobs.content
        assert len(likely) == got.usage.completion_tokens
    assert "".join(each.token for each in likely) == text
    assert all(each.token == each.top_logprobs[0].token for each in likely)
    assert all(0 >= each.logprob == each.top_logprobs[0].logprob >= each.top_logprobs[2].logprob for each in likely)


def test_penalties_and_least_tokens_are_obeyed(live, client):
    asked: dict[str, Any] = {
        "model": MODEL,
        "messages": said("Explain."),
        "temperature": 2,
        "seed": 7,
        "max_tokens": 60,
    }
    knobs: list[dict[str, Any]] = [{}, {"frequency_penalty": 2.0}, {"extra_body": {"repetition_penalty": 2.0}}]
    texts = [client.chat.completions.create(**asked, **each).choices[0].message.content for each in knobs]
    assert len(set(texts)) == 3
    prompt = "<|bos|>The bisect module"
    free = client.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=40)
    held = client.completions.create(
        model=MODEL, prompt=prompt, temperature=0, max_tokens=40, extra_body={"min_tokens": 40}
    )
    assert free.usage.completion_tokens < held.usage.completion_tokens == 40
