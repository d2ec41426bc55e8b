"""How long a worker that is to end waits for others to take what runs there. Pure.

It waits as long as it has something and somebody may take it, and not for longer than its launcher's patience allows:
what is left then is placed again by its gateways, from the tokens so far. Whether it has, its decode policy says when
it is asked (`MigratingPolicy.giving`): that changes with every step and every word of a peer, and is asked for now and
then.

| parameter | unit | default | meaning |
|---|---|---|---|
| patience_s | s | 5.0 | the longest wait; the launcher waits a little longer before it kills |
| look_s | s | 0.02 | between two looks |
"""

from __future__ import annotations

from dataclasses import dataclass

from core.errors import LocalError


@dataclass(frozen=True, slots=True)
class DrainConfig:
    """Settings; see the module's table."""

    patience_s: float = 5.0
    look_s: float = 0.02

    def __post_init__(self) -> None:
        if not (self.patience_s >= 0 and self.look_s > 0):
            raise LocalError(f"drain: got {self}, want patience_s from 0 on and look_s above 0")


@dataclass(frozen=True, slots=True)
class Begun:
    """The worker is to end, and takes nothing more."""


@dataclass(frozen=True, slots=True)
class Looked:
    """Whether there is something left that somebody may take: the answer to `Look`."""

    giving: bool


@dataclass(frozen=True, slots=True)
class Look:
    """Ask the decode policy; ends in `Looked`."""


@dataclass(frozen=True, slots=True)
class Drained:
    """The worker may end."""


DrainEvent = Begun | Looked
DrainCommand = Look | Drained


class Drain:
    """One wait. `Begun` ends in exactly one `Drained`."""

    def __init__(self, config: DrainConfig = DrainConfig()) -> None:
        self._config = config
        self._until: float | None = None
        """When patience ends; None before and after the wait."""
        self._due: float | None = None
        """The next look; None while one is under way."""
        self._begun = False

    def on(self, event: DrainEvent | None, now: float) -> list[DrainCommand]:
        match event:
            case None:
                if self._due is None or now < self._due:
                    return []
                self._due = None
                return [Look()]
            case Begun():
                if self._begun:
                    raise LocalError("drain: begun twice")
                self._begun, self._until = True, now + self._config.patience_s
                return [Look()]
            case Looked(giving):
                if self._until is None or self._due is not None:
                    raise LocalError("drain: nobody has asked")
                if giving and now < self._until:
                    self._due = min(now + self._config.look_s, self._until)
                    return []
                self._until = None
                return [Drained()]

    def deadline(self) -> float | None:
        return self._due

    def check(self) -> None:
        assert self._begun or self._until is None
        assert self._due is None or (self._until is not None and self._due <= self._until)
