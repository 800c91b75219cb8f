"""The CPU kernels against torch: attention over an arena in place, and linear layers.

    OMP_WAIT_POLICY=PASSIVE python -m benchmarks.attention [--json] [--one-core]

Medians of interleaved runs (ours, theirs, ours, theirs, ...) with inputs that rotate through more memory than the cache
holds where the bytes decide. SDPA and the batched products get K and V gathered and in their favourite layout for
free; "pages" adds the gathering. --one-core runs one thread and counts its processor time instead of the clock on the
wall: comparable figures on a machine that does other things as well.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from time import perf_counter, thread_time

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from kvasir.engine.torch.kernels import BatchLayout, KvLayout, KvView, Ops, load_ops

Clock = Callable[[], float]
BF16 = torch.bfloat16
BLOCK_TOKENS = 64
ROTATION_BYTES = 128 << 20  # four times the L3 of the machine in docs/results
QUERY_BLOCK = 32  # of the batched products


@dataclass(frozen=True, slots=True)
class Attention:
    """One step: `sequences` of `context` tokens with `queries` new ones each."""

    queries: int
    context: int
    heads: int
    kv_heads: int
    sequences: int = 1
    head_dim: int = 64

    @property
    def what(self) -> str:
        batch = f", batch {self.sequences}" if self.sequences > 1 else ""
        return f"{self.queries} x {self.context}{batch}, {self.heads}/{self.kv_heads} heads of {self.head_dim}"

    @property
    def operations(self) -> int:
        pairs = self.queries * self.context - self.queries * (self.queries - 1) // 2
        return 4 * self.sequences * self.heads * self.head_dim * pairs

    @property
    def kv_bytes(self) -> int:
        return 4 * self.sequences * self.context * self.kv_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class Row:
    """Median milliseconds of ours and of each other way, and our rate."""

    what: str
    ours_ms: float
    others_ms: dict[str, float]
    gflop_per_s: float
    gb_per_s: float

    def line(self) -> str:
        others = "".join(f"  {name} {ms:9.3f} ({ms / self.ours_ms:4.1f}x)" for name, ms in self.others_ms.items())
        return f"{self.what:40} ours {self.ours_ms:9.3f} ms {self.gflop_per_s:6.0f} GFLOP/s {self.gb_per_s:6.1f} GB/s{others}"


ATTENTIONS = [
    *(Attention(q, k, h, g) for h, g in ((8, 4), (14, 2)) for q, k in ((512, 2048), (512, 8192), (2048, 8192))),
    *(Attention(1, 8192, h, g) for h, g in ((8, 4), (14, 2))),
    *(Attention(1, 512, h, g, sequences=s) for h, g in ((8, 4), (14, 2)) for s in (1, 8, 32)),
]
LINEARS = [(512, 1376), (1024, 512), (2752, 512), (896, 4864), (9728, 896), (32000, 512)]  # [N, K]
TOKENS = [1, 8, 32, 64, 512, 2048]


def measure_attention(ops: Ops, case: Attention, *, clock: Clock, repeats: int) -> Row:
    """Ours in place, torch on gathered tensors."""
    layout = KvLayout(1, case.kv_heads, case.head_dim, BLOCK_TOKENS, BF16)
    blocks = layout.blocks_of(case.context)
    kv = KvView.empty(case.sequences * blocks, layout)
    kv.base.view(BF16).normal_()
    slots = torch.randperm(case.sequences * blocks).view(case.sequences, blocks)
    batch = BatchLayout.build(
        [case.queries] * case.sequences,
        [case.context] * case.sequences,
        block_tables=slots.tolist(),
        block_tokens=BLOCK_TOKENS,
    )
    q = torch.randn(batch.num_tokens, case.heads, case.head_dim).to(BF16)
    heads_first = q.view(case.sequences, case.queries, case.heads, -1).transpose(1, 2).contiguous()
    k, v = (t.contiguous() for t in _gather(kv, slots))
    scale = case.head_dim**-0.5
    ways: dict[str, Callable[[], object]] = {
        "ours": lambda: ops.attention(q, batch, kv=kv, layer=0, scale=scale),
        "sdpa": lambda: _sdpa(heads_first, k, v),
        "products": lambda: _products(heads_first, k, v),
        "pages + products": lambda: _products(heads_first, *_gather(kv, slots)),
    }
    return _row(case.what, _interleaved(ways, clock, repeats), operations=case.operations, num_bytes=case.kv_bytes)


def measure_linear(ops: Ops, shape: tuple[int, int], *, tokens: int, clock: Clock, repeats: int) -> Row:
    """Packed weights by `ops.linear`, against torch's F.linear and against oneDNN on the same packed weights."""
    n, k = shape
    copies = max(1, min(64, ROTATION_BYTES // (2 * n * k)))
    weights = [torch.randn(n, k).to(BF16) for _ in range(copies)]
    packed = [ops.pack_weight(weight) for weight in weights]
    x = torch.randn(tokens, k).to(BF16)
    turn = iter(range(1 << 30))
    ways: dict[str, Callable[[], object]] = {
        "ours": lambda: ops.linear(x, packed[next(turn) % copies]),
        "F.linear": lambda: F.linear(x, weights[next(turn) % copies]),
    }
    if not isinstance(packed[0], Tensor):
        prepacked = [p.data for p in packed if not isinstance(p, Tensor)]
        product = torch.ops.mkldnn._linear_pointwise.default
        ways["oneDNN packed"] = lambda: product(x, prepacked[next(turn) % copies], None, "none", [], "")
    what = f"linear {tokens} x [{n}, {k}]"
    return _row(what, _interleaved(ways, clock, repeats), operations=2 * tokens * n * k, num_bytes=2 * n * k)


def _gather(kv: KvView, slots: Tensor) -> tuple[Tensor, Tensor]:
    """K and V in place copied out of the blocks: [sequences, kv_heads, context, head_dim]."""
    k = kv.keys(0)[slots].permute(0, 2, 1, 4, 3, 5).flatten(4).flatten(2, 3)
    v = kv.values(0)[slots].permute(0, 2, 1, 3, 5, 4).flatten(3, 4).flatten(2, 3)
    return k, v


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    queries, keys = q.shape[2], k.shape[2]
    if queries == 1:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    visible = torch.arange(keys) <= torch.arange(keys - queries, keys)[:, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)


def _products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax between two batched products, over blocks of queries, the heads of a group side by side."""
    sequences, heads, queries, dim = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    grouped = q.view(sequences * kv_heads, heads // kv_heads, queries, dim)
    k, v = k.flatten(0, 1).transpose(1, 2), v.flatten(0, 1)
    out = torch.empty_like(grouped)
    for first in range(0, queries, QUERY_BLOCK):
        rows = grouped[:, :, first : first + QUERY_BLOCK]
        size = rows.shape[2]
        seen = keys - queries + first + size
        scores = torch.bmm(rows.flatten(1, 2), k[:, :, :seen]).float().view(*rows.shape[:3], seen)
        hidden = torch.arange(seen) > torch.arange(seen - size, seen)[:, None]
        weights = scores.mul_(dim**-0.5).masked_fill_(hidden, float("-inf")).softmax(-1).to(q.dtype)
        out[:, :, first : first + size] = torch.bmm(weights.flatten(1, 2), v[:, :seen]).view_as(rows)
    return out


def _interleaved(ways: dict[str, Callable[[], object]], clock: Clock, repeats: int) -> dict[str, float]:
    """Median milliseconds of each way."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, run in ways.items():
            start = clock()
            run()
            if turn:
                times[name].append(clock() - start)
    return {name: 1e3 * median(seconds) for name, seconds in times.items()}


def _row(what: str, medians: dict[str, float], *, operations: int, num_bytes: int) -> Row:
    ours = medians.pop("ours")
    return Row(what, ours, medians, operations / ours / 1e6, num_bytes / ours / 1e6)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line per case, or one JSON document."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention", description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one-core", action="store_true")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    clock: Clock = thread_time if options.one_core else perf_counter
    if options.one_core:
        torch.set_num_threads(1)
    ops = load_ops("cpu")
    machine = f"{ops.name} ({ops.reason}), torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}"
    if not options.json:
        print(f"{machine}, OMP_WAIT_POLICY={os.environ.get('OMP_WAIT_POLICY')}")
    rows = []
    for case in ATTENTIONS:
        rows.append(measure_attention(ops, case, clock=clock, repeats=options.repeats * (1 if case.queries > 1 else 4)))
        _show(rows[-1], as_json=options.json)
    for shape in LINEARS:
        for tokens in TOKENS:
            if tokens > 64 and shape[0] == 32000:
                continue  # the last layer sees a step's last tokens only
            rows.append(measure_linear(ops, shape, tokens=tokens, clock=clock, repeats=options.repeats))
            _show(rows[-1], as_json=options.json)
    if options.json:
        print(json.dumps({"machine": machine, "rows": [asdict(row) for row in rows]}, indent=1))
    return 0


def _show(row: Row, *, as_json: bool) -> None:
    if not as_json:
        print(row.line(), flush=True)


if __name__ == "__main__":
    sys.exit(main())
