"""Reading through NIXL: RDMA and GPU fabrics where the machine has them, UCX over shared memory and TCP elsewhere.

A one-sided read that was given up may still write into our memory: seen with UCX over TCP and a peer that had stopped, long
after NIXL had said that the handle was released. So a read ends only when its transfers are done or failed; when they do not
end within `settle_s`, the whole agent is destroyed, which closes its connections and with them everything that could write.

For machines with RDMA. Where UCX falls back to TCP, TcpTransport is faster, and safer for the source: UCX emulates the read
there by messages from the source, and aborts the source's whole process when a reader goes in the middle (seen with the UCX
of NIXL 1.5.1).
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt
from nixl import _bindings as bindings
from nixl._api import nixl_agent, nixl_agent_config

from kvasir.core.errors import TransferError
from kvasir.store.arena import Arena
from kvasir.store.messenger.spans import Slice, SpanPair, check_spans, cut
from kvasir.store.messenger.transport import PeerArena, Priority

CHUNK_BYTES = 1 << 20
"""Bytes of one NIXL transfer: over shared memory the copy is done within the call, and the event loop waits for it."""

MAX_PIECES = 1024
DEPTH = 4
SPIN_POLLS = 50
PAUSE_S = 0.0005

PROGRESS_S = 0.002
"""How often a source looks after its side of transfers, where the hardware does not do it by itself."""

_ERRORS = (
    bindings.nixlBackendError,
    bindings.nixlCancelledError,
    bindings.nixlInvalidParamError,
    bindings.nixlMismatchError,
    bindings.nixlNotAllowedError,
    bindings.nixlNotFoundError,
    bindings.nixlNotPostedError,
    bindings.nixlNotSupportedError,
    bindings.nixlRemoteDisconnectError,
    bindings.nixlRepostActiveError,
    bindings.nixlUnknownError,
)
"""NIXL's errors have no base of their own."""


class _Failed(Exception):
    """NIXL said no."""


class NixlAddress(msgspec.Struct, frozen=True):
    """What a peer needs: the agent's metadata, and where its arena begins in its own address space."""

    agent: str
    metadata: bytes
    base: int


@dataclass(slots=True, eq=False)
class _Posted:
    """A transfer that NIXL works on; the handle itself is in the agent's table, so that nothing else keeps the agent alive."""

    handle: int
    piece: Slice


class NixlTransport:
    """Registers the arena with an agent of its own, by which others read from it and it reads from others.

    Needs UCX_TLS and UCX_NET_DEVICES only where UCX's own choice is wrong. `address` goes into PeerArena.nixl; it changes when
    a peer's stall has forced a new agent, so announce it anew after a `stalled` failure. Until then peers cannot read by it.
    """

    name = "nixl"

    def __init__(self, arena: Arena, *, settle_s: float = 1.0):
        self._arena = arena
        self._settle_s = settle_s
        self._incarnations = itertools.count()
        self._agent: _Agent | None = _Agent(arena, next(self._incarnations))
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(PROGRESS_S, self._progress)

    @property
    def address(self) -> bytes:
        agent = self._require_agent()
        return msgspec.msgpack.encode(agent.address)

    def reaches(self, peer: PeerArena) -> bool:
        return peer.nixl is not None

    async def read(
        self,
        peer: PeerArena,
        spans: Sequence[SpanPair],
        *,
        deadline_s: float,
        priority: Priority = Priority.FETCH,
        on_part: Callable[[int], None] | None = None,
    ) -> None:
        """See Transport. Reads of one peer share its path as UCX shares it; priorities mean nothing here."""
        check_spans(spans, peer.arena, self._arena.handle)
        if not spans:
            return
        agent = self._require_agent()
        remote = agent.connect(peer)
        posted: deque[_Posted] = deque()
        slices = cut(spans, max_bytes=CHUNK_BYTES, max_pieces=MAX_PIECES)
        failure = None
        try:
            async with asyncio.timeout_at(deadline_s):
                await _run(agent, remote, slices, posted, on_part)
        except TimeoutError:
            failure = TransferError(f"NIXL's read from node {peer.node} outlived its deadline", cause="stalled")
        except _Failed as error:
            failure = TransferError(f"NIXL's read from node {peer.node} failed: {error}", cause="cut")
            agent.disconnect(peer)
        finally:
            await self._settle(agent, posted)
        if failure is not None:
            raise failure

    async def close(self) -> None:
        """Ends all reads: they raise TransferError (cut)."""
        self._timer.cancel()
        if self._agent is not None:
            self._agent.destroy()
            self._agent = None

    async def _settle(self, agent: _Agent, posted: deque[_Posted]) -> None:
        """Return when none of these transfers can write any more, however often the caller is cancelled meanwhile."""
        give_up_s = self._loop.time() + self._settle_s
        is_cancelled = False
        while posted and agent.is_alive:
            posted = deque(p for p in posted if agent.may_write(p))
            if posted and self._loop.time() >= give_up_s:
                self._replace(agent)
                break
            try:
                await asyncio.sleep(PAUSE_S if posted else 0)
            except asyncio.CancelledError:
                is_cancelled = True
        if is_cancelled:
            raise asyncio.CancelledError

    def _replace(self, agent: _Agent) -> None:
        agent.destroy()
        if self._agent is agent:
            self._agent = _Agent(self._arena, next(self._incarnations))

    def _require_agent(self) -> _Agent:
        if self._agent is None:
            raise TransferError("the transport was closed", cause="refused")
        return self._agent

    def _progress(self) -> None:
        if self._agent is not None:
            self._agent.progress()
        self._timer = self._loop.call_later(PROGRESS_S, self._progress)


async def _run(
    agent: _Agent,
    remote: _Remote,
    slices: Iterator[Slice],
    posted: deque[_Posted],
    on_part: Callable[[int], None] | None,
) -> None:
    """Keep DEPTH transfers going and tell of them in order, until none is left."""
    polls = 0
    for piece in itertools.chain(slices, itertools.repeat(None)):
        if piece is not None:
            posted.append(agent.post(remote, piece))
        if piece is not None and len(posted) < DEPTH:
            continue
        while posted and agent.is_busy(posted[0]):
            polls += 1
            await asyncio.sleep(0 if polls < SPIN_POLLS else PAUSE_S)
        if not posted:
            return
        done, polls = posted.popleft(), 0
        if on_part is not None:
            on_part(done.piece.whole)


@dataclass(frozen=True, slots=True)
class _Remote:
    name: str
    base: int
    stride: int


class _Agent:
    """One NIXL agent over one arena, until it is destroyed."""

    def __init__(self, arena: Arena, incarnation: int):
        self._stride = arena.stride
        self._base = arena.memory.ctypes.data
        self._name = f"{arena.handle.id.hex()}.{incarnation}"
        self._nixl: nixl_agent | None = nixl_agent(self._name, nixl_agent_config(enable_prog_thread=False, backends=["UCX"]))
        self._memory = arena.memory
        self._registered = self._nixl.register_memory([(self._base, arena.memory.nbytes, 0, "arena")], "DRAM")
        self._handles: dict[int, object] = {}
        self._numbers = itertools.count()
        self._remotes: dict[bytes, _Remote] = {}
        self.address = NixlAddress(self._name, self._nixl.get_agent_metadata(), self._base)

    @property
    def is_alive(self) -> bool:
        return self._nixl is not None

    def connect(self, peer: PeerArena) -> _Remote:
        """The peer's agent, if it is the one of the arena that is meant."""
        assert peer.nixl is not None, "the messenger asks only transports that reach the peer"
        known = self._remotes.get(peer.nixl)
        address = msgspec.msgpack.decode(peer.nixl, type=NixlAddress)
        if address.agent.partition(".")[0] != peer.arena.id.hex():
            raise TransferError(f"node {peer.node} has another arena by now; was the pool restarted?", cause="stale_arena")
        if known is not None:
            return known
        try:
            with _told():
                name = self._require().add_remote_agent(address.metadata)
        except _Failed as error:
            raise TransferError(f"NIXL cannot connect to node {peer.node}: {error}", cause="refused") from None
        text = name.decode() if isinstance(name, bytes) else name
        remote = self._remotes[peer.nixl] = _Remote(text, address.base, peer.arena.stride)
        return remote

    def disconnect(self, peer: PeerArena) -> None:
        remote = self._remotes.pop(peer.nixl, None) if peer.nixl is not None else None
        if remote is not None and self._nixl is not None:
            with suppress(*_ERRORS):  # it may be gone already
                self._nixl.remove_remote_agent(remote.name)

    def post(self, remote: _Remote, piece: Slice) -> _Posted:
        """Begin a transfer; when it fails at once, `is_busy` says so."""
        nixl = self._require()
        places = np.array(piece.pieces, dtype=np.uint64).reshape(-1, 4)
        there = _places(remote.base, remote.stride, places[:, 0], places)
        here = _places(self._base, self._stride, places[:, 1], places)
        with _told():
            theirs, ours = nixl.get_xfer_descs(there, "DRAM"), nixl.get_xfer_descs(here, "DRAM")
            handle = nixl.initialize_xfer("READ", ours, theirs, remote.name, b"")
            number = next(self._numbers)
            self._handles[number] = handle
            nixl.transfer(handle)
        return _Posted(number, piece)

    def is_busy(self, posted: _Posted) -> bool:
        """False once it is done; raises _Failed when it failed. Either way it writes no more."""
        nixl = self._require()
        handle = self._handles.get(posted.handle)
        if handle is None:
            return False
        with _told():
            state = nixl.check_xfer_state(handle)
            if state == "PROC":
                return True
            del self._handles[posted.handle]
            nixl.release_xfer_handle(handle)
        if state == "ERR":
            raise _Failed("the transfer failed")
        return False

    def may_write(self, posted: _Posted) -> bool:
        """Whether it is still under way; what failed is not."""
        try:
            return self.is_busy(posted)
        except _Failed:
            self._handles.pop(posted.handle, None)
            return False

    def progress(self) -> None:
        with suppress(*_ERRORS):  # of others' connections; their readers hear of it
            self._require().get_new_notifs()

    def destroy(self) -> None:
        """Close everything. When this returns nothing writes into the arena; an AssertionError beats a false promise."""
        nixl, self._nixl = self._nixl, None
        if nixl is None:
            return
        while self._handles:
            with suppress(*_ERRORS):
                nixl.release_xfer_handle(self._handles.popitem()[1])
        self._remotes.clear()
        nixl.deregister_memory(self._registered)
        alive = weakref.ref(nixl.agent)
        del nixl, self._registered
        gc.collect()
        assert alive() is None, "somebody still holds NIXL's agent"

    def _require(self) -> nixl_agent:
        if self._nixl is None:
            raise _Failed("NIXL's agent was destroyed")
        return self._nixl


@contextmanager
def _told() -> Iterator[None]:
    """NIXL's errors as ours."""
    try:
        yield
    except _ERRORS as error:
        raise _Failed(str(error)) from None


def _places(base: int, stride: int, slots: npt.NDArray[np.uint64], places: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """NIXL's descriptors, N x (address, bytes, device)."""
    table = np.zeros((len(places), 3), dtype=np.uint64)
    table[:, 0] = np.uint64(base) + slots * np.uint64(stride) + places[:, 2]
    table[:, 1] = places[:, 3]
    return table
