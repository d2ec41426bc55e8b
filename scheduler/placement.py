"""Where a request may go: the workers that a gateway knows, and what it has under way at each. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from core.request import Request
from core.worker import Identity, Member

MostTokens = Callable[[int, int], int | None]
"""The largest `max_tokens`, at least 1, that a worker can hold for a prompt's tokens and `n`; None without workers."""


@dataclass(frozen=True, slots=True)
class Load:
    """What one placement puts on its workers, in tokens."""

    source: Identity
    prompt: int
    """0 once the prompt is computed."""
    sink: Identity
    size: int


class Workers:
    """Ranks workers by the tokens that this gateway has in flight there; only those that are ready get new requests."""

    def __init__(self) -> None:
        self._members: dict[Identity, Member] = {}
        self._loads: dict[str, Load] = {}
        self._prompts: Counter[Identity] = Counter()
        self._sizes: Counter[Identity] = Counter()

    def __contains__(self, identity: Identity) -> bool:
        return identity in self._members

    def up(self, member: Member) -> None:
        """A worker's session stands, or what it says of itself has changed."""
        self._members[member.identity] = member

    def down(self, identity: Identity) -> None:
        """This life of a worker cannot be used any more."""
        self._members.pop(identity, None)

    def missing(self) -> str | None:
        """What the deployment lacks to serve anything, None if nothing."""
        roles = [member.role for member in self._ready()]
        lacking = [
            name
            for name, there in (
                ("prefill", any(role.prefills for role in roles)),
                ("decode", any(role.decodes for role in roles)),
            )
            if not there
        ]
        return f"no {' and no '.join(lacking)} worker is ready" if lacking else None

    def too_large(self, request: Request) -> str | None:
        """Why no worker can ever hold it, with both numbers; None if one can. Nothing may be missing."""
        prompt, size = len(request.prompt), self.size(request)
        room = max(member.kv_tokens for member in self._ready() if member.role.prefills)
        if prompt > room:
            return f"prompt: got {prompt} tokens, no worker holds more than {room}"
        room = max((self._room(source, sink, prompt) for source, sink in self._pairs()), default=0)
        if size > room:
            return f"prompt and max_tokens: got {size} tokens, no decode worker holds more than {room}"
        return None

    def most_tokens(self) -> MostTokens:
        """As of now; what it returns may be called on any thread."""
        pairs = [(source, sink, sink.kv) for source, sink in self._pairs() if sink.kv is not None]

        def most(prompt: int, n: int) -> int | None:
            rooms = [(self._room(source, sink, prompt), shape) for source, sink, shape in pairs]
            return max((max(1, shape.most_tokens(room, prompt, n)) for room, shape in rooms), default=None)

        return most

    def size(self, request: Request) -> int:
        """Tokens of KV it may come to, all continuations together."""
        prompt, sampling = len(request.prompt), request.sampling
        shape = next((member.kv for member in self._members.values() if member.kv is not None), None)
        if sampling.n == 1 or shape is None:
            return prompt + sampling.max_tokens
        return shape.pages_for_branches(prompt, sampling.max_tokens, sampling.n) * shape.page_tokens

    def sources(self, tried: Iterable[Identity]) -> list[Identity]:
        """Prefill workers that were not tried yet, best first."""
        prefills = (member.identity for member in self._ready() if member.role.prefills)
        untried = [identity for identity in prefills if identity not in tried]
        return sorted(untried, key=lambda identity: (self._prompts[identity], identity))

    def sinks(self, source: Identity, request: Request) -> list[Identity]:
        """Decode workers with room for it, best first; a mixed worker keeps its own."""
        prompt, size = len(request.prompt), self.size(request)
        mine = [sink for giver, sink in self._pairs() if giver == source]
        fitting = [sink for sink in mine if self._room(source, sink, prompt) >= size]
        if any(member.identity == source for member in fitting):
            return [source]
        fitting.sort(key=lambda member: (self._sizes[member.identity] / member.kv_tokens, member.identity))
        return [member.identity for member in fitting]

    def others(self, blamed: Identity | None) -> bool:
        """True if another prefill worker than this takes new requests."""
        return any(member.role.prefills and member.identity != blamed for member in self._ready())

    def hold(self, key: str, load: Load | None) -> None:
        """Count a placement's load in place of what it was before; None: it is over."""
        before = self._loads.pop(key, None)
        if before is not None:
            self._prompts[before.source] -= before.prompt
            self._sizes[before.sink] -= before.size
        if load is not None:
            self._loads[key] = load
            self._prompts[load.source] += load.prompt
            self._sizes[load.sink] += load.size

    def check(self, keys: Iterable[str]) -> None:
        """Invariants: exactly the placements named are counted."""
        assert self._loads.keys() == set(keys)
        for counts, who in ((self._prompts, "source"), (self._sizes, "sink")):
            amount = "prompt" if who == "source" else "size"
            for identity, count in counts.items():
                mine = [load for load in self._loads.values() if getattr(load, who) == identity]
                assert count == sum(getattr(load, amount) for load in mine)

    def _ready(self) -> list[Member]:
        """Workers that take new requests; one that is not ready goes on with those it has."""
        return [member for member in self._members.values() if member.ready]

    def _pairs(self) -> list[tuple[Identity, Member]]:
        """Who may hand over to whom: two mixed workers never, as each could keep for the other what it needs itself."""
        ready = self._ready()
        return [
            (source.identity, sink)
            for source in ready
            if source.role.prefills
            for sink in ready
            if sink.role.decodes and (sink is source or not (source.role.decodes and sink.role.prefills))
        ]

    def _room(self, source: Identity, sink: Member, prompt: int) -> int:
        """Tokens of it that `sink` can hold; while a worker hands over to itself it holds the prompt twice."""
        if sink.identity != source or sink.kv is None:
            return sink.kv_tokens
        return sink.kv_tokens - sink.kv.pages_for(prompt) * sink.kv.page_tokens
