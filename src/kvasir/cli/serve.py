"""`kvasir serve`: a disaggregated cluster on this machine, behind one OpenAI-compatible address."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import typer
from rich.console import Console

from kvasir.cli.costs import load_costs
from kvasir.cli.options import options_of, with_options
from kvasir.cluster.config import ServeConfig, load_config
from kvasir.cluster.hub import Clock, Hub, Send
from kvasir.cluster.joined import JoinedNode
from kvasir.cluster.kv_events import KvEventPublisher, kv_event_publisher
from kvasir.cluster.local import LocalCluster, fit_to_pool
from kvasir.cluster.messages import Progress
from kvasir.cluster.model import check_stages, model_spec
from kvasir.cluster.operator import Operator
from kvasir.core.errors import ConfigError
from kvasir.core.events import Event
from kvasir.core.request import Slo
from kvasir.core.units import format_size, parse_duration
from kvasir.costs.fitted import FittedCost
from kvasir.costs.roofline import RooflineCost
from kvasir.engine.interface import ModelSpec
from kvasir.gateway.app import make_app
from kvasir.gateway.config import GatewayConfig
from kvasir.gateway.server import serve_http
from kvasir.gateway.tokenizer import Tokenizer
from kvasir.scheduling.conductor_config import ConductorConfig
from kvasir.scheduling.recording import ConductorSetup, heard, line_of
from kvasir.telemetry import logs

Listener = Callable[[Event, float], object]
"""For `Hub.on_event`."""

READY_DEADLINE_S = 600.0
DRAIN_S = 5.0
"""How long answers that run may go on after the first Ctrl-C; a second one ends everything at once."""


@with_options(options_of(ServeConfig, but=("model",)))
def serve(
    model: Annotated[str | None, typer.Argument(help="Checkpoint directory or name; the built-in model when left out.")] = None,
    config: Annotated[Path | None, typer.Option("--config", help="Settings as TOML; flags win over it.")] = None,
    **flags: Any,
) -> None:
    """Start the KVCache pool, prefill, decode and mixed instances, the conductor and the gateway; stop them on Ctrl-C.

    Without a model the small built-in one is served:

        kvasir serve

        kvasir serve ./Qwen3-0.6B --prefill 1 --decode 1 --dram 8GiB --slo-ttft 10s --slo-tbt 50ms

        curl localhost:8000/v1/chat/completions -d '{"messages": [{"role": "user", "content": "What is a tuple?"}]}'

    A second node joins the first one's cluster with its pool and instances; Ctrl-C there drains it:

        kvasir serve --listen-nodes 10.0.0.1:8100 --advertise 10.0.0.1

        kvasir serve --join 10.0.0.1:8100 --advertise 10.0.0.2
    """
    settings = load_config(config, {"model": model, **flags})
    asyncio.run(run_server(settings) if settings.join is None else run_joined(settings))


async def run_server(config: ServeConfig) -> None:
    """Serve until SIGINT or SIGTERM, or until the cluster cannot go on. Raises KvasirError."""
    logs.setup(config.log_level, json=config.log_json)
    screen = _Screen(config)
    stop = _stop_on_signals()
    whole = model_spec(config)
    spec = fit_to_pool(whole, config)
    check_stages(config, spec)
    screen.model(spec)
    if spec.max_model_len < whole.max_model_len:
        screen.say(f"--dram {config.dram} limits the context to {spec.max_model_len:,} of {whole.max_model_len:,} tokens")
    costs = _costs(config, spec)
    tokenizer = Tokenizer.load(spec.path)
    gateway = GatewayConfig(
        served_model_name=spec.name,
        api_keys=tuple(config.api_key),
        admin_keys=tuple(config.admin_key),
        slo=Slo(parse_duration(config.slo_ttft), parse_duration(config.slo_tbt)),
    )
    publisher = kv_event_publisher(config, spec)
    with _recording(config) as log:
        make_hub = _hub_maker(config, spec, costs, log, publisher)
        cluster = LocalCluster(config, spec, costs, make_hub, on_progress=screen.progress)
        operator = Operator(cluster.hub, cluster.tell, asyncio.get_running_loop().time)
        app = make_app(cluster.hub, tokenizer, gateway, operator)
        # in this order, so that answers that run may end before the cluster does
        publishing = nullcontext() if publisher is None else publisher.running()
        serving = serve_http(app, config.host, config.port, stop_timeout_s=DRAIN_S)
        async with publishing, cluster.running(), serving as port:
            await _first_of(cluster.ready(READY_DEADLINE_S), stop.wait())
            if not stop.is_set():
                screen.ready(cluster, port)
                await _first_of(cluster.wait_failed(), stop.wait())
            screen.say("stopping")


async def run_joined(config: ServeConfig) -> None:
    """Work for the cluster that was joined until SIGINT or SIGTERM, or until its head says goodbye. Raises KvasirError."""
    logs.setup(config.log_level, json=config.log_json)
    screen = _Screen(config)
    stop = _stop_on_signals()
    spec = model_spec(config)
    screen.model(spec)

    def joined(node: str) -> None:
        screen.say(f"[bold green]joined[/bold green] {config.join} as [bold]{node}[/bold]; Ctrl-C drains it and leaves")

    await JoinedNode(config, spec, _costs(config, spec), leave=stop, on_joined=joined).run()
    screen.say("left the cluster")


def _hub_maker(
    config: ServeConfig,
    spec: ModelSpec,
    costs: FittedCost | RooflineCost,
    log: BinaryIO | None,
    publisher: KvEventPublisher | None,
) -> Callable[[Send, Clock], Hub]:
    setup = ConductorSetup(
        policy=config.policy,
        admission=config.admission,
        roles=config.role_rule,
        chunk_tokens=config.chunk_tokens,
        config=ConductorConfig(
            kv_bytes_per_token=spec.shape.kv_bytes_per_token,
            block_tokens=spec.block_tokens,
            max_queued=config.max_queue,
            shares_cores=config.device == "cpu",
            load_bandwidth=config.ssd_read_bandwidth,
            max_stages=config.stages,
            stages_on_one_node=True,
        ),
        costs=costs,
        slo=Slo(parse_duration(config.slo_ttft), parse_duration(config.slo_tbt)),
        seed=config.seed,
    )
    conductor = setup.make()

    def make(send: Send, clock: Clock) -> Hub:
        hub = Hub(spec, conductor, send=send, clock=clock, request_timeout_s=parse_duration(config.request_timeout))
        listeners: list[Listener] = []
        if log is not None:
            log.write(line_of(setup))
            listeners.append(lambda event, now: log.write(heard("conductor", event, now)))
        if publisher is not None:
            hub.on_blocks = publisher.learn
            listeners.append(lambda event, now: publisher.hear(event))
        hub.on_event = _all_of(listeners)
        return hub

    return make


def _all_of(listeners: list[Listener]) -> Listener:
    def tell(event: Event, now: float) -> None:
        for listener in listeners:
            listener(event, now)

    return tell


def _recording(config: ServeConfig) -> AbstractContextManager[BinaryIO | None]:
    if config.record is None:
        return nullcontext()
    try:
        return Path(config.record).open("wb")
    except OSError as error:
        raise ConfigError(f"--record: cannot write {config.record}: {error.strerror}") from None


def _stop_on_signals() -> asyncio.Event:
    """Set by the first SIGINT or SIGTERM; a second one ends the process at once, and its children notice."""
    stop = asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            os._exit(130)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    return stop


async def _first_of(*waits: Coroutine[Any, Any, object]) -> None:
    """Wait for one of them and cancel the others; what it raised is raised."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
    for task in done:
        task.result()


class _Screen:
    """What the operator sees, on stderr: one line a milestone, and a live line of progress on a terminal."""

    def __init__(self, config: ServeConfig):
        self._config = config
        self._console = Console(stderr=True, highlight=False)
        self._parts: dict[str, Progress] = {}
        self._status = self._console.status("starting") if self._console.is_terminal else None
        self._started = time.monotonic()

    def say(self, text: str) -> None:
        if self._status is not None:
            self._status.stop()
        self._console.print(text)

    def model(self, spec: ModelSpec) -> None:
        size, kv = f"{spec.shape.num_params / 1e6:.0f}M parameters", format_size(spec.shape.kv_bytes_per_token)
        self.say(f"[bold]{spec.name}[/bold]: {spec.architecture}, {size}, {spec.dtype}, {kv} of KV a token")
        prefill, decode, mixed = self._config.split
        ssd = f", {self._config.ssd} SSD" if self._config.ssd_bytes else ""
        self.say(
            f"starting pool ({self._config.dram} DRAM{ssd}) and instances: {prefill} prefill, {decode} decode, {mixed} mixed"
        )
        if self._status is not None:
            self._status.start()

    def progress(self, progress: Progress) -> None:
        self._parts[progress.name] = progress
        if self._status is not None:
            self._status.update("  ".join(f"{p.name}: {p.what} {p.fraction:.0%}" for p in self._parts.values()))

    def ready(self, cluster: LocalCluster, port: int) -> None:
        config = self._config
        tokens = cluster.num_slots * config.block_tokens
        self.say(f"pool holds {tokens:,} tokens in {cluster.num_slots:,} blocks of {config.block_tokens}")
        seconds = time.monotonic() - self._started
        host = f"[{config.host}]" if ":" in config.host else config.host
        self.say(f"[bold green]ready[/bold green] after {seconds:.1f} s: http://{host}:{port}/v1")
        if cluster.cluster_address is not None:
            self.say(f"nodes join with: kvasir serve MODEL --join {cluster.cluster_address.removeprefix('tcp://')}")
            if not cluster.hub.status().ready:
                self.say("waiting for nodes: no instance here prefills, or none decodes")
        self.say("docs at /docs, metrics at /metrics; Ctrl-C stops everything")


def _costs(config: ServeConfig, spec: ModelSpec) -> FittedCost | RooflineCost:
    return load_costs(config.profile, spec, device=config.device, link_bytes_s=config.link_bytes_s)
