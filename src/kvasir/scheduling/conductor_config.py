"""What a scheduler is told of its cluster. Recordings hold it, so it stays Python: machine code has no types to read it by."""

from __future__ import annotations

from dataclasses import dataclass

from kvasir.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ConductorConfig:
    """Sizes and bounds of a cluster's scheduler.

    `max_queued` bounds requests whose prefill is not done. A request is placed at most `max_attempts` times. An output is
    expected to have `expected_output_tokens` until answers were seen, or the request's max_tokens if that is less. A heartbeat
    may not have seen what was sent within the last `settle_s`; a prefill overdue by `prediction_ttl_s` no longer counts as
    waiting time. A request whose instance died waits `homeless_s` for another when none is left.
    `shares_cores`: prefill and decode instances of a node run on the same cores. `mixed_step_s`: the longest step of an
    instance that decodes; None where nothing bounds it. Prefill runs in steps of `chunk_tokens`. `load_bandwidth`
    (bytes/s) is a node's SSD, 0 for none. With `layerwise`, transfers overlap compute. A prompt may be prefilled by a
    pipeline of `max_stages` instances; 1 where the bodies have no pipelines. With `stages_on_one_node` its stages share their
    pages, so that they must be on one node.
    """

    kv_bytes_per_token: int
    block_tokens: int = 64
    max_queued: int = 1024
    max_attempts: int = 3
    expected_output_tokens: int = 512
    settle_s: float = 0.5
    prediction_ttl_s: float = 60.0
    homeless_s: float = 60.0
    shares_cores: bool = False
    mixed_step_s: float | None = None
    chunk_tokens: int | None = None
    load_bandwidth: float = 0.0
    layerwise: bool = False
    max_stages: int = 1
    stages_on_one_node: bool = False

    def __post_init__(self) -> None:
        for name, value in (
            ("kv_bytes_per_token", self.kv_bytes_per_token),
            ("block_tokens", self.block_tokens),
            ("max_queued", self.max_queued),
            ("max_attempts", self.max_attempts),
            ("expected_output_tokens", self.expected_output_tokens),
        ):
            if value < 1:
                raise ConfigError(f"{name}: got {value}, expected at least 1")
