"""The settings of `kvasir serve`: declared once, here; the TOML file and the command line both come from this tree."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta, Struct

from kvasir.cluster.wire import split_address
from kvasir.core.errors import ConfigError
from kvasir.core.units import parse_duration, parse_size
from kvasir.pool.policies import EVICTIONS

T = TypeVar("T")

TRANSPORTS = ("shm", "tcp", "nixl")

BUILTIN_MODEL = "kvasir-small"


def _about(text: str) -> Meta:
    return Meta(description=text)


class ServeConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that `kvasir serve` can be told. Sizes and durations are text with a unit (`4GiB`, `100ms`)."""

    model: Annotated[str, _about("Hugging Face checkpoint directory or name; the built-in model when left out.")] = (
        BUILTIN_MODEL
    )
    served_model_name: Annotated[
        str | None, _about("Name under which clients ask for the model (default: its directory's).")
    ] = None
    host: Annotated[str, _about("Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, _about("Port to listen on.")] = 8000
    api_key: Annotated[list[str], _about("A key that clients must send as `Authorization: Bearer`; may be repeated.")] = []
    admin_key: Annotated[
        list[str], _about("A key that opens /admin; without one it is open to this machine alone, and closed with --api-key.")
    ] = []
    prefill: Annotated[int | None, _about("Number of prefill instances (default 1, or 0 with --mixed).")] = None
    decode: Annotated[int | None, _about("Number of decode instances (default 1, or 0 with --mixed).")] = None
    mixed: Annotated[int, _about("Number of instances that prefill and decode.")] = 0
    dram: Annotated[str, _about("DRAM for KVCache on this node.")] = "4GiB"
    ssd: Annotated[str, _about("Room for KVCache on this node's SSD; it is still there after a restart. 0: none.")] = "0"
    ssd_path: Annotated[str | None, _about("Directory for it, on a disk of this node; needed with --ssd.")] = None
    ssd_read: Annotated[str, _about("What that disk reads a second, for predictions.")] = "1GB"
    listen_nodes: Annotated[
        str | None, _about("HOST:PORT where other nodes join this cluster; off by default, for private networks only.")
    ] = None
    join: Annotated[str | None, _about("HOST:PORT of a running cluster to join with this node's pool and instances.")] = None
    advertise: Annotated[str | None, _about("Address under which other nodes reach this one (default 127.0.0.1).")] = None
    transports: Annotated[
        str,
        _about(
            "How blocks of other nodes are read, best first: shm (same machine), tcp, nixl (RDMA; needs kvasir-serve[nixl])."
        ),
    ] = "shm,tcp"
    rack: Annotated[str, _about("Where this machine stands: nodes of one rack read blocks from each other first.")] = ""
    link_speed: Annotated[
        str | None,
        _about("What this machine's network carries a second (25GB): sources are chosen and transfers predicted by it."),
    ] = None
    block_tokens: Annotated[int, _about("Tokens in a block, the unit of the KVCache pool; a multiple of 16.")] = 64
    max_model_len: Annotated[int | None, _about("Longest prompt plus output, in tokens (default: the model's own limit).")] = (
        None
    )
    dtype: Annotated[Literal["auto", "bfloat16", "float32"], _about("auto, bfloat16 or float32.")] = "auto"
    engine: Annotated[
        Literal["torch", "fake"], _about("torch, or fake: predicted time instead of computation, for trying out traffic.")
    ] = "torch"
    device: Annotated[Literal["cpu", "cuda"], _about("cpu, or cuda: the instances of a node share its GPUs in turn.")] = "cpu"
    threads: Annotated[
        int | None, _about("Threads of each instance (default: all cores; instances share them by priority).")
    ] = None
    slo_ttft: Annotated[str, _about("Objective for the time to first token.")] = "30s"
    slo_tbt: Annotated[str, _about("Objective for the time between tokens.")] = "100ms"
    policy: Annotated[str, _about("Scheduler: kvasir, mooncake, local, least-loaded, ...; see docs/policies.md.")] = "kvasir"
    admission: Annotated[
        str | None, _about("Early rejection: off, slo, predictive, ... (default: the policy's; kvasir's is predictive).")
    ] = None
    roles: Annotated[
        str | None,
        _about(
            "static, or elastic: instances change roles as the load asks (default: the policy's; static on a CPU, where the"
            " instances of a machine share its cores by priority)."
        ),
    ] = None
    stages: Annotated[
        int,
        _about(
            "A prompt that one instance cannot answer in time is prefilled by a pipeline of up to so many on a node (1: never);"
            " for instances with a GPU each, or --threads to themselves. Policy kvasir, models with a forward of our own."
        ),
    ] = 1
    eviction: Annotated[
        str | None, _about("Which block goes when space is needed: lru, lfu, length-aware, cost-aware (default: the policy's).")
    ] = None
    max_queue: Annotated[int, _about("Most requests waiting for their prefill at once; more are rejected with 429.")] = 1024
    max_batch: Annotated[int, _about("Most sequences decoding together in an instance.")] = 64
    chunk_tokens: Annotated[int, _about("Most new tokens in one step: the size of a prefill chunk.")] = 512
    request_timeout: Annotated[str, _about("Longest that one request may take.")] = "10m"
    profile: Annotated[str | None, _about("Cost profile written by `kvasir profile` (default: this machine's, if there).")] = (
        None
    )
    seed: Annotated[int, _about("Seed of policies that draw.")] = 0
    record: Annotated[
        str | None, _about("Write to this file what the conductor is told, so that its decisions can be replayed; no prompts.")
    ] = None
    kv_events: Annotated[
        str | None,
        _about(
            "Publish block events in vLLM's format here (tcp://127.0.0.1:5557); off by default. They hold the prompts' token"
            " ids: for private networks only."
        ),
    ] = None
    kv_events_replay: Annotated[
        str | None, _about("Repeat block events here to subscribers that missed some (tcp://127.0.0.1:5558).")
    ] = None
    kv_events_shape: Annotated[
        Literal["array", "map"], _about("Block events as arrays, as vLLM wrote them first, or as maps, as later versions do.")
    ] = "array"
    kv_events_hashes: Annotated[
        Literal["int", "bytes"], _about("Block hashes as 64-bit integers, vLLM's default, or as whole keys.")
    ] = "int"
    log_level: Annotated[Literal["debug", "info", "warning", "error"], _about("debug, info, warning or error.")] = "info"
    log_json: Annotated[bool, _about("Log as JSON lines.")] = False

    def __post_init__(self) -> None:
        _check(self)

    @property
    def split(self) -> tuple[int, int, int]:
        """How many prefill, decode and mixed instances to start; 1 + 1 when nothing was said."""
        default = 0 if self.mixed else 1
        prefill = default if self.prefill is None else self.prefill
        decode = default if self.decode is None else self.decode
        return prefill, decode, self.mixed

    @property
    def role_rule(self) -> str | None:
        """None: the policy's. On a CPU a prefill engine is started at the lowest priority, and stays there."""
        return "static" if self.roles is None and self.device == "cpu" else self.roles

    @property
    def dram_bytes(self) -> int:
        return parse_size(self.dram)

    @property
    def ssd_bytes(self) -> int:
        return 0 if self.ssd == "0" else parse_size(self.ssd)

    @property
    def ssd_read_bandwidth(self) -> float:
        """Bytes per second; 0 without an SSD."""
        return float(parse_size(self.ssd_read)) if self.ssd_bytes else 0.0

    @property
    def link_bytes_s(self) -> float:
        """0 when it was not declared."""
        return float(parse_size(self.link_speed)) if self.link_speed is not None else 0.0

    @property
    def transport_names(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.transports.split(","))

    @property
    def advertised(self) -> str:
        return self.advertise or "127.0.0.1"


def load_config(path: Path | None, flags: dict[str, Any]) -> ServeConfig:
    """The file's settings with the flags laid over them; unknown keys and wrong types raise ConfigError."""
    values = _read_toml(path) if path is not None else {}
    if path is not None:
        _converted(values, f"{path}: ")
    values.update({name: value for name, value in flags.items() if value is not None})
    return _converted(values, "")


def _converted(values: dict[str, Any], where: str) -> ServeConfig:
    try:
        return msgspec.convert(values, ServeConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(where + _in_our_words(str(error), values)) from error


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read config file {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    return {name.replace("-", "_"): value for name, value in values.items()}


def _in_our_words(message: str, values: dict[str, Any]) -> str:
    """msgspec's message, with the flag, the value and what would be right."""
    if "unknown field" in message:
        return f"{message}; known keys: {', '.join(ServeConfig.__struct_fields__)}"
    name = message.rpartition("`$.")[2].rstrip("`").partition("[")[0]
    if name not in values:
        return message
    kind = get_args(get_type_hints(ServeConfig, include_extras=True)[name])[0]
    choices = (
        f"one of {', '.join(get_args(kind))}" if get_origin(kind) is Literal else f"{kind}".replace("<class '", "").rstrip("'>")
    )
    return f"--{name.replace('_', '-')} must be {choices}, got {values[name]!r}"


def _check(config: ServeConfig) -> None:
    def require(ok: bool, message: str) -> None:
        if not ok:
            raise ConfigError(message)

    prefill, decode, mixed = config.split
    for name, count in (("prefill", prefill), ("decode", decode), ("mixed", mixed)):
        require(0 <= count <= 64, f"--{name} must be between 0 and 64, got {count}")
    if config.join is None and config.listen_nodes is None:
        require(prefill + mixed > 0, "no instance can prefill: give --prefill or --mixed at least 1")
        require(decode + mixed > 0, "no instance can decode: give --decode or --mixed at least 1")
    require(prefill + decode + mixed > 0, "a node needs an instance: give --prefill, --decode or --mixed at least 1")
    require(0 <= config.port <= 65535, f"--port must be between 0 and 65535, got {config.port}")
    require(
        config.block_tokens >= 16 and config.block_tokens % 16 == 0,
        f"--block-tokens must be a multiple of 16, got {config.block_tokens}",
    )
    require(config.threads is None or config.threads >= 1, f"--threads must be at least 1, got {config.threads}")
    require(
        config.max_model_len is None or config.max_model_len >= 2,
        f"--max-model-len must be at least 2, got {config.max_model_len}",
    )
    for name in ("chunk_tokens", "max_batch", "max_queue", "stages"):
        value = getattr(config, name)
        require(value >= 1, f"--{name.replace('_', '-')} must be at least 1, got {value}")
    require(config.dram_bytes > 0, f"--dram must be positive, got {config.dram}")
    require(config.link_speed is None or config.link_bytes_s > 0, f"--link-speed must be positive, got {config.link_speed}")
    require(config.ssd_bytes == 0 or config.ssd_path is not None, f"--ssd {config.ssd} needs --ssd-path DIRECTORY")
    require(config.join is None or config.listen_nodes is None, "--join and --listen-nodes exclude each other: join the head")
    for transport in config.transport_names:
        require(transport in TRANSPORTS, f"--transports must be some of {','.join(TRANSPORTS)}, got {config.transports!r}")
    if config.eviction is not None:
        choose("eviction", config.eviction, EVICTIONS)
    require(config.stages == 1 or config.join is None, "--stages: the head decides; give it there")
    require(config.kv_events is None or config.join is None, "--kv-events: the head publishes for all nodes; give it there")
    require(config.kv_events is not None or config.kv_events_replay is None, "--kv-events-replay needs --kv-events")
    for name in ("kv_events", "kv_events_replay"):
        if (address := getattr(config, name)) is not None:
            flag = name.replace("_", "-")
            require(address.startswith("tcp://"), f"--{flag} must be tcp://HOST:PORT, got {address!r}")
            split_address(flag, address.removeprefix("tcp://"))
    for name in ("join", "listen_nodes"):
        if (address := getattr(config, name)) is not None:
            split_address(name.replace("_", "-"), address)
    require(
        config.chunk_tokens > config.max_batch,
        f"--chunk-tokens must exceed --max-batch ({config.max_batch}), got {config.chunk_tokens}",
    )
    for name in ("slo_ttft", "slo_tbt", "request_timeout"):
        value = getattr(config, name)
        require(parse_duration(value) > 0, f"--{name.replace('_', '-')} must be positive, got {value}")


def choose(name: str, value: str, choices: Mapping[str, T]) -> T:
    """The entry of a table that a setting names. Raises ConfigError with what there is."""
    if value not in choices:
        raise ConfigError(f"--{name} must be one of {', '.join(choices)}, got {value!r}")
    return choices[value]
