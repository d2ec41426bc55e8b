"""Who is next among tenants, by weight: virtual times for those that wait, and shares of a line that is full. Pure.

`Fair` is start-time fair queueing, with what VTC (OSDI'24) charges: a tenant's virtual time grows by the tokens that
are computed for it, over its weight; an output token counts for `OUTPUT` prompt tokens. Who has the least is served
next. A tenant that comes back from idleness begins at the least of those that wait, so it saves up nothing.

**Bound.** While two tenants both wait, the tokens charged to them over their weights, since both did, differ by at most
`c_a / w_a + c_b / w_b`, c being the largest single charge. So a tenant that waits is served at the latest when each
other one that does was charged `c_a / w_a + c_b / w_b` a unit of weight since: nobody starves. What is charged late, as
output tokens are at the end of an answer, counts as one charge.

`Shares` says who has had more than its share of a worker lately, so that those who have not find room there. See below.

| parameter | default | unit | meaning |
|---|---|---|---|
| weights | 1 for each | | of tenants, by name |
| recent_s | 10 | s | for so long after its last offer a tenant counts as one that may come |
| most | 1024 | tenants | told apart; all others together are one |
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

from core.ranked import Ranked
from scheduler.waiting import Waiting

T = TypeVar("T")

OUTPUT = 2
"""An output token costs as much as so many prompt tokens, as in VTC."""
LATELY_S = 2.0
"""Accepted tokens count for 1/e of themselves after this."""
EQUAL = 1 + 1e-9
"""Who has exactly its share is not above it, however sums are rounded."""
OTHERS = "\0others"
"""Tenants beyond the most that are told apart."""
MOST_RESTS = 1024
"""Tenants that do not wait and are remembered; of more, those that were charged longest ago are forgotten."""
NO_WEIGHTS: Mapping[str, float] = {}


class Fair:
    """Virtual times of tenants that wait, or that were charged for more than those by now. O(log tenants) a call."""

    def __init__(self, weights: Mapping[str, float] = NO_WEIGHTS) -> None:
        self._weights = weights
        self._waiting = Ranked()
        """Tenants that wait, by their virtual times."""
        self._rests: dict[str, float] = {}
        """Virtual times of others that are ahead of who was served last."""
        self._now = 0.0
        """The virtual time at which somebody was served last."""

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, tenant: str) -> bool:
        return tenant in self._waiting

    def join(self, tenant: str) -> None:
        """It waits from now on; if it did not, it begins no earlier than the others are."""
        if tenant not in self._waiting:
            self._waiting.put(tenant, max(self._rests.pop(tenant, 0.0), self._least()))

    def leave(self, tenant: str) -> None:
        """It does not wait any more; what it was charged beyond others is remembered, as long as others wait."""
        if tenant in self._waiting:
            at, self._now = self._waiting.rank(tenant), self._least()
            self._waiting.drop(tenant)
            self._rest(tenant, at)
            if not self._waiting:
                self._rests.clear()
                self._now = 0.0

    def first(self) -> str | None:
        """Who is next, None if nobody waits."""
        return self._waiting.first()

    def in_order(self) -> Iterator[str]:
        """All that wait, the next first; those behind the first cost a sort."""
        first = self._waiting.first()
        if first is not None:
            yield first
            if len(self._waiting) > 1:
                yield from [tenant for tenant, _ in self._waiting.items()][1:]

    def charge(self, tenant: str, tokens: int) -> None:
        """So many tokens are computed for it, or fewer than 0: not after all. Nobody is compared while nobody waits."""
        if not self._waiting:
            return
        least, cost = self._least(), tokens / self._weights.get(tenant, 1.0)
        if tenant in self._waiting:
            at = self._waiting.rank(tenant)
            self._now = max(self._now, min(at, least))
            self._waiting.put(tenant, max(self._now, at + cost))
        else:
            self._rest(tenant, max(self._rests.get(tenant, 0.0), least) + cost)

    def check(self) -> None:
        """Raise AssertionError if an invariant does not hold."""
        assert not set(self._rests) & {tenant for tenant, _ in self._waiting.items()}
        assert self._waiting or (not self._rests and not self._now)
        assert all(math.isfinite(at) for _, at in self._waiting.items())

    def _rest(self, tenant: str, at: float) -> None:
        self._rests.pop(tenant, None)
        if at > self._now:
            self._rests[tenant] = at
            if len(self._rests) > MOST_RESTS:
                ahead = {who: rest for who, rest in self._rests.items() if rest > self._now}
                while len(ahead) > MOST_RESTS // 2:
                    del ahead[next(iter(ahead))]
                self._rests = ahead

    def _least(self) -> float:
        return max(self._now, self._waiting.lowest()) if self._waiting else self._now


class Parked:
    """`Waiting` for each tenant: of those that are small enough, the most urgent of whoever is next by `Fair`.

    With one tenant it is that tenant's `Waiting` and nothing else.
    """

    def __init__(self, weights: Mapping[str, float] = NO_WEIGHTS) -> None:
        self.fair = Fair(weights)
        self._of: dict[str, Waiting] = {}
        self._tenants: dict[str, str] = {}
        """By key."""

    def __len__(self) -> int:
        return len(self._tenants)

    def __contains__(self, key: str) -> bool:
        return key in self._tenants

    def add(self, key: str, tokens: int, until: float, age: int, tenant: str = "") -> None:
        """As in `Waiting`."""
        waiting = self._of.get(tenant)
        if waiting is None:
            waiting = self._of[tenant] = Waiting()
            self.fair.join(tenant)
        waiting.add(key, tokens, until, age)
        self._tenants[key] = tenant

    def remove(self, key: str) -> int:
        """It waits no more; how many tokens it has."""
        tenant = self._tenants.pop(key)
        waiting = self._of[tenant]
        tokens = waiting.remove(key)
        if not waiting:
            del self._of[tenant]
            self.fair.leave(tenant)
        return tokens

    def first(self, tokens: int) -> str | None:
        """Of those with at most so many tokens, the most urgent of the tenant that is next."""
        for tenant in self.fair.in_order():
            key = self._of[tenant].first(tokens)
            if key is not None:
                return key
        return None

    def check(self) -> None:
        """Raise AssertionError if an invariant does not hold."""
        self.fair.check()
        assert set(self._of) == set(self._tenants.values())
        assert len(self.fair) == len(self._of)
        assert sum(map(len, self._of.values())) == len(self._tenants)


class Queue(Generic[T]):
    """First come, first served among those of one tenant; of tenants it is the turn of whoever is next by `Fair`.

    While only one tenant waits nothing is counted.
    """

    def __init__(self, weights: Mapping[str, float] = NO_WEIGHTS) -> None:
        self.fair = Fair(weights)
        """Of those that wait, from when two tenants do until nobody does."""
        self._of: dict[str, deque[T]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._of.values()))

    def __bool__(self) -> bool:
        return bool(self._of)

    def __iter__(self) -> Iterator[T]:
        """Of each tenant all in order, the next tenant first."""
        for tenant, _ in self.firsts():
            yield from self._of[tenant]

    def append(self, item: T, tenant: str = "") -> bool:
        """It waits behind all of its tenant's; whether nobody does."""
        queue = self._of.get(tenant)
        if queue is not None:
            queue.append(item)
            return False
        if self._of:
            if len(self._of) == 1:
                self.fair.join(next(iter(self._of)))
            self.fair.join(tenant)
        self._of[tenant] = deque((item,))
        return True

    def firsts(self) -> Iterator[tuple[str, T]]:
        """The first one of each tenant, the next tenant first."""
        for tenant in self.fair.in_order() if self.fair else self._of:
            yield tenant, self._of[tenant][0]

    def pop(self, tenant: str, tokens: int) -> None:
        """A tenant's first one leaves, for which it is charged so many tokens."""
        queue = self._of[tenant]
        queue.popleft()
        if tokens and len(self._of) > 1:
            self.fair.charge(tenant, tokens)
        if not queue:
            del self._of[tenant]
            self.fair.leave(tenant)


class Shares:
    """Whether a tenant has had more than its share of a worker lately, as of its offers.

    A tenant is *above its share* if the tokens that were accepted of it, over its weight, are more than those of all
    over the weights of all that came lately; a token that was accepted a while ago counts for less, by half every 1.4
    s. A worker accepts those of a tenant above its share only as long as its whole line takes no longer than `spare` of
    the goal (`PrefillConfig.spare`). So, however much some tenants send,

    - whoever is not above its share finds at least `1 - spare` of its goal free, but for what tenants that were not
      above theirs put there, and
    - of two tenants whose offers always come, while the line is longer than that, neither has had more than the other
      by more than one request of its own, by weight.

    One tenant alone is never above its share, and nothing is counted: nothing is kept free for those that have not come
    for `recent_s`. One that comes back has had nothing lately; that is worth as much as it could be accepted in 2 s.
    """

    def __init__(self, weights: Mapping[str, float] = NO_WEIGHTS, recent_s: float = 10.0, most: int = 1024) -> None:
        self._weights = weights
        self._recent_s = recent_s
        self._most = most
        self._seen = Ranked()
        """Tenants that came lately, by when they did last; none while there is one only."""
        self._only: str | None = None
        self._only_at = -math.inf
        self._had: dict[str, float] = {}
        """Accepted tokens, as they would count at `_base`: so none of them has to be looked at as time goes by."""
        self._total = 0.0
        self._weight = 0.0
        """Of all in `_seen`."""
        self._base = 0.0

    def __len__(self) -> int:
        return len(self._seen) or self._only is not None

    def offer(self, tenant: str, now: float) -> tuple[str, bool]:
        """An offer came: the name under which its tenant counts, and whether that is above its share."""
        seen = self._seen
        if not seen:
            if tenant == self._only or self._only_at < now - self._recent_s:
                self._only, self._only_at = tenant, now
                return tenant, False
            assert self._only is not None
            seen.put(self._only, self._only_at)
            self._weight, self._total, self._base = self._weights.get(self._only, 1.0), 0.0, now
            self._only = None
        if tenant not in seen and len(seen) >= self._most:
            tenant = OTHERS
        if tenant not in seen:
            self._weight += self._weights.get(tenant, 1.0)
        seen.put(tenant, now)
        while seen.lowest() < now - self._recent_s:
            gone = seen.pop()
            assert gone is not None
            self._weight -= self._weights.get(gone, 1.0)
            self._total -= self._had.pop(gone, 0.0)
        if len(seen) == 1:
            seen.pop()
            self._had.clear()
            self._only, self._only_at = tenant, now
            return tenant, False
        return tenant, self.above(tenant)

    def above(self, name: str) -> bool:
        """Whether it was above its share when one came last."""
        return self._had.get(name, 0.0) * self._weight > self._total * self._weights.get(name, 1.0) * EQUAL

    def add(self, name: str, tokens: int, now: float) -> None:
        """So many tokens of the one that has just offered them were accepted."""
        if not self._seen:
            return
        since = (now - self._base) / LATELY_S
        if since > 50:
            factor = math.exp(-since)
            self._had = {tenant: had * factor for tenant, had in self._had.items()}
            self._total, self._base, since = math.fsum(self._had.values()), now, 0.0
        counted = tokens * math.exp(since)
        self._had[name] = self._had.get(name, 0.0) + counted
        self._total += counted

    def check(self) -> None:
        """Raise AssertionError if an invariant does not hold."""
        names = {name for name, _ in self._seen.items()}
        assert self._had.keys() <= names
        assert len(names) != 1
        assert not names or self._only is None
        assert not names or math.isclose(self._weight, math.fsum(self._weights.get(name, 1.0) for name in names))
        assert math.isclose(self._total, math.fsum(self._had.values()), rel_tol=1e-6, abs_tol=1e-6) or not names
