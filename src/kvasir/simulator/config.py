"""How a simulation is run: what is modelled, what clients ask for, what is recorded."""

from __future__ import annotations

from dataclasses import dataclass

from kvasir.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class SimConfig:
    """Settings of a run that are neither the cluster's nor the strategy's.

    `layerwise`: transfers of KV overlap compute, layer by layer; without it a prefill starts when its fetch has arrived
    and a hand-off starts when the prefill is done. `max_tokens` is what clients ask for, or a request's true output if that is
    longer; the scheduler never learns the true one. `max_repeats` bounds the decode passes made as one event.
    `expected_output_tokens` and `max_queued` are the conductor's (None: its default; 64 for each instance where that is more),
    `stash_pages` the batchers'.
    State is sampled every `sample_s` (0: never), with the replicas of the `num_hot` most hit blocks. A simulation in which
    nothing happens for `stall_s` raises InvariantError. With `keep_decisions` the run carries its decision log.
    """

    layerwise: bool = True
    max_tokens: int = 2048
    max_repeats: int = 1 << 20
    expected_output_tokens: int | None = None
    max_queued: int | None = None
    stash_pages: int = 32
    sample_s: float = 30.0
    num_hot: int = 10
    stall_s: float = 600.0
    keep_decisions: bool = False

    def __post_init__(self) -> None:
        for name, value, least in (
            ("max_tokens", self.max_tokens, 1),
            ("max_repeats", self.max_repeats, 1),
            ("stash_pages", self.stash_pages, 0),
            ("sample_s", self.sample_s, 0),
            ("num_hot", self.num_hot, 0),
            ("stall_s", self.stall_s, 1),
        ):
            if value < least:
                raise ConfigError(f"{name}: got {value}, expected at least {least}")
