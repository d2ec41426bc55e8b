"""DualMap: two workers a prefix, the one that has it as long as it is fast enough, else the other. Pure.

DualMap (ICLR 2026): a prefix is hashed twice onto a ring of prefill workers, so that its requests meet their cache
again (at least a share 1 - 2/m of m requests hits), while two choices instead of one keep the largest load near the
mean (log log n / log 2 above it instead of log n / log log n). The paper asks the one with the longer cached prefix
first, unless its predicted time to first token misses what is wanted: then the one with the shorter time. Where much
time is allowed and little is cached that piles prompts up behind each other; so here the queue counts before that as
well, a cached token for as much as `loyalty` queued ones, and the lightest of all other workers is a third candidate
where its queue is shorter by the prompt, which nobody finds there the next time.
Prefixes that are too common for two workers are lengthened (`scheduler/heat.py`). The paper moves queued requests
between the two when a worker falls behind; here such a worker refuses, and the order of tries does that work: the two,
then the rest by our own queued tokens (P/D-Serve, forwarding upon rejection). Requests without hashes have no place of
their own and go by queued tokens at once.

The time to first token is (our own new tokens queued there + the request's) / speed. A worker's speed is measured: the
tokens that were queued at an offer and the seconds to its first token, both with exponential forgetting, beginning with
`prior_samples` samples at the speed that it says of itself (`Member.costs`), else that of the cost model, else
`tokens_per_s`.

Decode workers are chosen among those with room: the predicted gap with one more row must keep what was promised, and
the KV that all may come to stay below `fill`. `first_fit` packs them in order of identity (xLLM's rule), so that others
drain and can change their role; `spread` takes the lightest. Where none will do, the lightest does.

A request with few new tokens skips disaggregation where a mixed worker has slack: it computes and keeps it.

| parameter | unit | default | meaning |
|---|---|---|---|
| points | points | 64 | places of a worker on the ring |
| first_pages | pages | 2 | of a prefix that is not hot |
| window | requests | 2000 | over which shares of prefixes are taken |
| hot | 1/n | 2.0 | a prefix with a larger share, n being the number of prefill workers, is lengthened |
| cool | 1/n | 1.0 | below this share it is not any more |
| known_pages | pages | 0 | most that are remembered of a worker; 0: as many as its arena has |
| loyalty | tokens | 4.0 | of others' that a request waits for rather than compute one that is cached elsewhere |
| astray | prompts | 1.0 | by which the queue elsewhere must be shorter; infinite: only the two, as in the paper |
| margin | share | 0.9 | of the wanted time to first token that a prediction may use |
| tokens_per_s | tokens/s | 10000 | speed of a prefill worker before it is measured, without a cost model |
| prior_samples | samples | 4 | weight of that |
| forget | share | 0.05 | of all samples before, at each new one |
| decode | - | spread | or first_fit |
| fill | share | 0.9 | of a decode worker's KV that may be promised before it counts as full |
| looks | workers | 8 | decode workers that are looked at for one that will do; first_fit: 64 at most |
| context_share | share | 0.75 | of the KV promised at a worker that a decode step reads, on average |
| skip_tokens | tokens | 256 | most new tokens that skip disaggregation; 0: none do |
| skip_fill | share | 0.5 | of a mixed worker's KV that may be promised for that |
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from core.worker import Identity
from scheduler.cost import CostModel
from scheduler.heat import Heat, Known
from scheduler.placement import Need, Post, Workers
from scheduler.ring import Ring

PROBE_TOKENS = 2048
"""A cost model's speed is that of a step of so many new tokens."""
FIRST_FIT_LOOKS = 64
HOLDERS = 2
"""Workers that are named as having pages which another one is to compute."""


@dataclass(frozen=True, slots=True)
class DualMapConfig:
    """Settings; see the module's table."""

    points: int = 64
    first_pages: int = 2
    window: int = 2000
    hot: float = 2.0
    cool: float = 1.0
    known_pages: int = 0
    loyalty: float = 4.0
    astray: float = 1.0
    margin: float = 0.9
    tokens_per_s: float = 10_000.0
    prior_samples: int = 4
    forget: float = 0.05
    decode: Literal["spread", "first_fit"] = "spread"
    fill: float = 0.9
    looks: int = 8
    context_share: float = 0.75
    skip_tokens: int = 256
    skip_fill: float = 0.5


class DualMap:
    """Prefill by prefix and predicted time to first token; decode by predicted gap and memory."""

    def __init__(self, config: DualMapConfig = DualMapConfig(), cost: CostModel | None = None) -> None:
        self._config = config
        self._cost = cost
        self._costs: dict[Identity, CostModel] = {}
        """Of workers that say their own."""
        self._prior = self._samples_of(cost)
        self._ring = Ring(config.points)
        self._heat = Heat(first_pages=config.first_pages, window=config.window, hot=config.hot, cool=config.cool)
        self._known: dict[Identity, Known] = {}
        self._having: dict[int, set[Identity]] | None = None
        """The same by page, where prefill workers fetch: nobody else asks who has one."""
        self._samples: dict[Identity, tuple[float, float]] = {}
        """Tokens and seconds of prefills."""
        self._version = 0
        self._named: dict[str, Post] = {}
        self._mixed = False
        """Some of the prefill workers are, and others are not."""

    def queue_load(self, post: Post) -> float:
        return post.queue_tokens

    def decode_load(self, post: Post) -> float:
        return post.held_tokens / post.room if post.room else float(post.held_tokens)

    def sources(self, need: Need, workers: Workers) -> Iterable[Post]:
        self._refresh(workers)
        pair = self._pair(need)
        return self._in_turn(pair, need, workers) if pair or self._mixed else workers.prefills

    def _in_turn(self, pair: tuple[Post, ...], need: Need, workers: Workers) -> Iterator[Post]:
        """Whoever has slack, the prefix's own, and the rest by their queues."""
        if self._mixed and self._few(need, pair, workers) <= self._config.skip_tokens:
            yield from self._slack(need, workers)
        first = self._first(pair, need, workers)
        yield from first
        yield from (post for post in workers.prefills if post not in first)

    def sinks(self, source: Post, need: Need, workers: Workers) -> tuple[Post, ...]:
        if workers.keeps(source, need):
            return (source,)
        if self._config.decode == "first_fit":
            posts: Iterable[Post] = islice(workers.decodes.posts, FIRST_FIT_LOOKS)
            fitting = (post for post in posts if post is not source and workers.takes(source, post, need))
            best = next((post for post in fitting if self._will_do(post, need, self._config.fill)), None)
            lightest = workers.lightest(source, need, 2)
            return lightest if best is None else (best, *(post for post in lightest if post is not best))[:2]
        if not need.gap_s or (self._cost is None and not self._costs):
            return workers.lightest(source, need, 2)  # in order of memory, which is all that is asked
        lightest = workers.lightest(source, need, 2)
        if not lightest or self._will_do(lightest[0], need, self._config.fill):
            return lightest
        others = workers.lightest(source, need, self._config.looks)[1:]
        best = next((post for post in others if self._will_do(post, need, self._config.fill)), None)
        return lightest if best is None else (best, lightest[0])

    def fewest(self, need: Need, workers: Workers) -> int:
        self._refresh(workers)
        return self._few(need, self._pair(need), workers)

    def accepted(self, source: Post, need: Need) -> None:
        if need.prefix:
            self.kept(source, need.prefix)

    def kept(self, post: Post, prefix: tuple[int, ...]) -> None:
        known = self._known.get(post.identity)
        if known is None:
            known = self._known[post.identity] = Known(self._config.known_pages or post.member.pages)
        forgotten = known.add(prefix)
        if self._having is not None:
            for page in prefix:
                self._having.setdefault(page, set()).add(post.identity)
            self._lacks(post.identity, [page for page in forgotten if page not in known])

    def holders(self, source: Post, need: Need, pages: int, workers: Workers) -> tuple[tuple[Identity, int], ...]:
        self._refresh(workers)
        if self._having is None or len(need.prefix) <= pages:
            return ()
        found = []
        # A page is there only with all before it: who has more than so many has the next.
        for who in self._having.get(need.prefix[pages], ()):
            post = workers.get(who)
            if post is not None and post is not source and post.member.kv == source.member.kv:
                found.append((-self._known[who].pages(need.prefix), who))
        return tuple([(who, -less) for less, who in sorted(found)[:HOLDERS]])

    def prefilled(self, source: Post, tokens: int, seconds: float) -> None:
        had, took = self._measured(source.identity)
        keep = 1 - self._config.forget
        self._samples[source.identity] = keep * had + tokens, keep * took + seconds

    def ttft_s(self, post: Post, need: Need, workers: Workers) -> float:
        """Predicted time to first token of a request that is offered to `post` now."""
        tokens, seconds = self._measured(post.identity)
        return (post.queue_tokens + self._new(post, need, workers)) * seconds / tokens if tokens else 0.0

    def document(self) -> dict[str, Any]:
        return {
            "heat": self._heat.document(),
            "known": {str(who): self._known[who].document() for who in sorted(self._known)},
            "samples": {str(who): list(self._samples[who]) for who in sorted(self._samples)},
        }

    def restore(self, document: Mapping[str, Any]) -> None:
        self._version, self._having = 0, None
        self._heat.restore(document["heat"])
        self._samples = {Identity.parse(who): (tokens, s) for who, (tokens, s) in document["samples"].items()}
        self._known = {Identity.parse(who): Known.of(pages) for who, pages in document["known"].items()}

    def _refresh(self, workers: Workers) -> None:
        """The members changed: the ring is theirs, and what was remembered of those who left is dropped."""
        if self._version == workers.version:
            return
        self._version = workers.version
        posts = workers.prefills.posts
        self._named = {post.identity.name: post for post in posts}
        self._ring.set(self._named)
        self._mixed = len({post.decodes for post in posts}) == 2
        for who in [who for who in self._known if who not in workers]:
            gone = self._known.pop(who)
            self._lacks(who, gone)
        if not workers.fetches:
            self._having = None
        elif self._having is None:
            self._having = {}
            for who, known in self._known.items():
                for page in known:
                    self._having.setdefault(page, set()).add(who)
        self._samples = {who: sample for who, sample in self._samples.items() if who in workers}
        told = [(post.identity, post.member.costs) for post in (*posts, *workers.decodes.posts)]
        self._costs = {
            who: CostModel(who.name, costs.prefill, costs.decode) for who, costs in told if costs is not None
        }

    def _lacks(self, who: Identity, pages: Iterable[int]) -> None:
        """It has none of these any more."""
        having = self._having
        if having is None:
            return
        for page in pages:
            there = having.get(page, set())
            there.discard(who)
            if not there:
                having.pop(page, None)

    def _pair(self, need: Need) -> tuple[Post, ...]:
        """The prefix's two workers."""
        if not need.prefix or not self._named:
            return ()
        if need.note is None:
            need.note = self._heat.key(need.prefix, len(self._named))
        assert isinstance(need.note, int)
        return tuple(self._named[name] for name in self._ring.pair(need.note))

    def _first(self, pair: tuple[Post, ...], need: Need, workers: Workers) -> list[Post]:
        """The prefix's two workers and the lightest other one, in the order in which they are asked."""
        if not pair:
            return []
        loyalty = self._config.loyalty
        scores = [(post.queue_tokens + loyalty * self._new(post, need, workers), post.queue_tokens) for post in pair]
        posts = [post for _, post in sorted(zip(scores, pair, strict=True), key=lambda each: each[0])]
        lightest = next((post for post in workers.prefills if post not in pair), None)
        if lightest is not None:
            score = lightest.queue_tokens + loyalty * self._new(lightest, need, workers)
            score += self._config.astray * need.tokens
            posts.insert(sum(each[0] <= score for each in scores), lightest)
        if self.ttft_s(posts[0], need, workers) > self._config.margin * need.wait_s:
            posts.sort(key=lambda post: self.ttft_s(post, need, workers))
        return posts

    def _new(self, post: Post, need: Need, workers: Workers) -> int:
        """Tokens that `post` would have to compute, at least one."""
        known = self._known.get(post.identity)
        cached = known.pages(need.prefix) * workers.page_tokens if known is not None else 0
        return max(1, need.tokens - cached)

    def _few(self, need: Need, pair: Iterable[Post], workers: Workers) -> int:
        return min((self._new(post, need, workers) for post in pair), default=need.tokens)

    def _slack(self, need: Need, workers: Workers) -> Iterator[Post]:
        """The lightest mixed worker, if it can keep the request and does not feel it."""
        post = next(post for post in workers.decodes if post.prefills)
        late = self.ttft_s(post, need, workers) > self._config.margin * need.wait_s
        if not late and workers.keeps(post, need) and self._will_do(post, need, self._config.skip_fill):
            yield post

    def _will_do(self, post: Post, need: Need, fill: float) -> bool:
        """One more row there keeps the gap that was promised, and memory below `fill`."""
        if post.held_tokens + need.size > fill * post.room:
            return False
        cost = self._costs.get(post.identity, self._cost) if self._costs else self._cost
        if not need.gap_s or cost is None:
            return True
        context = round(self._config.context_share * (post.held_tokens + need.size))
        return cost.decode_s(post.rows + 1, context) <= need.gap_s

    def _measured(self, who: Identity) -> tuple[float, float]:
        """Tokens and seconds of a worker's prefills; at first what it says of itself, or the model of all."""
        known = self._samples.get(who)
        if known is not None:
            return known
        return self._samples_of(self._costs[who]) if who in self._costs else self._prior

    def _samples_of(self, cost: CostModel | None) -> tuple[float, float]:
        """As many samples as a prior counts for, at a model's speed."""
        config = self._config
        step_s = cost.prefill_s([(PROBE_TOKENS, 0)]) if cost is not None else 0.0
        speed = PROBE_TOKENS / step_s if step_s > 0 else config.tokens_per_s
        return config.prior_samples * float(PROBE_TOKENS), config.prior_samples * PROBE_TOKENS / speed
