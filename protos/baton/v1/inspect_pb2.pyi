from protos.baton.v1 import inference_pb2 as _inference_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetRequestsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Standing(_message.Message):
    __slots__ = ("key", "request_id", "machine", "state", "age_s", "left_s", "waits_for", "owner", "tokens")
    KEY_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MACHINE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    LEFT_S_FIELD_NUMBER: _ClassVar[int]
    WAITS_FOR_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    key: str
    request_id: str
    machine: str
    state: str
    age_s: float
    left_s: float
    waits_for: str
    owner: str
    tokens: int
    def __init__(self, key: _Optional[str] = ..., request_id: _Optional[str] = ..., machine: _Optional[str] = ..., state: _Optional[str] = ..., age_s: _Optional[float] = ..., left_s: _Optional[float] = ..., waits_for: _Optional[str] = ..., owner: _Optional[str] = ..., tokens: _Optional[int] = ...) -> None: ...

class GetRequestsResponse(_message.Message):
    __slots__ = ("identity", "requests")
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    identity: str
    requests: _containers.RepeatedCompositeFieldContainer[Standing]
    def __init__(self, identity: _Optional[str] = ..., requests: _Optional[_Iterable[_Union[Standing, _Mapping]]] = ...) -> None: ...

class TraceRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class TraceResponse(_message.Message):
    __slots__ = ("running", "phase", "code", "reason", "end", "total_s", "arrived_at")
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    TOTAL_S_FIELD_NUMBER: _ClassVar[int]
    ARRIVED_AT_FIELD_NUMBER: _ClassVar[int]
    running: bool
    phase: str
    code: str
    reason: str
    end: _inference_pb2.End
    total_s: float
    arrived_at: float
    def __init__(self, running: _Optional[bool] = ..., phase: _Optional[str] = ..., code: _Optional[str] = ..., reason: _Optional[str] = ..., end: _Optional[_Union[_inference_pb2.End, _Mapping]] = ..., total_s: _Optional[float] = ..., arrived_at: _Optional[float] = ...) -> None: ...

class DebugRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DebugResponse(_message.Message):
    __slots__ = ("document",)
    DOCUMENT_FIELD_NUMBER: _ClassVar[int]
    document: str
    def __init__(self, document: _Optional[str] = ...) -> None: ...
