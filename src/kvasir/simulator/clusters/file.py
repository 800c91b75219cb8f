"""What a cluster file may say: one typed table, checked at the edge, with the nearest known key in the error."""

from __future__ import annotations

import re
import tomllib
from difflib import get_close_matches
from typing import Any

import msgspec
from msgspec import Struct

from kvasir.core.errors import ConfigError
from kvasir.costs.shape import ModelShape


class ModelTable(ModelShape, frozen=True, forbid_unknown_fields=True):
    """A ModelShape written out."""


class HardwareTable(Struct, frozen=True, forbid_unknown_fields=True):
    """A node's hardware: fields of `costs.hardware.Hardware` laid over the one that `base` names, if any.

    Bandwidths are bytes/s or text (`80GB/s`), memory is bytes or text (`80GB`).
    """

    base: str | None = None
    name: str | None = None
    source: str | None = None
    devices: int | None = None
    flops: float | None = None
    memory_bandwidth: float | str | None = None
    memory_bytes: int | str | None = None
    network_bandwidth: float | str | None = None
    network_latency_s: float | None = None
    flops_efficiency: float | None = None
    memory_efficiency: float | None = None
    prefill_overhead_s: float | None = None
    step_overhead_s: float | None = None
    dram_bytes: int | str | None = None
    ssd_bytes: int | str | None = None
    ssd_read_bandwidth: float | str | None = None
    ssd_write_bandwidth: float | str | None = None


class ProfileTable(Struct, frozen=True, forbid_unknown_fields=True):
    """Costs measured by `kvasir profile`."""

    profile: str


class NodeTable(Struct, frozen=True, forbid_unknown_fields=True):
    """`count` nodes that differ from the rest; what is left out is as at the top of the file."""

    count: int = 1
    dram: int | str | None = None
    ssd: int | str | None = None
    ssd_read: float | str | None = None
    ssd_write: float | str | None = None
    network: float | str | None = None
    network_latency: float | str | None = None


class ClusterTable(Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file; docs/howto/simulate.md says what each key means."""

    name: str
    model: str | ModelTable
    hardware: str | HardwareTable
    nodes: int | list[NodeTable]
    split: str
    instances: int = 1
    memory: str = "device"
    costs: str | ProfileTable = "roofline"
    block_tokens: int = 512
    dram: int | str | None = None
    ssd: int | str = 0
    ssd_read: float | str | None = None
    ssd_write: float | str | None = None
    network: float | str | None = None
    network_latency: float | str | None = None
    max_batch: int = 256
    heartbeat: float | str = "1s"
    report_delay: float | str = "0s"
    hand_off: float | str = "0s"
    step_noise: list[float] = []
    stages: int | None = None
    stages_on_one_node: bool = False


def parse(text: str) -> ClusterTable:
    """The file's table. Raises ConfigError, in one line, for what is not TOML, an unknown key or a wrong type."""
    try:
        values = _with_underscores(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"cluster file is not TOML: {error}") from None
    try:
        return msgspec.convert(values, ClusterTable)
    except msgspec.ValidationError as error:
        raise ConfigError(f"cluster file: {_in_our_words(str(error), values)}") from None


def nearest(word: str, known: list[str]) -> str:
    """`; did you mean ...?`, or nothing."""
    close = get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


_TABLES: dict[str, type[Struct]] = {
    "": ClusterTable,
    "model": ModelTable,
    "hardware": HardwareTable,
    "costs": ProfileTable,
    "nodes": NodeTable,
}
_ERROR = re.compile(r"(?P<what>.*?)(?: - at `\$\.?(?P<path>.*)`)?")
_FIELD = re.compile(r"Object (?P<how>contains unknown|missing required) field `(?P<field>.*)`")


def _in_our_words(message: str, values: dict[str, Any]) -> str:
    matched = _ERROR.fullmatch(message)
    what, path = (matched["what"], matched["path"] or "") if matched else (message, "")
    field = _FIELD.fullmatch(what)
    where = f"{path}: " if path else ""
    if field is None:
        expected = re.sub(r", got `[^`]*`$", "", what).replace("`", "")
        return f"{where}{expected[:1].lower()}{expected[1:]}, got {_at(values, path)!r}"
    known = list(_TABLES[re.sub(r"\[.*", "", path)].__struct_fields__)
    if field["how"].startswith("missing"):
        return f"{where}{field['field']} is missing"
    return f"{where}unknown key {field['field']!r}{nearest(field['field'], known) or '; known are ' + ', '.join(known)}"


def _at(values: Any, path: str) -> Any:
    """The value that a msgspec path (`nodes[0].dram`) leads to."""
    for key in re.findall(r"[^.\[\]]+", path):
        values = values[int(key)] if isinstance(values, list) else values.get(key)
    return values


def _with_underscores(value: Any) -> Any:
    """`block-tokens` is `block_tokens`."""
    if isinstance(value, dict):
        return {key.replace("-", "_"): _with_underscores(v) for key, v in value.items()}
    return [_with_underscores(v) for v in value] if isinstance(value, list) else value
