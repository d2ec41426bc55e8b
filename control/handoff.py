"""The hand-off shell: commands of the source and the sink become peer messages and transfer jobs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import assert_never

from core.kv import page_runs
from core.messages import (
    CaughtUp,
    Fetch,
    Freeness,
    Grant,
    HandOff,
    OfferMigration,
    Ready,
    Refuse,
    Release,
    Reserve,
    Taken,
    ToPeer,
)
from core.request import Stage
from core.worker import Identity, Lane, Use
from runtime.driver import Driver
from scheduler.decode_events import Asked, KvArrived, MoveAsked, MoveEnded, PeerCame, PeerGone, Withdrawn
from scheduler.prefill_events import FetchOver, Granted, HandOffOver
from transfer import sink as taking
from transfer import source as giving
from transfer.thread import TransferThread
from transfer.thread_events import Digested, DigestFailed, Pulled
from transfer.transport import ReadFailed, ReadFenced

log = logging.getLogger("baton.handoff")

SOURCE, SINK, DECODE = "source", "sink", "decode"
BEGINS = {Reserve: Use.HAND_OFF, OfferMigration: Use.MOVE}
"""What a source says first, and what for."""


class HandOffShell:
    """Seats `source` and `sink` in `driver`. The seats "prefill" and "decode" exist as far as the role needs them.

    `moves`: the policy in the seat "decode" gives and takes running rows. `fetches`: that in "prefill" has pages
    fetched. `away`: whether nothing can be read from a
    peer for now, though it is there. `pulls` and `serves`: whether we may begin to read from a peer, or it from us, for
    a use; what has begun goes on whatever they say.
    """

    def __init__(
        self,
        me: Identity,
        source: giving.Source,
        sink: taking.Sink,
        driver: Driver,
        transfer: TransferThread,
        send: Callable[[Identity, ToPeer], bool],
        lane: Callable[[Identity], Lane | None],
        emulated: Callable[[], bool],
        *,
        moves: bool = False,
        fetches: bool = False,
        away: Callable[[Identity], bool] = lambda peer: False,
        pulls: Callable[[Identity, Use], bool] = lambda peer, use: True,
        serves: Callable[[Identity, Use], bool] = lambda peer, use: True,
    ) -> None:
        self.source = source
        self.sink = sink
        self._me = me
        self._driver = driver
        self._transfer = transfer
        self._send = send
        self._lane = lane
        self._emulated = emulated
        self._moves = moves
        self._fetches = fetches
        self._away = away
        self._pulls = pulls
        self._serves = serves
        self._lively = False
        self._jobs: dict[int, tuple[str, int]] = {}
        """Digests under way: ticket and first page."""
        self._next_job = 0
        self.pulled_nbytes = 0
        driver.seat(SOURCE, source, self._give)
        driver.seat(SINK, sink, self._take)

    def heard(self, peer: Identity, message: ToPeer) -> None:
        """A peer's message; one about a ticket that is not between us and it is ignored."""
        if isinstance(message, Freeness):
            if self._moves and message.worker == peer:
                self._driver.post(DECODE, message)
        elif isinstance(message, OfferMigration) and not self._moves:
            self._send(peer, Refuse(message.ticket, "rows do not move here"))
        else:
            self._heard(peer, message)

    def _heard(self, peer: Identity, message: HandOff) -> None:
        ticket = message.ticket
        ends = ticket.source, ticket.sink
        if isinstance(message, Reserve | Ready | OfferMigration | Refuse) and ends == (peer, self._me):
            use = BEGINS.get(type(message))
            if use is not None and not self._pulls(peer, use):
                self._send(peer, Refuse(ticket, self._unmapped(use, peer)))
            elif use is not None and self._away(peer):
                self._send(peer, Refuse(ticket, f"the lane from {peer.name} is away"))
            else:
                self._driver.post(SINK, message)
        elif isinstance(message, Fetch) and ends == (self._me, peer) and not self._serves(peer, Use.FETCH):
            self._send(peer, Refuse(ticket, self._unmapped(Use.FETCH, peer)))
        elif isinstance(message, Grant | Refuse | CaughtUp | Taken | Fetch) and ends == (self._me, peer):
            self._driver.post(SOURCE, message)
        elif isinstance(message, Release) and peer in ends:
            self._driver.post(SOURCE if ticket.source == self._me else SINK, message)

    def met(self, peer: Identity) -> None:
        """Rows can move to a peer, and from it: its lane and ours are up."""
        if self._moves:
            self._driver.post(DECODE, PeerCame(peer))

    def parted(self, peer: Identity) -> None:
        """Rows cannot move to a peer, nor from it, until it is met again: one of the two lanes is away."""
        if self._moves:
            self._driver.post(DECODE, PeerGone(peer))

    def lost(self, peer: Identity) -> None:
        """A peer's life is over."""
        self.parted(peer)
        self._driver.post(SOURCE, giving.SinkLost(peer))
        self._driver.post(SINK, taking.SourceLost(peer))

    def busy(self, peer: Identity) -> bool:
        """Whether a ticket between a peer and us still runs."""
        return self.source.serves(peer) or self.sink.pulls(peer)

    def _unmapped(self, use: Use, peer: Identity) -> str:
        return f"the transfer map has no {use} between {peer.name} and {self._me.name}"

    def completed(self, completion: Digested | DigestFailed | Pulled | ReadFailed | ReadFenced) -> None:
        """The transfer thread finished something; on the loop's thread."""
        match completion:
            case Digested(job_id, digests):
                self._driver.post(SOURCE, giving.Digested(*self._jobs.pop(job_id), digests))
            case DigestFailed(job_id, reason):
                key, _ = self._jobs.pop(job_id)
                log.error("digest of %s: %s", key, reason)
                self._driver.post(SOURCE, giving.Withdraw(key, f"digest: {reason}"))
            case Pulled(read_id, nbytes, seconds, digests):
                self.pulled_nbytes += nbytes
                self._driver.post(SINK, taking.Pulled(read_id, seconds, digests))
            case ReadFailed(read_id, reason, in_doubt):
                self._driver.post(SINK, taking.PullFailed(read_id, reason, in_doubt))
            case ReadFenced(read_id):
                self._driver.post(SINK, taking.Fenced((read_id,)))
            case _:
                assert_never(completion)

    def _give(self, command: giving.SourceCommand) -> None:
        match command:
            case giving.SendToSink(message):
                ticket = message.ticket
                self._progress()
                if ticket.sink == self._me:
                    self._driver.post(SINK, message)
                elif isinstance(message, Reserve) and not self._serves(ticket.sink, Use.HAND_OFF):
                    self._driver.post(SOURCE, Refuse(ticket, self._unmapped(Use.HAND_OFF, ticket.sink)))
                elif not self._send(ticket.sink, message) and isinstance(message, Reserve):
                    self._driver.post(SOURCE, Refuse(ticket, f"no lane to {ticket.sink.name}"))
            case giving.Digest(key, first_page, pages, tokens):
                self._next_job += 1
                self._jobs[self._next_job] = (key, first_page)
                self._transfer.digest(self._next_job, pages, first_page, tokens)
            case giving.SendOffer(offer):
                self._progress()
                if not self._serves(offer.ticket.sink, Use.MOVE):
                    self._driver.post(SOURCE, Refuse(offer.ticket, self._unmapped(Use.MOVE, offer.ticket.sink)))
                elif not self._send(offer.ticket.sink, offer):
                    self._driver.post(SOURCE, Refuse(offer.ticket, f"no lane to {offer.ticket.sink.name}"))
            case giving.MoveAsked(key):
                self._driver.post(DECODE, MoveAsked(key))
            case giving.MoveEnded(key, taken, sure, reason):
                self._progress()
                log.info("row of %s %s", key, "moved" if taken else f"did not move: {reason}")
                self._driver.post(DECODE, MoveEnded(key, taken, sure, reason))
            case giving.GrantCame(key):
                self._driver.post("prefill", Granted(key))
            case giving.HandOffEnded(key, taken, reason, taken_s):
                self._progress()
                self._driver.post("prefill", HandOffOver(key, taken, reason, taken_s))
            case giving.FetchEnded(key, taken, reason):
                self._progress()
                log.debug("pages for %s %s", key, "were fetched" if taken else f"were not fetched: {reason}")
            case _:
                assert_never(command)

    def _take(self, command: taking.SinkCommand) -> None:
        match command:
            case taking.SendToSource(message):
                ticket = message.ticket
                if ticket.source == self._me:
                    self._driver.post(SOURCE, message)
                elif isinstance(message, Fetch) and not self._pulls(ticket.source, Use.FETCH):
                    self._driver.post(SINK, Refuse(ticket, self._unmapped(Use.FETCH, ticket.source)))
                elif not self._send(ticket.source, message) and isinstance(message, Fetch):
                    self._driver.post(SINK, Refuse(ticket, f"no lane to {ticket.source.name}"))
            case taking.AskForMore(message):
                self._send(message.ticket.source, message)
            case taking.AskPolicy(ticket, request, offer):
                self._driver.post(DECODE, Asked(ticket, request, offer))
            case taking.Read(read_id, source, runs, pages, first_page, tokens, size):
                self._transfer.pull(read_id, str(source), runs, page_runs(pages), first_page, tokens, size)
            case taking.Fence(read_ids):
                self._transfer.fence(read_ids)
            case taking.Arrived(ticket, request, firsts, pull, carried):
                stages = self._stages(ticket.source, pull, moved=carried is not None)
                self._driver.post(DECODE, KvArrived(ticket, request, firsts, stages, carried))
            case taking.Gone(ticket, reason, recompute):
                self._driver.post(DECODE, Withdrawn(ticket, reason, recompute))
            case taking.Fetched(ticket, pages, reason, pull):
                log.debug("fetch %s: %d pages are here%s", ticket.key, pages, reason and f": {reason}")
                if self._fetches:
                    detail = {"from": ticket.source.name, "failed": reason}
                    if pull is not None:
                        detail = self._pulled(ticket.source, pull)
                    self._driver.post("prefill", FetchOver(ticket.key, pull.nbytes if pull else 0, detail))
            case _:
                assert_never(command)

    def _progress(self) -> None:
        """An emulated lane moves only while its source polls: do that often as long as somebody may be reading."""
        lively = len(self.source) > 0 and self._emulated()
        if lively != self._lively:
            self._lively = lively
            self._transfer.lively(lively)

    def _stages(self, source: Identity, pull: taking.Pull, *, moved: bool) -> tuple[Stage, ...]:
        """What it took to come here. A row that moves is copied while it runs: only its pause is time of its own."""
        detail, me = self._pulled(source, pull), self._me.name
        if moved:
            copied = {"copy_s": f"{pull.total_s:.6f}", "pause_s": f"{pull.paused_s:.6f}"}
            return (Stage("move", me, pull.paused_s, {**detail, **copied}),)
        detail["cached"] = str(pull.cached_tokens)
        return (Stage("reserve_wait", me, pull.granted_s), Stage("pull", me, pull.total_s, detail))

    def _pulled(self, source: Identity, pull: taking.Pull) -> dict[str, str]:
        """What came from where, and how fast."""
        lane = self._lane(source)
        return {
            "from": source.name,
            "nbytes": str(pull.nbytes),
            "runs": str(pull.runs),
            "gbytes_per_s": f"{pull.nbytes / pull.read_s / 1e9:.3g}" if pull.read_s else "",
            "transport": lane.transport if lane else "own memory",
            "read_s": f"{pull.read_s:.6f}",
        }
