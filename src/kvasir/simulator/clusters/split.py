"""Which instance has which role: `8P8D`, `4P4D8M`, or `elastic`."""

from __future__ import annotations

import re

from msgspec.structs import replace

from kvasir.core.errors import ConfigError
from kvasir.core.request import Role
from kvasir.simulator.spec import ClusterSpec

ELASTIC = "elastic"
"""Every instance is mixed."""

_LETTERS = {"P": Role.PREFILL, "D": Role.DECODE, "M": Role.MIXED}
_PART = re.compile(r"(\d+)([PDM])")
_EXAMPLE = "8P8D, 4P4D8M or elastic"


def with_split(cluster: ClusterSpec, split: str) -> ClusterSpec:
    """The cluster with roles given out in order of its instances, as the letters come. Raises ConfigError."""
    roles = roles_of(split, len(cluster.instances), where=f"{cluster.name}: ")
    return replace(cluster, instances=tuple(replace(i, role=r) for i, r in zip(cluster.instances, roles, strict=True)))


def split_of(cluster: ClusterSpec) -> str:
    """The roles in `with_split`'s notation, prefill first."""
    counts = {letter: sum(i.role is role for i in cluster.instances) for letter, role in _LETTERS.items()}
    return "".join(f"{count}{letter}" for letter, count in counts.items() if count)


def roles_of(split: str, num_instances: int, *, where: str = "") -> list[Role]:
    """One role per instance. Raises ConfigError when they do not fit, or nothing can prefill or decode."""
    text = split.strip()
    if text.lower() == ELASTIC:
        return [Role.MIXED] * num_instances
    parts = _PART.findall(text.upper())
    letters = [letter for _, letter in parts]
    if not parts or _PART.sub("", text.upper()) or len(set(letters)) < len(letters):
        raise ConfigError(f"{where}split: got {split!r}, expected for example {_EXAMPLE}")
    asked = sum(int(count) for count, _ in parts)
    if asked != num_instances:
        raise ConfigError(f"{where}split {split} on {num_instances} instances: {asked} asked, {num_instances} there")
    roles = [_LETTERS[letter] for count, letter in parts for _ in range(int(count))]
    for what, can in (("prefill", any(r.can_prefill for r in roles)), ("decode", any(r.can_decode for r in roles))):
        if not can:
            raise ConfigError(f"{where}split {split}: no instance can {what}; expected for example {_EXAMPLE}")
    return roles
