"""Durations and sizes as people write them: `30s`, `100ms`, `4GiB`."""

from __future__ import annotations

import math
import re

from kvasir.core.errors import ConfigError

_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_BYTES = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
    "k": 2**10,
    "m": 2**20,
    "g": 2**30,
    "t": 2**40,
}
_NUMBER_AND_UNIT = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([a-zA-Z]*)\s*")


def parse_duration(text: str | float) -> float:
    """Seconds from `30s`, `100ms`, `10m`, `1h`, or a bare number of seconds. Raises ConfigError."""
    return _parse(text, _SECONDS, default_unit="s", what="duration", example="30s, 100ms or 10m")


def parse_size(text: str | int) -> int:
    """Bytes from `4GiB`, `512MiB`, `10GB`, or a bare number of bytes. Raises ConfigError."""
    return int(_parse(text, _BYTES, default_unit="b", what="size", example="4GiB or 512MiB"))


def format_duration(seconds: float) -> str:
    """`1.53 s`, `12.4 ms` or `85 us`: three significant digits."""
    if seconds >= 1 or seconds == 0:
        return f"{seconds:.3g} s"
    if seconds >= 1e-3:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds * 1e6:.3g} us"


def format_size(num_bytes: float) -> str:
    """`4.0 GiB`, `12.5 MiB`, `900 B`."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes:.0f} B"


def _parse(text: str | float, units: dict[str, float] | dict[str, int], *, default_unit: str, what: str, example: str) -> float:
    match = _NUMBER_AND_UNIT.fullmatch(str(text))
    unit = (match.group(2) or default_unit).lower() if match else ""
    if match is None or unit not in units:
        raise ConfigError(f"not a {what}: {text!r}; write for example {example}")
    value = float(match.group(1)) * units[unit]
    if not math.isfinite(value):
        raise ConfigError(f"not a {what}: {text!r} is too large; write for example {example}")
    return value
