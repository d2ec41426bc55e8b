from protos.baton.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Lane(_message.Message):
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

class StepCosts(_message.Message):
    __slots__ = ("prefill", "decode")
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    prefill: _containers.RepeatedScalarFieldContainer[float]
    decode: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, prefill: _Optional[_Iterable[float]] = ..., decode: _Optional[_Iterable[float]] = ...) -> None: ...

class Member(_message.Message):
    __slots__ = ("identity", "role", "address", "metrics_address", "build", "protocol", "model", "fingerprint", "kv", "pages", "context", "numerics", "transport", "ready", "lanes", "migrates", "costs", "grammar", "fetches", "group")
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    METRICS_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    BUILD_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    KV_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    NUMERICS_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    LANES_FIELD_NUMBER: _ClassVar[int]
    MIGRATES_FIELD_NUMBER: _ClassVar[int]
    COSTS_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    FETCHES_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    identity: str
    role: str
    address: str
    metrics_address: str
    build: str
    protocol: int
    model: str
    fingerprint: str
    kv: _common_pb2.KvShape
    pages: int
    context: int
    numerics: _common_pb2.Numerics
    transport: str
    ready: bool
    lanes: _containers.RepeatedCompositeFieldContainer[Lane]
    migrates: bool
    costs: StepCosts
    grammar: str
    fetches: bool
    group: str
    def __init__(self, identity: _Optional[str] = ..., role: _Optional[str] = ..., address: _Optional[str] = ..., metrics_address: _Optional[str] = ..., build: _Optional[str] = ..., protocol: _Optional[int] = ..., model: _Optional[str] = ..., fingerprint: _Optional[str] = ..., kv: _Optional[_Union[_common_pb2.KvShape, _Mapping]] = ..., pages: _Optional[int] = ..., context: _Optional[int] = ..., numerics: _Optional[_Union[_common_pb2.Numerics, _Mapping]] = ..., transport: _Optional[str] = ..., ready: _Optional[bool] = ..., lanes: _Optional[_Iterable[_Union[Lane, _Mapping]]] = ..., migrates: _Optional[bool] = ..., costs: _Optional[_Union[StepCosts, _Mapping]] = ..., grammar: _Optional[str] = ..., fetches: _Optional[bool] = ..., group: _Optional[str] = ...) -> None: ...

class RegisterRequest(_message.Message):
    __slots__ = ("member", "map_version")
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    MAP_VERSION_FIELD_NUMBER: _ClassVar[int]
    member: Member
    map_version: int
    def __init__(self, member: _Optional[_Union[Member, _Mapping]] = ..., map_version: _Optional[int] = ...) -> None: ...

class RegisterResponse(_message.Message):
    __slots__ = ("heartbeat_s",)
    HEARTBEAT_S_FIELD_NUMBER: _ClassVar[int]
    heartbeat_s: float
    def __init__(self, heartbeat_s: _Optional[float] = ...) -> None: ...

class HeartbeatRequest(_message.Message):
    __slots__ = ("identity", "ready", "lanes", "costs")
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    LANES_FIELD_NUMBER: _ClassVar[int]
    COSTS_FIELD_NUMBER: _ClassVar[int]
    identity: str
    ready: bool
    lanes: _containers.RepeatedCompositeFieldContainer[Lane]
    costs: StepCosts
    def __init__(self, identity: _Optional[str] = ..., ready: _Optional[bool] = ..., lanes: _Optional[_Iterable[_Union[Lane, _Mapping]]] = ..., costs: _Optional[_Union[StepCosts, _Mapping]] = ...) -> None: ...

class HeartbeatResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DeregisterRequest(_message.Message):
    __slots__ = ("identity",)
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    identity: str
    def __init__(self, identity: _Optional[str] = ...) -> None: ...

class DeregisterResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Ended(_message.Message):
    __slots__ = ("identity", "crashed")
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    CRASHED_FIELD_NUMBER: _ClassVar[int]
    identity: str
    crashed: bool
    def __init__(self, identity: _Optional[str] = ..., crashed: _Optional[bool] = ...) -> None: ...

class ReportEndRequest(_message.Message):
    __slots__ = ("ended",)
    ENDED_FIELD_NUMBER: _ClassVar[int]
    ended: Ended
    def __init__(self, ended: _Optional[_Union[Ended, _Mapping]] = ...) -> None: ...

class ReportEndResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("identity",)
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    identity: str
    def __init__(self, identity: _Optional[str] = ...) -> None: ...

class Way(_message.Message):
    __slots__ = ("peer", "pulls", "serves")
    PEER_FIELD_NUMBER: _ClassVar[int]
    PULLS_FIELD_NUMBER: _ClassVar[int]
    SERVES_FIELD_NUMBER: _ClassVar[int]
    peer: str
    pulls: _containers.RepeatedScalarFieldContainer[str]
    serves: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, peer: _Optional[str] = ..., pulls: _Optional[_Iterable[str]] = ..., serves: _Optional[_Iterable[str]] = ...) -> None: ...

class TransferPart(_message.Message):
    __slots__ = ("version", "ways")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    WAYS_FIELD_NUMBER: _ClassVar[int]
    version: int
    ways: _containers.RepeatedCompositeFieldContainer[Way]
    def __init__(self, version: _Optional[int] = ..., ways: _Optional[_Iterable[_Union[Way, _Mapping]]] = ...) -> None: ...

class WatchResponse(_message.Message):
    __slots__ = ("members", "epoch", "ended", "part")
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    members: _containers.RepeatedCompositeFieldContainer[Member]
    epoch: int
    ended: _containers.RepeatedCompositeFieldContainer[Ended]
    part: TransferPart
    def __init__(self, members: _Optional[_Iterable[_Union[Member, _Mapping]]] = ..., epoch: _Optional[int] = ..., ended: _Optional[_Iterable[_Union[Ended, _Mapping]]] = ..., part: _Optional[_Union[TransferPart, _Mapping]] = ...) -> None: ...
