"""Every error that Kvasir raises, in one tree.

    KvasirError
    ├── ConfigError            a flag, a config key or an environment that cannot work
    ├── TraceError             a trace file that cannot be read
    ├── ModelError             a checkpoint that is broken or not supported
    ├── RequestError           a request that the API refuses (HTTP 4xx), with OpenAI's fields
    ├── PoolError              the pool refuses an operation
    │   ├── StaleEpoch         the caller is an earlier incarnation of its process
    │   └── UnknownLease       the lease was released, or its owner died
    ├── ClusterError           a process of the cluster failed or did not answer
    │   ├── DeadlineExceeded   a wait outlived its deadline
    │   ├── KvLost             blocks that a step was to read never came
    │   └── TransferError      bytes did not come or go; says why with a cause
    └── InvariantError         check() found a broken invariant: a bug of ours

A message is one line: what, got, expected, remedy. Overload is not an error: it is a `Reject` command.
"""

from __future__ import annotations

from typing import Literal

TransferCause = Literal["refused", "cut", "stalled", "stale_arena", "out_of_range", "garbled"]


class KvasirError(Exception):
    """The root: everything that Kvasir raises on purpose."""


class ConfigError(KvasirError):
    """A flag, a config key or an environment that cannot work."""


class TraceError(KvasirError):
    """A trace that cannot be read; the message names line and field."""


class ModelError(KvasirError):
    """A checkpoint that is broken, incomplete or not supported."""


class RequestError(KvasirError):
    """A request that the API refuses.

    `status` is the HTTP status, `code` a stable machine-readable word, `param` the offending field.
    """

    def __init__(self, message: str, *, status: int = 400, code: str = "invalid_value", param: str | None = None):
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param


class PoolError(KvasirError):
    """The pool refuses an operation."""


class StaleEpoch(PoolError):
    """The caller is an earlier incarnation of its process; its blocks are gone."""


class UnknownLease(PoolError):
    """The lease was released or expired, or its owner died."""


class ClusterError(KvasirError):
    """A process of the cluster failed or did not answer."""


class DeadlineExceeded(ClusterError):
    """A wait outlived its deadline."""


class KvLost(ClusterError):
    """Blocks that a step was to read, and that were still on their way, never came. Nothing that it computed may be used."""

    def __init__(self, request_ids: list[str]):
        super().__init__(f"cached blocks of {', '.join(request_ids)} did not come")
        self.request_ids = tuple(request_ids)


class TransferError(ClusterError):
    """Bytes did not come or go; nothing of it may be used, and nothing writes into the local slots any more.

    `cause` is `refused` (nobody listens, no room, not granted), `cut` (the connection or its process ended), `stalled` (too
    late or no progress), `stale_arena` (another incarnation), `out_of_range` (slots or bytes that do not exist) or `garbled`
    (a peer that does not speak the protocol).
    """

    def __init__(self, message: str, *, cause: TransferCause):
        super().__init__(message)
        self.cause: TransferCause = cause


class InvariantError(KvasirError):
    """`check()` found a broken invariant."""


def root_cause(error: BaseException) -> BaseException:
    """The first error inside nested exception groups: what a person should be told."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
