"""What an operator may ask of a running cluster: its latest decisions, an empty cache, pinned prefixes, quotas."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from uuid import uuid4

from kvasir.cluster.hub import Clock, Hub
from kvasir.cluster.messages import Message, OrderDone
from kvasir.cluster.names import pool_name
from kvasir.cluster.orders import ClearCache, Order, PinBlocks, PinPriority, SetTenantQuota, UnpinBlocks
from kvasir.cluster.service import PinStatus, TimedDecision
from kvasir.core.commands import Decision
from kvasir.core.errors import ClusterError, DeadlineExceeded, RequestError
from kvasir.core.keys import BlockKey, block_keys

MAX_DECISIONS = 1000
"""Decisions that are remembered."""
MAX_PINS = 1000
MAX_TENANTS = 10_000
DEADLINE_S = 5.0
"""Within this every pool answers, or the operator is told which did not."""

Tell = Callable[[str, Message], bool]
"""Delivers a message to a pool process by name and says whether it could."""


@dataclass(frozen=True, slots=True)
class _Pin:
    id: str
    keys: tuple[BlockKey, ...]
    num_tokens: int
    until_s: float
    priority: PinPriority
    tenant: str
    held: dict[str, int]


class Operator:
    """Implements `Admin` over a Hub and the pools that it knows."""

    def __init__(self, hub: Hub, tell: Tell, clock: Clock):
        self._hub = hub
        self._tell = tell
        self._clock = clock
        self._decisions: deque[Decision] = deque(maxlen=MAX_DECISIONS)
        self._pins: dict[str, _Pin] = {}
        self._quotas: dict[str, int] = {}
        self._ids = count(1)
        self._open: dict[tuple[str, int], asyncio.Future[OrderDone]] = {}
        hub.on_decision = self._decisions.append
        hub.on_pool = self._greet
        hub.on_order_done = self._take

    def decisions(self, limit: int) -> list[TimedDecision]:
        now = self._clock()
        latest = list(self._decisions)[-limit:] if limit else []
        return [TimedDecision(decision, now - decision.at_s) for decision in reversed(latest)]

    async def clear_cache(self) -> dict[str, int]:
        return await self._order(ClearCache(next(self._ids)))

    def pins(self) -> list[PinStatus]:
        self._forget_expired()
        return [self._status(pin) for pin in self._pins.values()]

    async def pin(self, prompt: list[int], *, salt: str, tenant: str, ttl_s: float, priority: PinPriority) -> PinStatus:
        self._forget_expired()
        spec = self._hub.spec
        keys = tuple(block_keys(spec.root_key(salt), prompt, spec.block_tokens))
        if not keys:
            message = f"nothing to pin: {len(prompt)} tokens are less than a block of {spec.block_tokens}"
            raise RequestError(message, param="prompt")
        if len(self._pins) >= MAX_PINS:
            raise RequestError(f"{MAX_PINS} pins exist; delete one first", status=409, code="too_many_pins")
        until_s = self._clock() + ttl_s
        held = await self._order(PinBlocks(next(self._ids), keys, ttl_s, priority))
        if not any(held.values()):
            message = "no block of this prompt is in DRAM; send it once, then pin it"
            raise RequestError(message, status=409, code="not_cached", param="prompt")
        pin = _Pin(uuid4().hex[:12], keys, len(prompt), until_s, priority, tenant, held)
        self._pins[pin.id] = pin
        return self._status(pin)

    async def unpin(self, pin_id: str) -> PinStatus:
        self._forget_expired()
        pin = self._pins.pop(pin_id, None)
        if pin is None:
            raise RequestError(f"no such pin: {pin_id[:50]!r}", status=404, code="pin_not_found")
        await self._order(UnpinBlocks(next(self._ids), pin.keys))
        for other in [other for other in self._pins.values() if other.keys[0] == pin.keys[0]]:
            await self._order(self._again(other))  # what they share was unpinned too
        return self._status(pin)

    async def set_quota(self, tenant: str, blocks: int | None) -> dict[str, int]:
        if blocks is not None and tenant not in self._quotas and len(self._quotas) >= MAX_TENANTS:
            raise RequestError(f"{MAX_TENANTS} tenants have quotas; remove one first", status=409, code="too_many_quotas")
        done = await self._order(SetTenantQuota(next(self._ids), tenant, blocks))
        if blocks is None:
            self._quotas.pop(tenant, None)
        else:
            self._quotas[tenant] = blocks
        return done

    def _greet(self, node: str) -> None:
        """A pool that starts knows of no pin and no quota. Its answers are nobody's."""
        self._forget_expired()
        for pin in self._pins.values():
            self._tell(pool_name(node), self._again(pin))
        for tenant, blocks in self._quotas.items():
            self._tell(pool_name(node), SetTenantQuota(next(self._ids), tenant, blocks))

    async def _order(self, order: Order) -> dict[str, int]:
        """Each node's number of blocks. Raises ClusterError when one cannot be reached, refuses, or does not answer in time."""
        nodes = sorted(self._hub.status().pools)
        if not nodes:
            raise ClusterError("no node has a pool yet; try again when the cluster is ready")
        waits = {node: self._sent(node, order) for node in nodes}
        try:
            async with asyncio.timeout(DEADLINE_S):
                done = [await wait for wait in waits.values()]
        except TimeoutError:
            silent = ", ".join(node for node, wait in waits.items() if not wait.done() or wait.cancelled())
            raise DeadlineExceeded(f"no answer from the pool of {silent} within {DEADLINE_S:g} s") from None
        finally:
            for node in nodes:
                self._open.pop((node, order.id), None)
        if errors := [f"{answer.node}: {answer.error}" for answer in done if answer.error is not None]:
            raise ClusterError("; ".join(errors))
        return {answer.node: answer.blocks for answer in done}

    def _sent(self, node: str, order: Order) -> asyncio.Future[OrderDone]:
        wait = self._open[node, order.id] = asyncio.get_running_loop().create_future()
        if not self._tell(pool_name(node), order):
            wait.set_result(OrderDone(node, order.id, error="cannot be reached; try again when it is there"))
        return wait

    def _take(self, done: OrderDone) -> None:
        wait = self._open.get((done.node, done.id))
        if wait is not None and not wait.done():
            wait.set_result(done)

    def _again(self, pin: _Pin) -> PinBlocks:
        return PinBlocks(next(self._ids), pin.keys, pin.until_s - self._clock(), pin.priority)

    def _status(self, pin: _Pin) -> PinStatus:
        ttl_s = max(0.0, pin.until_s - self._clock())
        return PinStatus(pin.id, pin.num_tokens, len(pin.keys), ttl_s, pin.priority, pin.tenant, pin.held)

    def _forget_expired(self) -> None:
        now = self._clock()
        for pin_id in [pin_id for pin_id, pin in self._pins.items() if pin.until_s <= now]:
            del self._pins[pin_id]
