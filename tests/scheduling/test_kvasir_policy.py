"""Our own placement, on clusters small enough to work out by hand."""

import math
from random import Random

import numpy as np
import pytest
from msgspec.structs import replace

from kvasir.core.commands import Candidate
from kvasir.costs.fitted import DecodeFit, FittedCost, PrefillFit
from kvasir.costs.quick import quick
from kvasir.scheduling.policies.kvasir import IDLE, MARGIN, SLACK_HORIZON_S, Kvasir
from kvasir.scheduling.view import ClusterView, PrefillColumns
from tests.scheduling.views import decode_columns, lengths

COSTS = quick(FittedCost(PrefillFit(0.0, 1e-3, 0, 0), DecodeFit(0.010, 1e-3, 1e-6), 0.0, 1e6))  # 1 ms a token; 1 MB/s


def view(
    *rows: tuple[float, int],
    tokens: int = 1000,
    pace: tuple[float, ...] = (),
    decoders: tuple[int, ...] = (),
    kv_bytes: int = 100,
    due_in_s: float = math.inf,
    tbt_s: float = math.inf,
) -> ClusterView:
    """Instances p0, p1, ... as (wait, own prefix); a token takes 1 ms to compute and, at 100 bytes, 0.1 ms to fetch."""
    count = len(rows)
    prefix = [cached for _, cached in rows]
    zeros = np.zeros(count, dtype=np.int64)
    return ClusterView(
        prefills=PrefillColumns(
            ids=tuple(f"p{i}" for i in range(count)),
            wait_s=np.array([wait_s for wait_s, _ in rows]),
            pace=np.array(pace or [1.0] * count),
            prefix=lengths(prefix),
            deep=lengths(prefix),
            queued=zeros,
            queued_tokens=zeros,
            batch=zeros,
            kv_used=np.zeros(count),
            can_decode=np.array([i in decoders for i in range(count)]),
        ),
        decodes=decode_columns(),
        num_prompt_tokens=tokens,
        best_tokens=max(prefix),
        source=f"n{prefix.index(max(prefix))}" if any(prefix) else None,
        costs=COSTS,
        kv_bytes_per_token=kv_bytes,
        due_in_s=due_in_s,
        tbt_s=tbt_s,
        max_stages=8,
    )


def place(cluster: ClusterView) -> Candidate:
    return Kvasir().place(cluster, Random(1)).chosen


def test_a_fetch_is_made_when_it_is_faster_whatever_the_ratio_of_prefixes() -> None:
    chosen = place(view((0.0, 600), (0.5, 900)))  # 0.03 + 0.1 against 0.4 here and 0.5 + 0.1 there
    assert (chosen.instance, chosen.fetch_tokens, chosen.source) == ("p0", 300, "n1")
    assert chosen.ttft_s == pytest.approx(0.13)
    slow = place(view((0.0, 600), (0.5, 900), kv_bytes=2000))  # 2 ms to fetch a token
    assert (slow.instance, slow.fetch_tokens) == ("p0", 0)


def test_what_is_on_the_ssd_is_loaded_when_that_is_faster() -> None:
    cluster = view((0.0, 0))
    prefills = replace(cluster.prefills, deep=lengths([800]))
    chosen = place(replace(cluster, prefills=prefills, load_bandwidth=1e6))
    assert (chosen.load_tokens, chosen.prefix_tokens) == (800, 800)
    assert chosen.ttft_s == pytest.approx(0.08 + 0.2)
    assert place(replace(cluster, prefills=prefills, load_bandwidth=1e4)).load_tokens == 0


def test_a_prompt_that_is_late_alone_runs_on_the_fewest_stages_with_which_it_is_in_time() -> None:
    idle = [(0.0, 0)] * 8
    alone = place(view(*idle, tokens=8000, due_in_s=8.0 / MARGIN))
    assert (alone.instance, alone.group) == ("p0", ())
    two = place(view(*idle, tokens=8000, due_in_s=7.9 / MARGIN))
    assert two.group == ()  # one chunk: stages would only wait for each other
    chunked = replace(view(*idle, tokens=8000, due_in_s=7.0), chunk_tokens=1000)
    two = place(chunked)
    assert two.group == ("p0", "p1")
    assert two.instance == "p1"
    assert two.prefill_s == pytest.approx(8.0 / 2 * (1 + 1 / 8))
    four = place(replace(chunked, due_in_s=4.0))
    assert len(four.group) == 4


def test_stages_are_those_that_are_free_and_do_not_decode() -> None:
    cluster = view((0.0, 0), (0.3, 0), (0.1, 0), (0.0, 0), tokens=8000, due_in_s=7.0, pace=(0.5, 1.0, 1.0, 1.0), decoders=(0,))
    assert place(replace(cluster, chunk_tokens=1000)).group == ("p3", "p2")


def test_stages_that_share_memory_are_of_the_node_where_they_are_done_first() -> None:
    cluster = view((0.2, 0), (0.0, 0), (0.1, 0), (0.0, 0), (0.1, 0), tokens=8000, due_in_s=7.0)
    nodes = {"p0": "a", "p1": "a", "p2": "b", "p3": "b", "p4": "b"}
    shared = replace(cluster, chunk_tokens=1000, stage_node=nodes.__getitem__)
    assert place(shared).group == ("p3", "p2")
    assert place(replace(shared, stage_node=lambda name: name)).group == ()
    assert place(replace(shared, stage_node=None)).group == ("p1", "p3")


def test_while_others_queue_no_pipeline_starts() -> None:
    busy = IDLE * 7.0 + 0.1
    cluster = view(*[(busy, 0)] * 8, tokens=8000, due_in_s=7.0)
    assert place(replace(cluster, chunk_tokens=1000)).group == ()


def test_an_instance_that_decodes_takes_only_what_it_can_do_soon() -> None:
    late = SLACK_HORIZON_S + 1.5
    assert place(view((0.0, 0), (late, 0), tokens=2000, pace=(0.5, 1.0))).instance == "p0"  # 4 s
    assert place(view((0.5, 0), (late, 0), tokens=2000, pace=(0.5, 1.0))).instance == "p1"  # 4.5 s in a slack that may shrink
    assert place(view((0.5, 0), tokens=2000, pace=(0.5,))).instance == "p0"  # nobody else


def test_a_prompt_nearly_all_cached_is_prefilled_where_it_decodes() -> None:
    """Its hand-off of 0.1 s has next to no prefill to hide behind."""
    rows, tbt_s = ((0.0, 990), (0.2, 990)), 0.1
    assert place(view(*rows, decoders=(1,), tbt_s=tbt_s)).instance == "p1"
    assert place(view(*rows, decoders=(1,), tbt_s=1.0)).instance == "p0"  # who minds?
    assert place(view(*rows, decoders=(1,), tbt_s=tbt_s, due_in_s=0.1)).instance == "p0"  # p1 would be late
    assert place(view((0.0, 100), (0.2, 100), decoders=(1,), tbt_s=tbt_s)).instance == "p0"  # 0.9 s of prefill hide it


def test_the_decision_records_the_next_best() -> None:
    choice = Kvasir().place(view((0.2, 0), (0.0, 0), (0.1, 0), (0.3, 0)), Random(1))
    assert [c.instance for c in choice.candidates] == ["p1", "p2", "p0"]
    assert choice.why == "least TTFT of all plans among 4"
