"""Runs the choices of a job on the cluster and turns their tokens into text, piece by piece."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from time import monotonic

from kvasir.cluster.service import Output, Rejected, Service
from kvasir.core.errors import ClusterError
from kvasir.core.request import FinishReason
from kvasir.engine.interface import SampledToken
from kvasir.gateway.job import Job
from kvasir.gateway.stops import StopStrings
from kvasir.gateway.tokenizer import Tokenizer
from kvasir.report.timeline import RequestRecord
from kvasir.telemetry.metrics import Metrics


@dataclass(slots=True)
class Piece:
    """What one output of the cluster adds to choice `index`. `tokens` are those whose text is in the answer."""

    index: int
    text: str
    tokens: list[SampledToken]
    finish: str | None


Emit = Callable[[Piece], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Backend:
    """What an answer is made with."""

    service: Service
    tokenizer: Tokenizer
    metrics: Metrics


class Choice:
    """One answer to one prompt: a submission, its text so far, its times."""

    def __init__(self, job: Job, index: int, backend: Backend):
        self.index = index
        self.cached_tokens: int | None = None
        self.token_times_s: list[float] = []
        self.first_token = asyncio.Event()
        self._submission = job.submission(index)
        self._backend = backend
        self._stop_ids = frozenset(job.stop_tokens)
        if not job.ignore_eos:
            self._stop_ids |= frozenset(backend.service.spec.eos_token_ids)
        self._detokenizer = backend.tokenizer.detokenizer(self._submission.prompt)
        self._stops = StopStrings(job.stops)

    async def run(self, emit: Emit, *, arrival_s: float) -> None:
        """Emit pieces until the last one, which has a `finish`. Leaving early aborts the request on the cluster."""
        outputs = self._backend.service.submit(self._submission)
        finish = None
        try:
            async for output in outputs:
                piece = self._take(output, arrival_s)
                finish = piece.finish or finish
                await emit(piece)
                if self._stops.hit is not None:
                    break
        except Rejected as error:
            self._backend.metrics.rejected(error.reject.code)
            raise
        finally:
            if isinstance(outputs, AsyncGenerator):
                await outputs.aclose()
        if finish is None:
            raise ClusterError("the answer ended without a reason")
        self.first_token.set()  # an answer may end without any token; whoever waits for one waits no longer
        self._backend.metrics.finished(self.record(arrival_s), finish)

    async def run_after(self, first: Choice, emit: Emit) -> None:
        """Run once `first` has its first token, so that this choice finds the prompt's KV in the pool."""
        await first.first_token.wait()
        await self.run(emit, arrival_s=monotonic())

    def record(self, arrival_s: float) -> RequestRecord:
        """What happened so far."""
        return RequestRecord(
            id=self._submission.request_id,
            arrival_s=arrival_s,
            input_tokens=len(self._submission.prompt),
            output_tokens=len(self.token_times_s),
            cached_tokens=self.cached_tokens,
            token_times_s=tuple(self.token_times_s),
        )

    def _take(self, output: Output, arrival_s: float) -> Piece:
        self._note_times(output, arrival_s)
        text, tokens = "", []
        for token in output.tokens:
            if output.finish_reason is FinishReason.STOP and token is output.tokens[-1] and token.token in self._stop_ids:
                break  # the token that ends an answer is counted but not shown
            tokens.append(token)
            text += self._stops.push(self._detokenizer.push(token.token))
            if self._stops.hit is not None:
                return Piece(self.index, text, tokens, "stop")
        if output.finish_reason is None:
            return Piece(self.index, text, tokens, None)
        return self._last_piece(text, tokens, output.finish_reason)

    def _last_piece(self, text: str, tokens: list[SampledToken], reason: FinishReason) -> Piece:
        if reason not in (FinishReason.STOP, FinishReason.LENGTH):
            raise ClusterError(f"the answer was {reason.value} on the cluster")
        text += self._stops.push(self._detokenizer.flush())
        is_hit = self._stops.hit is not None
        return Piece(self.index, text if is_hit else text + self._stops.flush(), tokens, "stop" if is_hit else reason.value)

    def _note_times(self, output: Output, arrival_s: float) -> None:
        now, metrics, count = monotonic(), self._backend.metrics, len(output.tokens)
        if output.cached_tokens is not None and self.cached_tokens is None:
            self.cached_tokens = output.cached_tokens
            metrics.prefix_looked_up(tokens=len(self._submission.prompt), hit_tokens=output.cached_tokens)
        if not count:
            return
        if self.token_times_s:
            metrics.tokens_came(count, gap_s=now - self.token_times_s[-1])
        else:
            metrics.first_token_came(count, ttft_s=now - arrival_s, prompt_tokens=len(self._submission.prompt))
            self.first_token.set()
        self.token_times_s.extend([now] * count)


async def generate(choices: list[Choice], n: int, emit: Emit, *, arrival_s: float) -> None:
    """Run all choices; of each prompt the first one alone until its first token. The first failure ends them all."""
    if len(choices) == 1:
        await choices[0].run(emit, arrival_s=arrival_s)
        return
    try:
        async with asyncio.TaskGroup() as group:
            for choice in choices:
                first = choices[choice.index - choice.index % n]
                group.create_task(choice.run(emit, arrival_s=arrival_s) if choice is first else choice.run_after(first, emit))
    except BaseExceptionGroup as failures:
        raise first_of(failures) from None


def first_of(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first failure in a group, without the groups around it."""
    error = group.exceptions[0]
    return first_of(error) if isinstance(error, BaseExceptionGroup) else error
