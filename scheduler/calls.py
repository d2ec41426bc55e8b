"""What a gateway knows of its requests under way: a call has continuations, flights carry them through workers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from core.messages import Answer, Finished, Reject
from core.prefix import page_hashes
from core.request import Phase, Request, Stage, Ticket
from core.worker import Identity, Role
from scheduler.placement import Load, Need, Post
from scheduler.poison import Presence


@dataclass(slots=True)
class Branch:
    """One continuation, as its client knows it."""

    tokens: list[int] = field(default_factory=list)
    done: bool = False


@dataclass(frozen=True, slots=True)
class Left:
    """An attempt that failed while its KV was on the way: whoever was to have it may be heard later to have crashed."""

    sinks: tuple[Identity, ...]
    at: float
    alone: bool


@dataclass(slots=True)
class Call:
    """A client's request."""

    counter: int
    request: Request
    arrived_at: float
    deadline: float
    branches: list[Branch]
    prompt_due: bool
    """The prompt's logprobs are wanted and have not come; until then nothing is delivered."""
    flights: list[Flight] = field(default_factory=list)
    offers: int = 0
    """Numbers the offers, so that a late answer to an old one is told apart."""
    cached_tokens: int = 0
    stages: list[Stage] = field(default_factory=list)
    placements: int = 0
    """Of its most often placed flight."""
    presences: tuple[Presence, ...] = ()
    """At ends of workers and failed steps."""
    left: Left | None = None
    """The last attempt that failed while its KV was on the way."""

    def names(self, index: int, upto: int, link: int) -> tuple[int, ...]:
        """Of the full pages, `link` tokens each, that hold the first `upto` tokens of the prompt and a continuation."""
        request, prompt = self.request, self.request.prompt
        start = len(prompt) // link * link
        if not request.prefix or len(request.prefix) * link != start:
            return request.prefix
        rest = prompt[start:] + tuple(self.branches[index].tokens[: upto - len(prompt)])
        return request.prefix + page_hashes(rest, link, after=request.prefix[-1])


@dataclass(slots=True)
class Flight:
    """One or all continuations of a request, on their way through one prefill and one decode worker."""

    call: Call
    branches: tuple[int, ...]
    """Which of the call's; messages count them from 0."""
    need: Need
    """What is left to do, as far as it matters where."""
    key: str = ""
    """Of its last ticket."""
    phase: Phase = Phase.QUEUED
    parked: bool = False
    """Everyone refused, or nobody is there: it waits for a worker that says it has room, or for one that comes."""
    resumes: float = math.inf
    """When it is placed again, if it waits for no more than its time."""
    gives_up: float = math.inf
    """When it is refused, if it was not begun and waits for workers to come."""
    called: bool = False
    """Its offer is the answer to such a word."""
    charged: int = 0
    """Tokens that its tenant was charged for an offer that nobody has accepted yet."""
    lent: Post | None = None
    """The prefill worker whose idle time it takes, until its prompt is computed."""
    load: Load | None = None
    """While a worker has it."""
    placements: int = 0
    """Offers that were accepted."""
    placed: Ticket | None = None
    second: Identity | None = None
    tried: set[Identity] = field(default_factory=set)
    silent: set[Identity] = field(default_factory=set)
    """Those tried who did not answer in time."""
    refusals: dict[Identity, Reject] = field(default_factory=dict)
    """The last one of each worker."""
    tries: int = 0
    """Offers that were refused since it began to be placed."""
    queued_at: float = 0.0
    offered_at: float = 0.0
    ahead_tokens: int = 0
    """New tokens that were queued there when it was offered."""
    base: int = 0
    """Tokens delivered before this attempt began; its own count starts there."""
    alone: bool = False
    """In this attempt no step has it and another request, and its workers have no other such request."""
    workers: tuple[Identity, ...] = ()
    """Who may have it in this attempt; see `Flights`, as for the next."""
    losses: int = 0
    """Of workers, before this attempt began."""
    moves: int = 0
    """How often it has moved from one decode worker to another in this attempt, as far as we have heard."""
    moved: Ticket | None = None
    """By the last of these words."""
    untold: list[int] = field(default_factory=list)
    """Of `branches`: done while the sink could not be told yet."""
    held: list[Answer] = field(default_factory=list)
    """A decode worker's, that have overtaken the prompt's logprobs from the prefill worker."""
    handed: bool = False
    """The prefill worker has reported its stages for this attempt."""
    finished: Finished | None = None
    """All tokens are here; only reports of stages may still be on their way."""
    owing: dict[Role, Identity] = field(default_factory=dict)
    """Whose reports are awaited."""
    finished_at: float = 0.0
    reports: dict[Role, tuple[Stage, ...]] = field(default_factory=dict)
    """The stages that came last from the prefill and from the decode worker."""

    @property
    def ticket(self) -> Ticket:
        """Of the attempt under way."""
        assert self.placed is not None
        return self.placed

    def owner(self) -> tuple[str, str]:
        """The worker that has it in the attempt under way, and what is waited for."""
        source, sink = self.ticket.source.name, self.ticket.sink.name
        match self.phase:
            case Phase.OFFERED:
                return source, f"{source} to answer an offer"
            case Phase.PREFILLING:
                return source, f"its first token from {source}"
            case Phase.HANDING_OFF:
                return source, f"{sink} to take its KV from {source}"
            case _:
                return sink, f"tokens from {sink}"

    def live(self) -> list[int]:
        """Continuations that go on."""
        return [branch for branch in self.branches if not self.call.branches[branch].done]

    def rest(self, now: float) -> Request:
        """What is left to do: the tokens so far are forced, because they are part of the prompt."""
        call, request = self.call, self.call.request
        sampling, left_s = request.sampling, max(0.0, call.deadline - now)
        if sampling.prompt_logprobs is not None and not call.prompt_due:
            sampling = replace(sampling, prompt_logprobs=None)
        done: tuple[int, ...] = ()
        if len(self.branches) == 1:
            (branch,) = self.branches
            if branch or sampling.n > 1:
                sampling = sampling.branch(branch)
            if self.base:
                done = tuple(call.branches[branch].tokens)
                most, least = sampling.max_tokens - len(done), max(0, sampling.min_tokens - len(done))
                sampling = replace(sampling, max_tokens=most, min_tokens=least)
        slo = request.slo
        if slo.deadline_s:
            slo = replace(slo, deadline_s=max(slo.ttft_s, call.arrived_at + slo.deadline_s - now))
        return Request(
            request.id,
            request.prompt + done,
            sampling,
            left_s,
            slo,
            request.hints,
            request.generated + len(done),
            self.need.prefix,
            request.prefix_page_tokens,
            self.alone,
        )
