"""Which cost model a command uses: the profile of this machine where there is one, else the roofline."""

from __future__ import annotations

import os
from pathlib import Path

from msgspec.structs import replace

from kvasir.core.errors import ConfigError
from kvasir.costs.fitted import FittedCost
from kvasir.costs.hardware import HARDWARE
from kvasir.costs.roofline import RooflineCost
from kvasir.engine.interface import ModelSpec


def profile_path(spec: ModelSpec) -> Path:
    """Where this machine's profile of the model lies."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "kvasir" / "profiles" / f"{spec.identity}-{spec.dtype}.json"


def load_profile(path: Path) -> FittedCost:
    """A profile that `kvasir profile` wrote. Raises ConfigError."""
    try:
        return FittedCost.from_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read profile {path}: {error.strerror}; `kvasir profile MODEL` writes one") from error


def load_costs(profile: str | None, spec: ModelSpec, *, link_bytes_s: float = 0.0) -> FittedCost | RooflineCost:
    """The profile that was named; else this machine's, if there is one; else the roofline of a CPU machine.

    Transfers take as long as a declared link makes them.
    """
    path = Path(profile) if profile is not None else profile_path(spec)
    fitted = load_profile(path) if profile is not None or path.exists() else None
    hardware = HARDWARE["cpu-laptop"]
    if not link_bytes_s:
        return fitted or RooflineCost(spec.shape, hardware)
    if fitted is not None:
        return replace(fitted, transfer_bandwidth=link_bytes_s)
    return RooflineCost(spec.shape, replace(hardware, network_bandwidth=link_bytes_s))
