"""What the gateway adds to a token: emit time in a fake cluster to arrival at a client in another process.

All streams get their tokens at the same instant, as one decode step makes them, so a token also waits for its neighbours.

    python benchmarks/gateway.py --streams 32 --step-ms 20
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import selectors
import socket
import statistics
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import cast

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from kvasir.cluster.service import ClusterStatus, Output, Submission
from kvasir.core.request import FinishReason
from kvasir.costs.shape import ModelShape
from kvasir.engine.interface import ModelSpec, SampledToken
from kvasir.gateway.app import make_app
from kvasir.gateway.config import GatewayConfig
from kvasir.gateway.server import serve_http
from kvasir.gateway.tokenizer import Tokenizer
from kvasir.telemetry.logs import setup

PROMPT = "the quick brown fox jumps over the lazy dog " * 12
OUTPUT_TOKENS = 128
END_OF_BODY = b"0\r\n\r\n"
MAX_PAUSE_S = 0.1
ROUND_STRIDE = 10_000
"""A request's seed is stream + round * ROUND_STRIDE: how both sides name it."""


@dataclass
class TickingService:
    """Gives the first token at once and then one to every stream at each tick."""

    spec: ModelSpec
    step_s: float
    puts: dict[int, Callable[[float], None]] = field(default_factory=dict)
    submit_s: dict[int, float] = field(default_factory=dict)
    emit_s: dict[int, list[float]] = field(default_factory=dict)

    async def submit(self, submission: Submission) -> AsyncGenerator[Output, None]:
        seed = submission.sampling.seed
        assert seed is not None
        now = time.monotonic()
        self.submit_s[seed] = now
        times = self.emit_s[seed] = [now]
        queue: asyncio.Queue[float] = asyncio.Queue()
        self.puts[seed] = queue.put_nowait
        token = SampledToken(submission.prompt[1])
        yield Output([token], cached_tokens=0)
        try:
            for position in range(1, submission.max_tokens):
                times.append(await queue.get())
                reason = FinishReason.LENGTH if position == submission.max_tokens - 1 else None
                yield Output([token], finish_reason=reason)
        finally:
            del self.puts[seed]

    def status(self) -> ClusterStatus:
        return ClusterStatus(ready=True, reason="", instances=(), pools={})

    async def tick(self) -> None:
        """A decode step every `step_s`, for ever."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            due += self.step_s
            await asyncio.sleep(due - loop.time())
            now = time.monotonic()
            for put in list(self.puts.values()):
                put(now)


def tiny_tokenizer() -> Tokenizer:
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator([PROMPT], trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    return Tokenizer(core)


def tiny_spec(vocab: int) -> ModelSpec:
    return ModelSpec(
        name="tiny",
        path="",
        identity="",
        architecture="",
        shape=ModelShape(1, 1, 1, 1, 1, 1, vocab, 1, 4),
        dtype="float32",
        layout="",
        block_tokens=16,
        max_model_len=4096,
        eos_token_ids=(),
    )


# --- the client: one thread, raw sockets, so that it measures the gateway and not itself ---------------------


def request_bytes(seed: int) -> bytes:
    body = {"model": "tiny", "prompt": PROMPT, "stream": True, "max_tokens": OUTPUT_TOKENS, "seed": seed, "ignore_eos": True}
    raw = json.dumps(body).encode()
    return (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(raw)
        + raw
    )


@dataclass
class Stream:
    """One connection that sends request after request."""

    index: int
    sock: socket.socket
    rounds: int
    round: int = 0
    begin_at_s: float = 0.0
    sent_s: dict[int, float] = field(default_factory=dict)
    arrived_s: dict[int, list[float]] = field(default_factory=dict)

    def begin(self) -> None:
        self.begin_at_s = math.inf
        seed = self.index + self.round * ROUND_STRIDE
        self.arrived_s[seed] = []
        raw = request_bytes(seed)
        self.sent_s[seed] = time.monotonic()
        self.sock.sendall(raw)

    def receive(self) -> bool:
        """Take what came; false when all rounds are done."""
        now = time.monotonic()
        data = self.sock.recv(65536)
        assert data, "the server closed the connection"
        self.arrived_s[self.index + self.round * ROUND_STRIDE] += [now] * data.count(b'"choices"')
        if not data.endswith(END_OF_BODY):
            return True
        self.round += 1
        # not at once, or every request would arrive in the burst of tokens that ended the one before
        self.begin_at_s = time.monotonic() + random.uniform(0.0, MAX_PAUSE_S)
        return self.round < self.rounds


def run_client(port: int, streams: int, rounds: int, step_s: float) -> None:
    """Run all streams, beginning them at different phases; prints what was sent and what arrived as JSON."""
    selector = selectors.DefaultSelector()
    all_streams = []
    for index in range(streams):
        stream = Stream(index, socket.create_connection(("127.0.0.1", port)), rounds)
        stream.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        stream.begin_at_s = time.monotonic() + index / streams * OUTPUT_TOKENS * step_s
        selector.register(stream.sock, selectors.EVENT_READ, stream)
        all_streams.append(stream)
    while selector.get_map():
        pump(selector, all_streams)
    sent = {seed: at for stream in all_streams for seed, at in stream.sent_s.items()}
    arrived = {seed: at for stream in all_streams for seed, at in stream.arrived_s.items()}
    json.dump({"sent": sent, "arrived": arrived}, sys.stdout)


def pump(selector: selectors.BaseSelector, streams: list[Stream]) -> None:
    next_begin_s = min(stream.begin_at_s for stream in streams)
    for key, _ in selector.select(min(1.0, max(0.0, next_begin_s - time.monotonic()))):
        if not key.data.receive():
            key.data.begin_at_s = math.inf
            selector.unregister(key.fileobj)
    for stream in streams:
        if stream.begin_at_s <= time.monotonic():
            stream.begin()


# --- the measurement -----------------------------------------------------------------------------------------


class BareConnection(asyncio.Protocol):
    """The floor: the same bytes at the same ticks, written to the socket without parsing, text or HTTP in between."""

    def __init__(self, service: TickingService):
        self._service = service
        self._request = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance

    def data_received(self, data: bytes) -> None:
        self._request += data
        if not self._request.endswith(b"}"):
            return
        seed = json.loads(self._request.partition(b"\r\n\r\n")[2])["seed"]
        self._request = b""
        now = time.monotonic()
        self._service.submit_s[seed] = now
        times = self._service.emit_s[seed] = []
        chunk = b"x" * 150 + b'"choices"\n\n'

        def put(now: float) -> None:
            times.append(now)
            is_last = len(times) == OUTPUT_TOKENS
            if is_last:
                del self._service.puts[seed]
            self._transport.write(chunk + END_OF_BODY if is_last else chunk)

        self._service.puts[seed] = put
        put(now)


@asynccontextmanager
async def serve_bare(service: TickingService) -> AsyncIterator[int]:
    server = await asyncio.get_running_loop().create_server(lambda: BareConnection(service), "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


Rows = dict[str, float]


async def measure(arguments: argparse.Namespace, *, is_bare: bool) -> Rows:
    tokenizer = tiny_tokenizer()
    service = TickingService(tiny_spec(tokenizer.vocab_size), arguments.step_ms / 1e3)
    app = make_app(service, tokenizer, GatewayConfig())
    ticking = asyncio.create_task(service.tick())
    async with serve_bare(service) if is_bare else serve_http(app, "127.0.0.1", 0, stop_timeout_s=1) as port:
        cpu = time.process_time()
        options = [
            f"--client={port}",
            f"--streams={arguments.streams}",
            f"--rounds={arguments.rounds}",
            f"--step-ms={arguments.step_ms}",
        ]
        child = await asyncio.create_subprocess_exec(sys.executable, __file__, *options, stdout=asyncio.subprocess.PIPE)
        out, _ = await child.communicate()
        cpu = time.process_time() - cpu
    ticking.cancel()
    return summary(service, json.loads(out), cpu)


def summary(service: TickingService, client: dict[str, dict[str, list[float]]], cpu_s: float) -> Rows:
    sent, arrived = client["sent"], client["arrived"]
    token_ms: list[float] = []
    inbound_ms: list[float] = []
    ttft_ms: list[float] = []
    for seed, emitted in service.emit_s.items():
        times = arrived[str(seed)]
        assert len(times) == len(emitted) == OUTPUT_TOKENS, f"{len(times)} of {len(emitted)} tokens arrived"
        token_ms += [(there - here) * 1e3 for here, there in zip(emitted[1:], times[1:], strict=True)]
        at = sent[str(seed)]
        assert isinstance(at, float)
        inbound_ms.append((service.submit_s[seed] - at) * 1e3)
        ttft_ms.append((times[0] - at) * 1e3)
    num_tokens = len(token_ms) + len(ttft_ms)
    rows: Rows = {"tokens": num_tokens, "requests": len(ttft_ms), "cpu_us_per_token": cpu_s / num_tokens * 1e6}
    for name, values in (("token", token_ms), ("request_in", inbound_ms), ("ttft", ttft_ms)):
        cuts = statistics.quantiles(values, n=100)
        rows |= {f"{name}_median_ms": cuts[49], f"{name}_p90_ms": cuts[89], f"{name}_p99_ms": cuts[98]}
    return rows


def table(rows: Rows, floor: Rows) -> str:
    names = {"token": "token, emitted to arrived", "request_in": "request, sent to submitted", "ttft": "TTFT, sent to arrived"}
    lines = [f"{'':<28}{'gateway':^30}{'bare sockets':^30}", f"{'':<28}" + f"{'median':>10}{'p90':>10}{'p99':>10}" * 2]
    for name, text in names.items():
        cells = "".join(f"{side[f'{name}_{cut}_ms']:>7.2f} ms" for side in (rows, floor) for cut in ("median", "p90", "p99"))
        lines.append(f"{text:<28}{cells}")
    lines.append(f"{'CPU per token':<28}{rows['cpu_us_per_token']:>7.1f} µs{'':<20}{floor['cpu_us_per_token']:>7.1f} µs")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3, help="requests per stream")
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--client", type=int, metavar="PORT", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.client is not None:
        run_client(given.client, given.streams, given.rounds, given.step_ms / 1e3)
        return
    setup("warning", json=False)
    with asyncio.Runner() as runner:
        rows = runner.run(measure(given, is_bare=False))
        floor = runner.run(measure(given, is_bare=True))
    parser_name = "h11" if find_spec("httptools") is None else "httptools"
    if given.json:
        print(
            json.dumps(
                {"streams": given.streams, "step_ms": given.step_ms, "http": parser_name, "gateway": rows, "bare": floor},
                indent=2,
            )
        )
        return
    print(f"{given.streams} streams, a step of {given.step_ms:g} ms, {rows['tokens']} tokens; {parser_name}")
    print(table(rows, floor))


if __name__ == "__main__":
    main()
