"""Real deployments for the live tests, and the one engine in one process that they are compared with."""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from prometheus_client.parser import text_string_to_metric_families

from control.launcher import Deployment
from control.up import wait_ready
from core.config import DeploymentConfig, WorkerConfig
from core.sampling import Sampling
from engine.api import Sampled
from engine.config import ModelConfig
from engine.engine import TorchEngine
from protos.baton.v1 import inference_pb2, inference_pb2_grpc
from tests.engine.play import alone

EMPTY_S = 6.0
"""A gateway's lease and a little: after this time nothing of a dead request is left."""


@dataclass(slots=True)
class Reply:
    """All that one request's stream gave."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    messages: list[inference_pb2.GenerateResponse] = field(default_factory=list)
    end: inference_pb2.End | None = None
    error: grpc.RpcError | None = None

    @property
    def code(self) -> grpc.StatusCode:
        """OK, or the status the stream ended with."""
        return grpc.StatusCode.OK if self.error is None else self.error.code()

    def stage(self, name: str) -> Any:
        """One stage of the waterfall."""
        assert self.end is not None
        return next(stage for stage in self.end.stages if stage.name == name)


class Cluster:
    """A running deployment, its model, and a stub for each gateway."""

    def __init__(self, deployment: Deployment, model: Path, log: Path) -> None:
        self.deployment = deployment
        self.model = model
        self.log = log
        self.expected_errors: list[str] = []
        self._channels = {}

    def stub(self, gateway: int = 0) -> inference_pb2_grpc.InferenceServiceStub:
        """The gateway's service."""
        address = self.deployment.gateways[gateway]
        if address not in self._channels:
            self._channels[address] = grpc.insecure_channel(address)
        return inference_pb2_grpc.InferenceServiceStub(self._channels[address])

    def channel(self, gateway: int = 0) -> grpc.Channel:
        """The gateway's channel."""
        self.stub(gateway)
        return self._channels[self.deployment.gateways[gateway]]

    def ask(
        self,
        request: inference_pb2.GenerateRequest,
        gateway: int = 0,
        timeout_s: float = 60.0,
        watch: Callable[[inference_pb2.GenerateResponse], None] = lambda response: None,
    ) -> Reply:
        """Run one request to its end."""
        reply = Reply()
        try:
            for response in self.stub(gateway).Generate(request, timeout=timeout_s):
                reply.messages.append(response)
                reply.text += response.text
                reply.tokens += response.token_ids
                if response.HasField("end"):
                    reply.end = response.end
                watch(response)
        except grpc.RpcError as error:
            reply.error = error
        return reply

    def ask_all(self, requests: Sequence[inference_pb2.GenerateRequest], gateway: int = 0) -> list[Reply]:
        """Run requests at once, a thread each; replies in the order of the requests."""
        replies: list[Reply | None] = [None] * len(requests)

        def one(index: int) -> None:
            replies[index] = self.ask(requests[index], gateway, timeout_s=100.0)

        threads = [threading.Thread(target=one, args=(index,)) for index in range(len(requests))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [reply for reply in replies if reply is not None]

    def metrics(self, name: str) -> dict[str, dict[tuple[str, ...], float]]:
        """A process's samples: metric -> label values -> value."""
        running = self.deployment.running[name]
        with urllib.request.urlopen(f"http://{running.metrics}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        found: dict[str, dict[tuple[str, ...], float]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found.setdefault(sample.name, {})[tuple(sample.labels.values())] = sample.value
        return found

    def workers(self) -> list[str]:
        """Names of the workers that run."""
        return [
            name
            for name, each in self.deployment.running.items()
            if isinstance(each.config, WorkerConfig) and each.process.poll() is None
        ]

    def held_pages(self) -> dict[str, float]:
        """Pages of each worker that belong to a request or are promised to one."""
        held = {}
        for name in self.workers():
            samples = self.metrics(name)
            pages = {key[0]: value for key, value in samples["baton_pages"].items()}
            mine = sum(value for state, value in pages.items() if state not in ("free", "scratch"))
            held[name] = mine + samples["baton_pages_promised"][()]
        return held

    def assert_empty(self, within_s: float = EMPTY_S) -> None:
        """All arenas are empty, soon."""
        until = time.monotonic() + within_s
        while any((held := self.held_pages()).values()):
            assert time.monotonic() < until, f"pages are still held: {held}"
            time.sleep(0.1)

    def log_lines(self) -> list[dict[str, str]]:
        """All log lines so far."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def close(self) -> None:
        """Hang up, end everything, and see that all was in order."""
        for channel in self._channels.values():
            channel.close()
        pids = [each.process.pid for each in self.deployment.running.values()]
        ended = self.deployment.ended()
        self.deployment.stop()
        for pid in pids:
            assert not Path(f"/proc/{pid}").exists(), f"process {pid} is left"
        errors = [
            line
            for line in self.log_lines()
            if line["level"] == "error" and not any(text in line["message"] for text in self.expected_errors)
        ]
        assert not errors, errors
        assert not ended, f"ended by themselves: {ended}"


@contextmanager
def cluster(model: Path, scratch: Path, **settings: Any) -> Iterator[Cluster]:
    """A deployment that is ready, every machine checked at every step."""
    config = DeploymentConfig(**{"model": str(model), "port": 0, "kv_memory": "32M", "check": True, **settings})
    log = scratch / f"{model.name}-{time.monotonic_ns()}.log"
    deployment = Deployment(config, model, model.name, log_path=log)
    try:
        deployment.start()
        wait_ready(deployment)
        running = Cluster(deployment, model, log)
    except BaseException:
        deployment.stop()
        print(log.read_text()[-4000:])
        raise
    try:
        yield running
        running.assert_empty()
    except BaseException:
        print(log.read_text()[-6000:])
        raise
    finally:
        running.close()


def request(prompt: Sequence[int] | str, **fields: Any) -> inference_pb2.GenerateRequest:
    """A GenerateRequest; lists extend repeated fields."""
    made = inference_pb2.GenerateRequest()
    if isinstance(prompt, str):
        made.text = prompt
    else:
        made.token_ids.ids.extend(prompt)
    for name, value in fields.items():
        if isinstance(value, list):
            getattr(made, name).extend(value)
        else:
            setattr(made, name, value)
    return made


def sampling_of(made: inference_pb2.GenerateRequest, eos: Sequence[int]) -> Sampling:
    """What the gateway makes of the request."""
    return Sampling(
        max_tokens=made.max_tokens,
        temperature=made.temperature,
        top_k=made.top_k,
        top_p=made.top_p if made.HasField("top_p") else 1.0,
        seed=made.seed,
        stop_token_ids=(*made.stop_token_ids, *(() if made.ignore_eos else eos)),
        ignore_eos=made.ignore_eos,
    )


class Reference:
    """One engine in this process."""

    def __init__(self, model: Path, **settings: Any) -> None:
        self.config = ModelConfig.read(model)
        self.engine = TorchEngine(model, **{"kv_memory": 64 * 2**20, "threads": 1, "hash_logits": True, **settings})

    def play(self, made: inference_pb2.GenerateRequest) -> list[Sampled]:
        """Everything the request gives, run by itself with the whole prompt in one step."""
        name = f"reference-{id(made)}"
        out = alone(self.engine, list(made.token_ids.ids), sampling_of(made, self.config.eos_token_ids), name=name)
        self.engine.close(name)
        return out


def said(sampled: Sequence[Sampled]) -> list[int]:
    """The tokens that a client gets: a stop token is not among them."""
    return [each.token for each in sampled if each.finish != "stop"]


def hashes(sampled: Sequence[Sampled]) -> list[int]:
    """The logits' hash for each of those."""
    return [each.logits_hash for each in sampled if each.finish != "stop"]
