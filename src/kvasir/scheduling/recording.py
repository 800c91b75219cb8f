"""What brains were told, as JSON lines, and its replay: fresh brains, told the same at the same times, say the same.

A recording holds sizes, block keys and times; no prompt and no token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from random import Random
from typing import Protocol

import msgspec
from msgspec import Struct

from kvasir.core import events as ev
from kvasir.core.batcher_commands import BatcherCommand
from kvasir.core.commands import Command
from kvasir.core.errors import ConfigError
from kvasir.core.request import Slo
from kvasir.costs.fitted import FittedCost
from kvasir.costs.roofline import RooflineCost
from kvasir.scheduling.conductor import Conductor
from kvasir.scheduling.conductor_config import ConductorConfig
from kvasir.scheduling.strategy import strategy

ConductorEvent = (
    ev.Arrived
    | ev.PrefillDone
    | ev.Finished
    | ev.Aborted
    | ev.Failed
    | ev.InstanceJoined
    | ev.InstanceLost
    | ev.BlocksStored
    | ev.BlocksRemoved
    | ev.Inventory
    | ev.NodeLost
    | ev.Heartbeat
    | ev.Tick
)
BatcherEvent = ev.Submitted | ev.Extended | ev.StepDone | ev.Cancelled | ev.PagesGranted | ev.Tick


class Recorded(Struct, frozen=True, tag=True):
    """`brain` (`conductor`, or the instance whose batcher it is) was told of `event` at `at_s`."""

    brain: str
    at_s: float
    event: ConductorEvent | BatcherEvent


class ConductorSetup(Struct, frozen=True, tag=True):
    """All that a live Conductor is made of: the first line of a recording of it."""

    policy: str
    admission: str | None
    roles: str | None
    chunk_tokens: int
    config: ConductorConfig
    costs: FittedCost | RooflineCost
    slo: Slo
    seed: int

    def make(self) -> Conductor:
        """A fresh one. Raises ConfigError for a policy or a part that is not known."""
        scheduler = strategy(self.policy).with_parts(admission=self.admission, roles=self.roles)
        return scheduler.live(self.chunk_tokens).conductor(self.config, self.costs, self.slo, Random(self.seed))


Said = Command | BatcherCommand


class Brain(Protocol):
    """Conductor or Batcher."""

    def handle(self, event: ev.Event, now: float) -> Sequence[Said]: ...


Line = ConductorSetup | Recorded

_decoder = msgspec.json.Decoder(Line)


def line_of(record: Line) -> bytes:
    """One newline-terminated line of a recording."""
    return msgspec.json.encode(record) + b"\n"


def heard(brain: str, event: ev.Event, now: float) -> bytes:
    """The line that says what `brain` was told."""
    return line_of(Recorded(brain, now, event))  # type: ignore[arg-type]


def read_recording(lines: Iterable[bytes]) -> Iterator[Line]:
    """The inverse of `line_of`. Raises ConfigError naming the line that is not one."""
    for number, line in enumerate(lines, start=1):
        try:
            yield _decoder.decode(line)
        except (msgspec.DecodeError, UnicodeError) as error:
            raise ConfigError(f"recording line {number}: {error}; expected what `kvasir serve --record` writes") from None


def replay(brain: Brain, records: Iterable[Recorded]) -> list[Sequence[Said]]:
    """What `brain` says to each event. Give a fresh brain the events of one that was fresh."""
    return [brain.handle(record.event, record.at_s) for record in records]
