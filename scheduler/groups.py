"""A gateway's groups: each has a router of its own, over its own workers, and a request goes to the one it names. Pure.

After P/D-Serve (fine-grained organisation): what upstream knows of a request, its scenario, chooses the workers that
may have it; within them it is placed as ever. Routers share nothing, so no decision costs more for other groups' load,
and no request leaves its group: it waits for, or is refused by, the workers that are its own.

A group is there from the start if it was declared, or from its first worker on, and stays when its workers go. Where
there is only the one without a name, requests may name any: then it is a label, by which lengths may be forecast.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

from core.errors import LocalError
from core.messages import Moved, SlotFree
from core.request import Phase
from core.standing import Standing
from core.worker import Identity, ProcessEnded
from scheduler.placement import MostTokens
from scheduler.router import Router, Trace
from scheduler.router_events import (
    Arrived,
    ClientGone,
    Divided,
    End,
    RouterCommand,
    RouterEvent,
    Satisfied,
    WorkerDown,
    WorkerQuiet,
    WorkerUp,
)


class Groups:
    """The routers of one gateway. `pattern`: what each of them is to be like, without workers and requests."""

    def __init__(self, pattern: Router, declared: Iterable[str] = ("",)) -> None:
        self._pattern = pattern
        self._routers: dict[str, Router] = {}
        self._of: dict[int, Router] = {}
        """Of each live request."""
        self._at: dict[Identity, str] = {}
        """The group of each worker whose session stands."""
        self._unknown = 0
        for group in declared:
            self._router(group)

    def __len__(self) -> int:
        return len(self._of)

    @property
    def name(self) -> str:
        """Of the gateway, as it stands in stages."""
        return self._pattern.name

    @property
    def names(self) -> tuple[str, ...]:
        """All groups, in order."""
        return tuple(sorted(self._routers))

    @property
    def ignored(self) -> int:
        """Messages about old attempts, ended requests, or workers that nobody knows."""
        return self._unknown + sum(router.ignored for router in self._routers.values())

    def unknown(self, group: str) -> str | None:
        """Why a request cannot be of that group, naming those that there are; None if it can."""
        if self._chosen(group) is not None:
            return None
        return f"hints.group: got {group!r}, want one of {', '.join(map(repr, self.names))}"

    def on(self, event: RouterEvent | None, now: float) -> list[RouterCommand]:
        match event:
            case None:
                commands: list[RouterCommand] = []
                for router in self._routers.values():
                    due = router.deadline()
                    if due is not None and due <= now:
                        commands += router.on(None, now)
                return self._over(commands)
            case Arrived(counter, request):
                if counter in self._of:
                    raise LocalError(f"request {counter} arrived twice")
                chosen = self._chosen(request.hints.group)
                if chosen is None:
                    why = self.unknown(request.hints.group)
                    assert why is not None
                    return [End(counter, Phase.REJECTED, why, "NOT_FOUND")]
                self._of[counter] = chosen
                return self._over(chosen.on(event, now))
            case ClientGone(counter) | Satisfied(counter):
                found = self._of.get(counter)
                return self._over(found.on(event, now)) if found is not None else []
            case WorkerUp(member):
                before = self._at.get(member.identity)
                self._at[member.identity] = member.group
                gone: list[RouterCommand] = []
                if before is not None and before != member.group:
                    gone = self._routers[before].on(WorkerDown(member.identity), now)
                return self._over([*gone, *self._router(member.group).on(event, now)])
            case WorkerDown(identity):
                group = self._at.pop(identity, None)
                return self._over(self._routers[group].on(event, now)) if group is not None else self._ignore()
            case WorkerQuiet(identity):
                return self._of_worker(event, identity, now)
            case ProcessEnded():
                # It may be known no more, or not yet: whose it was knows what to do with the word.
                return self._over([each for router in self._routers.values() for each in router.on(event, now)])
            case Divided():
                return self._over([each for router in self._routers.values() for each in router.on(event, now)])
            case SlotFree(identity):
                return self._of_worker(event, identity, now)
            case Moved(ticket):
                # Of a request that is over, too: the worker that goes on with it is told so.
                router_ = self._of.get(ticket.counter)
                return self._over(router_.on(event, now)) if router_ else self._of_worker(event, ticket.sink, now)
            case _:
                mine = self._of.get(event.ticket.counter)
                return self._over(mine.on(event, now)) if mine is not None else self._ignore()

    def deadline(self) -> float | None:
        dues = [due for router in self._routers.values() if (due := router.deadline()) is not None]
        return min(dues) if dues else None

    def check(self) -> None:
        for name, router in self._routers.items():
            router.check()
            assert len(router) == sum(each is router for each in self._of.values())
            for identity, group in self._at.items():
                assert router.knows(identity) == (group == name)
        assert all(any(router is each for each in self._routers.values()) for router in self._of.values())
        assert not len(self._pattern)

    # What others ask.
    def missing(self) -> str | None:
        """What the deployment lacks to serve anything, None if some group can serve."""
        found = {name: router.missing() for name, router in self._routers.items()}
        if any(why is None for why in found.values()):
            return None
        if len(found) == 1:
            return next(iter(found.values()))
        return "; ".join(f"group {name!r}: {found[name]}" for name in self.names)

    def served_by(self, group: str) -> str:
        """The group whose workers serve requests that name this one."""
        return "" if len(self._routers) == 1 and "" in self._routers else group

    def page_tokens(self, group: str) -> int:
        """Tokens of a page whose hash its workers know it by; 0 while nobody is there."""
        router = self._chosen(group)
        return router.page_tokens if router is not None else 0

    def most_tokens(self, group: str) -> MostTokens:
        """What its workers have room for, or had as long as they were there."""
        router = self._chosen(group)
        return (self._pattern if router is None else router).most_tokens()

    def phases(self, group: str) -> dict[Phase, int]:
        """Its live placements in each phase."""
        router = self._chosen(group)
        return (self._pattern if router is None else router).phases()

    def standing(self) -> list[Standing]:
        """Of every flight, with who has it now."""
        return [each for router in self._routers.values() for each in router.standing()]

    def trace(self, counter: int) -> Trace | None:
        """A live request so far; None if it is not."""
        router = self._of.get(counter)
        return router.trace(counter) if router is not None else None

    def _chosen(self, group: str) -> Router | None:
        """The router of that group; where there are no groups, any name is a label and no more."""
        return self._routers.get(self.served_by(group))

    def _router(self, group: str) -> Router:
        router = self._routers.get(group)
        if router is None:
            router = self._routers[group] = copy.deepcopy(self._pattern)
        return router

    def _of_worker(self, event: SlotFree | Moved | WorkerQuiet, identity: Identity, now: float) -> list[RouterCommand]:
        group = self._at.get(identity)
        return self._over(self._routers[group].on(event, now)) if group is not None else self._ignore()

    def _over(self, commands: list[RouterCommand]) -> list[RouterCommand]:
        """Requests that have ended are nobody's."""
        for command in commands:
            if type(command) is End:
                self._of.pop(command.counter, None)
        return commands

    def _ignore(self) -> list[RouterCommand]:
        self._unknown += 1
        return []
