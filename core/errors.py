"""Typed errors: whose fault a failure is, and the one sentence its reader needs.

Every message names the field, what was got and what was wanted. `LocalError` is our own bug and raises where it
happens; `RemoteError` is a peer's or the outside world's and becomes an event; `RequestError` belongs to one
caller and becomes that caller's gRPC status; `SetupError` ends a process with one sentence and an exit code.
"""

from __future__ import annotations


class BatonError(Exception):
    """Everything this project raises on purpose."""


class LocalError(BatonError):
    """A contract was broken inside this process; nothing was changed by the call that raised it."""


class RemoteError(BatonError):
    """A peer, a lane or a file behaved badly; the work it touched fails, the process goes on."""


class StateError(RemoteError):
    """A written state is not one that this code can read; nothing was restored."""


class RequestError(BatonError):
    """One request cannot be served as asked.

    `code` is the name of a gRPC status (``INVALID_ARGUMENT``, ``RESOURCE_EXHAUSTED`` ...), `retry_s` the wait in
    seconds that a client is advised to keep, None where trying again is pointless.
    """

    def __init__(self, code: str, message: str, *, retry_s: float | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_s = retry_s


class SetupError(BatonError):
    """A process cannot start: one sentence for the operator and the exit code to leave with."""

    def __init__(self, message: str, *, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class ModelError(SetupError):
    """A model directory cannot be served: not a model, not supported, or damaged."""

    def __init__(self, message: str) -> None:
        super().__init__(message, exit_code=5)


class RpcFailure(BatonError):
    """A gRPC call ended with a status; carried to the CLI, which prints it and leaves with exit code 1."""
