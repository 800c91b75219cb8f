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

UNMEASURED = {"cpu": HARDWARE["cpu-laptop"], "cuda": replace(HARDWARE["h800"], devices=1)}
"""What a device is taken for until it has been profiled."""


def profile_path(spec: ModelSpec, device: str = "cpu") -> Path:
    """Where this machine's profile of the model on this device lies."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    suffix = "" if device == "cpu" else f"-{device}"
    return cache / "kvasir" / "profiles" / f"{spec.identity}-{spec.dtype}{suffix}.json"


def load_profile(path: Path) -> FittedCost:
    """A profile that `kvasir profile` wrote. Raises ConfigError."""
    try:
        return FittedCost.from_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read profile {path}: {error.strerror}; `kvasir profile MODEL` writes one") from error


def load_costs(
    profile: str | None, spec: ModelSpec, *, device: str = "cpu", link_bytes_s: float = 0.0
) -> FittedCost | RooflineCost:
    """The profile that was named; else this machine's, if there is one; else the roofline of a typical device.

    Transfers take as long as a declared link makes them.
    """
    path = Path(profile) if profile is not None else profile_path(spec, device)
    fitted = load_profile(path) if profile is not None or path.exists() else None
    hardware = UNMEASURED[device]
    if not link_bytes_s:
        return fitted or RooflineCost(spec.shape, hardware)
    if fitted is not None:
        return replace(fitted, transfer_bandwidth=link_bytes_s)
    return RooflineCost(spec.shape, replace(hardware, network_bandwidth=link_bytes_s))
