"""The open-loop load: every request is sent at its time, however the server does, and its tokens are timed."""

import asyncio
import contextlib
from dataclasses import dataclass, field

from kvasir.cli.replay.completion import Endpoint, StreamReading, error_code_of_body, request_body
from kvasir.cli.replay.http import Disconnected, Exchange, ProtocolError, Server, exchange
from kvasir.cli.replay.sse import SseParser
from kvasir.report.timeline import RequestRecord, Status
from kvasir.workload.content import BlockContent
from kvasir.workload.trace import TraceRequest

_MAX_ERROR_BYTES = 64 * 1024

_BODIES_AHEAD = 64
"""Bodies made before their time: twice the largest burst of the published traces, so that a burst goes out at once."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where the load goes and how each request is put."""

    server: Server
    model: str
    endpoint: Endpoint = Endpoint.COMPLETIONS
    ignore_eos: bool = True
    timeout_s: float = 600.0
    max_in_flight: int | None = None


@dataclass(slots=True)
class Progress:
    """Where the load stands; owned by the load, read by whoever shows it."""

    records: list[RequestRecord] = field(default_factory=list)
    send_delays_s: list[float] = field(default_factory=list)
    num_in_flight: int = 0
    num_rejected: int = 0
    num_failed: int = 0

    def add(self, record: RequestRecord) -> None:
        self.records.append(record)
        self.num_rejected += record.status is Status.REJECTED
        self.num_failed += record.status is Status.FAILED


@dataclass(frozen=True, slots=True)
class LoadResult:
    """Every request that was sent, in order of sending; how late each was; the seconds it all took."""

    records: tuple[RequestRecord, ...]
    send_delays_s: tuple[float, ...]
    duration_s: float
    was_stopped: bool


async def run_load(
    requests: tuple[TraceRequest, ...],
    content: BlockContent,
    target: Target,
    *,
    stop: asyncio.Event,
    progress: Progress | None = None,
) -> LoadResult:
    """Send every request at its time after the first one's; `stop` ends the sending and aborts what is in flight.

    Times in the records are seconds on the trace's clock. `progress` is kept up to date for whoever shows it.
    """
    load = _Load(requests, content, target, stop=stop, progress=progress or Progress())
    await load.run()
    return load.result()


class _Load:
    """One run of `run_load`."""

    def __init__(
        self,
        requests: tuple[TraceRequest, ...],
        content: BlockContent,
        target: Target,
        *,
        stop: asyncio.Event,
        progress: Progress,
    ):
        self._requests = requests
        self._content = content
        self._target = target
        self._stop = stop
        self._progress = progress
        self._slots = asyncio.Semaphore(target.max_in_flight or len(requests))
        self._bodies: asyncio.Queue[bytes] = asyncio.Queue(_BODIES_AHEAD)
        self._tasks: list[asyncio.Task[None]] = []
        self._loop_time = asyncio.get_running_loop().time
        self._first_s = requests[0].arrival_s
        self._zero = self._loop_time() - self._first_s

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            background = [group.create_task(self._make_bodies()), group.create_task(self._abort_on_stop())]
            for number, request in enumerate(self._requests):
                body = await self._bodies.get()
                if not await self._reach(request.arrival_s):
                    break
                self._tasks.append(group.create_task(self._send(number, request, body)))
            if self._tasks:
                await asyncio.wait(self._tasks)
            for task in background:
                task.cancel()

    def result(self) -> LoadResult:
        records = sorted(self._progress.records, key=lambda record: int(record.id))
        return LoadResult(
            records=tuple(records),
            send_delays_s=tuple(self._progress.send_delays_s),
            duration_s=self._clock() - self._first_s,
            was_stopped=self._stop.is_set(),
        )

    def _clock(self) -> float:
        return self._loop_time() - self._zero

    async def _make_bodies(self) -> None:
        target = self._target
        for request in self._requests:
            prompt = self._content.prompt(request)
            length = request.output_tokens
            body = request_body(target.endpoint, target.model, prompt, length, ignore_eos=target.ignore_eos)
            await self._bodies.put(body)
            await asyncio.sleep(0)  # arriving tokens are timed between two bodies

    async def _reach(self, due_s: float) -> bool:
        """Wait until `due_s` and for a free slot; False if stopped before."""
        if self._clock() < due_s:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(due_s + self._zero):
                    await self._stop.wait()
        if not self._stop.is_set():
            await self._slots.acquire()
        return not self._stop.is_set()

    async def _abort_on_stop(self) -> None:
        await self._stop.wait()
        for task in self._tasks:
            task.cancel()

    async def _send(self, number: int, request: TraceRequest, body: bytes) -> None:
        arrival_s = self._clock()
        self._progress.send_delays_s.append(max(0.0, arrival_s - request.arrival_s))
        reading = StreamReading()
        end = _End(Status.ABORTED, "interrupted")
        self._progress.num_in_flight += 1
        try:
            async with asyncio.timeout(self._target.timeout_s):
                end = await self._stream(body, reading)
        except (OSError, ProtocolError, Disconnected) as error:
            end = _End(Status.FAILED, _word(error))
        finally:
            self._progress.num_in_flight -= 1
            self._slots.release()
            self._progress.add(_record(number, request, arrival_s, reading, end))

    async def _stream(self, body: bytes, reading: StreamReading) -> "_End":
        target = self._target
        async with exchange(target.server, "POST", target.endpoint.path, body) as answer:
            if answer.status != 200:
                return await _refusal(answer)
            events = SseParser()
            async for piece in answer.body():
                now = self._clock()
                for payload in events.feed(piece):
                    reading.read(payload, now)
        if reading.error is not None:
            return _End(Status.FAILED, reading.error)
        if not reading.is_complete:
            return _End(Status.FAILED, "disconnected")
        return _End(Status.OK) if reading.arrivals else _End(Status.FAILED, "no_tokens")


@dataclass(frozen=True, slots=True)
class _End:
    """How a request ended."""

    status: Status
    reason: str | None = None


async def _refusal(answer: Exchange) -> _End:
    """A status other than 200: overload (429) is a rejection, anything else a failure."""
    body = bytearray()
    async for piece in answer.body():
        body += piece
        if len(body) > _MAX_ERROR_BYTES:
            break
    status = Status.REJECTED if answer.status == 429 else Status.FAILED
    return _End(status, error_code_of_body(bytes(body), f"http_{answer.status}"))


def _word(error: OSError | ProtocolError | Disconnected) -> str:
    """A stable word for a request that got no whole answer."""
    match error:
        case TimeoutError():
            return "timeout"
        case Disconnected() | ConnectionResetError() | BrokenPipeError():
            return "disconnected"
        case ConnectionRefusedError():
            return "connection_refused"
        case ProtocolError():
            return "bad_response"
        case _:
            return "connection_error"


def _record(number: int, request: TraceRequest, arrival_s: float, reading: StreamReading, end: _End) -> RequestRecord:
    token_times_s = reading.token_times_s()
    return RequestRecord(
        id=str(number),
        arrival_s=arrival_s,
        input_tokens=request.input_tokens if reading.num_prompt_tokens is None else reading.num_prompt_tokens,
        output_tokens=len(token_times_s) if reading.num_output_tokens is None else reading.num_output_tokens,
        cached_tokens=reading.num_cached_tokens,
        token_times_s=token_times_s,
        status=end.status,
        reason=end.reason,
    )
