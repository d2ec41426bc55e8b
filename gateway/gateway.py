"""One gateway process's inside: clients in front of the router, workers behind it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

import grpc

from core.config import GatewayConfig, weights
from core.constraint import Constraint
from core.errors import RequestError, SetupError
from core.request import Phase, Request, Stage
from core.sampling import Logprobs
from core.standing import Standing
from core.worker import Greeting, Identity, Member, ProcessEnded, Role
from engine.grammar import available
from gateway.goodput import Goodput, Seen
from gateway.intake import Intake, ModelFacts
from gateway.replies import Batch, Outcome, Replies, Reply
from gateway.service import SERVICE, InferenceService
from gateway.sessions import Sessions
from gateway.text import TextStream, Tokenizer
from gateway.traces import Traces
from protos.baton.v1 import inference_pb2, inference_pb2_grpc, inspect_pb2, inspect_pb2_grpc
from runtime import inspection, rpc, wire
from runtime.driver import Driver
from runtime.inspection import Inspection
from runtime.metrics import Gauges, Metrics
from runtime.registry import Registry
from scheduler import policies
from scheduler.groups import Groups
from scheduler.router_events import Arrived, ClientGone, Complete, Deliver, End, RouterCommand, Satisfied, ToOne

log = logging.getLogger("baton.gateway")

UNREAD_S = 30.0
"""A client that has not read the end of its request after this time is hung up on."""
LARGE_NBYTES = 16_384
"""A request from this size on takes milliseconds to tokenize."""

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(slots=True)
class _Client:
    replies: Replies
    request: Request
    arrived_at: float
    task: asyncio.Task[Any]
    """Serves the call."""
    refuse: Callable[[RequestError], Awaitable[object]] | None
    """Ends the call from beside that task, which may be waiting for the client to read."""
    seen: Seen = field(default_factory=Seen)


def response(index: int, batch: Batch, end: inference_pb2.End | None = None) -> inference_pb2.GenerateResponse:
    """What a client is sent of a batch."""
    return inference_pb2.GenerateResponse(
        index=index,
        text=batch.text,
        token_ids=batch.tokens,
        end=end,
        logprobs=[token_logprobs(each) for each in batch.logprobs],
        prompt_logprobs=[token_logprobs(each) for each in batch.prompt_logprobs],
    )


def token_logprobs(known: Logprobs | None) -> inference_pb2.TokenLogprobs:
    """How likely a token was; empty for the first of a prompt."""
    if known is None:
        return inference_pb2.TokenLogprobs()
    return inference_pb2.TokenLogprobs(
        token_id=known.token, logprob=known.logprob, top_ids=known.top_ids, top_logprobs=known.top_logprobs
    )


def vllm_door() -> ModuleType | None:
    """The front door for OpenAI HTTP servers, if its stubs are installed."""
    try:
        from gateway import vllm
    except ImportError:
        return None
    return vllm


class Gateway:
    """What every front door asks: `generate`, `abort`, and what is known of the model.

    `bug` is called when the process should end because of a fault of our own.
    """

    def __init__(
        self,
        config: GatewayConfig,
        me: Identity,
        build: str,
        facts: ModelFacts,
        tokenizer: Tokenizer,
        intake: Intake,
        chat_template: str,
        bug: Callable[[BaseException], None],
    ) -> None:
        self._config = config
        self.facts = facts
        self.tokenizer = tokenizer
        self.intake = intake
        self.chat_template = chat_template
        self._bug = bug
        self._tasks: list[asyncio.Task[None]] = []
        self._clients: dict[int, _Client] = {}
        self._hang_ups: set[asyncio.Task[None]] = set()
        self._names: dict[str, int] = {}
        self._next = 0
        self._healthy = False
        vllm = vllm_door()
        services = [SERVICE, inspection.SERVICE, *([vllm.SERVICE] if vllm else [])]
        self._server = rpc.Server(config.listen, services)
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(InferenceService(self), self._server.grpc)
        if vllm:
            vllm.add(self, Path(config.model), build, self._server.grpc)
            log.info("offers %s, too", vllm.SERVICE)
        self._metrics = Metrics(self._gauges)
        self._ttft = self._metrics.histogram("request_ttft_seconds", "Arrival to first token, at the gateway.")
        self._gap = self._metrics.histogram("inter_token_latency_seconds", "Gaps between tokens, at the gateway.")
        self._e2e = self._metrics.histogram("request_e2e_seconds", "Arrival to end, at the gateway.")
        self._stage = self._metrics.histogram("stage_latency_seconds", "Stages of requests.", ("stage",))
        self._requests = self._metrics.counter("requests", "Requests by how they ended.", ("outcome", "code"))
        judged = "Requests by whether all that was promised was kept; a bounded number of tenants is told apart."
        counter = self._metrics.counter("requests_judged", judged, ("class", "tenant", "good"))
        self._goodput = Goodput(lambda *labels: counter.labels(*labels).inc())
        self.address = self._server.address
        self.metrics_address = self._metrics.serve(config.listen.rpartition(":")[0])
        self._me = Member(
            identity=me,
            role=Role.GATEWAY,
            address=self.address,
            metrics_address=self.metrics_address,
            build=build,
            model=facts.name,
            fingerprint=facts.fingerprint,
            context=facts.context,
        )
        self._driver = Driver(bug, check=config.check)
        chosen = policies.live(config.policy).weighing(weights(config.tenants))
        waits = replace(chosen.router_config, max_queue_s=config.max_queue_s)
        pattern = replace(chosen, router_config=waits).router(me, None, mixed_alone=chosen.colocated)
        self._router = Groups(pattern, [group.name for group in config.group] or [""])
        self._driver.seat("router", self._router, self._perform)
        self._traces = Traces(self._router, self._driver.now)
        self.inspection = Inspection(str(me), self._driver, more=self._unread, trace=self._traced, here_only=True)
        inspect_pb2_grpc.add_InspectServiceServicer_to_server(self.inspection, self._server.grpc)
        self._sessions = Sessions(Greeting(self._me), self._driver, self._changed)
        self._registry = Registry(config.coordinator, self._member, self._sessions.members_changed, self._process_ended)

    async def start(self) -> None:
        """Serve; healthy once a prefill and a decode worker can be used."""
        await self._server.start()
        self._tasks.append(asyncio.create_task(self._registered()))

    async def stop(self, reason: str) -> None:
        """Refuse new calls, say goodbye to the workers and end."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._registry.leave()
        await self._server.stop(0.2)
        await self._sessions.close(reason)
        self._driver.close()
        self._metrics.close()

    async def generate(
        self,
        asked: inference_pb2.GenerateRequest,
        remaining_s: float | None,
        refuse: Callable[[RequestError], Awaitable[object]] | None = None,
    ) -> AsyncGenerator[inference_pb2.GenerateResponse]:
        """The request's messages, each continuation's last with `end`; `RequestError` if it is refused or fails.

        `remaining_s` is the call's own deadline; `refuse` ends the call if its client does not read the response.
        Closing the iterator ends the request.
        """
        counter = self._next = self._next + 1
        arrived_at = self._driver.now()
        try:
            if (why := self._router.unknown(asked.hints.group)) is not None:
                raise RequestError("NOT_FOUND", why)
            group = self._router.served_by(asked.hints.group)
            most = self._router.most_tokens(group)
            pages = self._router.page_tokens(group) if self._config.prefix_cache else 0
            if (constraint := self.intake.constraint(asked)) is not None:
                self._constrains(constraint, group)
            request, stops = await self.aside(asked, self.intake.request, asked, remaining_s, most, pages)
            if request.id in self._names:
                raise RequestError("ALREADY_EXISTS", f"request_id: {request.id!r} is live")
        except RequestError as error:
            self._requests.labels("rejected", error.code).inc()
            raise
        task = asyncio.current_task()
        assert task is not None
        sampling = request.sampling
        streams = [TextStream(self.tokenizer, stops, min_tokens=sampling.min_tokens) for _ in range(sampling.n)]
        client = _Client(Replies(streams), request, arrived_at, task, refuse)
        self._clients[counter], self._names[request.id] = client, counter
        try:
            self._driver.post("router", Arrived(counter, request))
            failed: RequestError | None = None
            while news := await client.replies.next():
                for index, batch in news:
                    outcome = client.replies[index].outcome if batch.last else None
                    wrong = outcome.error if outcome is not None else None
                    if outcome is not None and wrong is None:
                        yield self._last(client, index, batch, outcome)
                        continue
                    failed = failed or wrong
                    if batch.tokens or batch.text or batch.prompt_logprobs:
                        yield response(index, batch)
            if failed is not None:
                raise failed
        finally:
            self._driver.post("router", ClientGone(counter, "the client left"))
            del self._clients[counter]
            del self._names[request.id]

    @property
    def constrains(self) -> bool:
        """True if all workers can make texts match a schema or grammar, and so can we."""
        return available() and not self._cannot_constrain(None)

    def missing(self) -> str | None:
        """What the deployment lacks to serve anything, None if nothing."""
        return self._router.missing()

    def phases(self) -> dict[Phase, int]:
        """Live requests by phase."""
        counts = [Counter(self._router.phases(group)) for group in self._router.names]
        return {phase: sum(each[phase] for each in counts) for phase in Phase if not phase.ended}

    def abort(self, request_id: str) -> bool:
        """End a live request by its caller's name for it; False if there is none."""
        counter = self._names.get(request_id)
        if counter is None:
            return False
        for reply in self._clients[counter].replies.all:
            reply.aborted = True
        self._driver.post("router", ClientGone(counter, "aborted"))
        return True

    async def aside(
        self,
        request: inference_pb2.GenerateRequest | inference_pb2.TokenizeRequest,
        read: Callable[P, T],
        *arguments: P.args,
        **named: P.kwargs,
    ) -> T:
        """What `read` makes of a request; a large one is read on a thread, or every stream here would stand still.

        So is one with a grammar to compile.
        """
        constrained = isinstance(request, inference_pb2.GenerateRequest) and request.WhichOneof("constraint")
        if request.ByteSize() < LARGE_NBYTES and not constrained:
            return read(*arguments, **named)
        return await asyncio.to_thread(read, *arguments, **named)

    def _constrains(self, constraint: Constraint, group: str) -> None:
        """Refuse what a text must match, if some worker cannot see to it: the request may come to any of its group."""
        if cannot := self._cannot_constrain(group):
            why = "needs workers that compile grammars (the extra grammar; never the paced engine)"
            raise RequestError("UNIMPLEMENTED", f"{constraint.language}: {why}, and {', '.join(cannot)} cannot")

    def _cannot_constrain(self, group: str | None) -> list[str]:
        """Workers of a group, or of all."""
        workers = [member for member in self._sessions.members if member.role is not Role.GATEWAY]
        workers = [member for member in workers if group is None or member.group == group]
        return sorted(member.identity.name for member in workers if not member.grammar)

    def _perform(self, command: RouterCommand) -> None:
        match command:
            case ToOne(worker, message):
                self._sessions.tell(worker, message)
            case Deliver(counter, tokens, hashes, branch, logprobs, prompt_logprobs):
                client = self._clients.get(counter)
                if client is not None:
                    reply = client.replies[branch]
                    if tokens:
                        self._observe(client, reply, len(tokens))
                    if reply.deliver(tokens, hashes, logprobs, prompt_logprobs):
                        self._driver.post("router", Satisfied(counter, branch))
            case Complete(counter, branch, reason, stop_token_id):
                client = self._clients.get(counter)
                if client is not None:
                    client.replies[branch].end(reason, stop_token_id)
            case End():
                client = self._clients.get(command.counter)
                if client is None:
                    self._requests.labels(command.phase, command.code).inc()
                else:
                    total_s = self._driver.now() - client.arrived_at
                    self._traces.ended(client.request, command, total_s, client.replies)
                    self._e2e.observe(total_s)
                    request = client.request
                    self._goodput.ended(client.seen, request.slo, request.hints.tenant, total_s, command.phase)
                    for stage in command.stages:
                        self._stage.labels(stage.name).observe(stage.seconds)
                    client.replies.end(command)
                    self._requests.labels(command.phase, command.code).inc()
                    asyncio.get_running_loop().call_later(UNREAD_S, self._give_up, command.counter)
                    if command.poisonous:
                        log.warning("%s", command.reason, extra={"request": client.request.id})
                    log.info(
                        "%s: %s after %d tokens",
                        command.phase,
                        command.reason,
                        sum(reply.completion_tokens for reply in client.replies.all),
                        extra={"request": client.request.id},
                    )

    def _traced(self, request_id: str) -> inspect_pb2.TraceResponse | None:
        """Of a live request, or of one that ended lately."""
        counter = self._names.get(request_id)
        client = None if counter is None else self._clients[counter]
        if counter is None or client is None:
            return self._traces.past(request_id)
        return self._traces.live(counter, client.request, client.arrived_at) or self._traces.past(request_id)

    def _unread(self) -> Iterable[tuple[str, Standing]]:
        """Clients who have something to read."""
        for client in self._clients.values():
            unread = sum(reply.unread for reply in client.replies.all)
            over = all(reply.outcome is not None for reply in client.replies.all)
            if unread or over:
                why = f"its client to read {unread} tokens" if unread else "its client to read the end"
                state = "ended" if over else "delivering"
                yield "client", Standing("", client.request.id, state, client.arrived_at, waits_for=why)

    def _give_up(self, counter: int) -> None:
        """A request that ended long ago and is still not read: its client hangs, and is hung up on."""
        client = self._clients.get(counter)
        if client is not None:
            log.info("hung up on a client that does not read", extra={"request": client.request.id})
            # Cancelling alone would leave the call open: its client, should it read one day, would wait for ever.
            if client.refuse is not None:
                self._hang_ups.add(hang_up := asyncio.create_task(self._hang_up(client.refuse)))
                hang_up.add_done_callback(self._hang_ups.discard)
            client.task.cancel()

    async def _hang_up(self, refuse: Callable[[RequestError], Awaitable[object]]) -> None:
        """Ends when the client has read what was sent before, or is gone."""
        with contextlib.suppress(grpc.aio.AbortError):
            await refuse(RequestError("ABORTED", f"the response was not read within {UNREAD_S:g} s of its end"))

    def _observe(self, client: _Client, reply: Reply, tokens: int) -> None:
        now = self._driver.now()
        if reply.last_token_at is not None:
            gap_s = (now - reply.last_token_at) / tokens
            self._gap.observe(gap_s)
            client.seen.gap(gap_s, tokens, client.request.slo)
        elif all(each.last_token_at is None for each in client.replies.all):
            client.seen.ttft_s = now - client.arrived_at
            self._ttft.observe(client.seen.ttft_s)
        reply.last_token_at = now

    def _last(self, client: _Client, index: int, batch: Batch, outcome: Outcome) -> inference_pb2.GenerateResponse:
        """A continuation's last message; the request's own last one says where the time went."""
        request, reply = client.request, client.replies[index]
        last = inference_pb2.End(
            finish_reason=outcome.reason,
            prompt_tokens=len(request.prompt),
            completion_tokens=outcome.completion_tokens,
            request_id=request.id,
            seed=request.sampling.seed,
            logits_hashes=reply.hashes if any(reply.hashes) else (),
        )
        if outcome.stop_string is not None:
            last.stop_string = outcome.stop_string
        elif outcome.stop_token_id is not None:
            last.stop_token_id = outcome.stop_token_id
        if outcome.end is not None:
            total = Stage("total", self._me.identity.name, self._driver.now() - client.arrived_at)
            last.cached_tokens, last.attempts = outcome.end.cached_tokens, outcome.end.attempts
            last.stages.extend(wire.stage_proto(stage) for stage in (*outcome.end.stages, total))
        return response(index, batch, last)

    async def _registered(self) -> None:
        try:
            await self._registry.run()
        except SetupError as error:
            self._bug(error)

    def _process_ended(self, ended: ProcessEnded) -> None:
        self._driver.post("router", ended)

    def _member(self) -> Member:
        return Member(
            identity=self._me.identity,
            role=self._me.role,
            address=self.address,
            metrics_address=self.metrics_address,
            build=self._me.build,
            model=self._me.model,
            fingerprint=self._me.fingerprint,
            context=self._me.context,
            ready=self._router.missing() is None,
        )

    def _changed(self) -> None:
        self._registry.renew()
        ready = self._router.missing() is None
        if ready != self._healthy:
            self._healthy = ready
            log.info("ready" if ready else "not ready: %s", *([] if ready else [self._router.missing()]))
            self._health_task = asyncio.create_task(self._server.healthy(ready))

    def _gauges(self) -> Gauges:
        for group in self._router.names:
            for phase, count in self._router.phases(group).items():
                yield "requests_live", "Live requests by phase.", {"phase": phase, "group": group}, float(count)
        for worker in self._sessions.members:
            yield (
                "worker_ready",
                "Workers that the gateway knows.",
                {"worker": worker.identity.name, "group": worker.group},
                float(worker.ready),
            )
        yield "ignored_messages", "Late or unknown messages.", {"machine": "router"}, float(self._router.ignored)
