"""Steps that do not take what was expected of them, as on a machine that does other things too."""

from __future__ import annotations

from random import Random


class Noise:
    """How many times as long as expected a step takes: one of `factors`, each as likely."""

    __slots__ = ("_factors", "_rng")

    def __init__(self, factors: tuple[float, ...], seed: int):
        self._factors = factors
        self._rng = Random(seed)

    def draw(self) -> float:
        return self._factors[int(self._rng.random() * len(self._factors))]
