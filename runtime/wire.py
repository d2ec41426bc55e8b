"""The wire form of everything our processes say: core dataclasses to protobuf and back, total in both directions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

from core import messages as m
from core.constraint import Constraint, Language
from core.errors import LocalError, RemoteError, RequestError
from core.kv import KvShape, PageRun
from core.request import Hints, Request, Slo, Stage, Ticket
from core.sampling import Logprobs, Sampling
from core.worker import (
    PROTOCOL_VERSION,
    Costs,
    Greeting,
    Identity,
    Lane,
    Member,
    Numerics,
    Part,
    ProcessEnded,
    Role,
    Use,
    Way,
)
from protos.baton.v1 import common_pb2, registry_pb2, worker_pb2
from protos.baton.v1.worker_pb2 import Frame

PIECE_TOKENS = 64 * 1024
"""Most prompt tokens in one frame (at most 3 bytes each for common vocabularies), so that tokens never wait long."""


def hello(greeting: Greeting) -> Frame:
    """A greeting as the first frame of a stream."""
    member = greeting.member
    body = worker_pb2.Hello(
        identity=str(member.identity),
        role=member.role,
        protocol=member.protocol,
        build=member.build,
        model=member.model,
        fingerprint=member.fingerprint,
        kv=_kv(member.kv),
        pages=member.pages,
        context=member.context,
        numerics=_numerics(member.numerics),
        transport=member.transport,
        transport_metadata=greeting.transport_metadata,
        scratch_pages=greeting.scratch_pages,
        migrates=member.migrates,
        fetches=member.fetches,
        group=member.group,
    )
    return Frame(hello=body)


def greeting(frame: Frame) -> Greeting:
    """The inverse of `hello`; raises RemoteError on any other frame, and on one of another protocol version."""
    if frame.WhichOneof("body") != "hello":
        raise RemoteError(f"first frame: got {frame.WhichOneof('body')}, want hello")
    body = frame.hello
    _speaks(body)
    member = Member(
        identity=identity(body.identity),
        role=_role(body.role),
        address="",
        metrics_address="",
        build=body.build,
        protocol=body.protocol,
        model=body.model,
        fingerprint=body.fingerprint,
        kv=_kv_from(body.kv) if body.HasField("kv") else None,
        pages=body.pages,
        context=body.context,
        numerics=_numerics_from(body.numerics) if body.HasField("numerics") else None,
        transport=body.transport,
        migrates=body.migrates,
        fetches=body.fetches,
        group=body.group,
    )
    return Greeting(member, body.transport_metadata, body.scratch_pages)


def lane_frame(lane: Lane) -> Frame:
    """What the reader of a lane measured."""
    return Frame(
        lane=worker_pb2.LaneMeasured(
            source=str(lane.source),
            transport=lane.transport,
            gbytes_per_s=lane.gbytes_per_s,
            latency_us=lane.latency_us,
        )
    )


def lane_from(body: worker_pb2.LaneMeasured | registry_pb2.Lane) -> Lane:
    """The inverse of `lane_frame` and of the registry's lanes."""
    return Lane(identity(body.source), body.transport, body.gbytes_per_s, body.latency_us)


def registry_lane(lane: Lane) -> registry_pb2.Lane:
    """A lane as the registry carries it."""
    return registry_pb2.Lane(
        source=str(lane.source), transport=lane.transport, gbytes_per_s=lane.gbytes_per_s, latency_us=lane.latency_us
    )


def registry_member(member: Member) -> registry_pb2.Member:
    """A member as the registry carries it."""
    return registry_pb2.Member(
        identity=str(member.identity),
        role=member.role,
        address=member.address,
        metrics_address=member.metrics_address,
        build=member.build,
        protocol=member.protocol,
        model=member.model,
        fingerprint=member.fingerprint,
        kv=_kv(member.kv),
        pages=member.pages,
        context=member.context,
        numerics=_numerics(member.numerics),
        transport=member.transport,
        ready=member.ready,
        migrates=member.migrates,
        fetches=member.fetches,
        group=member.group,
        lanes=[registry_lane(lane) for lane in member.lanes],
        costs=registry_costs(member.costs),
        grammar=member.grammar,
    )


def member_from(body: registry_pb2.Member) -> Member:
    """The inverse of `registry_member`; raises RemoteError on one of another protocol version."""
    _speaks(body)
    return Member(
        identity=identity(body.identity),
        role=_role(body.role),
        address=body.address,
        metrics_address=body.metrics_address,
        build=body.build,
        protocol=body.protocol,
        model=body.model,
        fingerprint=body.fingerprint,
        kv=_kv_from(body.kv) if body.HasField("kv") else None,
        pages=body.pages,
        context=body.context,
        numerics=_numerics_from(body.numerics) if body.HasField("numerics") else None,
        transport=body.transport,
        ready=body.ready,
        migrates=body.migrates,
        fetches=body.fetches,
        group=body.group,
        lanes=tuple(lane_from(lane) for lane in body.lanes),
        costs=costs_from(body.costs) if body.HasField("costs") else None,
        grammar=body.grammar,
    )


def registry_part(part: Part) -> registry_pb2.TransferPart:
    """One worker's part of the transfer map."""
    ways = [registry_pb2.Way(peer=str(each.peer), pulls=each.pulls, serves=each.serves) for each in part.ways]
    return registry_pb2.TransferPart(version=part.version, ways=ways)


def part_from(body: registry_pb2.TransferPart) -> Part:
    """The inverse of `registry_part`; raises RemoteError on uses that nobody has."""
    ways = [Way(identity(each.peer), _uses(each.pulls), _uses(each.serves)) for each in body.ways]
    return Part(body.version, tuple(ways))


def _uses(names: Iterable[str]) -> tuple[Use, ...]:
    try:
        return tuple(Use(name) for name in names)
    except ValueError:
        raise RemoteError(f"uses: got {', '.join(names)}, want some of {', '.join(Use)}") from None


def registry_ended(ended: ProcessEnded) -> registry_pb2.Ended:
    """An end as the registry carries it."""
    return registry_pb2.Ended(identity=str(ended.identity), crashed=ended.crashed)


def ended_from(body: registry_pb2.Ended) -> ProcessEnded:
    """The inverse of `registry_ended`; raises RemoteError on what names nobody."""
    return ProcessEnded(identity(body.identity), body.crashed)


def registry_costs(costs: Costs | None) -> registry_pb2.StepCosts | None:
    """What steps take, as the registry carries it."""
    if costs is None:
        return None
    prefill, decode = (list(itertools.chain(*lines)) for lines in (costs.prefill, costs.decode))
    return registry_pb2.StepCosts(prefill=prefill, decode=decode)


def costs_from(body: registry_pb2.StepCosts) -> Costs:
    """The inverse of `registry_costs`; raises RemoteError on what are no lines of costs."""
    fills, steps = tuple(body.prefill), tuple(body.decode)
    whole = fills and steps and not (len(fills) % 4 or len(steps) % 3)
    if not (whole and all(0 <= value < math.inf for value in (*fills, *steps))):
        raise RemoteError(f"costs: got {fills} and {steps}, want lines of 4 and of 3 numbers from 0 on")
    return Costs(
        tuple((a, b, c, d) for a, b, c, d in zip(*(iter(fills),) * 4, strict=True)),
        tuple((a, b, c) for a, b, c in zip(*(iter(steps),) * 3, strict=True)),
    )


def _speaks(body: worker_pb2.Hello | registry_pb2.Member) -> None:
    """Of what another version says nothing else is read: it may mean anything."""
    if body.protocol != PROTOCOL_VERSION:
        raise RemoteError(
            f"protocol: got {body.protocol} from {body.identity[:99]}, want {PROTOCOL_VERSION} as we have"
        )


def frames(message: m.Message) -> list[Frame]:
    """A message as frames: one, but for a prompt, which travels in pieces of `PIECE_TOKENS`."""
    if isinstance(message, m.SlotFree):
        return [Frame(slot_free=worker_pb2.SlotFree(worker=str(message.worker), tokens=message.tokens))]
    if isinstance(message, m.Readiness):
        return [Frame(readiness=worker_pb2.Readiness(worker=str(message.worker), ready=message.ready))]
    if isinstance(message, m.Freeness):
        return [Frame(freeness=worker_pb2.Freeness(worker=str(message.worker), steps=message.steps))]
    ticket = _ticket(message.ticket)
    match message:
        case m.Offer(_, prompt_tokens, max_tokens, wait_s, hints, prefix, named, batch, second):
            offer = worker_pb2.Offer(
                ticket=ticket,
                prompt_tokens=prompt_tokens,
                max_tokens=max_tokens,
                wait_s=wait_s,
                hints=_hints(hints),
                prefix=prefix,
                prefix_page_tokens=named,
                batch=batch,
                second=str(second) if second else "",
            )
            return [Frame(offer=offer)]
        case m.Accept(_, cached_tokens, wait_s):
            return [Frame(accept=worker_pb2.Accept(ticket=ticket, cached_tokens=cached_tokens, wait_s=wait_s))]
        case m.Reject(_, reason, wait_s, again_s):
            return [Frame(reject=worker_pb2.Reject(ticket=ticket, reason=reason, wait_s=wait_s, again_s=again_s))]
        case m.Prompt(_, request, second, holdings):
            cuts = range(0, len(request.prompt), PIECE_TOKENS)
            pieces = [worker_pb2.PromptPiece(ticket=ticket, tokens=request.prompt[c : c + PIECE_TOKENS]) for c in cuts]
            pieces[-1].request.CopyFrom(_meta(request))
            pieces[-1].second = str(second) if second else ""
            for each in holdings:
                pieces[-1].holdings.add(worker=str(each.worker), tokens=each.tokens)
            return [Frame(prompt=piece) for piece in pieces]
        case m.Cancel(_, reason, report, branch, prefix):
            cancel = worker_pb2.Cancel(ticket=ticket, reason=reason, report=report, branch=branch, prefix=prefix)
            return [Frame(cancel=cancel)]
        case m.Tokens(_, index, tokens, hashes, branch, logprobs, prompt_logprobs):
            body = worker_pb2.Tokens(
                ticket=ticket,
                index=index,
                tokens=tokens,
                logits_hashes=hashes,
                branch=branch,
                logprobs=[_logprobs(each) for each in logprobs],
                prompt_logprobs=[_logprobs(each) for each in prompt_logprobs],
            )
            return [Frame(tokens=body)]
        case m.Handed(_, stages, cancelled, cached_tokens):
            handed = worker_pb2.Handed(
                ticket=ticket,
                stages=[stage_proto(stage) for stage in stages],
                cancelled=cancelled,
                cached_tokens=cached_tokens,
            )
            return [Frame(handed=handed)]
        case m.Finished(_, reason, completion_tokens, stop_token_id, stages, branch, decoded, cached_tokens):
            finished = worker_pb2.Finished(
                ticket=ticket,
                reason=reason,
                completion_tokens=completion_tokens,
                stop_token_id=stop_token_id,
                stages=[stage_proto(stage) for stage in stages],
                branch=branch,
                decoded=decoded,
                cached_tokens=cached_tokens,
            )
            return [Frame(finished=finished)]
        case m.Failed(_, code, why, stages):
            told = [stage_proto(stage) for stage in stages]
            return [Frame(failed=worker_pb2.Failed(ticket=ticket, code=code, message=why, stages=told))]
        case m.Reserve(_, request, size):
            reserve = worker_pb2.Reserve(ticket=ticket, request=_meta(request), prompt=request.prompt, page_tokens=size)
            return [Frame(reserve=reserve)]
        case m.Grant(_, cached, size):
            return [Frame(grant=worker_pb2.Grant(ticket=ticket, cached_tokens=cached, page_tokens=size))]
        case m.Refuse(_, reason):
            return [Frame(refuse=worker_pb2.Refuse(ticket=ticket, reason=reason))]
        case m.Ready(_, first_page, runs, digests, firsts, carried):
            ready = worker_pb2.Ready(
                ticket=ticket,
                first_page=first_page,
                runs=[worker_pb2.PageRun(start=run.start, count=run.count) for run in runs],
                digests=digests,
                firsts=[_first(first) for first in firsts],
                carried=_carried(carried) if carried is not None else None,
            )
            return [Frame(ready=ready)]
        case m.Taken():
            return [Frame(taken=worker_pb2.Taken(ticket=ticket))]
        case m.Release(_, reason):
            return [Frame(release=worker_pb2.Release(ticket=ticket, reason=reason))]
        case m.OfferMigration(_, request, placed, generated, most, moves, size):
            offered = worker_pb2.OfferMigration(
                ticket=ticket,
                request=_meta(request),
                prompt=request.prompt,
                placed=_ticket(placed),
                generated=generated,
                most=most,
                moves=moves,
                page_tokens=size,
            )
            return [Frame(offer_migration=offered)]
        case m.CaughtUp():
            return [Frame(caught_up=worker_pb2.CaughtUp(ticket=ticket))]
        case m.Fetch(_, prefix, cached_pages, timeout_s, size):
            wanted = worker_pb2.Fetch(
                ticket=ticket, prefix=prefix, cached_pages=cached_pages, timeout_s=timeout_s, page_tokens=size
            )
            return [Frame(fetch=wanted)]
        case m.Moved(_, moves):
            return [Frame(moved=worker_pb2.Moved(ticket=ticket, moves=moves))]


class Reader:
    """Messages out of one stream's frames; holds the pieces of prompts that are not whole yet."""

    def __init__(self) -> None:
        self._pieces: dict[str, list[int]] = {}

    def message(self, frame: Frame) -> m.Message | None:
        """The message a frame completes, None for a piece of a prompt. Raises RemoteError if it makes no sense."""
        try:
            return self._message(frame)
        except (LocalError, RequestError) as error:
            raise RemoteError(f"frame {frame.WhichOneof('body')}: {error}") from error

    def _message(self, frame: Frame) -> m.Message | None:
        match frame.WhichOneof("body"):
            case "offer":
                offer = frame.offer
                return m.Offer(
                    _ticket_from(offer.ticket),
                    offer.prompt_tokens,
                    offer.max_tokens,
                    offer.wait_s,
                    _hints_from(offer.hints),
                    tuple(offer.prefix),
                    offer.prefix_page_tokens,
                    offer.batch,
                    identity(offer.second) if offer.second else None,
                )
            case "accept":
                return m.Accept(_ticket_from(frame.accept.ticket), frame.accept.cached_tokens, frame.accept.wait_s)
            case "reject":
                no = frame.reject
                return m.Reject(_ticket_from(no.ticket), no.reason, no.wait_s, no.again_s)
            case "slot_free":
                return m.SlotFree(identity(frame.slot_free.worker), frame.slot_free.tokens)
            case "readiness":
                return m.Readiness(identity(frame.readiness.worker), frame.readiness.ready)
            case "prompt":
                return self._prompt(frame.prompt)
            case "cancel":
                ticket = _ticket_from(frame.cancel.ticket)
                self._pieces.pop(ticket.key, None)
                branch = frame.cancel.branch if frame.cancel.HasField("branch") else None
                prefix = tuple(frame.cancel.prefix)
                return m.Cancel(ticket, frame.cancel.reason, frame.cancel.report, branch, prefix)
            case "tokens":
                tokens = frame.tokens
                return m.Tokens(
                    _ticket_from(tokens.ticket),
                    tokens.index,
                    tuple(tokens.tokens),
                    tuple(tokens.logits_hashes),
                    tokens.branch,
                    tuple(_logprobs_from(each) for each in tokens.logprobs),
                    tuple(_logprobs_from(e) if e.HasField("logprob") else None for e in tokens.prompt_logprobs),
                )
            case "handed":
                handed = frame.handed
                stages = _stages_from(handed.stages)
                return m.Handed(_ticket_from(handed.ticket), stages, handed.cancelled, handed.cached_tokens)
            case "finished":
                finished = frame.finished
                return m.Finished(
                    _ticket_from(finished.ticket),
                    finished.reason,
                    finished.completion_tokens,
                    finished.stop_token_id if finished.HasField("stop_token_id") else None,
                    _stages_from(finished.stages),
                    finished.branch,
                    finished.decoded,
                    finished.cached_tokens,
                )
            case "failed":
                failed = frame.failed
                stages = _stages_from(failed.stages)
                return m.Failed(_ticket_from(failed.ticket), failed.code, failed.message, stages)
            case "reserve":
                reserve = frame.reserve
                request = _request(reserve.request, tuple(reserve.prompt))
                return m.Reserve(_ticket_from(reserve.ticket), request, reserve.page_tokens)
            case "grant":
                grant = frame.grant
                return m.Grant(_ticket_from(grant.ticket), grant.cached_tokens, grant.page_tokens)
            case "refuse":
                return m.Refuse(_ticket_from(frame.refuse.ticket), frame.refuse.reason)
            case "ready":
                ready = frame.ready
                return m.Ready(
                    _ticket_from(ready.ticket),
                    ready.first_page,
                    tuple(PageRun(run.start, run.count) for run in ready.runs),
                    tuple(ready.digests),
                    tuple(map(_first_from, ready.firsts)),
                    _carried_from(ready.carried) if ready.HasField("carried") else None,
                )
            case "taken":
                return m.Taken(_ticket_from(frame.taken.ticket))
            case "release":
                return m.Release(_ticket_from(frame.release.ticket), frame.release.reason)
            case "offer_migration":
                offered = frame.offer_migration
                return m.OfferMigration(
                    _ticket_from(offered.ticket),
                    _request(offered.request, tuple(offered.prompt)),
                    _ticket_from(offered.placed),
                    offered.generated,
                    offered.most,
                    offered.moves,
                    offered.page_tokens,
                )
            case "caught_up":
                return m.CaughtUp(_ticket_from(frame.caught_up.ticket))
            case "fetch":
                fetch = frame.fetch
                ticket = _ticket_from(fetch.ticket)
                return m.Fetch(ticket, tuple(fetch.prefix), fetch.cached_pages, fetch.timeout_s, fetch.page_tokens)
            case "moved":
                return m.Moved(_ticket_from(frame.moved.ticket), frame.moved.moves)
            case "freeness":
                return m.Freeness(identity(frame.freeness.worker), frame.freeness.steps)
            case other:
                raise RemoteError(f"frame: got {other}, want a message")

    def _prompt(self, piece: worker_pb2.PromptPiece) -> m.Prompt | None:
        ticket = _ticket_from(piece.ticket)
        tokens = self._pieces.setdefault(ticket.key, [])
        tokens.extend(piece.tokens)
        if not piece.HasField("request"):
            return None
        del self._pieces[ticket.key]
        second = identity(piece.second) if piece.second else None
        holdings = tuple([m.Holding(identity(each.worker), each.tokens) for each in piece.holdings])
        return m.Prompt(ticket, _request(piece.request, tuple(tokens)), second, holdings)


def _first(first: m.First) -> worker_pb2.First:
    body = worker_pb2.First(token=first.token, logits_hash=first.logits_hash, branch=first.branch)
    if first.logprobs is not None:
        body.logprobs.CopyFrom(_logprobs(first.logprobs))
    return body


def _first_from(body: worker_pb2.First) -> m.First:
    logprobs = _logprobs_from(body.logprobs) if body.HasField("logprobs") else None
    return m.First(body.token, body.logits_hash, body.branch, logprobs)


def _carried(carried: m.Carried) -> worker_pb2.Carried:
    return worker_pb2.Carried(
        tokens=carried.tokens,
        stages=[stage_proto(stage) for stage in carried.stages],
        logits_hashes=carried.logits_hashes,
        logprobs=[_logprobs(each) for each in carried.logprobs],
        stopped_s=carried.stopped_s,
    )


def _carried_from(body: worker_pb2.Carried) -> m.Carried:
    return m.Carried(
        tuple(body.tokens),
        _stages_from(body.stages),
        tuple(body.logits_hashes),
        tuple(_logprobs_from(each) for each in body.logprobs),
        body.stopped_s,
    )


def _logprobs(known: Logprobs | None) -> worker_pb2.Logprobs:
    if known is None:
        return worker_pb2.Logprobs()
    return worker_pb2.Logprobs(
        token=known.token, logprob=known.logprob, top_ids=known.top_ids, top_logprobs=known.top_logprobs
    )


def _logprobs_from(body: worker_pb2.Logprobs) -> Logprobs:
    return Logprobs(body.token, body.logprob, tuple(body.top_ids), tuple(body.top_logprobs))


def stage_proto(stage: Stage) -> common_pb2.Stage:
    """A stage of a waterfall."""
    return common_pb2.Stage(name=stage.name, worker=stage.worker, seconds=stage.seconds, detail=stage.detail)


def hints_from(body: common_pb2.Hints) -> Hints:
    """A caller's hints."""
    return _hints_from(body)


def slo_from(body: common_pb2.Slo) -> Slo:
    """What a client was promised, or asks for."""
    return Slo(body.ttft_s, body.gap_s, body.deadline_s, body.batch)


def _slo(slo: Slo) -> common_pb2.Slo:
    return common_pb2.Slo(ttft_s=slo.ttft_s, gap_s=slo.gap_s, deadline_s=slo.deadline_s, batch=slo.batch)


def _ticket(ticket: Ticket) -> worker_pb2.Ticket:
    return worker_pb2.Ticket(
        minter=str(ticket.minter),
        counter=ticket.counter,
        attempt=ticket.attempt,
        source=str(ticket.source),
        sink=str(ticket.sink),
    )


def _ticket_from(body: worker_pb2.Ticket) -> Ticket:
    return Ticket(identity(body.minter), body.counter, body.attempt, identity(body.source), identity(body.sink))


def identity(text: str) -> Identity:
    """A process's identity as it is written on the wire; RemoteError if it is not one."""
    try:
        return Identity.parse(text)
    except LocalError as error:
        raise RemoteError(str(error)) from error


def _role(text: str) -> Role:
    try:
        return Role(text)
    except ValueError:
        raise RemoteError(f"role: got {text!r}, want one of {[role.value for role in Role]}") from None


def _kv(shape: KvShape | None) -> common_pb2.KvShape | None:
    if shape is None:
        return None
    return common_pb2.KvShape(
        layers=shape.layers,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        page_tokens=shape.page_tokens,
        dtype=shape.dtype,
    )


def _kv_from(body: common_pb2.KvShape) -> KvShape:
    try:
        return KvShape(body.layers, body.kv_heads, body.head_dim, body.page_tokens, body.dtype)
    except LocalError as error:
        raise RemoteError(str(error)) from error


def _numerics(numerics: Numerics | None) -> common_pb2.Numerics | None:
    if numerics is None:
        return None
    return common_pb2.Numerics(exact=numerics.exact, dtype=numerics.dtype, threads=numerics.threads, cpu=numerics.cpu)


def _numerics_from(body: common_pb2.Numerics) -> Numerics:
    return Numerics(body.exact, body.dtype, body.threads, body.cpu)


def _hints(hints: Hints) -> common_pb2.Hints:
    return common_pb2.Hints(
        priority=hints.priority,
        session=hints.session,
        tenant=hints.tenant,
        group=hints.group,
        program_step=hints.program_step,
        tool=hints.tool,
    )


def _hints_from(body: common_pb2.Hints) -> Hints:
    return Hints(body.priority, body.session, body.tenant, body.group, body.program_step, body.tool)


def _stages_from(stages: Iterable[common_pb2.Stage]) -> tuple[Stage, ...]:
    return tuple(Stage(stage.name, stage.worker, stage.seconds, dict(stage.detail)) for stage in stages)


def _meta(request: Request) -> worker_pb2.RequestMeta:
    sampling = request.sampling
    return worker_pb2.RequestMeta(
        id=request.id,
        sampling=common_pb2.Sampling(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            seed=sampling.seed,
            stop_token_ids=sampling.stop_token_ids,
            ignore_eos=sampling.ignore_eos,
            n=sampling.n,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            logit_bias=dict(sampling.logit_bias),
            min_tokens=sampling.min_tokens,
            logprobs=sampling.logprobs,
            prompt_logprobs=sampling.prompt_logprobs,
            constraint=_constraint(sampling.constraint),
        ),
        timeout_s=request.timeout_s,
        slo=_slo(request.slo),
        hints=_hints(request.hints),
        generated=request.generated,
        prefix=request.prefix,
        prefix_page_tokens=request.prefix_page_tokens,
        alone=request.alone,
    )


def _constraint(constraint: Constraint | None) -> common_pb2.Constraint | None:
    if constraint is None:
        return None
    return common_pb2.Constraint(language=constraint.language, text=constraint.text)


def _constraint_from(body: common_pb2.Constraint) -> Constraint:
    try:
        return Constraint(Language(body.language), body.text)
    except ValueError:
        want = [each.value for each in Language]
        raise RemoteError(f"constraint.language: got {body.language!r}, want one of {want}") from None


def _request(meta: worker_pb2.RequestMeta, prompt: tuple[int, ...]) -> Request:
    s = meta.sampling
    sampling = Sampling(
        max_tokens=s.max_tokens,
        temperature=s.temperature,
        top_k=s.top_k,
        top_p=s.top_p,
        seed=s.seed,
        stop_token_ids=tuple(s.stop_token_ids),
        ignore_eos=s.ignore_eos,
        n=s.n or 1,
        min_p=s.min_p,
        repetition_penalty=s.repetition_penalty or 1.0,
        presence_penalty=s.presence_penalty,
        frequency_penalty=s.frequency_penalty,
        logit_bias=tuple(sorted(s.logit_bias.items())),
        min_tokens=s.min_tokens,
        logprobs=s.logprobs if s.HasField("logprobs") else None,
        prompt_logprobs=s.prompt_logprobs if s.HasField("prompt_logprobs") else None,
        constraint=_constraint_from(s.constraint) if s.HasField("constraint") else None,
    )
    slo = slo_from(meta.slo)
    hints = _hints_from(meta.hints)
    prefix, named = tuple(meta.prefix), meta.prefix_page_tokens
    return Request(meta.id, prompt, sampling, meta.timeout_s, slo, hints, meta.generated, prefix, named, meta.alone)
