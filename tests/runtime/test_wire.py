"""The wire form: everything that our processes say comes back equal, and anything else is a remote error."""

from __future__ import annotations

import typing
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from core import messages as m
from core.constraint import Constraint, Language
from core.errors import RemoteError
from core.kv import ITEM_NBYTES, KvShape, PageRun
from core.request import Hints, Request, Slo, Stage, Ticket
from core.sampling import MAX_LOGPROBS, MAX_N, MAX_PENALTY, MAX_SEED, Logprobs, Sampling
from core.worker import (
    PROTOCOL_VERSION,
    Costs,
    Greeting,
    Identity,
    Lane,
    Member,
    Numerics,
    Part,
    ProcessEnded,
    Role,
    Use,
    Way,
)
from protos.baton.v1 import common_pb2, registry_pb2, worker_pb2
from protos.baton.v1.worker_pb2 import Frame
from runtime import wire
from tests.cast import D1, QUICK, ask, ticket

text = st.text(max_size=8)
counts = st.integers(0, 2**31 - 1)
seconds = st.floats(0, 1e9)
tokens = st.lists(counts, max_size=6).map(tuple)
words = st.integers(0, 2**64 - 1)
identities = st.builds(Identity, st.text(min_size=1, max_size=8), st.integers(0, 2**48 - 1))
shapes = st.builds(KvShape, *[st.integers(1, 999)] * 4, st.sampled_from(sorted(ITEM_NBYTES)))
tickets = st.builds(Ticket, identities, words, counts, identities, identities)
hints = st.builds(Hints, st.integers(-9, 9), text, text, text, counts, text)
penalties = st.floats(-MAX_PENALTY, MAX_PENALTY)
asked = st.none() | st.integers(0, MAX_LOGPROBS)
constraints = st.none() | st.builds(Constraint, st.sampled_from(Language), text)
plain = st.builds(
    Sampling,
    st.integers(50, 2**31 - 1),
    st.floats(0, 1e6),
    counts,
    st.floats(0, 1, exclude_min=True),
    st.integers(0, MAX_SEED),
    tokens,
    st.booleans(),
    st.integers(1, MAX_N),
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0, 1e300, exclude_min=True),
    presence_penalty=penalties,
    frequency_penalty=penalties,
    logit_bias=st.dictionaries(counts, st.floats(-100, 100), max_size=4).map(lambda bias: tuple(sorted(bias.items()))),
    min_tokens=st.integers(0, 50),
    logprobs=asked,
    prompt_logprobs=asked,
)


def constrained(sampling: Sampling, constraint: Constraint | None) -> Sampling:
    possible = sampling.stop_token_ids and not sampling.ignore_eos
    return replace(sampling, constraint=constraint) if possible else sampling


samplings = st.builds(constrained, plain, constraints)
logs = st.floats(max_value=0, allow_nan=False)
known = st.builds(Logprobs, counts, logs, tokens, st.lists(logs, max_size=4).map(tuple))
slos = st.builds(Slo, seconds, seconds, seconds, st.booleans())
requests = st.builds(
    Request,
    text,
    st.lists(counts, min_size=1, max_size=9).map(tuple),
    samplings,
    seconds,
    slos,
    hints,
    counts,
    st.lists(words, max_size=3).map(tuple),
    counts,
    st.booleans(),
)
stages = st.lists(st.builds(Stage, text, text, seconds, st.dictionaries(text, text, max_size=2)), max_size=3).map(tuple)
runs = st.lists(st.builds(PageRun, counts, st.integers(1, 99)), max_size=3).map(tuple)
lanes = st.builds(Lane, identities, text, seconds, seconds)
numerics = st.builds(Numerics, st.booleans(), text, counts, text)
coefficients = st.floats(0, 1e9)
costs = st.builds(
    Costs,
    st.lists(st.tuples(*[coefficients] * 4), min_size=1, max_size=3).map(tuple),
    st.lists(st.tuples(*[coefficients] * 3), min_size=1, max_size=3).map(tuple),
)
members = st.builds(
    Member,
    identities,
    st.sampled_from(Role),
    address=text,
    metrics_address=text,
    build=text,
    protocol=st.just(PROTOCOL_VERSION),
    model=text,
    fingerprint=text,
    kv=st.none() | shapes,
    pages=counts,
    context=counts,
    numerics=st.none() | numerics,
    transport=text,
    ready=st.booleans(),
    migrates=st.booleans(),
    fetches=st.booleans(),
    lanes=st.lists(lanes, max_size=2).map(tuple),
    costs=st.none() | costs,
    grammar=text,
)

firsts = st.lists(st.builds(m.First, counts, words, counts, st.none() | known), max_size=3).map(tuple)
carried = st.builds(
    m.Carried, tokens, stages, st.lists(words, max_size=3).map(tuple), st.lists(known, max_size=3).map(tuple), seconds
)
MESSAGES: dict[type, st.SearchStrategy] = {
    m.Offer: st.builds(
        m.Offer, tickets, counts, counts, seconds, hints, st.lists(words, max_size=3).map(tuple), counts, st.booleans()
    ),
    m.SlotFree: st.builds(m.SlotFree, identities, counts),
    m.Prompt: st.builds(
        m.Prompt,
        tickets,
        requests,
        st.none() | identities,
        st.lists(st.builds(m.Holding, identities, counts), max_size=2).map(tuple),
    ),
    m.Cancel: st.builds(
        m.Cancel, tickets, text, st.booleans(), st.none() | counts, st.lists(words, max_size=3).map(tuple)
    ),
    m.Accept: st.builds(m.Accept, tickets, counts, seconds),
    m.Reject: st.builds(m.Reject, tickets, text, seconds, seconds),
    m.Tokens: st.builds(
        m.Tokens,
        tickets,
        counts,
        tokens,
        st.lists(words, max_size=6).map(tuple),
        counts,
        st.lists(known, max_size=3).map(tuple),
        st.lists(st.none() | known, max_size=3).map(tuple),
    ),
    m.Handed: st.builds(m.Handed, tickets, stages, st.booleans(), counts),
    m.Finished: st.builds(m.Finished, tickets, text, counts, st.none() | counts, stages, counts, st.booleans(), counts),
    m.Failed: st.builds(m.Failed, tickets, text, text, stages),
    m.Reserve: st.builds(m.Reserve, tickets, requests, counts),
    m.Grant: st.builds(m.Grant, tickets, counts, counts),
    m.Refuse: st.builds(m.Refuse, tickets, text),
    m.Ready: st.builds(
        m.Ready, tickets, counts, runs, st.lists(words, max_size=3).map(tuple), firsts, st.none() | carried
    ),
    m.Taken: st.builds(m.Taken, tickets),
    m.Release: st.builds(m.Release, tickets, text),
    m.OfferMigration: st.builds(m.OfferMigration, tickets, requests, tickets, *[counts] * 4),
    m.CaughtUp: st.builds(m.CaughtUp, tickets),
    m.Fetch: st.builds(m.Fetch, tickets, st.lists(words, max_size=6).map(tuple), counts, seconds, counts),
    m.Moved: st.builds(m.Moved, tickets, counts),
    m.Freeness: st.builds(m.Freeness, identities, st.floats(allow_nan=False)),
    m.Readiness: st.builds(m.Readiness, identities, st.booleans()),
}
any_message = st.one_of(*MESSAGES.values())


def over(frame: Frame) -> Frame:
    """A frame after its way over the wire."""
    return Frame.FromString(frame.SerializeToString())


def heard(reader: wire.Reader, frames: list[Frame]) -> list[m.Message]:
    return [message for frame in frames if (message := reader.message(over(frame))) is not None]


def test_every_message_has_its_strategy_here():
    assert MESSAGES.keys() == set(typing.get_args(m.Message))


@pytest.mark.parametrize("kind", typing.get_args(m.Message), ids=lambda kind: kind.__name__)
@QUICK
@given(st.data())
def test_a_message_comes_back_equal(kind, data):
    message = data.draw(MESSAGES[kind])
    assert heard(wire.Reader(), wire.frames(message)) == [message]


@QUICK
@given(st.lists(any_message, max_size=5))
def test_a_streams_messages_come_back_in_order(messages):
    reader = wire.Reader()
    assert heard(reader, [frame for message in messages for frame in wire.frames(message)]) == messages


@QUICK
@given(st.data())
def test_prompts_travel_in_pieces_between_other_frames(data):
    size = data.draw(st.integers(1, 4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wire, "PIECE_TOKENS", size)
        prompts = data.draw(
            st.lists(MESSAGES[m.Prompt], min_size=1, max_size=3, unique_by=lambda prompt: prompt.ticket.key)
        )
        queues = [wire.frames(prompt) for prompt in prompts]
        for prompt, queue in zip(prompts, queues, strict=True):
            assert len(queue) == -(-len(prompt.request.prompt) // size)
        others = data.draw(st.lists(any_message.filter(lambda message: not isinstance(message, m.Prompt)), max_size=3))
        keys = {prompt.ticket.key for prompt in prompts}
        assume(not any(isinstance(each, m.Cancel) and each.ticket.key in keys for each in others))
        queues += [wire.frames(other) for other in others]
        reader, got = wire.Reader(), []
        while any(queues):
            queue = data.draw(st.sampled_from([queue for queue in queues if queue]))
            got += heard(reader, [queue.pop(0)])
        assert len(got) == len(prompts) + len(others)
        assert all(message in got for message in (*prompts, *others))


def test_a_long_prompt_is_cut_so_that_tokens_need_not_wait():
    prompt = m.Prompt(ticket(), ask(2 * wire.PIECE_TOKENS + 1), D1)
    frames = wire.frames(prompt)
    assert [len(frame.prompt.tokens) for frame in frames] == [wire.PIECE_TOKENS, wire.PIECE_TOKENS, 1]
    reader = wire.Reader()
    assert reader.message(frames[0]) is None
    assert reader.message(wire.frames(m.Cancel(ticket(2), "x"))[0]) == m.Cancel(ticket(2), "x")
    assert heard(reader, frames[1:]) == [prompt]


def test_a_cancel_drops_the_pieces_of_its_prompt():
    reader = wire.Reader()
    frames = wire.frames(m.Prompt(ticket(), ask(2 * wire.PIECE_TOKENS)))
    reader.message(frames[0])
    reader.message(wire.frames(m.Cancel(ticket(), "x"))[0])
    whole = m.Prompt(ticket(), ask(3))
    assert heard(reader, wire.frames(whole)) == [whole]


@QUICK
@given(members, st.binary(max_size=20), counts)
def test_a_greeting_comes_back_without_what_the_registry_tells(member, metadata, scratch):
    known = replace(member, address="", metrics_address="", ready=False, lanes=(), costs=None, grammar="")
    assert wire.greeting(over(wire.hello(Greeting(member, metadata, scratch)))) == Greeting(known, metadata, scratch)


@pytest.mark.parametrize(
    ("prefill", "decode"),
    [((), (1.0, 2.0, 3.0)), ((1.0,) * 4, ()), ((1.0,) * 5, (1.0,) * 3), ((1.0,) * 4, (1.0,) * 4),
     ((1.0, 2.0, 3.0, -1.0), (1.0,) * 3), ((1.0,) * 4, (1.0, 2.0, float("nan"))), ((float("inf"),) * 4, (1.0,) * 3)],
)  # fmt: skip
def test_what_are_no_costs_is_a_remote_error(prefill, decode):
    with pytest.raises(RemoteError, match="costs: got"):
        wire.costs_from(registry_pb2.StepCosts(prefill=prefill, decode=decode))


@QUICK
@given(members)
def test_a_member_comes_back_equal(member):
    body = registry_pb2.Member.FromString(wire.registry_member(member).SerializeToString())
    assert wire.member_from(body) == member


uses = st.lists(st.sampled_from(Use), unique=True).map(tuple)


@QUICK
@given(st.builds(Part, counts, st.lists(st.builds(Way, identities, uses, uses), max_size=3).map(tuple)))
def test_a_part_of_the_transfer_map_comes_back_equal(part):
    body = registry_pb2.TransferPart.FromString(wire.registry_part(part).SerializeToString())
    assert wire.part_from(body) == part


@pytest.mark.parametrize("way", [{"peer": "nobody"}, {"peer": "d#1", "pulls": ["steal"]}])
def test_a_part_that_makes_no_sense_is_a_remote_error(way):
    with pytest.raises(RemoteError):
        wire.part_from(registry_pb2.TransferPart(version=1, ways=[way]))


@QUICK
@given(lanes)
def test_a_lane_comes_back_equal(lane):
    assert wire.lane_from(over(wire.lane_frame(lane)).lane) == lane
    assert wire.lane_from(wire.registry_lane(lane)) == lane


@QUICK
@given(st.builds(ProcessEnded, identities, st.booleans()))
def test_an_end_comes_back_equal(ended):
    assert wire.ended_from(wire.registry_ended(ended)) == ended


GOOD = worker_pb2.Ticket(minter="g#1", counter=1, attempt=1, source="p#1", sink="d#1")


def constrained_by(**fields: str) -> worker_pb2.RequestMeta:
    meta = worker_pb2.RequestMeta(sampling={"max_tokens": 1, "top_p": 1.0, "stop_token_ids": [1]})
    meta.sampling.constraint.CopyFrom(common_pb2.Constraint(**fields))
    return meta


@pytest.mark.parametrize(
    "frame",
    [
        Frame(),
        Frame(heartbeat=worker_pb2.Heartbeat()),
        Frame(hello=worker_pb2.Hello()),
        Frame(grant=worker_pb2.Grant()),
        Frame(slot_free=worker_pb2.SlotFree(worker="nobody", tokens=1)),
        Frame(grant=worker_pb2.Grant(ticket=worker_pb2.Ticket(minter="nobody", source="p#1", sink="d#1"))),
        Frame(prompt=worker_pb2.PromptPiece(ticket=GOOD, tokens=[1], request=worker_pb2.RequestMeta())),
        Frame(reserve=worker_pb2.Reserve(ticket=GOOD, prompt=[1])),
        Frame(reserve=worker_pb2.Reserve(ticket=GOOD, prompt=[1], request=constrained_by(language="prolog"))),
        Frame(reserve=worker_pb2.Reserve(ticket=GOOD, prompt=[1], request=constrained_by())),
        Frame(freeness=worker_pb2.Freeness(worker="nobody", steps=1.0)),
        Frame(readiness=worker_pb2.Readiness(worker="nobody", ready=True)),
        Frame(moved=worker_pb2.Moved(moves=1)),
        Frame(offer_migration=worker_pb2.OfferMigration(ticket=GOOD, placed=GOOD, prompt=[1])),
    ],
)
def test_a_frame_that_makes_no_sense_is_the_peers_fault(frame):
    with pytest.raises(RemoteError):
        wire.Reader().message(frame)


@pytest.mark.parametrize(
    "frame",
    [
        Frame(),
        Frame(grant=worker_pb2.Grant(ticket=GOOD)),
        Frame(hello=worker_pb2.Hello(identity="", role="decode", protocol=PROTOCOL_VERSION)),
        Frame(hello=worker_pb2.Hello(identity="d#1", role="chef", protocol=PROTOCOL_VERSION)),
        Frame(hello=worker_pb2.Hello(identity="d#1", role="decode", protocol=PROTOCOL_VERSION, kv={"layers": 1})),
    ],
)
def test_a_greeting_that_makes_no_sense_is_the_peers_fault(frame):
    with pytest.raises(RemoteError, match=r"^(?!protocol)"):
        wire.greeting(frame)


@pytest.mark.parametrize("version", [0, PROTOCOL_VERSION - 1, PROTOCOL_VERSION + 1])
def test_of_another_protocol_version_nothing_else_is_read(version):
    """It may call roles and pages what it likes: what is said is that the version differs."""
    want = f"protocol: got {version} from d#1, want {PROTOCOL_VERSION} as we have"
    with pytest.raises(RemoteError, match=want):
        wire.greeting(Frame(hello=worker_pb2.Hello(identity="d#1", role="chef", kv={"layers": 0}, protocol=version)))
    with pytest.raises(RemoteError, match=want):
        wire.member_from(registry_pb2.Member(identity="d#1", role="chef", kv={"layers": 0}, protocol=version))


@QUICK
@given(st.binary(max_size=60))
def test_any_bytes_give_a_message_or_a_remote_error(noise):
    reader = wire.Reader()
    for kind in ("offer", "slot_free", "prompt", "tokens", "ready", "finished", "reserve", "handed", "offer_migration"):
        frame = Frame()
        try:
            getattr(frame, kind).ParseFromString(noise)
        except Exception:  # not protobuf at all: gRPC refuses it before us
            continue
        getattr(frame, kind).SetInParent()
        try:
            reader.message(frame)
        except RemoteError:
            pass
