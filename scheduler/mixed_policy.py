"""What a colocated worker does next: prompt chunks and decode rows in one step, on the same pages. Pure.

Three ways of the literature are one machine with settings (`MixedConfig`), none of them with a path of its own:

- `PREFILL_FIRST`: prompts run before decode rows, as vLLM did before version 1 and DistServe's baseline does;
- `SARATHI`: every step carries all decode rows, and prompt chunks fill it up to a token budget (Sarathi-Serve,
  section 4.2, "stall-free batching"); with a cost model and `gap_s` the chunk is the largest whose step stays below a
  gap, as its section 4.3 chooses the budget;
- `VLLM`: the same with memory by the chunk and nothing set aside for what will be generated.

First come, first served: of those that do not run, nobody starts before one that came earlier. When the rows' next
step finds no page, the newest running sequence is suspended: it goes to the head of the line and is computed again,
prompt and what it has generated. The oldest is suspended only if even all of what the others hold is not enough,
which somebody else in the arena must be the cause of; so it always goes on, and everybody becomes the oldest.

A step with a prompt is one step. Without any, decode is a standing order as in `scheduler/decode_policy.py`: the
policy decides for a *horizon* of steps, until a row must end or memory is used up, and orders continue each other up
to there. Pages are bound ahead for an order, and count as free in every decision until they are needed: whatever
`max_steps` is, the same is decided at the same times. (One exception: memory bound ahead may reclaim cached prefixes
up to an order earlier.)

Continuations (`n` > 1) share the prompt's full pages. One that finds no memory or row when the prompt is complete,
or whose memory is taken, goes on by itself: its prompt is computed again.

The full pages of a prompt are named by their hashes as soon as they are computed, those of the answer when it ends, if
whoever runs the engine knows how they are called: then the next turn of a session finds both.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace

from core.errors import LocalError
from core.kv import KvShape
from core.messages import Accept, Cancel, Failed, Finished, Handed, Offer, Prompt, Reject, SlotFree
from core.pages import Owner, Pages
from core.ranked import Ranked
from core.request import Stage
from core.sampling import MAX_N
from core.standing import Standing
from core.worker import Identity
from scheduler.cost import CostModel, Repriced
from scheduler.mixed_batch import Batch, Job, Row, State
from scheduler.mixed_chunk import Chunks
from scheduler.mixed_events import (
    Answer,
    Began,
    Begin,
    Cut,
    EndSequence,
    GatewayGone,
    Grow,
    Invite,
    Join,
    MixedCommand,
    MixedConfig,
    MixedEvent,
    Span,
    Step,
    StepFailed,
    Stepped,
    Suspend,
    continuation,
)
from scheduler.mixed_wait import Waits
from scheduler.refusals import Refusals

_FURTHEST = list(State)


class MixedPolicy:
    """The line and the running sequences of one colocated worker; at most one `Step` is out at a time."""

    def __init__(
        self, me: Identity, shape: KvShape, ledger: Pages, config: MixedConfig, cost: CostModel | None = None
    ) -> None:
        if config.gap_s and cost is None:
            raise LocalError("gap_s: got no cost model, want one to predict gaps with")
        self._me = me
        self._shape = shape
        self._ledger = ledger
        self._config = config
        self._capacity = ledger.available
        self._watermark = math.ceil(config.watermark_share * self._capacity)
        self._promises = config.admission == "worst_case"
        self._jobs: dict[str, Job] = {}
        self._untils = Ranked()
        """When requests lapse or are late."""
        self._prompts = 0
        self._line: OrderedDict[int, Row] = OrderedDict()
        """Rows that wait, by rank; the first is the next to start."""
        self._running: list[int] = []
        """Ranks of rows that prefill or decode, ascending."""
        self._by_rank: dict[int, Row] = {}
        self._partial: dict[int, Row] = {}
        """Running rows whose prompt is not complete, by rank."""
        self._batch = Batch(shape.page_tokens)
        self._joining: list[Row] = []
        self._step: Step | None = None
        self._steps_ordered = 0
        self._spans: list[Row] = []
        """Of the step under way."""
        self._started_at = 0.0
        self._horizon = 0
        """Up to this count of steps an order continues the one before."""
        self._cut = False
        self._dying: list[Row] = []
        """Cancelled rows that the step under way computes."""
        self._fresh = False
        """The head of the line is another than at the last decision."""
        self._stuck = False
        """At the last decision somebody lacked memory."""
        self._level = 0
        """Available pages when `_stuck` was last true of them."""
        self._waits = Waits(shape, config, cost, self._capacity)
        self._chunks = Chunks(config, cost)
        self._refusals = Refusals()
        self._eased = False
        """There is less to do, or more memory, than when a request was refused."""
        self.ignored = 0
        """Messages about tickets we do not hold."""
        self.suspensions = 0
        self.recomputed_tokens = 0

    def queue(self) -> dict[State, int]:
        """Sequences in each state."""
        counts = dict.fromkeys(State, 0)
        for job in self._jobs.values():
            for row in job.rows.values():
                counts[row.state] += 1
        return counts

    def predicted_wait_s(self, now: float, new: int = 0, cached: int = 0) -> float:
        """Time until the first token of a request of `new` tokens behind `cached` ones; 0 if nothing is known yet."""
        busy = self._step is not None and not self._spans
        return self._waits.predicted_s(now, new, cached, self._shape.pages_for(new + cached), busy)

    def on(self, event: MixedEvent | None, now: float) -> list[MixedCommand]:
        commands: list[MixedCommand] = []
        match event:
            case Stepped():
                if self._stepped(event, now, commands):
                    self._order((), [], commands, now)
                    return commands
            case Offer():
                self._offered(event, now, commands)
            case Prompt():
                self._prompted(event, now, commands)
            case Cancel(ticket, _, report, branch):
                job = self._jobs.get(ticket.key)
                if job is None:
                    self.ignored += 1
                elif branch is None:
                    job.report = job.report or (report and job.handed and not job.cancelled)
                    self._cancel(job, now, commands)
                elif job.handed and branch in job.rows:
                    self._stop(job.rows[branch], now, commands)
            case None:
                while (key := self._untils.first()) is not None and self._untils.lowest() <= now:
                    late = self._jobs[key]
                    if late.request is not None:
                        why = f"ended while {max((row.state for row in late.rows.values()), key=_FURTHEST.index)}"
                        commands.append(Answer(Failed(late.ticket, "DEADLINE_EXCEEDED", why)))
                    self._cancel(late, now, commands)
            case GatewayGone(identity):
                self._refusals.drop(identity)
                mine = [job for job in self._jobs.values() if job.ticket.minter == identity]
                self.ignored += not mine
                for job in mine:
                    self._cancel(job, now, commands)
            case StepFailed():
                self._step_failed(event, now, commands)
            case Repriced(cost):
                self._waits.reprice(cost)
                self._chunks.reprice(cost)
                self._eased = True
        if self._step is None:
            self._plan(commands, now)
        else:
            self._look(commands)
        if self._eased and self._refusals:
            told = self._refusals.told(now, lambda new, wait_s: self.predicted_wait_s(now, new) <= wait_s)
            commands += [Invite(gateway, SlotFree(self._me, tokens)) for gateway, tokens in told]
        self._eased = False
        return commands

    def deadline(self) -> float | None:
        """Already past when somebody who lacks memory may have it, because somebody else in this arena freed some."""
        if self._freed() and not (self._cut or self._spans):
            return self._started_at
        due = self._untils.lowest()
        return due if due != math.inf else None

    def standing(self) -> list[Standing]:
        """Of every sequence here."""
        line = {rank: place for place, rank in enumerate(self._line)}
        standing = []
        for key, job in self._jobs.items():
            name = job.request.id if job.request is not None else ""
            until = self._untils.rank(key) if key in self._untils else math.inf
            for row in job.rows.values():
                state = "cancelled" if row.cancelled else row.state
                tokens = self._batch.generated(row) if row.state is State.DECODING else 0
                why = self._waits_for(row, line)
                standing.append(Standing(key, name, state, job.accepted_at, until, why, tokens=tokens))
        return standing

    def check(self) -> None:
        self._ledger.check()
        self._batch.check()
        assert len(self._untils) == sum(not job.cancelled for job in self._jobs.values())
        rows: list[Row] = []
        waiting: list[Row] = []
        ranks: list[int] = []
        for key, job in self._jobs.items():
            assert key == job.ticket.key
            assert job.rows, "a request without sequences stays"
            assert job.sharers == sum(row.shares for row in job.rows.values())
            assert self._ledger.count(key) == 0 or job.sharers or 0 in job.rows
            for branch, row in job.rows.items():
                assert (row.job, row.branch) == (job, branch)
                rows.append(row)
                if row.state in (State.OFFERED, State.WAITING):
                    waiting.append(row)
                running = row.state in (State.PREFILLING, State.DECODING)
                assert (row.rank in self._by_rank and self._by_rank[row.rank] is row) == running
                assert (self._line.get(row.rank) is row) == (row.state is State.WAITING)
                assert (self._partial.get(row.rank) is row) == (row.state is State.PREFILLING)
                assert (self._batch.rows.get(row.key) is row) == (row.state is State.DECODING)
                own = row.held - (row.prompt // self._shape.page_tokens if row.shares else 0)
                assert self._ledger.count(row.key) == (own if running else 0)
                assert row.cancelled <= (row in self._dying), "a cancelled sequence stays"
                if running:
                    ranks.append(row.rank)
                if row.state is State.PREFILLING:
                    assert row.begun
                    assert row.done <= row.held * self._shape.page_tokens
        self._waits.check(rows, waiting)
        assert self._running == sorted(ranks)
        assert list(self._line) == sorted(self._line), "the line is out of order"
        assert len(self._running) <= self._config.max_rows
        assert self._step is not None or not (self._cut or self._spans or self._dying)
        assert all(self._batch.rows.get(row.key) is row and row.first is not None for row in self._joining)
        step = self._step
        if step is not None:
            assert [row.key for row in self._spans] == [span.key for span in step.spans]
            assert all(self._jobs[row.job.ticket.key].rows[row.branch] is row for row in self._spans), "computed, freed"
            assert step.rows in (0, len(self._batch))
            if step.rows:
                assert self._batch.full_before(self._batch.steps + step.steps) is None, "a step without a page"

    # What comes in.
    def _offered(self, offer: Offer, now: float, commands: list[MixedCommand]) -> None:
        ticket, prompt = offer.ticket, offer.prompt_tokens
        if ticket.key in self._jobs or ticket.source != self._me or ticket.sink != self._me:
            self.ignored += 1
            why = "offered twice, to an earlier life of this worker, or for a hand-over that it does not do"
            commands.append(Answer(Reject(ticket, why)))
            return
        need = self._shape.pages_for(prompt + offer.max_tokens)
        if need > self._capacity:
            commands.append(Answer(Reject(ticket, f"needs {need} pages, the worker has {self._capacity}")))
            return
        prefix = self._shape.names(offer.prefix, offer.prefix_page_tokens)
        hashes = self._hashes(prefix, prompt)
        cached = self._ledger.cached(hashes) * self._shape.page_tokens if hashes else 0
        wait_s = self.predicted_wait_s(now, prompt - cached, cached)
        if wait_s > offer.wait_s:
            self._refusals.add(ticket.minter, prompt - cached, offer.wait_s, now)
            why = f"first token in {wait_s:.2f} s, wanted in {offer.wait_s:.2f} s"
            commands.append(Answer(Reject(ticket, why, wait_s, wait_s - offer.wait_s)))
            return
        job = Job(ticket, prefix, now)
        row = job.rows[0] = Row(ticket.key, job, prompt, offer.max_tokens, prompt)
        self._jobs[ticket.key] = job
        self._untils.put(ticket.key, now + self._config.offer_s)
        self._waits.owe(row, prompt - cached)
        self._waits.starts(row, 1)
        commands.append(Answer(Accept(ticket, cached, wait_s)))

    def _prompted(self, event: Prompt, now: float, commands: list[MixedCommand]) -> None:
        ticket, request = event.ticket, event.request
        job = self._jobs.get(ticket.key)
        if job is None or job.request is not None or len(request.prompt) != job.rows[0].prompt:
            self.ignored += 1
            commands.append(Answer(Failed(ticket, "ABORTED", "the offer has lapsed")))
            return
        sampling = request.sampling
        need = self._shape.pages_for_branches(len(request.prompt), sampling.max_tokens, sampling.n)
        if need > self._capacity:
            why = f"needs {need} pages, the worker has {self._capacity}"
            commands.append(Answer(Failed(ticket, "ABORTED", why)))
            self._cancel(job, now, commands)
            return
        job.request, job.prefix = request, self._shape.names(request.prefix, request.prefix_page_tokens)
        self._untils.put(ticket.key, now + request.timeout_s)
        row = job.rows[0]
        self._prompts += 1
        row.request, row.most, row.state, row.rank = request, sampling.max_tokens, State.WAITING, self._prompts * MAX_N
        self._fresh = self._fresh or not self._line
        self._line[row.rank] = row

    def _stepped(self, event: Stepped, now: float, commands: list[MixedCommand]) -> bool:
        """True if the next order continues this one: nobody ended, came or left, and the horizon is ahead."""
        step = self._verify(event)
        spans, self._spans = self._spans, []
        cut, self._cut, self._step = self._cut, False, None
        batch = self._batch
        if step.rows:
            batch.advance(event.steps)
        for each in event.ended:
            row = batch.rows[each.key]
            if not row.cancelled:
                job = row.job
                stages = self._stages(job, row, now)
                finished = Finished(
                    job.ticket, each.reason, each.generated, each.stop_token_id, stages, row.branch, True
                )
                commands.append(Answer(finished))
                self._waits.ended(self._shape.pages_for(batch.stored(row)), now)
                if each.prefix:
                    self._name_all(row, each.prefix)
                self._end(row, now, commands)
        begun: dict[str, list[Began]] = {}
        for each_begun in event.begun:
            begun.setdefault(each_begun.key, []).append(each_begun)
        for row, span in zip(spans, step.spans, strict=True):
            row.done = span.stop
            row.job.chunks += 1
            self._waits.owe(row, row.goal - row.done)
            if row.key not in begun:
                continue
            if not row.cancelled:
                self._began(row, begun[row.key], now, commands)
            elif row.request is not None and row.request.sampling.n > 1:
                those = [each.first.branch for each in begun[row.key] if each.finish is None]
                commands += [EndSequence(continuation(row.key, branch)) for branch in those]
        if spans:
            self._eased = True
            self._waits.stepped(step, now - self._started_at)
        dying, self._dying = self._dying, []
        for row in dying:
            self._end(row, now, commands)
        if cut or spans or event.ended or batch.steps == self._horizon:
            return False
        # Both only if somebody else in this arena has freed or taken memory.
        return not self._freed() and self._lasts(1) == 1

    def _verify(self, event: Stepped) -> Step:
        step = self._step
        if step is None or event.step_id != step.step_id:
            raise LocalError(f"stepped: got step {event.step_id}, want {step.step_id if step else 'none'}")
        if not 1 <= event.steps <= step.steps:
            raise LocalError(f"step {event.step_id}: got {event.steps} steps, want 1 to {step.steps}")
        complete = {row.key for row, span in zip(self._spans, step.spans, strict=True) if span.stop == row.goal}
        begun = {each.key for each in event.begun}
        if begun != complete:
            raise LocalError(f"step {event.step_id}: got {sorted(begun)} begun, want {sorted(complete)}")
        if len({(each.key, each.first.branch) for each in event.begun}) < len(event.begun):
            raise LocalError(f"step {event.step_id}: a continuation began twice")
        ended = set()
        for each in event.ended:
            if not step.rows or each.key not in self._batch.rows:
                raise LocalError(f"step {event.step_id}: {each.key} ended, which is not a decode row of it")
            if each.key in ended:
                raise LocalError(f"step {event.step_id}: {each.key} ended twice")
            ended.add(each.key)
        return step

    def _step_failed(self, event: StepFailed, now: float, commands: list[MixedCommand]) -> None:
        """All of the step are placed again by their gateways, which bound how often; the worker goes on."""
        step = self._step
        if step is None or event.step_id != step.step_id:
            raise LocalError(f"step failed: got step {event.step_id}, want {step.step_id if step else 'none'}")
        rows = [*self._spans, *(self._batch.rows.values() if step.rows else ())]
        self._step, self._cut, self._spans = None, False, []
        dying, self._dying = self._dying, []
        for job in {row.job.ticket.key: row.job for row in rows}.values():
            if not job.cancelled:
                stages = self._stages(job, next(iter(job.rows.values())), now)
                commands.append(Answer(Failed(job.ticket, "ABORTED", f"the engine failed: {event.reason}", stages)))
                self._cancel(job, now, commands)
        for row in dying:
            self._end(row, now, commands)

    def _began(self, row: Row, begun: Sequence[Began], now: float, commands: list[MixedCommand]) -> None:
        """All known tokens have KV, and the next one was chosen."""
        job, request = row.job, row.request
        assert request is not None
        if job.prefix:
            self._ledger.name(row.key, job.prefix[: row.prompt // self._shape.page_tokens])
        again = job.handed
        if not again:
            job.computed_at = now
        go_on = []
        for each in begun:
            if each.finish is None:
                go_on.append(each)
                continue
            token, branch = each.first.token, row.branch if again else each.first.branch
            made = row.goal - row.prompt
            count, stop = (made, token) if each.finish == "stop" else (made + 1, None)
            stages = self._stages(job, row if again else None, now)
            commands.append(Answer(Finished(job.ticket, each.finish, count, stop, stages, branch, again)))
            self._waits.ended(self._shape.pages_for(row.goal), now)
        if not go_on:
            self._end(row, now, commands)
            return
        if not again:
            commands.append(Answer(Handed(job.ticket, self._stages(job, None, now))))
            job.handed = True
        if request.sampling.n > 1:
            self._fork(row, go_on, commands)
            return
        del self._partial[row.rank]
        row.state = State.DECODING
        self._ledger.move(row.key, Owner.DECODING)
        self._batch.join(row)

    def _fork(self, head: Row, begun: Sequence[Began], commands: list[MixedCommand]) -> None:
        """Rows for what goes on: with a share of the prompt's pages, or, without memory or a row for it, in line."""
        job, request, ledger, shape = head.job, head.request, self._ledger, self._shape
        assert request is not None
        key, prompt = job.ticket.key, head.prompt
        del job.rows[head.branch], self._partial[head.rank]
        self._rest(head)
        commands.append(EndSequence(key))
        ledger.unpromise(key)
        full = prompt // shape.page_tokens
        own = shape.pages_for(prompt + head.most if self._promises else prompt) - full
        waiting: list[Row] = []
        for each in begun:
            branch = each.first.branch
            alone = replace(request, sampling=request.sampling.branch(branch))
            row = Row(continuation(key, branch), job, prompt, head.most, prompt, head.rank + branch, branch, alone)
            job.rows[branch] = row
            row.begun = True
            self._return_spare(own)
            if own > ledger.available or len(self._running) == self._config.max_rows:
                row.goal += 1
                waiting.append(row)
                continue
            if self._promises:
                ledger.promise(row.key, own, Owner.DECODING)
            ledger.bind(row.key, shape.pages_for(prompt) - full, Owner.DECODING)
            row.first, row.shares, row.state = each.first, True, State.DECODING
            row.done, row.held = row.goal, shape.pages_for(prompt)
            job.sharers += 1
            self._run(row)
            self._joining.append(row)
            self._batch.join(row)
        if job.sharers:
            ledger.move(key, Owner.DECODING)
        else:
            ledger.release(key)
        for row in reversed(waiting):
            self._wait(row)

    # What is done next.
    def _look(self, commands: list[MixedCommand]) -> None:
        """While decode rows have an order: ask for an earlier end of it when something may be decided then."""
        step = self._step
        assert step is not None
        if self._cut or step.spans:
            return
        starts = self._fresh and len(self._running) < self._config.max_rows
        if starts or self._dying or self._freed():
            self._cut = True
            commands.append(Cut(step.step_id))

    def _plan(self, commands: list[MixedCommand], now: float) -> None:
        """A decision: who is suspended, who starts, which chunks, and for how many steps the rows go on."""
        self._fresh = self._stuck = False
        first = self._config.order == "prefill_first"
        suspended = not first and self._make_room(commands)
        spans, growing = self._fill(commands, now) if not suspended else ([], [])
        if first and not spans:
            suspended = self._make_room(commands)
        if suspended and not self._batch:
            spans, growing = self._fill(commands, now)
        batch = self._batch
        if batch and not spans:
            # Who was suspended just now may start at the next step end.
            limit = 1 if suspended else max(1, batch.first_end() - batch.steps)
            self._horizon = batch.steps + self._lasts(limit)
        self._waits.decided(len(batch), batch.context, self._room(), self._config.max_rows - len(self._running))
        if spans or batch:
            self._order(tuple(spans), growing, commands, now)
        else:
            self._started_at, self._level = now, self._ledger.available

    def _order(self, spans: tuple[Span, ...], growing: list[Grow], commands: list[MixedCommand], now: float) -> None:
        """One engine order, with the pages that it needs."""
        batch, size = self._batch, self._shape
        steps, rows = 1, len(batch)
        if spans and self._config.order == "prefill_first":
            rows = 0
        elif not spans:
            steps = self._lasts(min(self._config.max_steps, self._horizon - batch.steps))
        if rows:
            self._return_spare(batch.growth(steps))
            # As long as there is plenty, rows get a few pages at a time: what is bound ahead counts as free anyway.
            ahead = self._config.ahead_pages
            plenty = self._promises or self._ledger.available >= 2 * ahead * rows + batch.growth(steps)
            while (row := batch.full_before(batch.steps + steps)) is not None:
                more = size.pages_for(batch.stored(row) + steps) - row.held
                if plenty and more < ahead:
                    more = max(more, min(ahead, size.pages_for(row.prompt + row.most) - row.held))
                pages = self._ledger.bind(row.key, more, Owner.DECODING)
                if row.first is None:
                    growing.append(Grow(row.key, pages, row.held if row.trimmed else None))
                    row.trimmed = False
                batch.grown(row, more)
        joining: tuple[Join, ...] = ()
        if rows and self._joining:
            joining, self._joining = tuple([self._join(row) for row in self._joining]), []
        self._steps_ordered += 1
        self._step = Step(self._steps_ordered, spans, joining, tuple(growing), rows, steps)
        self._started_at, self._level = now, self._ledger.available
        commands.append(self._step)

    def _make_room(self, commands: list[MixedCommand]) -> bool:
        """Suspend the newest until the decode rows' next step has its pages; True if somebody was."""
        suspended = False
        while self._batch and not self._promises and self._batch.growth(1) > self._room():
            self._suspend(self._by_rank[self._running[-1]], commands)
            suspended = True
        return suspended

    def _fill(self, commands: list[MixedCommand], now: float) -> tuple[list[Span], list[Grow]]:
        """Chunks for one step: of prompts that are begun, then of the line, in order, as far as all limits allow."""
        config, shape = self._config, self._shape
        chunked = config.order == "chunked"
        beside = (len(self._batch), self._batch.context) if chunked else (0, 0)
        left = config.budget_tokens - beside[0]
        spans: list[Span] = []
        growing: list[Grow] = []
        sizes: list[tuple[int, int]] = []
        for row in self._partial.values():
            tokens = self._chunks.take(row.goal - row.done, row.done, left, sizes, beside)
            more = shape.pages_for(row.done + tokens) - row.held
            if not tokens:
                return spans, growing
            if more > 0 and not self._promises and more > self._room(beside[0]):
                self._stuck = True
                return spans, growing
            if more > 0:
                self._return_spare(more + self._growth(beside[0]))
                growing.append(Grow(row.key, self._ledger.bind(row.key, more, Owner.PREFILLING)))
                row.held += more
            self._add(row, tokens, spans, sizes)
            left -= tokens
        while self._line and left > 0 and len(self._running) < config.max_rows:
            row = next(iter(self._line.values()))
            assert row.request is not None
            # Prompt logprobs come with a prompt that is computed in full.
            told = row.request.sampling.prompt_logprobs is not None
            hashes = () if told else self._hashes(row.job.prefix, row.goal)
            cached = self._ledger.cached(hashes) * shape.page_tokens if hashes else 0
            tokens = self._chunks.take(row.goal - cached, cached, left, sizes, beside)
            if not tokens:
                break
            if not self._start(row, hashes, cached + tokens, beside[0], commands, now):
                self._stuck = True
                break
            tokens = min(tokens, row.goal - row.done)
            self._add(row, tokens, spans, sizes)
            left -= tokens
        return spans, growing

    def _add(self, row: Row, tokens: int, spans: list[Span], sizes: list[tuple[int, int]]) -> None:
        spans.append(Span(row.key, row.done, row.done + tokens))
        sizes.append((tokens, row.done))
        self._spans.append(row)

    def _start(
        self, row: Row, hashes: tuple[int, ...], stop: int, rows: int, commands: list[MixedCommand], now: float
    ) -> bool:
        """Give the first in line its memory and make it known to the engine, if there is enough."""
        job, request, shape, ledger = row.job, row.request, self._shape, self._ledger
        assert request is not None
        whole = shape.pages_for(stop)
        if self._config.admission == "prompt":
            whole = shape.pages_for(row.goal)
        elif self._promises:
            whole = shape.pages_for_branches(row.prompt, row.most, request.sampling.n)
        need = ledger.need(whole, hashes) if hashes else whole
        if need + (self._watermark if self._running else 0) > self._room(rows):
            return False
        self._return_spare(need + self._growth(rows))
        shared = ledger.share(row.key, hashes, Owner.PREFILLING) if hashes else 0
        bound = shape.pages_for(stop) if self._promises else whole
        if self._promises:
            ledger.promise(row.key, whole - shared, Owner.PREFILLING)
        ledger.bind(row.key, bound - shared, Owner.PREFILLING)
        del self._line[row.rank]
        self._waits.starts(row, -1)
        row.done, row.held = shared * shape.page_tokens, bound
        self._waits.owe(row, row.goal - row.done)
        self.recomputed_tokens += max(0, row.lost - row.done)
        row.lost = 0
        row.state = State.PREFILLING
        row.begun = True
        self._run(row)
        self._partial[row.rank] = row
        if job.started_at is None:
            job.started_at, job.cached_tokens = now, row.done
        pages = ledger.pages(row.key)
        commands.append(Begin(row.key, job.ticket, request, pages, row.goal - row.prompt, row.branch))
        return True

    def _join(self, row: Row) -> Join:
        """A continuation writes behind the prompt into a copy of the page that the prompt does not fill."""
        key, size = row.job.ticket.key, self._shape.page_tokens
        prompt, own = self._ledger.pages(key), self._ledger.pages(row.key)
        full = row.prompt // size
        copied = (prompt[full], own[0]) if row.prompt % size else None
        first, row.first = row.first, None
        assert row.request is not None
        assert first is not None
        return Join(row.key, row.job.ticket, row.request, first, prompt[:full] + own, copied)

    # Memory.
    def _room(self, rows: int = 0) -> int:
        """Pages for who wants some: those bound ahead count, those of the next step of `rows` decode rows do not."""
        spare = 0 if self._promises else self._batch.spare
        return self._ledger.available + spare - self._growth(rows)

    def _freed(self) -> bool:
        """Somebody lacked memory at the last decision, and somebody else in this arena has freed some."""
        return self._stuck and self._ledger.available > self._level

    def _lasts(self, steps: int) -> int:
        """Of so many steps of the decode rows those that there is memory for."""
        return steps if self._promises else self._batch.lasts(self._room(), steps)

    def _growth(self, rows: int) -> int:
        """Pages that so many decode rows, all or none, bind for their next step."""
        return self._batch.growth(1) if rows and not self._promises else 0

    def _return_spare(self, pages: int) -> None:
        """Take back what was bound ahead, if so many pages are not available without."""
        batch = self._batch
        if self._promises or not batch.spare or pages <= self._ledger.available:
            return
        for row in batch.ahead.values():
            extra = row.held - self._shape.pages_for(batch.stored(row))
            if extra:
                self._ledger.trim(row.key, extra)
                batch.shrunk(row, extra)
                row.trimmed = True
        batch.ahead.clear()

    def _suspend(self, row: Row, commands: list[MixedCommand]) -> None:
        """Take a running row's memory; it is computed again, first of all that wait."""
        job = row.job
        self.suspensions += 1
        job.suspended += 1
        if row.state is State.DECODING:
            row.lost = self._batch.stored(row)
            generated = self._batch.generated(row)
            self._leave(row)
            row.goal = row.prompt + generated
        else:
            row.lost = row.done
            full = min(row.done, row.prompt) // self._shape.page_tokens
            if job.prefix:
                self._ledger.name(row.key, job.prefix[:full])
            del self._partial[row.rank]
            self._waits.owe(row, 0)
        self._rest(row)
        self._release(row)
        self._wait(row)
        commands.append(Suspend(row.key))

    def _wait(self, row: Row) -> None:
        """Into the line by rank, which is at its head or close to it."""
        row.state, row.done, row.held, row.first, row.trimmed = State.WAITING, 0, 0, None, False
        self._waits.owe(row, row.goal)
        self._waits.starts(row, 1)
        line = self._line
        older: list[Row] = []
        while line and next(iter(line)) < row.rank:
            older.append(line.popitem(last=False)[1])
        for each in (row, *reversed(older)):
            line[each.rank] = each
            line.move_to_end(each.rank, last=False)

    def _release(self, row: Row) -> None:
        self._ledger.release(row.key)
        if row.shares:
            row.shares = False
            row.job.sharers -= 1
            if not row.job.sharers:
                self._ledger.release(row.job.ticket.key)

    # Ends.
    def _cancel(self, job: Job, now: float, commands: list[MixedCommand]) -> None:
        """Nobody wants the rest: what is not being computed ends now, the rest with the step."""
        if job.cancelled:
            return
        job.cancelled = True
        self._untils.drop(job.ticket.key)
        for row in list(job.rows.values()):
            self._stop(row, now, commands)

    def _stop(self, row: Row, now: float, commands: list[MixedCommand]) -> None:
        if row.cancelled:
            return
        row.cancelled = True
        step = self._step
        if step is not None and (row in self._spans or (step.rows and row.state is State.DECODING)):
            self._dying.append(row)
        else:
            self._end(row, now, commands)

    def _end(self, row: Row, now: float, commands: list[MixedCommand]) -> None:
        """Free a sequence, and with the last one all that is left of its request."""
        job = row.job
        self._eased = True
        if len(job.rows) == 1 and job.report:
            decodes = row.state is State.DECODING
            generated = self._batch.generated(row) if decodes else row.goal - row.prompt
            stages = self._stages(job, row, now)
            commands.append(Answer(Finished(job.ticket, "cancelled", generated, None, stages, row.branch, True)))
        self._waits.owe(row, 0)
        match row.state:
            case State.OFFERED:
                self._waits.starts(row, -1)
            case State.WAITING:
                self._waits.starts(row, -1)
                self._fresh = self._fresh or next(iter(self._line)) == row.rank
                del self._line[row.rank]
                self._fresh = self._fresh and bool(self._line)
            case State.PREFILLING:
                del self._partial[row.rank]
                self._rest(row)
                self._release(row)
            case State.DECODING:
                self._leave(row)
                self._rest(row)
                self._release(row)
        if row.begun:
            commands.append(EndSequence(row.key))
        del job.rows[row.branch]
        if not job.rows:
            self._untils.drop(job.ticket.key)
            del self._jobs[job.ticket.key]

    # Small things.
    def _run(self, row: Row) -> None:
        """It counts as running."""
        insort(self._running, row.rank)
        self._by_rank[row.rank] = row

    def _rest(self, row: Row) -> None:
        """It does not count as running any more."""
        del self._running[bisect_left(self._running, row.rank)]
        del self._by_rank[row.rank]

    def _leave(self, row: Row) -> None:
        """It is no decode row any more."""
        self._batch.leave(row)
        if row.first is not None:
            self._joining.remove(row)

    def _waits_for(self, row: Row, line: dict[int, int]) -> str:
        match row.state:
            case State.OFFERED:
                return f"its prompt from {row.job.ticket.minter.name}"
            case State.WAITING if before := line.get(row.rank, 0):
                return f"its turn: {before} are before it"
            case State.WAITING:
                pages = self._shape.pages_for(row.goal)
                return f"memory or a row: {pages} pages, {self._room()} are free; {len(self._running)} rows run"
            case State.PREFILLING if row not in self._spans:
                return f"its turn: {row.goal - row.done} tokens are left to compute"
            case _:
                return ""

    def _hashes(self, prefix: tuple[int, ...], tokens: int) -> tuple[int, ...]:
        """Of pages that may be shared: the last token is computed in any case, for what comes after it."""
        return prefix[: (tokens - 1) // self._shape.page_tokens] if prefix else ()

    def _name_all(self, row: Row, prefix: tuple[int, ...]) -> None:
        """Keep the pages of prompt and answer for whoever goes on from there, as SGLang's radix cache does.

        Continuations share the head of their tables and are not named. Hashes that do not go on from the prompt's are
        of no use: nobody who asks for them would come by here.
        """
        size, mine = self._shape.page_tokens, row.job.prefix
        named = min(len(mine), row.prompt // size)
        full = self._batch.stored(row) // size
        if not row.shares and prefix[:named] == mine[:named]:
            self._ledger.name(row.key, prefix[:full])

    def _stages(self, job: Job, row: Row | None, now: float) -> tuple[Stage, ...]:
        """Of the prompt until its gateway has heard of them, then of `row`."""
        me, request = self._me.name, job.request
        if job.handed:
            if row is None:
                return ()
            decoding = row.state is State.DECODING
            steps = self._batch.generated(row) - 1 if decoding else row.goal - row.prompt
            detail = {"steps": str(steps)}
            if job.suspended:
                detail["suspended"] = str(job.suspended)
            return (Stage("decode", me, now - job.computed_at, detail),)
        if job.started_at is None or request is None:
            return ()
        detail = {"tokens": str(len(request.prompt)), "chunks": str(job.chunks)}
        if job.cached_tokens:
            detail["cached"] = str(job.cached_tokens)
        end = job.computed_at or now
        return (
            Stage("batch_wait", me, job.started_at - job.accepted_at),
            Stage("prefill", me, end - job.started_at, detail),
        )
