from protos.baton.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SessionRequest(_message.Message):
    __slots__ = ("frames",)
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    frames: _containers.RepeatedCompositeFieldContainer[Frame]
    def __init__(self, frames: _Optional[_Iterable[_Union[Frame, _Mapping]]] = ...) -> None: ...

class SessionResponse(_message.Message):
    __slots__ = ("frames",)
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    frames: _containers.RepeatedCompositeFieldContainer[Frame]
    def __init__(self, frames: _Optional[_Iterable[_Union[Frame, _Mapping]]] = ...) -> None: ...

class PeerRequest(_message.Message):
    __slots__ = ("frames",)
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    frames: _containers.RepeatedCompositeFieldContainer[Frame]
    def __init__(self, frames: _Optional[_Iterable[_Union[Frame, _Mapping]]] = ...) -> None: ...

class PeerResponse(_message.Message):
    __slots__ = ("frames",)
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    frames: _containers.RepeatedCompositeFieldContainer[Frame]
    def __init__(self, frames: _Optional[_Iterable[_Union[Frame, _Mapping]]] = ...) -> None: ...

class Frame(_message.Message):
    __slots__ = ("hello", "heartbeat", "goodbye", "lane", "offer", "accept", "reject", "prompt", "cancel", "tokens", "finished", "failed", "handed", "slot_free", "reserve", "grant", "refuse", "ready", "taken", "release", "readiness", "offer_migration", "caught_up", "moved", "freeness", "fetch")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    GOODBYE_FIELD_NUMBER: _ClassVar[int]
    LANE_FIELD_NUMBER: _ClassVar[int]
    OFFER_FIELD_NUMBER: _ClassVar[int]
    ACCEPT_FIELD_NUMBER: _ClassVar[int]
    REJECT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    HANDED_FIELD_NUMBER: _ClassVar[int]
    SLOT_FREE_FIELD_NUMBER: _ClassVar[int]
    RESERVE_FIELD_NUMBER: _ClassVar[int]
    GRANT_FIELD_NUMBER: _ClassVar[int]
    REFUSE_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    TAKEN_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    READINESS_FIELD_NUMBER: _ClassVar[int]
    OFFER_MIGRATION_FIELD_NUMBER: _ClassVar[int]
    CAUGHT_UP_FIELD_NUMBER: _ClassVar[int]
    MOVED_FIELD_NUMBER: _ClassVar[int]
    FREENESS_FIELD_NUMBER: _ClassVar[int]
    FETCH_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    heartbeat: Heartbeat
    goodbye: Goodbye
    lane: LaneMeasured
    offer: Offer
    accept: Accept
    reject: Reject
    prompt: PromptPiece
    cancel: Cancel
    tokens: Tokens
    finished: Finished
    failed: Failed
    handed: Handed
    slot_free: SlotFree
    reserve: Reserve
    grant: Grant
    refuse: Refuse
    ready: Ready
    taken: Taken
    release: Release
    readiness: Readiness
    offer_migration: OfferMigration
    caught_up: CaughtUp
    moved: Moved
    freeness: Freeness
    fetch: Fetch
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., goodbye: _Optional[_Union[Goodbye, _Mapping]] = ..., lane: _Optional[_Union[LaneMeasured, _Mapping]] = ..., offer: _Optional[_Union[Offer, _Mapping]] = ..., accept: _Optional[_Union[Accept, _Mapping]] = ..., reject: _Optional[_Union[Reject, _Mapping]] = ..., prompt: _Optional[_Union[PromptPiece, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., tokens: _Optional[_Union[Tokens, _Mapping]] = ..., finished: _Optional[_Union[Finished, _Mapping]] = ..., failed: _Optional[_Union[Failed, _Mapping]] = ..., handed: _Optional[_Union[Handed, _Mapping]] = ..., slot_free: _Optional[_Union[SlotFree, _Mapping]] = ..., reserve: _Optional[_Union[Reserve, _Mapping]] = ..., grant: _Optional[_Union[Grant, _Mapping]] = ..., refuse: _Optional[_Union[Refuse, _Mapping]] = ..., ready: _Optional[_Union[Ready, _Mapping]] = ..., taken: _Optional[_Union[Taken, _Mapping]] = ..., release: _Optional[_Union[Release, _Mapping]] = ..., readiness: _Optional[_Union[Readiness, _Mapping]] = ..., offer_migration: _Optional[_Union[OfferMigration, _Mapping]] = ..., caught_up: _Optional[_Union[CaughtUp, _Mapping]] = ..., moved: _Optional[_Union[Moved, _Mapping]] = ..., freeness: _Optional[_Union[Freeness, _Mapping]] = ..., fetch: _Optional[_Union[Fetch, _Mapping]] = ...) -> None: ...

class Ticket(_message.Message):
    __slots__ = ("minter", "counter", "attempt", "source", "sink")
    MINTER_FIELD_NUMBER: _ClassVar[int]
    COUNTER_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    SINK_FIELD_NUMBER: _ClassVar[int]
    minter: str
    counter: int
    attempt: int
    source: str
    sink: str
    def __init__(self, minter: _Optional[str] = ..., counter: _Optional[int] = ..., attempt: _Optional[int] = ..., source: _Optional[str] = ..., sink: _Optional[str] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("identity", "role", "protocol", "build", "model", "fingerprint", "kv", "pages", "context", "numerics", "transport", "transport_metadata", "scratch_pages", "migrates", "fetches", "group")
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    BUILD_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    KV_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    NUMERICS_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_METADATA_FIELD_NUMBER: _ClassVar[int]
    SCRATCH_PAGES_FIELD_NUMBER: _ClassVar[int]
    MIGRATES_FIELD_NUMBER: _ClassVar[int]
    FETCHES_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    identity: str
    role: str
    protocol: int
    build: str
    model: str
    fingerprint: str
    kv: _common_pb2.KvShape
    pages: int
    context: int
    numerics: _common_pb2.Numerics
    transport: str
    transport_metadata: bytes
    scratch_pages: int
    migrates: bool
    fetches: bool
    group: str
    def __init__(self, identity: _Optional[str] = ..., role: _Optional[str] = ..., protocol: _Optional[int] = ..., build: _Optional[str] = ..., model: _Optional[str] = ..., fingerprint: _Optional[str] = ..., kv: _Optional[_Union[_common_pb2.KvShape, _Mapping]] = ..., pages: _Optional[int] = ..., context: _Optional[int] = ..., numerics: _Optional[_Union[_common_pb2.Numerics, _Mapping]] = ..., transport: _Optional[str] = ..., transport_metadata: _Optional[bytes] = ..., scratch_pages: _Optional[int] = ..., migrates: _Optional[bool] = ..., fetches: _Optional[bool] = ..., group: _Optional[str] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Goodbye(_message.Message):
    __slots__ = ("reason", "fault")
    REASON_FIELD_NUMBER: _ClassVar[int]
    FAULT_FIELD_NUMBER: _ClassVar[int]
    reason: str
    fault: bool
    def __init__(self, reason: _Optional[str] = ..., fault: _Optional[bool] = ...) -> None: ...

class LaneMeasured(_message.Message):
    __slots__ = ("source", "transport", "gbytes_per_s", "latency_us")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    GBYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    LATENCY_US_FIELD_NUMBER: _ClassVar[int]
    source: str
    transport: str
    gbytes_per_s: float
    latency_us: float
    def __init__(self, source: _Optional[str] = ..., transport: _Optional[str] = ..., gbytes_per_s: _Optional[float] = ..., latency_us: _Optional[float] = ...) -> None: ...

class Offer(_message.Message):
    __slots__ = ("ticket", "prompt_tokens", "max_tokens", "wait_s", "hints", "prefix", "prefix_page_tokens", "batch", "second")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    HINTS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    PREFIX_PAGE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    SECOND_FIELD_NUMBER: _ClassVar[int]
    ticket: Ticket
    prompt_tokens: int
    max_tokens: int
    wait_s: float
    hints: _common_pb2.Hints
    prefix: _containers.RepeatedScalarFieldContainer[int]
    prefix_page_tokens: int
    batch: bool
    second: str
    def __init__(self, ticket: _Optional[_Union[Ticket, _Mapping]] = ..., prompt_tokens: _Optional[int] = ..., max_tokens: _Optional[int] = ..., wait_s: _Optional[float] = ..., hints: _Optional[_Union[_common_pb2.Hints, _Mapping]] = ..., prefix: _Optional[_Iterable[int]] = ..., prefix_page_tokens: _Optional[int] = ..., batch: _Optional[bool] = ..., second: _Optional[str] = ...) -> None: ...

class Accept(_message.Message):
    __slots__ = ("ticket", "cached_tokens", "wait_s")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    ticket: Ticket
    cached_tokens: int
    wait_s: float
    def __init__(self, ticket: _Optional[_Union[Ticket, _Mapping]] = ..., cached_tokens: _Optional[int] = ..., wait_s: _Optional[float] = ...) -> None: ...

class Reject(_message.Message):
    __slots__ = ("ticket", "reason", "wait_s", "again_s")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    AGAIN_S_FIELD_NUMBER: _ClassVar[int]
    ticket: Ticket
    reason: str
    wait_s: float
    again_s: float
    def __init__(self, ticket: _Optional[_Union[Ticket, _Mapping]] = ..., reason: _Optional[str] = ..., wait_s: _Optional[float] = ..., again_s: _Optional[float] = ...) -> None: ...

class SlotFree(_message.Message):
    __slots__ = ("worker", "tokens")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    worker: str
    tokens: int
    def __init__(self, worker: _Optional[str] = ..., tokens: _Optional[int] = ...) -> None: ...

class Readiness(_message.Message):
    __slots__ = ("worker", "ready")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    worker: str
    ready: bool
    def __init__(self, worker: _Optional[str] = ..., ready: _Optional[bool] = ...) -> None: ...

class PromptPiece(_message.Message):
    __slots__ = ("ticket", "tokens", "request", "second", "holdings")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    SECOND_FIELD_NUMBER: _ClassVar[int]
    HOLDINGS_FIELD_NUMBER: _ClassVar[int]
    ticket: Ticket
    tokens: _containers.RepeatedScalarFieldContainer[int]
    request: RequestMeta
    second: str
    holdings: _containers.RepeatedCompositeFieldContainer[Holding]
    def __init__(self, ticket: _Optional[_Union[Ticket, _Mapping]] = ..., tokens: _Optional[_Iterable[int]] = ..., request: _Optional[_Union[RequestMeta, _Mapping]] = ..., second: _Optional[str] = ..., holdings: _Optional[_Iterable[_Union[Holding, _Mapping]]] = ...) -> None: ...

class Holding(_message.Message):
    __slots__ = ("worker", "tokens")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    worker: str
    tokens: int
    def __init__(self, worker: _Optional[str] = ..., tokens: _Optional[int] = ...) -> None: ...

class RequestMeta(_message.Message):
    __slots__ = ("id", "sampling", "timeout_s", "slo", "hints", "generated", "prefix", "prefix_page_tokens", "alone")
    ID_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    SLO_FIELD_NUMBER: _ClassVar[int]
    HINTS_FIELD_NUMBER: _ClassVar[int]
    GENERATED_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    PREFIX_PAGE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ALONE_FIELD_NUMBER: _ClassVar[int]
    id: str
    sampling: _common_pb2.Sampling
    timeout_s: float
    slo: _common_pb2.Slo
    hints: _common_pb2.Hints
    generated: int
    prefix: _containers.RepeatedScalarFieldContainer[int]
    prefix_page_tokens: int
    alone: bool
    def __init__(self, id: _Optional[str] = ..., sampling: _Optional[_Union[_common_pb2.Sampling, _Mapping]] = ..., timeout_s: _Optional[float] = ..., slo: _Optional[_Union[_common_pb2.Slo, _Mapping]] = ..., hints: _Optional[_Union[_common_pb2.Hints, _Mapping]] = ..., generated: _Optional[int] = ..., prefix: _Optional[_Iterable[int]] = ..., prefix_page_tokens: _Optional[int] = ..., alone: _Optional[bool] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("ticket", "reason", "report", "branch", "prefix")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    BRANCH_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    ticket: Ticket
    reason: str
    report: bool
    branch: int
    prefix: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ticket: _Optional[_Union[Ticket, _Mapping]] = ..., reason: _Optional[str] = ..., report: _Optional[bool] = ..., branch: _Optional[int] = ..., prefix: _Optional[_Iterable[int]] = ...) -> None: ...

class Tokens(_message.Message):
    __slots__ = ("ticket", "index", "tokens", "logits_hashes", "branch", "logprobs", "prompt_logprobs")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOGITS_HASHES_FIELD_NUMBER: _ClassVar[int]
    BRANCH_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    ticket: Ticket
    index: int
    tokens: _containers.RepeatedScalarFieldContainer[int]
    logits_hashes: _containers.RepeatedScalarFieldContainer[int]
    branch: int
    logprobs: _containers.RepeatedCompositeFieldContainer[Logprobs]
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[Logprobs]
    def __init__(self, ticket: _Optional[_Union[Ticket, _Mapping]] = ..., index: _Optional[int] = ..., tokens: _Optional[_Iterable[int]] = ..., logits_hashes: _Optional[_Iterable[int]] = ..., branch: _Optional[int] = ..., logprobs: _Optional[_Iterable[_Union[Logprobs, _Mapping]]] = ..., prompt_logprobs: _Optional[_Iterable[_Union[Logprobs, _Mapping]]] = ...) -> None: ...

class Logprobs(_message.Message):
    __slots__ = ("token", "logprob", "top_ids", "top_logprobs")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    token: int
    logprob: float
    top_ids: _containers.RepeatedScalarFieldContainer[int]
    top_logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, token: _Optional[int] = ..., logprob: _Optional[float] = ..., top_ids: _Optional[_Iterable[int]] = ..., top_logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

class Finished(_message.Message):
    __slots__ = ("ticket", "reason", "completion_tokens", "stop_token_id", "stages", "branch", "decoded", "cached_tokens")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    BRANCH_FIELD_NUMBER: _ClassVar[int]
    DECODED_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ticket: Ticket
    reason: str
    completion_tokens: int
    stop_token_id: int
    stages: _containers.RepeatedCompositeFieldContainer[_common_pb2.Stage]
    branch: int
    decoded: bool
    cached_tokens: int
    def __init__(self, ticket: _Optional[_Union[Ticket, _Mapping]] = ..., reason: _Optional[str] = ..., completion_tokens: _Optional[int] = ..., stop_token_id: _Optional[int] = ..., stages: _Optional[_Iterable[_Union[_common_pb2.Stage, _Mapping]]] = ..., branch: _Optional[int] = ..., decoded: _Optional[bool] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class Failed(_message.Message):
    __slots__ = ("ticket", "code", "message", "stages")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    ticket: Ticket
    code: str
    message: str
    stages: _containers.RepeatedCompositeFieldContainer[_common_pb2.Stage]
    def __init__(self, ticket: _Optional[_Union[Ticket, _Mapping]] = ..., code: _Optional[str] = ..., message: _Optional[str] = ..., stages: _Optional[_Iterable[_Union[_common_pb2.Stage, _Mapping]]] = ...) -> None: ...

class Handed(_message.Message):
    __slots__ = ("ticket", "stages", "cancelled", "cached_tokens")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    CANCELLED_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ticket: Ticket
    stages: _containers.RepeatedCompositeFieldContainer[_common_pb2.Stage]
    cancelled: bool
    cached_tokens: int
    def __init__(self, ticket: _Optional[_Union[Ticket, _Mapping]] = ..., stages: _Optional[_Iterable[_Union[_common_pb2.Stage, _Mapping]]] = ..., cancelled: _Optional[bool] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class Reserve(_message.Message):
    __slots__ = ("ticket", "request", "prompt", "page_tokens")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ticket: Ticket
    request: RequestMeta
    prompt: _containers.RepeatedScalarFieldContainer[int]
    page_tokens: int
    def __init__(self, ticket: _Optional[_Union[Ticket, _Mapping]] = ..., request: _Optional[_Union[RequestMeta, _Mapping]] = ..., prompt: _Optional[_Iterable[int]] = ..., page_tokens: _Optional[int] = ...) -> None: ...

class Grant(_message.Message):
    __slots__ = ("ticket", "cached_tokens", "page_tokens")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ticket: Ticket
    cached_tokens: int
    page_tokens: int
    def __init__(self, ticket: _Optional[_Union[Ticket, _Mapping]] = ..., cached_tokens: _Optional[int] = ..., page_tokens: _Optional[int] = ...) -> None: ...

class Refuse(_message.Message):
    __slots__ = ("ticket", "reason")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ticket: Ticket
    reason: str
    def __init__(self, ticket: _Optional[_Union[Ticket, _Mapping]] = ..., reason: _Optional[str] = ...) -> None: ...

class PageRun(_message.Message):
    __slots__ = ("start", "count")
    START_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    start: int
    count: int
    def __init__(self, start: _Optional[int] = ..., count: _Optional[int] = ...) -> None: ...

class First(_message.Message):
    __slots__ = ("token", "logits_hash", "branch", "logprobs")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    LOGITS_HASH_FIELD_NUMBER: _ClassVar[int]
    BRANCH_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    token: int
    logits_hash: int
    branch: int
    logprobs: Logprobs
    def __init__(self, token: _Optional[int] = ..., logits_hash: _Optional[int] = ..., branch: _Optional[int] = ..., logprobs: _Optional[_Union[Logprobs, _Mapping]] = ...) -> None: ...

class Ready(_message.Message):
    __slots__ = ("ticket", "first_page", "runs", "digests", "firsts", "carried")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    FIRST_PAGE_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    FIRSTS_FIELD_NUMBER: _ClassVar[int]
    CARRIED_FIELD_NUMBER: _ClassVar[int]
    ticket: Ticket
    first_page: int
    runs: _containers.RepeatedCompositeFieldContainer[PageRun]
    digests: _containers.RepeatedScalarFieldContainer[int]
    firsts: _containers.RepeatedCompositeFieldContainer[First]
    carried: Carried
    def __init__(self, ticket: _Optional[_Union[Ticket, _Mapping]] = ..., first_page: _Optional[int] = ..., runs: _Optional[_Iterable[_Union[PageRun, _Mapping]]] = ..., digests: _Optional[_Iterable[int]] = ..., firsts: _Optional[_Iterable[_Union[First, _Mapping]]] = ..., carried: _Optional[_Union[Carried, _Mapping]] = ...) -> None: ...

class Carried(_message.Message):
    __slots__ = ("tokens", "stages", "logits_hashes", "logprobs", "stopped_s")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    LOGITS_HASHES_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    STOPPED_S_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedScalarFieldContainer[int]
    stages: _containers.RepeatedCompositeFieldContainer[_common_pb2.Stage]
    logits_hashes: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[Logprobs]
    stopped_s: float
    def __init__(self, tokens: _Optional[_Iterable[int]] = ..., stages: _Optional[_Iterable[_Union[_common_pb2.Stage, _Mapping]]] = ..., logits_hashes: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[Logprobs, _Mapping]]] = ..., stopped_s: _Optional[float] = ...) -> None: ...

class Taken(_message.Message):
    __slots__ = ("ticket",)
    TICKET_FIELD_NUMBER: _ClassVar[int]
    ticket: Ticket
    def __init__(self, ticket: _Optional[_Union[Ticket, _Mapping]] = ...) -> None: ...

class Release(_message.Message):
    __slots__ = ("ticket", "reason")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ticket: Ticket
    reason: str
    def __init__(self, ticket: _Optional[_Union[Ticket, _Mapping]] = ..., reason: _Optional[str] = ...) -> None: ...

class OfferMigration(_message.Message):
    __slots__ = ("ticket", "request", "prompt", "placed", "generated", "most", "moves", "page_tokens")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    PLACED_FIELD_NUMBER: _ClassVar[int]
    GENERATED_FIELD_NUMBER: _ClassVar[int]
    MOST_FIELD_NUMBER: _ClassVar[int]
    MOVES_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ticket: Ticket
    request: RequestMeta
    prompt: _containers.RepeatedScalarFieldContainer[int]
    placed: Ticket
    generated: int
    most: int
    moves: int
    page_tokens: int
    def __init__(self, ticket: _Optional[_Union[Ticket, _Mapping]] = ..., request: _Optional[_Union[RequestMeta, _Mapping]] = ..., prompt: _Optional[_Iterable[int]] = ..., placed: _Optional[_Union[Ticket, _Mapping]] = ..., generated: _Optional[int] = ..., most: _Optional[int] = ..., moves: _Optional[int] = ..., page_tokens: _Optional[int] = ...) -> None: ...

class CaughtUp(_message.Message):
    __slots__ = ("ticket",)
    TICKET_FIELD_NUMBER: _ClassVar[int]
    ticket: Ticket
    def __init__(self, ticket: _Optional[_Union[Ticket, _Mapping]] = ...) -> None: ...

class Fetch(_message.Message):
    __slots__ = ("ticket", "prefix", "cached_pages", "timeout_s", "page_tokens")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    CACHED_PAGES_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ticket: Ticket
    prefix: _containers.RepeatedScalarFieldContainer[int]
    cached_pages: int
    timeout_s: float
    page_tokens: int
    def __init__(self, ticket: _Optional[_Union[Ticket, _Mapping]] = ..., prefix: _Optional[_Iterable[int]] = ..., cached_pages: _Optional[int] = ..., timeout_s: _Optional[float] = ..., page_tokens: _Optional[int] = ...) -> None: ...

class Moved(_message.Message):
    __slots__ = ("ticket", "moves")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    MOVES_FIELD_NUMBER: _ClassVar[int]
    ticket: Ticket
    moves: int
    def __init__(self, ticket: _Optional[_Union[Ticket, _Mapping]] = ..., moves: _Optional[int] = ...) -> None: ...

class Freeness(_message.Message):
    __slots__ = ("worker", "steps")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    worker: str
    steps: float
    def __init__(self, worker: _Optional[str] = ..., steps: _Optional[float] = ...) -> None: ...
