"""The `kvasir replay` command: flags in, table or JSON out."""

import asyncio
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from kvasir.cli.files import check_writable, write
from kvasir.cli.replay.completion import Endpoint
from kvasir.cli.replay.http import Server
from kvasir.cli.replay.load import Progress, Target, run_load
from kvasir.cli.replay.model_card import probe, usable_token_ids
from kvasir.cli.replay.outcome import Outcome
from kvasir.cli.replay.progress import shown
from kvasir.cli.replay.workload import Shape, fitting, load_trace, shaped
from kvasir.core.errors import ConfigError
from kvasir.core.request import Slo
from kvasir.core.units import parse_duration
from kvasir.workload.content import BlockContent
from kvasir.workload.trace import Trace

_EXIT_NOTHING_SERVED = 1
_EXIT_INTERRUPTED = 130


def replay(
    trace: Annotated[str, typer.Argument(help="A Mooncake trace (JSONL), or synthetic:conversation[?seed=3&requests=200].")],
    url: Annotated[str, typer.Option(help="The server, any OpenAI-compatible one.")] = "http://127.0.0.1:8000",
    speed: Annotated[float, typer.Option(help="How many times as fast requests arrive.")] = 1.0,
    scale_length: Annotated[float, typer.Option(help="How many times as long prompts are; sharing survives.")] = 1.0,
    limit: Annotated[int | None, typer.Option(help="Send only the first N requests.")] = None,
    start: Annotated[str, typer.Option(help="Begin this far into the trace.")] = "0s",
    model: Annotated[str | None, typer.Option(help="Model name; default: the server's only one.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="KVASIR_API_KEY", help="Bearer token.", show_envvar=True)] = None,
    endpoint: Annotated[Endpoint, typer.Option(help="chat sends words instead of token ids: lengths are approximate.")] = (
        Endpoint.COMPLETIONS
    ),
    slo_ttft: Annotated[str, typer.Option(help="Longest time to first token.")] = "30s",
    slo_tbt: Annotated[str, typer.Option(help="Longest mean of a request's longest 10 % of token gaps.")] = "100ms",
    output_scale: Annotated[float | None, typer.Option(help="Like --scale-length, for outputs; default: the same.")] = None,
    max_output: Annotated[int | None, typer.Option(help="No output longer than N tokens.")] = None,
    vocab_size: Annotated[int | None, typer.Option(help="The model's, if the server does not tell.")] = None,
    seed: Annotated[int, typer.Option(help="Another seed, other prompts: none hits an earlier replay's cache.")] = 0,
    timeout: Annotated[str, typer.Option(help="Give up on a request after this.")] = "10m",
    max_in_flight: Annotated[int | None, typer.Option(help="At most N at a time; makes the load closed-loop there.")] = None,
    ignore_eos: Annotated[bool, typer.Option(help="Ask for outputs of the trace's exact length (vLLM, Kvasir).")] = True,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table: vllm bench serve's keys.")] = False,
    save_result: Annotated[Path | None, typer.Option(help="Write that JSON to a file as well.")] = None,
    save_requests: Annotated[Path | None, typer.Option(help="Write every request's timeline, JSONL.")] = None,
) -> None:
    """Replay a trace against a server, and say how many requests met their latency objectives.

    Requests go out at the trace's times however the server does (open loop). A rejection (429) is counted with its
    reason and is not a failure. Ctrl-C stops the sending and reports what happened so far.

    A small machine replays the shape of big traffic, here 12,000-token prompts as 1,500 tokens, twice as fast:

        kvasir replay synthetic:conversation --scale-length 0.125 --speed 2 --limit 200
    """
    plan = _Plan(
        trace=_read(trace, Shape(parse_duration(start), limit, speed, scale_length, output_scale, max_output)),
        server=Server.parse(url, (("Authorization", f"Bearer {api_key}"),) if api_key else ()),
        model=model,
        endpoint=endpoint,
        vocab_size=vocab_size,
        seed=seed,
        timeout_s=parse_duration(timeout),
        max_in_flight=max_in_flight,
        ignore_eos=ignore_eos,
        slo=Slo(parse_duration(slo_ttft), parse_duration(slo_tbt)),
    )
    check_writable(save_result, save_requests)
    outcome = asyncio.run(_replay(plan))
    _write(outcome, as_json=json, save_result=save_result, save_requests=save_requests)
    if outcome.load.was_stopped:
        raise typer.Exit(_EXIT_INTERRUPTED)
    if outcome.summary.failures and not outcome.summary.num_completed:
        raise typer.Exit(_EXIT_NOTHING_SERVED)


@dataclass(frozen=True, slots=True)
class _Plan:
    """The flags, parsed."""

    trace: Trace
    server: Server
    model: str | None
    endpoint: Endpoint
    vocab_size: int | None
    seed: int
    timeout_s: float
    max_in_flight: int | None
    ignore_eos: bool
    slo: Slo

    def __post_init__(self) -> None:
        if self.max_in_flight is not None and self.max_in_flight < 1:
            raise ConfigError(f"not a --max-in-flight: {self.max_in_flight}; expected at least 1")
        if self.timeout_s <= 0:
            raise ConfigError(f"not a --timeout: {self.timeout_s:g} s; expected more than 0")


def _read(source: str, shape: Shape) -> Trace:
    trace = load_trace(source)
    if trace.num_unsorted:
        _note(f"{trace.num_unsorted} requests of {source} came out of order; sorted by timestamp")
    return shaped(trace, shape)


async def _replay(plan: _Plan) -> Outcome:
    card = await probe(plan.server, plan.model)
    fit = fitting(plan.trace, card.max_model_len)
    token_ids = usable_token_ids(plan.vocab_size or card.vocab_size)
    content = BlockContent(plan.endpoint.vocabulary(token_ids), plan.trace.block_tokens, plan.seed)
    target = Target(
        plan.server,
        card.name,
        plan.endpoint,
        ignore_eos=plan.ignore_eos,
        timeout_s=plan.timeout_s,
        max_in_flight=plan.max_in_flight,
    )
    progress = Progress()
    with _interrupts() as stop:
        async with shown(progress, len(fit.requests)):
            load = await run_load(fit.requests, content, target, stop=stop, progress=progress)
    return Outcome.of(card.name, load, fit, plan.slo)


@contextmanager
def _interrupts() -> Iterator[asyncio.Event]:
    """An event that Ctrl-C sets, for as long as the block runs."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, stop.set)
    try:
        yield stop
    finally:
        loop.remove_signal_handler(signal.SIGINT)


def _write(outcome: Outcome, *, as_json: bool, save_result: Path | None, save_requests: Path | None) -> None:
    result = msgspec.json.format(msgspec.json.encode(outcome.to_json()))
    for warning in outcome.warnings():
        _note(warning)
    typer.echo(result if as_json else outcome.table())
    if save_result is not None:
        write(save_result, [result, b"\n"])
    if save_requests is not None:
        write(save_requests, outcome.request_lines())


def _note(text: str) -> None:
    typer.echo(f"note: {text}", err=True)
