"""The names of synthetic traces: `synthetic:conversation?seed=3&requests=200`."""

from urllib.parse import parse_qsl

import numpy as np

from kvasir.core.errors import ConfigError
from kvasir.core.units import parse_duration
from kvasir.workload.synthesis import conversation
from kvasir.workload.trace import Trace

PREFIX = "synthetic:"
_KEYS = ("seed", "requests", "duration", "rate")
_EXAMPLE = "synthetic:conversation?seed=3&requests=200"


def is_synthetic(source: str) -> bool:
    """Whether `source` names a synthetic trace rather than a file."""
    return source.startswith(PREFIX)


def synthesise(source: str) -> Trace:
    """The trace that `source` names; by keys `seed`, `requests`, `duration` and `rate`. ConfigError otherwise."""
    name, _, query = source.removeprefix(PREFIX).partition("?")
    if name != "conversation":
        raise ConfigError(f"no synthetic trace {name!r}; there is: conversation, as in {_EXAMPLE}")
    values = dict(parse_qsl(query, keep_blank_values=True))
    for key in values:
        if key not in _KEYS:
            raise ConfigError(f"synthetic trace: unknown key {key!r}; expected {', '.join(_KEYS)}, as in {_EXAMPLE}")
    return conversation(
        np.random.default_rng(_integer(values, "seed") or 0),
        num_requests=_integer(values, "requests"),
        duration_s=parse_duration(values["duration"]) if "duration" in values else None,
        rate=_number(values, "rate"),
    )


def _integer(values: dict[str, str], key: str) -> int | None:
    text = values.get(key)
    if text is None:
        return None
    if not text.isdecimal():
        raise ConfigError(f"synthetic trace: {key}: got {text!r}, expected a whole number")
    return int(text)


def _number(values: dict[str, str], key: str) -> float | None:
    text = values.get(key)
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"synthetic trace: {key}: got {text!r}, expected a number") from None
