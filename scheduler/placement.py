"""Where a request may go: the workers that a gateway knows, what it has under way at each, and who ranks them. Pure.

`Workers` keeps members and loads; a `Placement` is a strategy over them, one file each. All loads are this gateway's
own: nobody's report is trusted to be fresh (after P/D-Serve), and a worker that is busier than it looks refuses.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import takewhile
from operator import itemgetter
from typing import Any, Protocol

from core.kv import KvShape
from core.request import Request
from core.worker import Identity, Member

MostTokens = Callable[[int, int], int | None]
"""The largest `max_tokens`, at least 1, that a worker can hold for a prompt's tokens and `n`; None without workers."""


class Lane(StrEnum):
    """What prompts a prefill worker computes."""

    ANY = "any"
    SHORT = "short"
    LONG = "long"


@dataclass(slots=True, eq=False)
class Post:
    """A worker, and what this gateway has under way there."""

    member: Member
    identity: Identity
    prefills: bool = False
    decodes: bool = False
    room: int = 0
    """Tokens of KV that it holds."""
    order: int = 0
    """Its place among all by identity: of equals, the lowest is taken."""
    queue: int = 0
    """Prompts that are not computed yet."""
    queue_tokens: int = 0
    """New tokens of these."""
    rows: int = 0
    """Placements that it decodes, or will."""
    held_tokens: int = 0
    """KV that these may come to."""
    free: int = 0
    """New tokens of the largest offer that it said it may accept now; 0 once it has refused one since."""
    lent: int = 0
    """Prompt tokens of the batch class that it was sent and has not computed yet."""
    gone: bool = False
    quiet: bool = False
    """Nothing comes from it: it gets something new only where nobody else is."""
    lane: Lane = Lane.ANY

    @property
    def mixed(self) -> bool:
        """True if it can keep what it prefills."""
        return self.prefills and self.decodes


@dataclass(slots=True, eq=False)
class Need:
    """What one placement asks of its workers."""

    tokens: int
    """Of the prompt."""
    size: int
    """Tokens of KV it may come to, all continuations together; where workers' pages differ, in the largest."""
    prefix: tuple[int, ...] = ()
    wait_s: float = 0.0
    """The first token is wanted within this time from now."""
    gap_s: float = 0.0
    """Tail of the gaps between tokens that was promised; 0: none."""
    note: Any = None
    """A strategy's own, from one try to the next."""
    sizes: Mapping[int, int] | None = None
    """The same as `size` by tokens a page, if it depends on them."""


@dataclass(slots=True, eq=False)
class Load:
    """What one placement puts on its workers."""

    source: Post
    sink: Post
    tokens: int
    """New tokens of the prompt."""
    size: int
    queued: bool = True
    """False once the prompt is computed."""


_POST = itemgetter(2)


class Ranking:
    """Posts in order of a load, the lightest first; a change costs O(log n) comparisons."""

    __slots__ = ("_entries", "_load", "_sorted", "posts")

    def __init__(self, load: Callable[[Post], float], posts: Iterable[Post] = ()) -> None:
        self._load = load
        self.posts = tuple(sorted(posts, key=lambda post: post.order))
        """All of them, in order of identity."""
        self._entries = {post.order: (load(post), post.order, post) for post in self.posts}
        self._sorted = sorted(self._entries.values())

    def __len__(self) -> int:
        return len(self._sorted)

    def __contains__(self, post: Post) -> bool:
        ranked = self._entries.get(post.order)
        return ranked is not None and ranked[2] is post

    def __iter__(self) -> Iterator[Post]:
        return map(_POST, self._sorted)

    def first(self) -> Post | None:
        """The lightest."""
        return self._sorted[0][2] if self._sorted else None

    def moved(self, post: Post) -> None:
        """Its load is not what it was; one that is not ranked is not now, either."""
        order = post.order
        before = self._entries.get(order)
        if before is None or before[2] is not post:
            return
        load = self._load(post)
        if load != before[0]:
            ranked = self._sorted
            del ranked[bisect_left(ranked, before)]
            after = self._entries[order] = (load, order, post)
            insort(ranked, after)

    def check(self) -> None:
        """Invariant: every load is as it was ranked."""
        assert self._sorted == sorted((self._load(post), post.order, post) for post in self)


class Placement(Protocol):
    """Chooses workers among those that are ready; one instance serves one gateway.

    Deterministic: same members, loads and calls, same choice. It keeps nothing of single requests except in their
    `Need.note`, so what it remembers (`document`) is all that a copy has to know beside members and loads.
    """

    def queue_load(self, post: Post) -> float:
        """What prefill workers are ranked by, from `post` alone."""
        ...

    def decode_load(self, post: Post) -> float:
        """What decode workers are ranked by, from `post` alone."""
        ...

    def sources(self, need: Need, workers: Workers) -> Iterable[Post]:
        """Prefill workers in the order in which they are to be asked; asked anew for each try."""
        ...

    def sinks(self, source: Post, need: Need, workers: Workers) -> tuple[Post, ...]:
        """Decode workers for what `source` prefills, the best first; at most two are used."""
        ...

    def fewest(self, need: Need, workers: Workers) -> int:
        """The fewest new tokens it may come to anywhere, by what is known of caches."""
        ...

    def accepted(self, source: Post, need: Need) -> None:
        """`source` will compute it."""
        ...

    def kept(self, post: Post, prefix: tuple[int, ...]) -> None:
        """`post` has these pages from now on, because it decodes, or has decoded, what they begin. Only said where
        prefill workers fetch."""
        ...

    def holders(self, source: Post, need: Need, pages: int, workers: Workers) -> tuple[tuple[Identity, int], ...]:
        """Others that may have more than so many of its first pages, as `source` could have them from there, and how
        many; the most first, a few at most."""
        ...

    def prefilled(self, source: Post, tokens: int, seconds: float) -> None:
        """`source` took so long, from offer to first token, for what was queued there and the request's new tokens."""
        ...

    def document(self) -> dict[str, Any]:
        """What it remembers, as JSON."""
        ...

    def restore(self, document: Mapping[str, Any]) -> None:
        """Remember that instead."""
        ...


class Workers:
    """The workers that a gateway knows; only those that are ready get new requests.

    What depends on the members alone is worked out once a change of them, on the first question after it.
    `mixed_alone`: a mixed worker computes both phases in one step (`scheduler/mixed_policy.py`), so it keeps what it
    prefills and neither hands over nor is handed anything.
    """

    def __init__(
        self, queue_load: Callable[[Post], float], decode_load: Callable[[Post], float], *, mixed_alone: bool = False
    ) -> None:
        self._loads = (queue_load, decode_load)
        self._mixed_alone = mixed_alone
        self._posts: dict[Identity, Post] = {}
        self._gone: dict[Identity, Post] = {}
        """Lost while they had loads, in case they come back with these."""
        self._sources = self._sinks = 0
        """Those that are ready, counted at once: whether somebody is there is asked at every change."""
        self._stale = True
        self._version = 0
        self._prefills = Ranking(queue_load)
        self._decodes = Ranking(decode_load)
        self._free = Ranking(_least_free)
        self._shapes: tuple[KvShape, ...] = ()
        """Of pages that there are, the smallest first."""
        self._prompt_room = 0
        self._rooms: tuple[tuple[int, KvShape | None, bool], ...] = ()
        """(tokens, shape, hands over to itself) of every kind of pair that there is."""
        self._last_rooms: tuple[tuple[int, KvShape | None, bool], ...] = ()
        """The same when nothing was missing last."""
        self._elsewhere = 0
        """The most tokens that a worker may be handed by another one."""
        self._apart = False
        """Somebody only decodes."""
        self._hushed: dict[Identity, None] = {}
        """Workers that are quiet, in order."""
        self._passed_over = False
        self._fetches = False
        self._lanes: dict[str, Lane] = {}
        """Of workers that are in a pool, by name: a worker that comes back is in the same."""
        self._in_lane = dict.fromkeys(Lane, 0)
        """Workers that take prompts, by pool."""
        self.short_tokens = 0
        """New tokens up to which a prompt is short; 0: there are no pools."""

    def __contains__(self, identity: Identity) -> bool:
        return identity in self._posts

    def get(self, identity: Identity) -> Post | None:
        """A worker whose session stands, ready or not."""
        return self._posts.get(identity)

    def up(self, member: Member) -> Post | None:
        """A worker's session stands, or what it says of itself has changed; it, if it takes prompts from now on."""
        post = self._posts.get(member.identity)
        took = post is not None and post.prefills and post.member.ready
        if post is not None and _alike(post.member, member):
            post.member = member  # it measured its lanes
            return None
        self._count(post, member if member.ready else None)
        if post is None:
            post = self._gone.pop(member.identity, None) or Post(member, member.identity)
            self._posts[member.identity] = post
        post.member, post.gone, post.free = member, False, post.free if took else 0
        post.prefills, post.decodes, post.room = member.role.prefills, member.role.decodes, member.kv_tokens
        self._stale = True
        return post if post.prefills and member.ready and not took else None

    def divide(self, short: Iterable[str], long: Iterable[str], short_tokens: int) -> None:
        """Prefill workers, by name, are in these pools from now on, and others in none."""
        self._lanes = {**dict.fromkeys(short, Lane.SHORT), **dict.fromkeys(long, Lane.LONG)}
        self.short_tokens = short_tokens if self._lanes else 0
        self._stale = True

    def in_lane(self, lane: Lane) -> int:
        """Workers of this pool that take prompts."""
        if self._stale:
            self._refresh()
        return self._in_lane[lane]

    def down(self, identity: Identity) -> None:
        """This life of a worker cannot be used any more."""
        post = self._posts.get(identity)
        if post is not None:
            self._count(post, None)
            del self._posts[identity]
            self._stale = True
            self._hushed.pop(identity, None)
            post.gone, post.quiet = True, False
            self._forget(post)

    def hush(self, identity: Identity, quiet: bool) -> None:
        """A worker is quiet, or is heard again."""
        post = self._posts.get(identity)
        if post is not None and post.quiet != quiet:
            post.quiet = quiet
            if quiet:
                self._hushed[identity] = None
            else:
                del self._hushed[identity]
            self._stale = True

    @property
    def quiet(self) -> bool:
        """Somebody who is ready is passed over for being quiet."""
        if self._hushed:
            self._refresh()
        return bool(self._hushed) and self._passed_over

    def hushed(self) -> tuple[Identity, ...]:
        """Those that are quiet, passed over or not."""
        return tuple(self._hushed)

    def spares(self, identity: Identity, *, decodes: bool) -> bool:
        """True if this worker is quiet, and others that are not compute prompts, or decode, in its place."""
        post = self._posts.get(identity)
        return post is not None and post.quiet and post not in (self.decodes if decodes else self.prefills)

    @property
    def version(self) -> int:
        """Another one whenever the members are."""
        if self._stale:
            self._refresh()
        return self._version

    @property
    def prefills(self) -> Ranking:
        """Those that take prompts."""
        if self._stale:
            self._refresh()
        return self._prefills

    @property
    def decodes(self) -> Ranking:
        """Those that take hand-overs."""
        if self._stale:
            self._refresh()
        return self._decodes

    @property
    def fetches(self) -> bool:
        """Some that take prompts pull pages of them from others."""
        if self._stale:
            self._refresh()
        return self._fetches

    def free(self, tokens: int) -> Iterator[Post]:
        """Those that said they may accept an offer of so many new tokens and have refused none since, the largest
        first."""
        self._refresh()
        return takewhile(lambda post: post.free >= max(tokens, 1), self._free)

    def said(self, post: Post, free: int) -> None:
        """It may accept an offer of so many new tokens; 0: it has refused one."""
        if post.free != free:
            post.free = free
            self._refresh()
            self._free.moved(post)

    def missing(self) -> str | None:
        """What the deployment lacks to serve anything, None if nothing."""
        if self._sources and self._sinks:
            return None
        lacking = [name for name, there in (("prefill", self._sources), ("decode", self._sinks)) if not there]
        return f"no {' and no '.join(lacking)} worker is ready"

    def too_large(self, request: Request) -> str | None:
        """Why no worker can ever hold it, with both numbers; None if one can. Nothing may be missing."""
        self._refresh()
        prompt, size = len(request.prompt), self.size(request)
        if prompt > self._prompt_room:
            return f"prompt: got {prompt} tokens, no worker holds more than {self._prompt_room}"
        if size <= self._elsewhere:
            return None
        sizes = self.sizes(request) or {}
        rooms = [(_room(*kind, prompt), sizes.get(_page_tokens(kind[1]), size)) for kind in self._rooms]
        if any(needed <= room for room, needed in rooms):
            return None
        room, size = max(rooms, default=(0, size))
        return f"prompt and max_tokens: got {size} tokens, no decode worker holds more than {room}"

    def most_tokens(self) -> MostTokens:
        """As of now, or as it was when nothing was missing; what it returns may be called on any thread."""
        self._refresh()
        kinds = [(room, shape, own) for room, shape, own in self._last_rooms if shape is not None]

        def most(prompt: int, n: int) -> int | None:
            rooms = [(_room(room, shape, own, prompt), shape) for room, shape, own in kinds]
            return max((max(1, shape.most_tokens(room, prompt, n)) for room, shape in rooms), default=None)

        return most

    def size(self, request: Request) -> int:
        """Tokens of KV it may come to, all continuations together."""
        prompt, sampling = len(request.prompt), request.sampling
        if sampling.n == 1:
            return prompt + sampling.max_tokens
        self._refresh()
        return _size(request, self._shapes[-1]) if self._shapes else prompt + sampling.max_tokens

    def sizes(self, request: Request) -> dict[int, int] | None:
        """The same by tokens a page, if there are several kinds and it is not one for all: of one continuation only
        the last page can be partly empty, whatever its size."""
        self._refresh()
        if request.sampling.n == 1 or len(self._shapes) < 2:
            return None
        return {shape.page_tokens: _size(request, shape) for shape in self._shapes}

    @property
    def page_tokens(self) -> int:
        """Tokens that one hash of a prefix stands for: those of the smallest page, as others are multiples of it."""
        self._refresh()
        return _page_tokens(self._shapes[0]) if self._shapes else 1

    def takes(self, source: Post, sink: Post, need: Need) -> bool:
        """May `source` hand this over to `sink`? Two mixed workers never do: each could keep for the other what it
        needs itself."""
        size = need.size
        if need.sizes is not None:
            size = need.sizes.get(_page_tokens(sink.member.kv), size)
        if sink is source:
            return _room(sink.room, sink.member.kv, True, need.tokens) >= size
        if source.decodes or sink.prefills:
            return sink.room >= size and not self._mixed_alone and not (source.decodes and sink.prefills)
        return sink.room >= size

    def keeps(self, source: Post, need: Need) -> bool:
        """True if `source` is mixed and can hold both parts."""
        return source.decodes and source.member.ready and self.takes(source, source, need)

    def lightest(self, source: Post, need: Need, count: int) -> tuple[Post, ...]:
        """Up to `count` decode workers for what `source` prefills, in order of their load."""
        self._refresh()
        if source.decodes and (self._mixed_alone or not self._apart):
            return ()
        found: list[Post] = []
        for post in self._decodes:
            if post is not source and self.takes(source, post, need):
                found.append(post)
                if len(found) == count:
                    break
        return tuple(found)

    def others(self, blamed: Identity | None) -> bool:
        """True if another prefill worker than this takes new requests."""
        count = len(self.prefills)
        post = self._posts.get(blamed) if blamed is not None else None
        return count - (post is not None and post.prefills and post.member.ready) > 0

    # Loads.
    def put(self, load: Load) -> None:
        """A placement begins."""
        source, sink = load.source, load.sink
        source.queue += 1
        source.queue_tokens += load.tokens
        sink.rows += 1
        sink.held_tokens += load.size
        self._prefills.moved(source)
        self._held(sink)

    def cached(self, load: Load, tokens: int) -> None:
        """So many of its prompt's tokens need not be computed."""
        tokens = min(tokens, load.tokens)
        if tokens and load.queued:
            load.tokens -= tokens
            load.source.queue_tokens -= tokens
            self._prefills.moved(load.source)

    def computed(self, load: Load) -> None:
        """Its prompt is."""
        if load.queued:
            load.queued = False
            source = load.source
            source.queue -= 1
            source.queue_tokens -= load.tokens
            self._prefills.moved(source)
            if source.gone:
                self._forget(source)

    def moved(self, load: Load, sink: Post) -> None:
        """Another decode worker has it."""
        for post, sign in ((load.sink, -1), (sink, 1)):
            post.rows += sign
            post.held_tokens += sign * load.size
            self._held(post)
        before, load.sink = load.sink, sink
        if before.gone:
            self._forget(before)

    def over(self, load: Load) -> None:
        """It ended."""
        self.computed(load)
        sink = load.sink
        sink.rows -= 1
        sink.held_tokens -= load.size
        self._held(sink)
        if sink.gone:
            self._forget(sink)

    def check(self, loads: Iterable[Load]) -> None:
        """Invariants: exactly these placements are counted, and every rank is right."""
        self._refresh()
        counts: dict[int, list[int]] = {}
        posts = {id(post): post for post in (*self._posts.values(), *self._gone.values())}
        for load in loads:
            posts[id(load.sink)] = load.sink
            if load.queued:
                posts[id(load.source)] = load.source
                count = counts.setdefault(id(load.source), [0, 0, 0, 0])
                count[0], count[1] = count[0] + 1, count[1] + load.tokens
            count = counts.setdefault(id(load.sink), [0, 0, 0, 0])
            count[2], count[3] = count[2] + 1, count[3] + load.size
        for key, post in posts.items():
            assert [post.queue, post.queue_tokens, post.rows, post.held_tokens] == counts.get(key, [0, 0, 0, 0])
            assert post is (self._gone if post.gone else self._posts).get(post.identity)
        for ranking in (self._prefills, self._decodes, self._free):
            ranking.check()
        assert set(self._hushed) == {who for who, post in self._posts.items() if post.quiet}
        ready = [post for post in self._posts.values() if post.member.ready]
        assert self._sources == sum(post.prefills for post in ready)
        assert self._sinks == sum(post.decodes for post in ready)
        assert self._passed_over or {*ready} == {*self._prefills, *self._decodes}

    def _held(self, post: Post) -> None:
        """What it decodes is not what it was, which a mixed one may also be ranked by as a prefill worker."""
        self._decodes.moved(post)
        if post.prefills:
            self._prefills.moved(post)

    def _count(self, post: Post | None, member: Member | None) -> None:
        """One that may have been ready is not, or as `member` from now on. What was there when nothing was missing last
        is kept."""
        sources, sinks = self._sources, self._sinks
        if post is not None and post.member.ready:
            sources, sinks = sources - post.prefills, sinks - post.decodes
        if member is not None:
            sources, sinks = sources + member.role.prefills, sinks + member.role.decodes
        if self._sources and self._sinks and not (sources and sinks):
            self._refresh()
        self._sources, self._sinks = sources, sinks

    def _forget(self, post: Post) -> None:
        """One that is gone is kept while it has loads."""
        if post.queue or post.rows:
            self._gone[post.identity] = post
        else:
            self._gone.pop(post.identity, None)

    def _refresh(self) -> None:
        """Nothing, unless members have changed."""
        if not self._stale:
            return
        self._stale = False
        self._version += 1
        everyone = sorted(self._posts.values(), key=lambda post: post.identity)
        for order, post in enumerate(everyone):
            post.order = order
            post.lane = self._lanes.get(post.identity.name, Lane.ANY)
        # One that is not ready goes on with those it has, and gets nothing new.
        ready = [post for post in everyone if post.member.ready]
        sources, sinks = [post for post in ready if post.prefills], [post for post in ready if post.decodes]
        self._prefills = Ranking(self._loads[0], _heard(sources))
        self._decodes = Ranking(self._loads[1], _heard(sinks))
        self._free = Ranking(_least_free, self._prefills.posts)
        self._passed_over = len(self._prefills) < len(sources) or len(self._decodes) < len(sinks)
        self._in_lane = {lane: sum(post.lane is lane for post in sources) for lane in Lane}
        self._apart = any(not post.prefills for post in sinks)
        self._fetches = any(post.member.fetches for post in sources)
        shapes = {post.member.kv for post in self._posts.values() if post.member.kv is not None}
        self._shapes = tuple(sorted(shapes, key=_page_tokens))
        self._prompt_room = max((post.room for post in sources), default=0)
        apart = any(not post.decodes for post in sources)
        kinds = [(post.room, post.member.kv, True) for post in sinks if post.prefills]
        if self._mixed_alone:
            kinds += [(post.room, post.member.kv, False) for post in sinks if apart and not post.prefills]
        else:
            kinds += [(post.room, post.member.kv, False) for post in sinks if apart or (sources and not post.prefills)]
        self._rooms = tuple(dict.fromkeys(kinds))
        if sources and sinks:
            self._last_rooms = self._rooms
        self._elsewhere = max((room for room, _, own in self._rooms if not own), default=0)


def _heard(posts: list[Post]) -> list[Post]:
    """Those that are not quiet; all if everybody is."""
    return [post for post in posts if not post.quiet] or posts


def _alike(before: Member, now: Member) -> bool:
    """True if nothing has changed that anybody here asks for."""
    return (
        before.ready == now.ready
        and before.role is now.role
        and before.pages == now.pages
        and before.kv == now.kv
        and before.costs == now.costs
        and before.fetches == now.fetches
    )


def _least_free(post: Post) -> float:
    return -post.free


def _page_tokens(shape: KvShape | None) -> int:
    return shape.page_tokens if shape is not None else 0


def _size(request: Request, shape: KvShape) -> int:
    prompt, sampling = len(request.prompt), request.sampling
    return shape.pages_for_branches(prompt, sampling.max_tokens, sampling.n) * shape.page_tokens


def _room(room: int, shape: KvShape | None, own: bool, prompt: int) -> int:
    """Tokens that a worker can hold of it; while it hands over to itself it holds the prompt twice."""
    return room - shape.pages_for(prompt) * shape.page_tokens if own and shape is not None else room
