"""Bytes on their way: flows share the bandwidth of what they pass, in virtual time.

A flow gets the least of its equal shares at the pipes it passes: the sender's out side and the receiver's in side, or one side
of an SSD. That is less than max-min fair sharing gives (a share that another flow cannot use is lost), and it makes a
start or an end change only the flows that share a pipe with it.
"""

from __future__ import annotations

from collections.abc import Callable

from mypy_extensions import mypyc_attr

from kvasir.simulator.agenda import NEVER_S, Agenda, Planned


class Pipe:
    """One direction of a NIC or of an SSD, in bytes per second. Each of its flows has a `share` of that, or less."""

    __slots__ = ("bandwidth", "flows", "share")

    def __init__(self, bandwidth: float):
        self.bandwidth = bandwidth
        self.share = bandwidth
        self.flows: dict[Flow, None] = {}


Pipes = tuple[Pipe] | tuple[Pipe, Pipe]
"""What a flow passes: one side of an SSD, or a NIC's out side and another's in side."""


class Flow:
    """`left` bytes as of `since_s`, at `rate`, so that the last is sent at `ends_s`; `then` is called `latency_s` after that.

    The agenda looks at it at `looks_s`, which is no later than `ends_s`. `fail` is for whoever breaks it.
    """

    __slots__ = (
        "ends_s",
        "fail",
        "first",
        "is_active",
        "last",
        "latency_s",
        "left",
        "looks_s",
        "rate",
        "since_s",
        "then",
        "version",
    )

    def __init__(self, pipes: Pipes, num_bytes: float, latency_s: float, then: Callable[[Flow], None], now: float):
        self.first, self.last = pipes[0], pipes[-1]
        self.left = num_bytes
        self.latency_s = latency_s
        self.then = then
        self.fail: Callable[[], None] | None = None
        self.rate = 0.0
        self.since_s = now
        self.ends_s = self.looks_s = NEVER_S
        self.version = 0
        self.is_active = True

    def forget(self) -> None:
        """It is over: let go of whoever refers to it, so that no garbage is left to collect."""
        self.then, self.fail = _nothing, None


def _nothing(_: Flow) -> None:
    return


class Network:
    """All flows of a simulation."""

    __slots__ = ("_agenda", "num_active", "num_bytes", "num_flows")

    def __init__(self, agenda: Agenda):
        self._agenda = agenda
        self.num_flows = 0
        self.num_active = 0
        self.num_bytes = 0.0

    def start(self, pipes: Pipes, num_bytes: float, then: Callable[[Flow], None], *, latency_s: float = 0.0) -> Flow:
        flow = Flow(pipes, num_bytes, latency_s, then, self._agenda.now)
        self.num_flows += 1
        self.num_active += 1
        self.num_bytes += num_bytes
        flow.first.flows[flow] = flow.last.flows[flow] = None
        self._share(flow.first, flow.last)
        return flow

    def extend(self, flow: Flow, num_bytes: float) -> None:
        """More bytes for an active flow."""
        self.num_bytes += num_bytes
        self._settle(flow)
        flow.left += num_bytes
        self._plan(flow)

    def stop(self, flow: Flow) -> None:
        """Void the flow, whether its bytes are sent or not: `then` is not called any more."""
        flow.version += 1
        if flow.is_active:
            self._leave(flow)
        flow.forget()

    def set_bandwidth(self, pipe: Pipe, bandwidth: float) -> None:
        pipe.bandwidth = bandwidth
        self._share(pipe, pipe)

    def ends_s(self, flow: Flow) -> float:
        """When the flow will have arrived, as things are."""
        if not flow.is_active:
            return self._agenda.now
        return flow.ends_s + flow.latency_s

    def _share(self, first: Pipe, last: Pipe) -> None:
        """Give every flow through one of these pipes the rate that it has now."""
        first.share = first.bandwidth / (len(first.flows) or 1)
        last.share = last.bandwidth / (len(last.flows) or 1)
        self._adjust(first)
        if last is not first:
            self._adjust(last)

    def _adjust(self, pipe: Pipe) -> None:
        now = self._agenda.now
        for flow in pipe.flows:
            rate, other = flow.first.share, flow.last.share
            if other < rate:
                rate = other
            if rate != flow.rate:  # settle and plan, written out: it is done for every flow that shares a pipe
                left = flow.left - flow.rate * (now - flow.since_s)
                if left < 0.0:
                    left = 0.0
                flow.left, flow.since_s, flow.rate = left, now, rate
                flow.ends_s = ends_s = now + left / rate
                if ends_s < flow.looks_s:
                    flow.version += 1
                    self._look(flow)

    def _settle(self, flow: Flow) -> None:
        now = self._agenda.now
        flow.left = max(0.0, flow.left - flow.rate * (now - flow.since_s))
        flow.since_s = now

    def _plan(self, flow: Flow) -> None:
        """Rates fall as often as they rise: a later end is planned only when the earlier one has come."""
        flow.ends_s = self._agenda.now + flow.left / flow.rate
        if flow.ends_s < flow.looks_s:
            flow.version += 1
            self._look(flow)

    def _look(self, flow: Flow) -> None:
        flow.looks_s = flow.ends_s
        self._agenda.plan(flow.ends_s, _Sent(self, flow, flow.version))

    def sent(self, flow: Flow, version: int) -> None:
        """Its last byte should have left by now."""
        if flow.version != version:
            return
        if flow.ends_s > self._agenda.now:
            self._look(flow)
            return
        self._leave(flow)
        if flow.latency_s:
            self._agenda.plan(self._agenda.now + flow.latency_s, _Arrived(self, flow, version))
        else:
            self.arrived(flow, version)

    def arrived(self, flow: Flow, version: int) -> None:
        """Its last byte should have come by now."""
        if flow.version == version:
            flow.then(flow)
            flow.forget()

    def _leave(self, flow: Flow) -> None:
        flow.is_active = False
        self.num_active -= 1
        flow.left = 0.0
        first, last = flow.first, flow.last
        del first.flows[flow]
        if last is not first:
            del last.flows[flow]
        self._share(first, last)


@mypyc_attr(acyclic=True)
class _Sent(Planned):
    __slots__ = ("flow", "network", "version")

    def __init__(self, network: Network, flow: Flow, version: int):
        super().__init__()
        self.network = network
        self.flow = flow
        self.version = version

    def happen(self) -> None:
        self.network.sent(self.flow, self.version)


@mypyc_attr(acyclic=True)
class _Arrived(_Sent):
    __slots__ = ()

    def happen(self) -> None:
        self.network.arrived(self.flow, self.version)
