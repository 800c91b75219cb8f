"""What an operator may ask of a running cluster: its latest decisions, an empty cache, pinned prefixes, quotas."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from uuid import uuid4

from kvasir.cluster.hub import Clock, Hub
from kvasir.cluster.messages import Message
from kvasir.cluster.names import pool_name
from kvasir.cluster.orders import ClearCache, PinBlocks, SetTenantQuota, UnpinBlocks
from kvasir.cluster.service import PinStatus, TimedDecision
from kvasir.core.commands import Decision
from kvasir.core.errors import ClusterError, RequestError
from kvasir.core.keys import BlockKey, block_keys

MAX_DECISIONS = 1000
"""Decisions that are remembered."""
MAX_PINS = 1000
MAX_TENANTS = 10_000

Tell = Callable[[str, Message], bool]
"""Delivers a message to a pool process by name and says whether it could."""


@dataclass(frozen=True, slots=True)
class _Pin:
    id: str
    keys: tuple[BlockKey, ...]
    num_tokens: int
    until_s: float
    priority: int
    tenant: str


class Operator:
    """Implements `Admin` over a Hub and the pools that it knows."""

    def __init__(self, hub: Hub, tell: Tell, clock: Clock):
        self._hub = hub
        self._tell = tell
        self._clock = clock
        self._decisions: deque[Decision] = deque(maxlen=MAX_DECISIONS)
        self._pins: dict[str, _Pin] = {}
        self._quotas: dict[str, int] = {}
        hub.on_decision = self._decisions.append
        hub.on_pool = self._greet

    def decisions(self, limit: int) -> list[TimedDecision]:
        now = self._clock()
        latest = list(self._decisions)[-limit:] if limit else []
        return [TimedDecision(decision, now - decision.at_s) for decision in reversed(latest)]

    def clear_cache(self) -> list[str]:
        return self._tell_all(ClearCache())

    def pins(self) -> list[PinStatus]:
        self._forget_expired()
        return [self._status(pin) for pin in self._pins.values()]

    def pin(self, prompt: list[int], *, salt: str, tenant: str, ttl_s: float, priority: int) -> PinStatus:
        self._forget_expired()
        spec = self._hub.spec
        keys = tuple(block_keys(spec.root_key(salt), prompt, spec.block_tokens))
        if not keys:
            message = f"nothing to pin: {len(prompt)} tokens are less than a block of {spec.block_tokens}"
            raise RequestError(message, param="prompt")
        if len(self._pins) >= MAX_PINS:
            raise RequestError(f"{MAX_PINS} pins exist; delete one first", status=409, code="too_many_pins")
        pin = _Pin(uuid4().hex[:12], keys, len(prompt), self._clock() + ttl_s, priority, tenant)
        self._tell_all(PinBlocks(keys, ttl_s, priority))
        self._pins[pin.id] = pin
        return self._status(pin)

    def unpin(self, pin_id: str) -> PinStatus:
        self._forget_expired()
        pin = self._pins.pop(pin_id, None)
        if pin is None:
            raise RequestError(f"no such pin: {pin_id[:50]!r}", status=404, code="pin_not_found")
        self._tell_all(UnpinBlocks(pin.keys))
        for other in self._pins.values():
            if set(other.keys) & set(pin.keys):
                self._tell_all(self._order(other))
        return self._status(pin)

    def set_quota(self, tenant: str, blocks: int | None) -> list[str]:
        if blocks is None:
            self._quotas.pop(tenant, None)
        elif tenant in self._quotas or len(self._quotas) < MAX_TENANTS:
            self._quotas[tenant] = blocks
        else:
            raise RequestError(f"{MAX_TENANTS} tenants have quotas; remove one first", status=409, code="too_many_quotas")
        return self._tell_all(SetTenantQuota(tenant, blocks))

    def _greet(self, node: str) -> None:
        """A pool that starts knows of no pin and no quota."""
        self._forget_expired()
        for pin in self._pins.values():
            self._tell(pool_name(node), self._order(pin))
        for tenant, blocks in self._quotas.items():
            self._tell(pool_name(node), SetTenantQuota(tenant, blocks))

    def _tell_all(self, order: Message) -> list[str]:
        """The nodes that were told. Raises ClusterError when one could not be, or there is none."""
        nodes = sorted(self._hub.status().pools)
        deaf = [node for node in nodes if not self._tell(pool_name(node), order)]
        if deaf or not nodes:
            raise ClusterError(f"cannot reach the pool of {', '.join(deaf) or 'any node'}; try again when it is there")
        return nodes

    def _order(self, pin: _Pin) -> PinBlocks:
        return PinBlocks(pin.keys, pin.until_s - self._clock(), pin.priority)

    def _status(self, pin: _Pin) -> PinStatus:
        ttl_s = max(0.0, pin.until_s - self._clock())
        return PinStatus(pin.id, pin.num_tokens, len(pin.keys), ttl_s, pin.priority, pin.tenant)

    def _forget_expired(self) -> None:
        now = self._clock()
        for pin_id in [pin_id for pin_id, pin in self._pins.items() if pin.until_s <= now]:
            del self._pins[pin_id]
