"""Hand-offs and moves of rows to which something happens at a named point: rules, and what becomes of the request.

Each is played twice: by all machines together on a made clock and network (tests/scheduler/test_stories.py), and by
the workers' own unmodified processes between a transport and peers that obey the same rules (tests/live). There are
two prefill and two decode workers; of idle workers the first by name is taken. A prompt has four chunks of two pages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tests.transfer.faults import Rule

SOURCE, SINK, OTHER_SINK = "prefill-0", "decode-0", "decode-1"
PAGES = 8
"""Of a prompt; the last one is not full."""
SLOW = Rule("read", "delay", times=100, seconds=0.1)


@dataclass(frozen=True)
class Story:
    """What is done to whom, and how the request ends: with its exact tokens, unless `code` says otherwise."""

    name: str
    rules: Mapping[str, tuple[Rule, ...]]
    """By worker."""
    pages: int = PAGES
    attempts: tuple[int, int] = (1, 3)
    """At least and at most."""
    mismatches: int = 0
    """Pages that are found wrong, at least."""
    code: str = "OK"
    timeout_s: float = 60.0
    dies: str = ""
    """Who is killed."""
    every: bool = True
    """Each rule acts at least once."""

    def __str__(self) -> str:
        return self.name


def both(*rules: Rule) -> dict[str, tuple[Rule, ...]]:
    """The same for both sinks."""
    return {SINK: rules, OTHER_SINK: rules}


def killed(name: str, victim: str, kill: Rule, own: tuple[Rule, ...] = (), **others: tuple[Rule, ...]) -> Story:
    """A worker that dies; its own other rules, and those of both sinks."""
    rules = {victim: (kill, *own)} | (both(*others["sinks"]) if others else {})
    return Story(name, rules, dies=victim, every=False)


def at(event: str, nth: int = 1, after_s: float = 0.0) -> Rule:
    """Killed at that event, or so long after it."""
    return Rule(event, "kill", nth, seconds=after_s)


FAULTS = (
    Story("a flipped bit is read once more", {SINK: (Rule("read", "flip"),)}, attempts=(1, 1), mismatches=1),
    Story("a page that is wrong twice is computed anew", both(Rule("read", "flip", times=2)), pages=1,
          attempts=(2, 3), mismatches=2, every=False),
    Story("a first read that fails costs an attempt", {SINK: (Rule("read", "fail"),)}, attempts=(2, 2)),
    Story("a later read that fails costs an attempt", {SINK: (Rule("read", "fail", nth=2),)}, attempts=(2, 2)),
    Story("a read in doubt costs an attempt", {SINK: (Rule("read", "doubt", seconds=0.3),)}, attempts=(2, 2)),
    Story("what is late arrives", both(Rule("read", "delay", times=100, seconds=0.1)), attempts=(1, 1), every=False),
    Story("what is slow arrives", both(Rule("read", "stall", times=100, seconds=0.1)), attempts=(1, 1), every=False),
    Story("a late Reserve", {SINK: (Rule("hear Reserve", "delay", seconds=0.3),)}, attempts=(1, 1)),
    Story("a late Grant", {SINK: (Rule("send Grant", "delay", seconds=0.3),)}, attempts=(1, 1)),
    Story("a late Taken", {SINK: (Rule("send Taken", "delay", seconds=0.5),)}, attempts=(1, 1)),
    Story("Reserve comes twice", {SINK: (Rule("hear Reserve", "twice"),)}, attempts=(1, 1)),
    Story("Grant comes twice", {SOURCE: (Rule("hear Grant", "twice"),)}, attempts=(1, 1)),
    Story("Taken comes twice", {SOURCE: (Rule("hear Taken", "twice"),)}, attempts=(1, 1)),
    Story("an announcement comes twice", {SINK: (Rule("hear Ready", "twice"),)}),
    Story("an announcement is overtaken", {SINK: (Rule("hear Ready", "delay", seconds=0.3),)}),
    Story("an announcement is lost", {SINK: (Rule("hear Ready", "drop"),)}),
)  # fmt: skip
"""What a transport or a stream may do, and what it never should."""

SOURCES = (
    killed("before Reserve", SOURCE, at("send Reserve")),
    killed(
        "after Reserve, before anybody answers",
        SOURCE,
        at("sent Reserve", after_s=0.01),
        sinks=(Rule("hear Reserve", "delay", seconds=0.2),),
    ),
    killed("at Grant", SOURCE, at("hear Grant")),
    killed("before the first Ready", SOURCE, at("send Ready")),
    killed("during the first read", SOURCE, at("sent Ready", after_s=0.03), sinks=(SLOW,)),
    killed("before the third Ready", SOURCE, at("send Ready", 3)),
    killed("before the last Ready", SOURCE, at("send last Ready")),
    killed("during the last read", SOURCE, at("sent last Ready", after_s=0.03), sinks=(SLOW,)),
    killed("before it knows of Taken", SOURCE, at("hear Taken")),
    killed("after Taken", SOURCE, at("heard Taken")),
)
SINKS = (
    killed("before it knows of Reserve", SINK, at("hear Reserve")),
    killed("before Grant", SINK, at("send Grant")),
    killed("after Grant", SINK, at("sent Grant", after_s=0.005)),
    killed("at the first Ready", SINK, at("hear Ready")),
    killed("when the first read is posted", SINK, at("read")),
    killed("during the second read", SINK, at("read", 2, 0.03), (SLOW,)),
    killed("when the third read has come, before its digests", SINK, at("done", 3)),
    killed("at the last Ready", SINK, at("hear last Ready")),
    killed("before Taken", SINK, at("send Taken")),
    killed("after Taken", SINK, at("sent Taken", after_s=0.01)),
)
"""Source and sink of a hand-off, killed at ten points each."""

GIVERS = (
    killed("before the offer", SINK, at("send OfferMigration")),
    killed("after the offer", SINK, at("sent OfferMigration", after_s=0.005)),
    killed("at Grant", SINK, at("hear Grant")),
    killed("at CaughtUp", SINK, at("hear CaughtUp")),
    killed("before the row's last Ready", SINK, at("send last Ready")),
    killed("after the row's last Ready", SINK, at("sent last Ready", after_s=0.005)),
    killed("before it knows of Taken", SINK, at("hear Taken")),
    killed("after Taken", SINK, at("heard Taken")),
)
TAKERS = (
    killed("before it knows of the offer", OTHER_SINK, at("hear OfferMigration")),
    killed("before Grant", OTHER_SINK, at("send Grant")),
    killed("when the first read is posted", OTHER_SINK, at("read")),
    killed("before CaughtUp", OTHER_SINK, at("send CaughtUp")),
    killed("after CaughtUp", OTHER_SINK, at("sent CaughtUp", after_s=0.005)),
    killed("at the row's last Ready", OTHER_SINK, at("hear last Ready")),
    killed("before Taken", OTHER_SINK, at("send Taken")),
    killed("after Taken", OTHER_SINK, at("sent Taken", after_s=0.005)),
)
"""The two ends of a row's first move, from `SINK` to `OTHER_SINK`, killed at eight points each."""
