"""A colocated worker around the mixed policy: a shell, and an engine whose tokens show what its pages really hold.

A slot of a page holds a number made of all tokens up to its own, and the next token is made of that of the last one:
a page that is missing, stale, shared by mistake or written twice gives a wrong token, or fails where it is read.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from core.messages import First
from core.request import Request, Ticket
from core.sampling import Sampling
from scheduler.decode_events import Ended
from scheduler.mixed_events import Begin, Cut, MixedCommand, Step, StepFailed, Stepped, Suspend, continuation
from scheduler.prefill_events import Began, EndSequence
from tests.cast import SHAPE

SIZE = SHAPE.page_tokens
STOP = 2


def mix(seed: int, token: int) -> int:
    """Another number for any other pair."""
    return (seed * 6364136223846793005 + token * 1442695040888963407 + 1013904223) % 2**61


def chain(tokens: tuple[int, ...] | list[int]) -> int:
    """What the slot of the last token holds."""
    number = 7
    for token in tokens:
        number = mix(number, token)
    return number


def prefix_of(prompt: tuple[int, ...]) -> tuple[int, ...]:
    """Hashes of the prompt's full pages."""
    return tuple(chain(prompt[:stop]) for stop in range(SIZE, len(prompt) + 1, SIZE))


def chosen(number: int, sampling: Sampling) -> int:
    """The token that follows."""
    return 100 + mix(number, sampling.seed) % 900


def text(request: Request, branch: int, count: int) -> list[int]:
    """The first tokens of a continuation, computed without any pages."""
    tokens, sampling = list(request.prompt), request.sampling.branch(branch)
    for _ in range(count):
        tokens.append(chosen(chain(tokens), sampling))
    return tokens[len(request.prompt) :]


@dataclass
class Sequence:
    """What the engine and the shell know of one."""

    ticket: Ticket
    request: Request
    branch: int
    tokens: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    open: bool = False
    row: bool = False
    """It decodes."""
    computed: int = 0

    @property
    def made(self) -> int:
        return len(self.tokens) - len(self.request.prompt)


class Worker:
    """Performs commands; `step` computes one step of the order that is out."""

    def __init__(self, pages: int) -> None:
        self.slots: list[list[int]] = [[-1] * SIZE for _ in range(pages)]
        self.sequences: dict[str, Sequence] = {}
        self.said: dict[tuple[str, int], list[int]] = {}
        """Tokens sent to the gateway, by ticket and continuation."""
        self.order: Step | None = None
        self.done = 0
        self.cut = False
        self.ordered = 0
        self.computed_tokens = 0
        self.stops: dict[str, int] = {}
        """Tokens after which a ticket's continuations say their stop token."""

    def perform(self, command: MixedCommand) -> None:
        match command:
            case Begin(key, ticket, request, pages, made, branch):
                assert self.order is None
                known = self.sequences.setdefault(key, Sequence(ticket, request, branch, list(request.prompt)))
                assert not known.open
                assert known.made == made, "tokens were lost"
                known.open, known.request, known.pages, known.computed = True, request, list(pages), 0
            case Step(step_id, spans, joining, growing, rows, steps):
                assert self.order is None
                assert step_id == self.ordered + 1
                assert steps == 1 or (steps > 1 and not spans)
                for grow in growing:
                    known = self.sequences[grow.key]
                    first = len(known.pages) if grow.first is None else grow.first
                    known.pages[first:] = grow.pages
                for join in joining:
                    known = self.sequences[join.key]
                    assert known.tokens == [*join.request.prompt, join.first.token]
                    if join.copied is not None:
                        self.slots[join.copied[1]] = list(self.slots[join.copied[0]])
                    known.open, known.row, known.request = True, True, join.request
                    known.pages, known.computed = list(join.pages), len(join.request.prompt)
                decoding = sum(known.row for known in self.sequences.values())
                assert rows in (0, decoding)
                assert spans or rows
                self.order, self.ordered, self.done, self.cut = command, step_id, 0, False
            case Cut(step_id):
                assert self.order is not None
                assert (self.order.step_id, self.order.spans, self.cut) == (step_id, (), False)
                self.cut = True
            case Suspend(key):
                assert self.order is None
                known = self.sequences[key]
                known.open = known.row = False
                known.pages = []
            case EndSequence(key):
                assert self.order is None or not self._computes(key), "a sequence was freed that is being computed"
                del self.sequences[key]
            case _:
                raise AssertionError(f"nothing that a shell does: {command}")

    def step(self) -> Stepped | None:
        """One step; the event if the order ended with it."""
        order = self.order
        assert order is not None
        self.done += 1
        begun = [began for span in order.spans for began in self._span(span.key, span.start, span.stop)]
        ended = []
        if order.rows:
            for key, known in list(self.sequences.items()):
                if known.row and not any(each.key == key for each in begun):
                    token = self._compute(key, len(known.tokens) - 1, len(known.tokens))
                    finish = self._take(known, token)
                    if finish is not None:
                        known.row = False
                        stop = token if finish == "stop" else None
                        names = prefix_of(tuple(known.tokens[: known.computed]))
                        ended.append(Ended(key, finish, known.made, stop, names))
        if not (ended or self.cut or self.done == order.steps):
            return None
        self.order = None
        return Stepped(order.step_id, self.done, tuple(begun), tuple(ended))

    def fail(self) -> StepFailed:
        """The order ended in an exception."""
        assert self.order is not None
        order, self.order = self.order, None
        return StepFailed(order.step_id, "boom")

    def _computes(self, key: str) -> bool:
        order = self.order
        assert order is not None
        known = self.sequences[key]
        return any(span.key == key for span in order.spans) or bool(order.rows and known.row)

    def _span(self, key: str, start: int, stop: int) -> list[Began]:
        known = self.sequences[key]
        assert known.open
        assert not known.row
        assert start == known.computed or known.computed == 0, "a hole in the prompt"
        self.computed_tokens += stop - start
        token = self._compute(key, start, stop)
        if stop < len(known.tokens):
            return []
        if known.request.sampling.n == 1:
            finish = self._take(known, token)
            known.row = finish is None
            return [Began(key, First(token), finish)]
        begun = []
        for branch in range(known.request.sampling.n):
            sampling = known.request.sampling.branch(branch)
            token = chosen(chain(known.tokens), sampling)
            part = Sequence(known.ticket, known.request, branch, list(known.tokens))
            finish = self._take(part, token)
            if finish is None:
                self.sequences[continuation(key, branch)] = part
            begun.append(Began(key, First(token, branch=branch), finish))
        return begun

    def _compute(self, key: str, start: int, stop: int) -> int:
        """Read all slots before `start`, write those up to `stop`, and choose the next token."""
        known = self.sequences[key]
        assert stop <= len(known.pages) * SIZE, "a step without a page"
        number = 7
        for place, token in enumerate(known.tokens[:stop]):
            number = mix(number, token)
            page, slot = known.pages[place // SIZE], place % SIZE
            if place < start:
                assert self.slots[page][slot] == number, f"{key} reads what is not its own at {place}"
            else:
                self.slots[page][slot] = number
        known.computed = stop
        return chosen(number, known.request.sampling)

    def _take(self, known: Sequence, token: int) -> str | None:
        """A new token goes to its client, unless it is a stop token."""
        if known.made == self.stops.get(known.ticket.key, 10**9):
            return "stop"
        known.tokens.append(token)
        self.said.setdefault((known.ticket.key, known.branch), []).append(token)
        return "length" if known.made == known.request.sampling.max_tokens else None
