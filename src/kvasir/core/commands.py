"""What brains want done: commands, each with the decision behind it where there was a choice."""

from __future__ import annotations

from msgspec import Struct

from kvasir.core.keys import BlockKey
from kvasir.core.request import Role
from kvasir.core.units import format_duration


class Command(Struct, frozen=True, tag=True, gc=False):
    """Something that a body must carry out."""


class Candidate(Struct, frozen=True, gc=False):
    """One prefill instance as a policy saw it; all times are predicted seconds.

    `prefix_tokens` will be in place when the prefill starts; of these, `fetch_tokens` come from `source` node, and
    `load_tokens` from the SSD of the instance's own node. `transfer_s` is what of that compute does not hide. A chunked
    pipeline has its stages in `group`, in order; `instance` is the last of them and holds the request.
    """

    instance: str
    wait_s: float
    transfer_s: float
    prefill_s: float
    prefix_tokens: int
    fetch_tokens: int = 0
    source: str | None = None
    load_tokens: int = 0
    group: tuple[str, ...] = ()

    @property
    def members(self) -> tuple[str, ...]:
        """All instances that prefill."""
        return self.group or (self.instance,)

    @property
    def ttft_s(self) -> float:
        return self.wait_s + self.transfer_s + self.prefill_s


class Decision(Struct, frozen=True, gc=False):
    """Why a request went where it went: the log line, the metric, the answer of `explain`, the test's expectation.

    `candidates` begin with the chosen one; the next best follow. `why` finishes the sentence "prefill on p3 by ...";
    `refusal` is why the request was not started. `tbt_s` and `batch` are predicted for the decode batch that it joins.
    """

    request_id: str
    policy: str
    at_s: float
    why: str = ""
    candidates: tuple[Candidate, ...] = ()
    decode: str | None = None
    tbt_s: float | None = None
    batch: int = 0
    has_room: bool = True
    refusal: str | None = None

    @property
    def chosen(self) -> str | None:
        """The prefill instance."""
        return self.candidates[0].instance if self.candidates else None

    @property
    def ttft_s(self) -> float | None:
        """Predicted for the chosen candidate."""
        return self.candidates[0].ttft_s if self.candidates else None

    @property
    def reason(self) -> str:
        """`prefill on p0 by least TTFT ...: wait 1.2 s + transfer ... + prefill ... = TTFT ...; decode on d1 at TBT ...`."""
        plan = f"{self._plan()}; {self._decode()}" if self.candidates else ""
        if self.refusal is None:
            return plan
        return f"rejected, {self.refusal}: {plan}" if plan else f"rejected, {self.refusal}"

    def _plan(self) -> str:
        c = self.candidates[0]
        fetch = f" + fetch of {c.fetch_tokens} tokens from {c.source} {format_duration(c.transfer_s)}" if c.source else ""
        load = f" + {c.load_tokens} tokens from SSD {format_duration(c.transfer_s)}" if c.load_tokens else ""
        stages = f" in {len(c.group)} stages" if c.group else ""
        return (
            f"prefill on {c.instance} by {self.why}: wait {format_duration(c.wait_s)}{fetch}{load} + prefill"
            f" {format_duration(c.prefill_s)} after {c.prefix_tokens} cached tokens{stages} = TTFT {format_duration(c.ttft_s)}"
        )

    def _decode(self) -> str:
        room = "" if self.has_room else ", once there is room"
        return f"decode on {self.decode} at TBT {format_duration(self.tbt_s or 0.0)} in a batch of {self.batch}{room}"


# --- Conductor ---------------------------------------------------------------------------------------------


class Reject(Command, frozen=True):
    """Early rejection, before any work is spent: HTTP 429 with `code` (machine-readable) and Retry-After.

    `code` is `queue_full`, `decode_full`, `slo_ttft`, `slo_tbt` or `overload`; or `too_large`: no instance can ever hold
    the request, so that trying again is in vain (HTTP 400, `retry_after_s` 0).
    """

    request_id: str
    code: str
    message: str
    retry_after_s: float
    decision: Decision


class Fail(Command, frozen=True):
    """The request cannot be answered: `no_instance` is left, or `attempts_exhausted`. HTTP 503."""

    request_id: str
    code: str
    message: str


class Prefill(Command, frozen=True):
    """Run the prompt on `instance`; keep decoding there when `decode` is the same instance, else hand off.

    `rank` is its place in the instance's queue, the least first; ranks of one conductor compare.
    """

    request_id: str
    instance: str
    decode: str
    candidate: Candidate
    decision: Decision
    rank: float = 0.0


class Decode(Command, frozen=True):
    """Take over the request, whose KV is complete, on `instance`."""

    request_id: str
    instance: str
    source: str


class Cancel(Command, frozen=True):
    """Stop working on the request on `instance` and release all that it holds."""

    request_id: str
    instance: str


class ShareCores(Command, frozen=True):
    """Prefills wait (or no longer wait) for the cores that decode instance `instance` uses: pause between its steps."""

    instance: str
    with_prefill: bool


class SetRole(Command, frozen=True):
    """From now on `instance` has another role. What it still does in the old one it brings to its end (drain)."""

    instance: str
    role: Role


class Replicate(Command, frozen=True):
    """Copy blocks, a prefix in order, from one node's DRAM to another's; best effort, in the background."""

    source: str
    target: str
    keys: tuple[BlockKey, ...]


class Resync(Command, frozen=True):
    """Block events of `node` were missed: ask its pool for the whole inventory, answered by the event Inventory."""

    node: str
