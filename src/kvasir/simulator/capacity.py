"""The search for a cluster's capacity: the highest trace speed at which enough requests and input tokens are effective."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvasir.core.errors import ConfigError
from kvasir.report.slo import Attainment

LOWEST_SPEED = 0.01
HIGHEST_SPEED = 256.0
"""Beyond these nobody asks: a trace 100 times slower or 256 times faster than itself."""

RESOLUTION = 0.015
"""The bisection ends when the lowest failing speed is at most this share above the highest passing one."""

_ABOVE = (1.04, 1.1)
"""Where to look for a speed that passes above one that fails: attainment is not monotonic, bursts fall differently."""

_MAX_LOOKS = 4


@dataclass(frozen=True, slots=True)
class Probe:
    """What one speed gave."""

    speed: float
    attained: Attainment

    @property
    def passes(self) -> bool:
        return self.attained.is_within_capacity


@dataclass(frozen=True, slots=True)
class Capacity:
    """The highest passing speed (None when even the lowest fails), and every probe in the order made."""

    speed: float | None
    probes: tuple[Probe, ...]

    @property
    def is_bound(self) -> bool:
        """Whether no speed above was seen to fail: the capacity is at least this, the search went no further."""
        return self.speed is not None and all(p.passes for p in self.probes if p.speed > self.speed)

    def __str__(self) -> str:
        return "none" if self.speed is None else f"{'>= ' if self.is_bound else ''}{self.speed:g}x"


def find_capacity(
    evaluate: Callable[[float], Attainment],
    *,
    start: float = 1.0,
    resolution: float = RESOLUTION,
    stride: float = 2.0,
    lowest: float = LOWEST_SPEED,
) -> Capacity:
    """Bracket by strides from `start`, bisect, then look a little above, and go on from there if that passes.

    A `stride` is a factor: little above 1 where `start` is a good guess. Speeds below `lowest` are not asked for. No speed is
    evaluated twice. Deterministic if `evaluate` is. Raises ConfigError for a start, stride or resolution out of range.
    """
    if not max(lowest, LOWEST_SPEED) <= start <= HIGHEST_SPEED:
        least = max(lowest, LOWEST_SPEED)
        raise ConfigError(f"capacity: start: got {start:g}, expected a speed from {least:g} to {HIGHEST_SPEED:g}")
    if not stride > 1:
        raise ConfigError(f"capacity: stride: got {stride:g}, expected more than 1")
    if not 0 < resolution < 1:
        raise ConfigError(f"capacity: resolution: got {resolution:g}, expected a share between 0 and 1")
    search = _Search(evaluate, resolution, stride, max(lowest, LOWEST_SPEED))
    return Capacity(search.run(start), tuple(search.probes.values()))


class _Search:
    def __init__(self, evaluate: Callable[[float], Attainment], resolution: float, stride: float, lowest: float):
        self._evaluate = evaluate
        self._resolution = resolution
        self._stride = stride
        self._lowest = lowest
        self.probes: dict[float, Probe] = {}

    def run(self, start: float) -> float | None:
        low, high = self._bracket(start)
        for _ in range(_MAX_LOOKS):
            if low is None or high is None:
                break
            low, high = self._bisect(low, high)
            passing = [speed for factor in _ABOVE if self._passes(speed := _rounded(high * factor))]
            if not passing:
                break
            low, high = self._double(max(passing), factor=_ABOVE[0])
        return low

    def _bracket(self, start: float) -> tuple[float | None, float | None]:
        """The speeds around the edge; None where the search ran out of range."""
        if self._passes(start):
            return self._double(start, factor=self._stride)
        high = start
        while high > self._lowest:
            low = max(_rounded(high / self._stride), self._lowest)
            if self._passes(low):
                return low, high
            high = low
        return None, high

    def _double(self, low: float, *, factor: float) -> tuple[float, float | None]:
        """From a passing speed up to the first failing one."""
        while (high := _rounded(low * factor)) <= HIGHEST_SPEED:
            if not self._passes(high):
                return low, high
            low = high
        return low, None

    def _bisect(self, low: float, high: float) -> tuple[float, float]:
        while high > low * (1 + self._resolution):
            middle = _rounded((low * high) ** 0.5)
            if not low < middle < high:
                break
            low, high = (middle, high) if self._passes(middle) else (low, middle)
        return low, high

    def _passes(self, speed: float) -> bool:
        if speed not in self.probes:
            self.probes[speed] = Probe(speed, self._evaluate(speed))
        return self.probes[speed].passes


def _rounded(speed: float) -> float:
    """Four significant digits: what a person can type again."""
    return float(f"{speed:.4g}")
