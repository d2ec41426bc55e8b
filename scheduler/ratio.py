"""How many workers prefill and how many decode: once a period nothing, one flip, or a word to the launcher. Pure.

After P/D-Serve (arXiv 2408.08147), which adjusts the ratio of a running group to its traffic. There the share of the
first token in a request's time says which phase is short. That is known of requests that ended, and who is overloaded
ends few of them: a planner that counted completions measured its own overload as little demand (Dynamo). So here
demand is what arrives (`Offered`), distress is how long who waits has waited (`Pressed`), and whether a change would
help is asked before it is made: whoever runs this simulates the last traffic with each candidate (`Simulate`). A
flip is one worker; what it would cost to be wrong is one flip, too.

A period goes like this. If nobody waits, nobody was refused and loads are low, nothing is asked. If traffic is what it
was when no change helped, it is asked again only after twice as long as the last time, or when it is worse than ever
since. Otherwise these are simulated: the ratio that there is; ratios one, two, four and all flips away, because where a
phase has far too little, one worker more changes nothing yet; and, where bounds allow it, one worker more or less. A
phase that is the busier one by `apart` gives nobody. One worker is flipped if that, or the way that begins with it,
makes more requests good by `gain`. A way is gone on with at once: when a flip has ended it is asked again from there,
without waiting for a period, and left only where to go on would make fewer good. More workers are asked for only if too
few are good with the best ratio of those that there are; goals that idle workers cannot meet ask for none, because no
number of workers meets them. A worker is given up only if the rest would serve `spare` times the traffic as well (a
check of consolidation), `patience` times in a row.

A flip that takes back the one before is a turn. Where traffic has not moved since, only one is made in `turn_s`, and it
must gain twice as much: so noise does not send workers to and fro. Traffic has moved if the rate of requests, of
prompt tokens or of output tokens is another by `moved`, and by more than chance makes it with so few requests. What
traffic a flip was made for is known a window later: at a step of load the rates are still half those of before it, and
outputs of what came since are not over.

Bounds are the planner's. An operator's ratio (`Pinned`) is taken up flip by flip, without being simulated.

| parameter | unit | default | meaning |
|---|---|---|---|
| period_s | s | 25 | between two decisions; 10 to 60, five times the split controller's |
| window_s | s | 25 | of traffic that counts |
| cooldown_s | s | 10 | after a change has ended, but for a way that goes on |
| share | share | 0.9 | of the requests that must be good for the number of workers to be enough |
| gain | share | 0.02 | of the requests that a flip or one more worker must make good |
| turn_s | s | 600 | in which there is one turn at most while traffic does not move |
| moved | share | 0.25 | by which a rate must change to be another |
| apart | share | 0.25 | of load by which a phase is busier than the other, so that it gives nobody |
| full | share | 0.9 | of load from which a phase may have far too little |
| calm | share | 0.5 | of load below which a phase has time to spare |
| calm_age_s | s | 0.2 | no request has waited for longer when all is calm |
| spare | times | 1.2 | the traffic that the rest must serve for a worker to be given up |
| patience | decisions | 3 | in a row that must find a worker spare |
| least_requests | requests | 30 | in the window, to be judged by |
| rest_most_s | s | 240 | the longest time without asking while something is amiss and traffic does not move |
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from core.errors import LocalError
from core.worker import Identity, Role
from scheduler.ratio_events import (
    ANY,
    BACK,
    STEP,
    STEPS,
    Act,
    Add,
    Bounded,
    Bounds,
    Candidate,
    Changed,
    Decided,
    Decision,
    Flip,
    Gone,
    Inputs,
    Offered,
    Pinned,
    Pressed,
    Ratio,
    RatioCommand,
    RatioEvent,
    Remove,
    Seen,
    Simulate,
    Simulated,
    Why,
)

CHANCE = 3.0
"""Standard deviations of a mean over requests by which it differs from another by chance."""
SPREADS = (1.0, 1.0, 2.5)
"""Standard deviation of one request's share of the rates of requests, prompt tokens and output tokens, in means: long
outputs are rare, and most are not over when they are told of."""
MORE = 3
"""Requests that a change must make good at least: of few, one is a large share."""
WORSE = 0.1
"""More refused than when no change helped: it is asked again at once."""
WORSE_S = 2.0
"""Likewise where somebody waits for so much more than twice as long as then."""


@dataclass(frozen=True, slots=True)
class RatioConfig:
    """Settings; see the module's table."""

    period_s: float = 25.0
    window_s: float = 25.0
    cooldown_s: float = 10.0
    share: float = 0.9
    gain: float = 0.02
    turn_s: float = 600.0
    moved: float = 0.25
    apart: float = 0.25
    full: float = 0.9
    calm: float = 0.5
    calm_age_s: float = 0.2
    spare: float = 1.2
    patience: int = 3
    least_requests: int = 30
    rest_most_s: float = 240.0

    def __post_init__(self) -> None:
        times = (self.period_s, self.window_s, self.turn_s, self.rest_most_s, self.moved, self.spare)
        if not all(0 < each < math.inf for each in times) or self.patience < 1 or self.least_requests < 1:
            raise LocalError(f"ratio: got {self}, want times above 0, and patience and least_requests from 1 on")
        if not (0 < self.share <= 1 and 0 <= self.gain < 1 and self.cooldown_s >= 0 and self.calm_age_s >= 0):
            raise LocalError(f"ratio: got {self}, want 0 < share <= 1, 0 <= gain < 1, cooldown_s and calm_age_s from 0")


@dataclass(slots=True, eq=False)
class _Post:
    """A worker as it was seen last."""

    identity: Identity
    role: Role
    flips: bool
    load: float = 0.0
    waiting: int = 0
    oldest_s: float = 0.0
    told: bool = False
    """It said something since it has its role."""

    def become(self, role: Role) -> None:
        """It has another role, and nothing to do there yet."""
        self.role, self.load, self.waiting, self.oldest_s, self.told = role, 0.0, 0, 0.0, False


Against = tuple[tuple[Candidate, Why], ...]
"""Candidates, and what spoke against each."""


@dataclass(frozen=True, slots=True)
class _Traffic:
    """Rates that say whether traffic is what it was."""

    requests: int
    rates: tuple[float, float, float]


@dataclass(slots=True, eq=False)
class _Flipped:
    """The last flip that was made."""

    act: Act
    traffic: _Traffic
    """That it was made for."""
    settles_at: float | None
    """When that is known for good; none if it is."""


@dataclass(slots=True, eq=False)
class _Question:
    """What was asked, and from what."""

    number: int
    inputs: Inputs
    candidates: tuple[Candidate, ...]
    against: Against
    traffic: _Traffic
    worse: bool
    """It is asked before its time, because it is worse than when no change helped."""


class RatioController:
    """One deployment's ratio. Each `Simulate` ends in one `Simulated`, each change in one `Changed`.

    Hears offers and pressure as they are told, decides at its deadline and when an answer comes. `decisions` keeps the
    last few records.
    """

    def __init__(self, config: RatioConfig = RatioConfig(), bounds: Bounds = ANY, *, kept: int = 64) -> None:
        self._config = config
        self._bounds = bounds
        self._pinned: Ratio | None = None
        self._posts: dict[Identity, _Post] = {}
        self._offers: deque[tuple[float, Offered]] = deque()
        """With the time at which they were told."""
        self._due: float | None = None
        self._number = 0
        """Of decisions, questions and changes."""
        self._question: _Question | None = None
        self._change: tuple[int, Candidate] | None = None
        """Under way, with its number."""
        self._ended_at = -math.inf
        """When the last change ended."""
        self._flip: _Flipped | None = None
        self._way: tuple[Act, Ratio] | None = None
        """Flips that follow each other without a wait: which, and to which ratio."""
        self._turned_at = -math.inf
        self._asked: tuple[_Traffic, float, float] | None = None
        """When no change was found to help: the traffic, the share that was refused, and the longest wait."""
        self._rest_s = 0.0
        self._rests_until = -math.inf
        self._spare = 0
        """Decisions in a row that found a worker spare."""
        self.decisions: deque[Decision] = deque(maxlen=kept)
        self.ignored = 0
        """Words about workers, questions and changes that are not known, or not any more."""

    @property
    def ratio(self) -> Ratio:
        """Of the workers that are ready."""
        prefill = sum(post.role is Role.PREFILL for post in self._posts.values())
        return Ratio(prefill, len(self._posts) - prefill)

    @property
    def bounds(self) -> Bounds:
        """As the planner said last."""
        return self._bounds

    def on(self, event: RatioEvent | None, now: float) -> list[RatioCommand]:
        match event:
            case None:
                if self._due is None or now < self._due:
                    return []
                # A late call skips periods; it does not catch up with them.
                self._due += self._config.period_s * (1 + math.floor((now - self._due) / self._config.period_s))
                return self._period(now)
            case Pressed(worker, load, waiting, oldest_s):
                if not (load >= 0 and waiting >= 0 and oldest_s >= 0):
                    raise LocalError(f"pressed: got {event}, want numbers from 0 on")
                post = self._posts.get(worker)
                if post is None:
                    self.ignored += 1
                else:
                    post.load, post.waiting, post.oldest_s, post.told = load, waiting, oldest_s, True
            case Offered():
                counts = (event.requests, event.new_tokens, event.cached_tokens, event.output_tokens, event.refused)
                if not 0 < event.seconds < math.inf or min(counts) < 0:
                    raise LocalError(f"offered: got {event}, want a time above 0 s and counts from 0 on")
                self._offers.append((now, event))
                self._forget(now)
            case Seen(worker, role, flips):
                if role not in (Role.PREFILL, Role.DECODE):
                    raise LocalError(f"seen: got role {role}, want prefill or decode")
                post = self._posts.get(worker)
                if post is None:
                    self._posts[worker] = _Post(worker, role, flips)
                else:
                    post.flips = flips
                    if post.role is not role:
                        post.become(role)
            case Gone(worker):
                self.ignored += self._posts.pop(worker, None) is None
            case Bounded(bounds):
                self._bounds = bounds
                self._wake()
            case Pinned(ratio):
                if ratio is not None and min(ratio) < 1:
                    raise LocalError(f"pinned: got {ratio}, want at least 1 worker of each phase")
                self._pinned = ratio
                self._wake()
            case Simulated():
                return self._simulated(event, now)
            case Changed(number, done, _):
                if self._changed(number, done, now) and self._due is not None:
                    return self._period(now, on_way=True)
        if self._due is None:
            self._due = now + self._config.period_s
        return []

    def deadline(self) -> float | None:
        return self._due

    def check(self) -> None:
        assert self._question is None or self._change is None, "nothing is asked while something changes"
        assert self._question is None or self._question.number <= self._number
        assert self._change is None or self._change[0] <= self._number
        assert all(post.identity == who for who, post in self._posts.items())
        assert sum(self.ratio) == len(self._posts)
        assert 0 <= self._spare <= self._config.patience
        times = [at for at, _ in self._offers]
        assert times == sorted(times)
        numbers = [decision.number for decision in self.decisions]
        assert numbers == sorted(set(numbers))

    # What is known.
    def _forget(self, now: float) -> None:
        """What was told longer ago than the window, but for the last word."""
        offers = self._offers
        while len(offers) > 1 and offers[0][0] <= now - self._config.window_s:
            offers.popleft()

    def _wake(self) -> None:
        """Something else than traffic is another: what was found before does not hold."""
        self._asked, self._rest_s, self._rests_until, self._spare = None, 0.0, -math.inf, 0

    def _inputs(self, now: float) -> Inputs:
        self._forget(now)
        told = [each for at, each in self._offers if at > now - self._config.window_s]
        # Several gateways tell of the same seconds.
        begin = min((at - each.seconds for at, each in self._offers if at > now - self._config.window_s), default=now)
        seconds = self._offers[-1][0] - begin if told else 0.0
        per_s = 1 / seconds if seconds else 0.0
        requests = sum(each.requests for each in told)
        prefills = [post for post in self._posts.values() if post.role is Role.PREFILL]
        decodes = [post for post in self._posts.values() if post.role is Role.DECODE]
        return Inputs(
            ratio=self.ratio,
            seconds=seconds,
            requests=requests,
            requests_per_s=requests * per_s,
            new_tokens_per_s=sum(each.new_tokens for each in told) * per_s,
            cached_tokens_per_s=sum(each.cached_tokens for each in told) * per_s,
            output_tokens_per_s=sum(each.output_tokens for each in told) * per_s,
            refused=sum(each.refused for each in told) / requests if requests else 0.0,
            prefill_load=_mean(prefills),
            decode_load=_mean(decodes),
            prefill_oldest_s=max((post.oldest_s for post in prefills), default=0.0),
            decode_oldest_s=max((post.oldest_s for post in decodes), default=0.0),
        )

    def _other(self, one: _Traffic, two: _Traffic) -> bool:
        """Whether traffic has moved, more than chance moves it."""
        least = CHANCE * math.sqrt(1 / max(1, one.requests) + 1 / max(1, two.requests))
        pairs = zip(one.rates, two.rates, SPREADS, strict=True)
        return any(max(a, b) > (1 + max(self._config.moved, spread * least)) * min(a, b) for a, b, spread in pairs)

    # Deciding.
    def _period(self, now: float, *, on_way: bool = False) -> list[RatioCommand]:
        """What is to be done now; `on_way`: a flip has just ended after which the way goes on."""
        inputs = self._inputs(now)
        keep = Candidate(Act.KEEP, inputs.ratio)
        if self._flip is not None and self._flip.settles_at is not None and now >= self._flip.settles_at:
            self._flip.traffic, self._flip.settles_at = _traffic(inputs), None
        candidates, against = self._candidates(inputs)

        def nothing(why: Why) -> list[RatioCommand]:
            because = Why.NOT_NEEDED if why is Why.CALM else why
            return self._decide(now, inputs, keep, why, against=_unasked(candidates, against, because))

        if self._change is not None:
            return nothing(Why.UNDER_WAY)
        if self._question is not None:
            return nothing(Why.UNANSWERED)
        if now < self._ended_at + self._config.cooldown_s and not on_way:
            return nothing(Why.RECENT)
        if min(inputs.ratio) < 1:
            return nothing(Why.BLIND)
        if self._pinned is not None:
            return self._to_pin(now, inputs, _unasked(candidates, against, Why.PINNED), self._pinned)
        shrinks, calm = any(each.act.removes for each in candidates), self._idle(inputs)
        if inputs.requests < self._config.least_requests and not (shrinks and calm):
            return nothing(Why.FEW)
        if calm and not shrinks:
            return nothing(Why.CALM)
        traffic = _traffic(inputs)
        worse = False
        if self._asked is not None and self._other(traffic, self._asked[0]):
            self._wake()
        elif self._asked is not None and now < self._rests_until:
            _, refused, oldest_s = self._asked
            worse = inputs.refused > refused + WORSE or _oldest(inputs) > WORSE_S + 2 * oldest_s
            if not worse:
                return nothing(Why.RESTING)
        if len(candidates) == 1:
            return nothing(Why.NO_GAIN)
        if not on_way:
            self._way = None
        self._number += 1
        self._question = _Question(self._number, inputs, candidates, against, traffic, worse)
        return [Simulate(self._number, candidates)]

    def _idle(self, inputs: Inputs) -> bool:
        config = self._config
        loads = max(inputs.prefill_load, inputs.decode_load)
        return not inputs.refused and _oldest(inputs) <= config.calm_age_s and loads < config.calm

    def _candidates(self, inputs: Inputs) -> tuple[tuple[Candidate, ...], Against]:
        """What can be done, the present first, and what cannot and why."""
        found, against = [Candidate(Act.KEEP, inputs.ratio)], list[tuple[Candidate, Why]]()
        for act in STEP:
            for candidate in self._of(act, inputs.ratio, far=self._distress(inputs)):
                if not self._bounds.allow(candidate.ratio, inputs.ratio):
                    if candidate.steps == 1:
                        against.append((candidate, Why.BOUND))
                elif candidate.worker is None and not act.adds:
                    against.append((candidate, Why.NOBODY))
                elif self._unwanted(act, inputs):
                    against.append((candidate, Why.BUSIER if act.flips else Why.NOT_NEEDED))
                else:
                    found.append(candidate)
        return tuple(found), tuple(against)

    def _of(self, act: Act, now: Ratio, *, far: bool) -> list[Candidate]:
        """An act's candidates, whether they are allowed or not; none if nobody may be added or removed at all."""
        prefill, decode = STEP[act]
        after = Ratio(now.prefill + prefill, now.decode + decode)
        if act.flips:
            role = Role.DECODE if act is Act.TO_PREFILL else Role.PREFILL
            worker = self._lightest(role, flips=True)
            most = sum(post.role is role and post.flips for post in self._posts.values())
            steps = {k for k in STEPS if k == 1 or (far and k <= most)}
            ratios = {k: Ratio(now.prefill + k * prefill, now.decode + k * decode) for k in range(1, max(2, most))}
            if far:  # and as far as it may go
                steps.add(max((k for k, ratio in ratios.items() if self._bounds.allow(ratio, now)), default=1))
            return [Candidate(act, ratios[k], worker, steps=k) for k in sorted(steps & ratios.keys())]
        if act.adds and self._bounds.most_workers is not None:
            return [Candidate(act, after)]
        if act.removes and self._bounds.least_workers is not None:
            worker = self._lightest(Role.PREFILL if act is Act.REMOVE_PREFILL else Role.DECODE, flips=False)
            return [Candidate(act, after, worker, self._config.spare)]
        return []

    def _distress(self, inputs: Inputs) -> bool:
        """Whether a phase may have far too little."""
        loads = max(inputs.prefill_load, inputs.decode_load)
        return loads >= self._config.full or inputs.refused > 1 - self._config.share or _oldest(inputs) > WORSE_S

    def _unwanted(self, act: Act, inputs: Inputs) -> bool:
        """Whether it need not be simulated, by load alone: who would give is busier than who would take, or would have
        to do the work of one more and is busy already, or nobody is."""
        calm, (prefill, decode), apart = self._config.calm, inputs.ratio, self._config.apart
        match act:
            case Act.TO_PREFILL:
                return inputs.decode_load > inputs.prefill_load + apart
            case Act.TO_DECODE:
                return inputs.prefill_load > inputs.decode_load + apart
            case Act.REMOVE_PREFILL:
                return inputs.prefill_load * prefill >= 2 * calm * (prefill - 1) or inputs.refused > 0
            case Act.REMOVE_DECODE:
                return inputs.decode_load * decode >= 2 * calm * (decode - 1) or inputs.refused > 0
            case Act.ADD_PREFILL | Act.ADD_DECODE:
                return self._idle(inputs)
            case _:
                return False

    def _lightest(self, role: Role, *, flips: bool) -> Identity | None:
        """Who of a phase has the least to give up."""
        posts = (post for post in self._posts.values() if post.role is role and (post.flips or not flips))
        found = min(posts, key=lambda post: (post.load, post.waiting, post.identity), default=None)
        return found.identity if found is not None else None

    def _to_pin(self, now: float, inputs: Inputs, against: Against, pinned: Ratio) -> list[RatioCommand]:
        """`against`: what else might be done."""
        ratio, keep = inputs.ratio, Candidate(Act.KEEP, inputs.ratio)
        wanted = max(1, min(pinned.prefill, sum(ratio) - 1))
        if wanted == ratio.prefill:
            return self._decide(now, inputs, keep, Why.PINNED, against=against)
        act = Act.TO_PREFILL if wanted > ratio.prefill else Act.TO_DECODE
        worker = self._lightest(Role.DECODE if act is Act.TO_PREFILL else Role.PREFILL, flips=True)
        if worker is None:
            return self._decide(now, inputs, keep, Why.NOBODY, against=against)
        prefill, decode = STEP[act]
        chosen = Candidate(act, Ratio(ratio.prefill + prefill, ratio.decode + decode), worker)
        others = tuple([each for each in against if each[0] != chosen])
        return self._decide(now, inputs, chosen, Why.PINNED, against=((keep, Why.PINNED), *others))

    def _simulated(self, event: Simulated, now: float) -> list[RatioCommand]:
        question = self._question
        if question is None or question.number != event.number:
            self.ignored += 1
            return []
        if event.scores and len(event.scores) != len(question.candidates):
            raise LocalError(f"simulated: got {len(event.scores)} scores, want {len(question.candidates)} or none")
        self._question = None
        inputs, keep = question.inputs, question.candidates[0]
        if not event.scores:
            against = _unasked(question.candidates, question.against, Why.UNKNOWN)
            return self._decide(now, inputs, keep, Why.UNKNOWN, question, event, against, event.reason)
        chosen, why, reasons = self._choose(question, event, now)
        against = (*reasons.items(), *question.against)
        if chosen.act is not Act.KEEP and (self.ratio != inputs.ratio or not self._stands(chosen)):
            against = ((chosen, Why.OTHERS), *[each for each in against if each[0] != keep])
            return self._decide(now, inputs, keep, Why.OTHERS, question, event, against)
        if chosen.act is Act.KEEP:
            refused, oldest_s = inputs.refused, _oldest(inputs)
            if question.worse and self._asked is not None:  # as bad as it ever was, no change helps
                refused, oldest_s = max(refused, self._asked[1]), max(oldest_s, self._asked[2])
            self._asked = (question.traffic, refused, oldest_s)
            self._rest_s = min(self._config.rest_most_s, max(self._config.period_s, 2 * self._rest_s))
            # A little early, so that it ends by the period that it is to end with.
            self._rests_until = now + self._rest_s - self._config.period_s / 2
            if self._spare:
                self._wake_but_spare()
        else:
            self._wake()
        return self._decide(now, inputs, chosen, why, question, event, against)

    def _stands(self, chosen: Candidate) -> bool:
        """Whether whom it names is there, in the role that it had."""
        if chosen.worker is None:
            return True
        post = self._posts.get(chosen.worker)
        prefills = chosen.act in (Act.TO_DECODE, Act.REMOVE_PREFILL)
        return post is not None and post.role is (Role.PREFILL if prefills else Role.DECODE)

    def _wake_but_spare(self) -> None:
        spare = self._spare
        self._wake()
        self._spare = spare

    def _choose(self, question: _Question, event: Simulated, now: float) -> tuple[Candidate, Why, dict[Candidate, Why]]:
        """The rule: a flip that helps; else one more worker if too few are good; else one less if enough are."""
        config, traffic = self._config, question.traffic
        scores = dict(zip(question.candidates, event.scores, strict=True))
        keep = question.candidates[0]
        good = scores[keep].good
        wanted = config.share * min(1.0, event.feasible)
        infeasible = event.feasible < config.share
        against: dict[Candidate, Why] = {}
        best: Candidate | None = None
        for each, score in scores.items():
            if not each.act.flips:
                continue
            needed, turn = max(config.gain, MORE / max(1, score.requests)), self._turns(each.act)
            if turn and not self._moved(traffic):
                needed *= 2
            if self._way is not None and _on(self._way, each):
                needed = 0.0
            if score.good - good < needed:
                against[each] = Why.NO_GAIN
            elif turn and not self._moved(traffic) and now < self._turned_at + config.turn_s:
                against[each] = Why.TURN
            elif best is None or score.good > scores[best].good:
                if best is not None:
                    against[best] = Why.SECOND
                best = each
            else:
                against[each] = Why.SECOND
        others = [each for each in scores if each is not keep and not each.act.flips]
        if best is not None:
            self._spare = 0
            against[keep] = Why.SECOND
            return best, Why.BETTER, against | dict.fromkeys(others, Why.SECOND)
        spare = [
            each
            for each in others
            if each.act.removes and scores[each].good >= max(wanted, good - config.gain / 2) and good >= wanted
        ]
        self._spare = self._spare + 1 if spare else 0
        adding = [each for each in others if each.act.adds]
        for each in others:
            against[each] = Why.NO_GAIN
        if good < wanted:
            more = max(adding, key=lambda each: scores[each].good, default=None)
            needed = max(config.gain, MORE / max(1, scores[keep].requests))
            if more is not None and scores[more].good - good >= needed:
                del against[more]
                against[keep] = Why.SECOND
                return more, Why.BETTER, against
            return keep, Why.INFEASIBLE if infeasible else Why.NO_GAIN if adding else Why.SHORT, against
        if infeasible:
            return keep, Why.INFEASIBLE, against
        for each in adding:
            against[each] = Why.NOT_NEEDED
        if spare:
            if self._spare >= config.patience:
                self._spare = 0
                less = max(spare, key=lambda each: scores[each].good)
                del against[less]
                against[keep] = Why.NOT_NEEDED
                return less, Why.SPARE, against
            against |= dict.fromkeys(spare, Why.PATIENCE)
        return keep, Why.NO_GAIN, against

    def _turns(self, act: Act) -> bool:
        return self._flip is not None and BACK[self._flip.act] is act

    def _moved(self, traffic: _Traffic) -> bool:
        """Traffic is not what it was at the last flip."""
        return self._flip is None or self._other(traffic, self._flip.traffic)

    def _decide(
        self,
        now: float,
        inputs: Inputs,
        chosen: Candidate,
        why: Why,
        question: _Question | None = None,
        answer: Simulated | None = None,
        against: Against = (),
        note: str = "",
    ) -> list[RatioCommand]:
        """Put it on record, and do it."""
        self._number += 1
        number = self._number
        candidates = question.candidates if question is not None else ()
        scores, feasible = (answer.scores, answer.feasible) if answer is not None and answer.scores else ((), None)
        decision = Decision(number, now, inputs, chosen, why, candidates, scores, against, feasible, note)
        self.decisions.append(decision)
        said: list[RatioCommand] = [Decided(decision)]
        worker = chosen.worker
        if question is not None and not chosen.act.flips:
            self._way = None
        match chosen.act:
            case Act.KEEP:
                return said
            case Act.TO_PREFILL | Act.TO_DECODE:
                assert worker is not None
                if question is None:
                    self._way = None
                elif self._way is None or not _on(self._way, chosen):
                    self._way = chosen.act, chosen.ratio
                traffic = question.traffic if question is not None else _traffic(inputs)
                if self._turns(chosen.act) and not self._moved(traffic):
                    self._turned_at = now
                self._flip = _Flipped(chosen.act, traffic, now + self._config.window_s)
                role = Role.PREFILL if chosen.act is Act.TO_PREFILL else Role.DECODE
                said.append(Flip(number, worker, role))
            case Act.ADD_PREFILL:
                said.append(Add(number, Role.PREFILL))
            case Act.ADD_DECODE:
                said.append(Add(number, Role.DECODE))
            case Act.REMOVE_PREFILL | Act.REMOVE_DECODE:
                assert worker is not None
                said.append(Remove(number, worker))
        self._change = (number, chosen)
        return said

    def _changed(self, number: int, done: bool, now: float) -> bool:
        """A change has ended; whether it was a flip after which the way goes on."""
        if self._change is None or self._change[0] != number:
            self.ignored += 1
            return False
        _, chosen = self._change
        self._change, self._ended_at = None, now
        post = self._posts.get(chosen.worker) if chosen.worker is not None else None
        if not done or post is None:
            self._way = None
            return False
        if chosen.act.flips:
            post.become(Role.PREFILL if chosen.act is Act.TO_PREFILL else Role.DECODE)
        elif chosen.act.removes:
            del self._posts[post.identity]
        if self._way is None or not _far(self._way, self.ratio):
            self._way = None
        return self._way is not None


def _unasked(candidates: tuple[Candidate, ...], against: Against, why: Why) -> Against:
    """Nothing was asked of any of them."""
    return (*[(each, why) for each in candidates if each.act is not Act.KEEP], *against)


def _far(way: tuple[Act, Ratio], ratio: Ratio) -> bool:
    """Whether a ratio lies before the end of the way."""
    act, end = way
    return ratio.prefill > end.prefill if act is Act.TO_DECODE else ratio.decode > end.decode


def _on(way: tuple[Act, Ratio], each: Candidate) -> bool:
    """Whether a candidate leads along the way, and not beyond its end."""
    return each.act is way[0] and (each.ratio == way[1] or _far(way, each.ratio))


def _oldest(inputs: Inputs) -> float:
    return max(inputs.prefill_oldest_s, inputs.decode_oldest_s)


def _mean(posts: list[_Post]) -> float:
    """Load of those that said something: who has just changed its role is not idle for long."""
    loads = [post.load for post in posts if post.told]
    return math.fsum(loads) / len(loads) if loads else 0.0


def _traffic(inputs: Inputs) -> _Traffic:
    prompts = inputs.new_tokens_per_s + inputs.cached_tokens_per_s
    return _Traffic(inputs.requests, (inputs.requests_per_s, prompts, inputs.output_tokens_per_s))
