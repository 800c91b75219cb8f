"""What admission is asked, and what it answers when it refuses."""

from __future__ import annotations

import math

from mypy_extensions import mypyc_attr

from kvasir.core.commands import Candidate
from kvasir.core.request import Request
from kvasir.scheduling.decode_choice import DecodeChoice


@mypyc_attr(acyclic=True)
class Outlook:
    """A decode instance's batch and the sum of its contexts: those decoding now, and those expected at hand-off time."""

    __slots__ = ("batch_now", "batch_then", "context_now", "context_then")

    def __init__(self, batch_now: int = 0, context_now: int = 0, batch_then: int = 0, context_then: int = 0):
        self.batch_now = batch_now
        self.context_now = context_now
        self.batch_then = batch_then
        self.context_then = context_then


@mypyc_attr(acyclic=True)
class Plan:
    """What would be done with the request. `ttft_s` counts from its arrival at the gateway.

    Prefills that it goes before can be put off by `spare_s` and still meet their objective. `decode` counts all that the
    decode instance was given, whether decoding or still in prefill; `outlook` tells them apart.
    """

    __slots__ = ("candidate", "decode", "expected_output_tokens", "num_prompt_tokens", "outlook", "spare_s", "ttft_s")

    def __init__(
        self,
        *,
        request: Request,
        candidate: Candidate,
        decode: DecodeChoice,
        ttft_s: float,
        expected_output_tokens: int,
        outlook: Outlook,
        spare_s: float = math.inf,
    ):
        self.num_prompt_tokens: int = request.num_prompt_tokens
        self.candidate = candidate
        self.decode = decode
        self.expected_output_tokens = expected_output_tokens
        self.spare_s = spare_s
        self.outlook = outlook
        self.ttft_s = ttft_s


@mypyc_attr(acyclic=True)
class Refusal:
    """Why not, for the client: `code` for machines, `message` for people, and when it is worth trying again."""

    __slots__ = ("code", "message", "retry_after_s")

    def __init__(self, code: str, message: str, retry_after_s: float):
        self.code = code
        self.message = message
        self.retry_after_s = retry_after_s
