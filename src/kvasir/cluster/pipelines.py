"""Chunked pipelines under way (FAST'25, section 3.3): who computes after whom, and when their memory may go back to the pool.

The pages of a pipeline's prompt and the slots of its mail are leases that nobody owns: on offer until the last stage takes the
pages over. Whichever stage dies, none of its fellows writes into slots that have become somebody else's. They go
back when every stage has done its part, has left, or is dead.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from msgspec.structs import replace

from kvasir.cluster.messages import ExtendRun, PipelineReady, RunRequest, StageComputed


def mail_of(run: str) -> str:
    """The name of the lease that holds the mail of a run."""
    return f"{run}/mail"


@dataclass(slots=True)
class _Pipeline:
    """`working`: who may write into its slots. `is_whole` until one of them leaves before the end, or nobody wants it."""

    request: RunRequest
    group: tuple[str, ...]
    node: str
    working: set[str]
    is_whole: bool = True


@dataclass(frozen=True, slots=True)
class Over:
    """Nobody writes for the run any more: these leases on `node` are to be released, where they are still on offer."""

    node: str
    leases: tuple[str, ...]


class Pipelines:
    """Told what became of each stage, it says whom to tell what. Of pipelines that are over it knows nothing."""

    def __init__(self) -> None:
        self._pipelines: dict[str, _Pipeline] = {}

    def begin(self, request: RunRequest, group: tuple[str, ...], node: str) -> None:
        """The last stage was sent `request`; the others of the group will have the same, each with its own stage."""
        self._pipelines[request.run] = _Pipeline(request, group, node, {group[-1]})

    def ready(self, message: PipelineReady) -> Iterator[tuple[str, RunRequest]]:
        """What to tell whom, now that there are pages."""
        pipeline = self._pipelines.get(message.run)
        if pipeline is None or not pipeline.is_whole:
            return
        for number, instance in enumerate(pipeline.group[:-1]):
            pipeline.working.add(instance)
            yield instance, replace(pipeline.request, stage=replace(message.plan, number=number))

    def computed(self, message: StageComputed) -> tuple[str, ExtendRun] | None:
        """The next stage, and what to tell it."""
        pipeline = self._pipelines.get(message.run)
        if pipeline is None or not pipeline.is_whole or message.instance == pipeline.group[-1]:
            return None
        following = pipeline.group[pipeline.group.index(message.instance) + 1]
        return following, ExtendRun(message.run, message.available)

    def done(self, message: StageComputed) -> Over | None:
        """A stage has said how far it is: with all of the prompt it writes nothing any more."""
        pipeline = self._pipelines.get(message.run)
        if pipeline is None or message.available < pipeline.request.num_tokens:
            return None
        return self._without(message.run, pipeline, message.instance)

    def left(self, run: str, instance: str) -> Over | None:
        """A stage has left before the end, or could not be reached."""
        pipeline = self._pipelines.get(run)
        if pipeline is None:
            return None
        pipeline.is_whole = False
        return self._without(run, pipeline, instance)

    def give_up(self, run: str) -> None:
        """Nobody wants this attempt any more, and its stages are told so. May be called of any run."""
        pipeline = self._pipelines.get(run)
        if pipeline is not None:
            pipeline.is_whole = False

    def lost(self, instance: str) -> list[Over]:
        """An instance is dead."""
        runs = [run for run, pipeline in self._pipelines.items() if instance in pipeline.working]
        return [over for run in runs if (over := self.left(run, instance)) is not None]

    def _without(self, run: str, pipeline: _Pipeline, instance: str) -> Over | None:
        """What was computed to the end belongs to the last stage by now, or to whom it was handed."""
        pipeline.working.discard(instance)
        if pipeline.working:
            return None
        del self._pipelines[run]
        return Over(pipeline.node, (mail_of(run),) if pipeline.is_whole else (mail_of(run), run))
