"""Quantities of a cluster file: text with a unit, or a number; what is negative or senseless raises ConfigError."""

from __future__ import annotations

import math
import re

from kvasir.core.errors import ConfigError
from kvasir.core.units import parse_duration, parse_size

_TOKENS = re.compile(r"([0-9]*\.?[0-9]+)\s*([kKmMgG]?)\s*tok(?:ens)?")
_TOKEN_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}


def tokens(key: str, value: object, kv_bytes: int) -> int:
    """`3Mtok` as tokens; anything else as bytes, by the KV bytes of a token."""
    matched = _TOKENS.fullmatch(str(value).strip())
    if matched is not None:
        return int(float(matched[1]) * _TOKEN_UNITS[matched[2].lower()])
    return num_bytes(key, value) // kv_bytes


def num_bytes(key: str, value: object) -> int:
    """`1TiB`, or a number of bytes."""
    try:
        return parse_size(str(value))
    except ConfigError:
        raise ConfigError(f"{key}: got {value!r}, expected a size such as 1TiB or 3Mtok, 0 or more") from None


def rate(key: str, value: object) -> float:
    """`80GB/s`, or a number of bytes a second."""
    if isinstance(value, int | float):
        if value < 0 or not math.isfinite(value):
            raise ConfigError(f"{key}: got {value!r}, expected bytes a second, 0 or more")
        return float(value)
    try:
        return float(parse_size(str(value).removesuffix("/s")))
    except ConfigError:
        raise ConfigError(f"{key}: got {value!r}, expected a bandwidth such as 80GB/s") from None


def seconds(key: str, value: float | str) -> float:
    """`20us`, or a number of seconds."""
    try:
        return parse_duration(value)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from None


def at_least_one(key: str, value: int) -> None:
    """Counts."""
    if value < 1:
        raise ConfigError(f"{key}: got {value}, expected at least 1")


def positive(key: str, value: float) -> float:
    """`value`, if it is more than 0."""
    if value <= 0:
        raise ConfigError(f"{key}: got {value:g}, expected more than 0")
    return value
