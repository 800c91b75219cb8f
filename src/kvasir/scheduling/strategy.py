"""A whole scheduler by name: placement, decode choice, admission, queue order, roles, eviction, chunking."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

from kvasir.core.errors import ConfigError
from kvasir.core.request import Slo
from kvasir.costs.model import CostModel
from kvasir.costs.quick import quick
from kvasir.pool.policies import EVICTIONS
from kvasir.report.slo import ScaledSlo
from kvasir.scheduling.admission import ADMISSIONS
from kvasir.scheduling.batcher import Batcher
from kvasir.scheduling.chunking import BatcherConfig
from kvasir.scheduling.conductor import Conductor
from kvasir.scheduling.conductor_config import ConductorConfig
from kvasir.scheduling.decode_choice import DECODE_RULES
from kvasir.scheduling.placer import Rules
from kvasir.scheduling.policies import POLICIES
from kvasir.scheduling.ranks import RANKS
from kvasir.scheduling.replication import REPLICATIONS
from kvasir.scheduling.roles import ROLES

WHOLE = 1 << 20
"""A chunk that holds any prompt."""

LIVE_SHARE = 0.5
"""Of the TBT objective, what a step of an engine is predicted to take at most that prefills beside decoding sequences."""

PACK_TOKENS = 512
"""A prefill of so many tokens uses an accelerator fully: batching another prompt with it saves nothing."""


@dataclass(frozen=True, slots=True)
class Strategy:
    """What `--policy NAME` stands for; each part is a row of its own table and can be replaced by itself.

    `is_colocated`: every instance does both phases. Prefill runs in steps of `chunk_tokens`; on an instance that decodes,
    in chunks of at most `mixed_tokens` and, with `step_share`, steps predicted to take at most that share of the TBT objective.
    A pipeline has at most `max_stages`, where the bodies have pipelines.
    """

    name: str
    placement: str
    decode: str = "least-tbt"
    admission: str = "slo"
    order: str = "first-come"
    eviction: str = "lru"
    roles: str = "static"
    replication: str = "none"
    is_colocated: bool = False
    chunk_tokens: int = WHOLE
    mixed_tokens: int = 512
    step_share: float | None = None
    max_stages: int = 1

    def with_parts(self, **parts: str | None) -> Strategy:
        """Some parts replaced; None leaves a part as it is. Raises ConfigError for a name that is not in its table."""
        chosen = {part: name for part, name in parts.items() if name is not None}
        for part, name in chosen.items():
            if name not in PARTS[part]:
                raise ConfigError(f"unknown {part} {name!r}; known are {', '.join(PARTS[part])}")
        return replace(self, **chosen)  # type: ignore[arg-type]

    def live(self, chunk_tokens: int) -> Strategy:
        """As `kvasir serve` runs it: an engine's prefill goes in chunks of at most `chunk_tokens`, in steps of LIVE_SHARE."""
        return replace(self, chunk_tokens=min(self.chunk_tokens, chunk_tokens), step_share=LIVE_SHARE)

    def conductor(self, config: ConductorConfig, costs: CostModel, slo: Slo | ScaledSlo, rng: Random) -> Conductor:
        """`config` says what the cluster is; how it is used is the strategy's."""
        costs = quick(costs)
        config = replace(config, mixed_step_s=self._mixed_step_s(slo), chunk_tokens=self.chunk_tokens)
        config = replace(config, max_stages=min(config.max_stages, self.max_stages))
        rules = Rules(POLICIES[self.placement](), ADMISSIONS[self.admission](slo), DECODE_RULES[self.decode], RANKS[self.order])

        def transfer_s(tokens: int) -> float:
            return costs.transfer_s(tokens * config.kv_bytes_per_token)

        roles = ROLES[self.roles](costs, slo.tbt_s, self._mixed_step_s(slo) or slo.tbt_s, transfer_s)
        replication = REPLICATIONS[self.replication](transfer_s)
        return Conductor(config, costs, rules=rules, slo=slo, rng=rng, roles=roles, replication=replication)

    def batcher(self, config: BatcherConfig, costs: CostModel, slo: Slo | ScaledSlo) -> Batcher:
        """`config` says what the instance can hold."""
        config = replace(
            config,
            max_step_tokens=max(self.chunk_tokens, config.max_batch + 1),
            max_mixed_tokens=self.mixed_tokens,
            pack_tokens=PACK_TOKENS,
            max_step_s=self._mixed_step_s(slo),
        )
        return Batcher(config, costs)

    def _mixed_step_s(self, slo: Slo | ScaledSlo) -> float | None:
        return None if self.step_share is None else self.step_share * slo.tbt_s


PARTS: dict[str, dict[str, Callable[..., object]]] = {
    "placement": {**POLICIES},
    "decode": {**DECODE_RULES},
    "admission": {**ADMISSIONS},
    "order": {**RANKS},
    "eviction": {**EVICTIONS},
    "roles": {**ROLES},
    "replication": {**REPLICATIONS},
}
"""Part → its rows by name."""


STRATEGIES: dict[str, Strategy] = {
    strategy.name: strategy
    for strategy in (
        Strategy("random", "random"),
        Strategy("round-robin", "round-robin"),
        Strategy("least-loaded", "least-loaded"),
        Strategy("local", "local"),
        Strategy("mooncake", "mooncake"),
        Strategy(
            "kvasir",
            "kvasir",
            decode="least-expected-tbt",
            admission="predictive",
            eviction="cost-aware",
            roles="elastic",
            replication="hot",
            chunk_tokens=8192,
            mixed_tokens=8192,
            step_share=0.6,
            max_stages=8,
        ),
        Strategy("memserve", "memserve", admission="off"),
        Strategy("dynamo", "dynamo", "fewest-tokens", "off"),
        Strategy("llm-d", "llm-d", "llm-d", "off"),
        Strategy("sglang", "sglang", "fewest-requests", "off"),
        Strategy("aibrix", "aibrix", "aibrix", "off"),
        Strategy("aibrix-conductor", "aibrix-conductor", "aibrix-conductor", "off"),
        Strategy("ray", "ray", "fewest-requests", "off"),
        Strategy("production-stack", "production-stack", "fewest-requests", "off"),
        Strategy("colocated", "local", "stay", "off", is_colocated=True, mixed_tokens=WHOLE),
        Strategy("colocated-chunked", "local", "stay", "off", is_colocated=True, chunk_tokens=512),
    )
}
"""Name on the command line → scheduler."""


def strategy(name: str) -> Strategy:
    """Raises ConfigError for a name that is not in the table."""
    if name not in STRATEGIES:
        raise ConfigError(f"unknown policy {name!r}; known are {', '.join(STRATEGIES)}")
    return STRATEGIES[name]
