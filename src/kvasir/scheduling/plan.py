"""What admission is asked, and what it answers when it refuses."""

from __future__ import annotations

import math

from msgspec import Struct

from kvasir.core.commands import Candidate
from kvasir.core.request import Request
from kvasir.scheduling.decode_choice import DecodeChoice


class Outlook(Struct, frozen=True):
    """A decode instance's batch and the sum of its contexts: those decoding now, and those expected at hand-off time."""

    batch_now: int = 0
    context_now: int = 0
    batch_then: int = 0
    context_then: int = 0


class Plan(Struct, frozen=True):
    """What would be done with the request. `waited_s` has passed since it arrived at the gateway.

    Prefills that it goes before can be put off by `spare_s` and still meet their objective. `decode` counts all that the
    decode instance was given, whether decoding or still in prefill; `outlook` tells them apart.
    """

    request: Request
    candidate: Candidate
    decode: DecodeChoice
    waited_s: float
    expected_output_tokens: int
    spare_s: float = math.inf
    outlook: Outlook = Outlook()

    @property
    def ttft_s(self) -> float:
        return self.waited_s + self.candidate.ttft_s


class Refusal(Struct, frozen=True):
    """Why not, for the client: `code` for machines, `message` for people, and when it is worth trying again."""

    code: str
    message: str
    retry_after_s: float
