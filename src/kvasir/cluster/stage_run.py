"""A run of a chunked pipeline as one of its instances sees it: which layers are its, and where the residual stream lies."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from msgspec.structs import replace

from kvasir.cluster.messages import StagePlan
from kvasir.cluster.pipelines import mail_of
from kvasir.cluster.pool_client import Pool
from kvasir.core.errors import ClusterError, KvasirError
from kvasir.core.pool_events import KeyedSlot
from kvasir.engine.interface import ModelSpec, Stage, StreamRows


@dataclass(slots=True)
class StageRun:
    """`computed` tokens of the prompt are done here. The last stage owns the pages when it has `taken_over`; the blocks that it
    filled before are `unpublished`.
    """

    plan: StagePlan
    computed: int = 0
    taken_over: bool = False
    unpublished: list[KeyedSlot] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Of the layers."""
        return 1.0 / self.plan.num_stages

    def part(self, start: int, spec: ModelSpec) -> Stage:
        """What an engine computes of a chunk that begins with token `start`."""
        plan, layers = self.plan, spec.shape.num_layers
        row = start - plan.cached
        return Stage(
            first=plan.number * layers // plan.num_stages,
            last=(plan.number + 1) * layers // plan.num_stages,
            reads=StreamRows(plan.mail[plan.number - 1], row) if plan.number else None,
            writes=None if plan.is_last else StreamRows(plan.mail[plan.number], row),
        )


async def open_pipeline(
    pool: Pool, run: str, plan: StagePlan, prefix: tuple[int, ...], *, num_tokens: int, spec: ModelSpec
) -> StagePlan:
    """The plan with its memory: pages for the whole prompt, the first of which are the leased `prefix`, and slots for the mail.

    All of it is on offer then, so that nobody's death frees what a stage still writes, until the hub gives it back. Raises
    KvasirError, and holds nothing, where the pool has too little.
    """
    num_pages = -(-num_tokens // spec.block_tokens) - len(prefix)
    num_gaps = plan.num_stages - 1
    each = -(-(num_tokens - plan.cached) // spec.rows_per_slot)
    wanted = num_pages + num_gaps * each
    held: tuple[int, ...] = ()
    try:
        held = slots = await pool.reserve(wanted)
        if len(slots) < wanted:
            raise ClusterError(f"the pool has {len(slots)} of the {wanted} free blocks that a pipeline needs")
        await pool.lease(mail_of(run), ())
        await pool.offer(mail_of(run), slots[num_pages:], math.inf)
        held = slots[:num_pages]
        await pool.offer(run, held, math.inf)
    except KvasirError:
        pool.release(run, held)
        raise
    mail = tuple(slots[at : at + each] for at in range(num_pages, wanted, each))
    return replace(plan, pages=(*prefix, *slots[:num_pages]), mail=mail)
