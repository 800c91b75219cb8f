"""Traffic unlike the conversation trace, to see whether a scheduler was tuned to it: writes one trace file for each kind.

    python -m benchmarks.other_traffic --out DIR
    kvasir simulate DIR/tool-agent.jsonl --cluster paper-16 --policy kvasir --slo-ttft 30s --slo-tbt 100ms --capacity --json

* tool-agent: sixty agents with long instructions of their own, called again and again; answers are short.
* long-document: a document and a few questions on it.
* chat: short prompts, long answers, many turns: decoding is what fills the machines.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

BLOCK = 512
HOUR_HALF_S = 1800.0
LONGEST = 120_000


@dataclass(slots=True)
class Session:
    """A conversation: its blocks so far, and how many tokens they stand for."""

    blocks: list[int]
    tokens: int
    time_s: float


@dataclass(slots=True)
class Writer:
    """Requests of one trace; blocks that nobody else has are numbered on."""

    rng: Random
    requests: list[tuple[float, int, int, list[int]]] = field(default_factory=list)
    _num_blocks: int = 0

    def fresh(self, count: int) -> list[int]:
        self._num_blocks += count
        return list(range(self._num_blocks - count, self._num_blocks))

    def log_normal(self, mean: float, sigma: float) -> float:
        return self.rng.lognormvariate(math.log(mean) - sigma * sigma / 2, sigma)

    def turn(self, session: Session, new_tokens: int, output: Callable[[], int], *, longest: float = math.inf) -> int:
        """The session goes on with so many tokens; the length of the answer."""
        length = int(min(session.tokens + new_tokens, longest))
        whole = session.tokens // BLOCK
        session.blocks = session.blocks[:whole] + self.fresh(-(-length // BLOCK) - whole)
        answer = output()
        if session.time_s < HOUR_HALF_S:
            self.requests.append((session.time_s, length, answer, list(session.blocks)))
        session.tokens = length + answer
        session.blocks = session.blocks + self.fresh(max(0, session.tokens // BLOCK - len(session.blocks)))
        return answer

    def lines(self) -> Iterator[str]:
        for time_s, length, output, blocks in sorted(self.requests, key=lambda request: request[0]):
            row = {"timestamp": int(time_s * 1000), "input_length": length, "output_length": output, "hash_ids": blocks}
            yield json.dumps(row) + "\n"


def tool_agent(writer: Writer) -> None:
    rng = writer.rng
    agents = [writer.fresh(max(1, int(writer.log_normal(5000, 0.7) / BLOCK))) for _ in range(60)]
    popularity = [1 / (rank + 1) for rank in range(60)]
    for _ in range(4200):
        (agent,) = rng.choices(agents, popularity)
        session = Session(list(agent), len(agent) * BLOCK, rng.uniform(0, HOUR_HALF_S))
        for turn in range(min(12, 1 + int(rng.expovariate(1 / 2.0)))):
            new = max(20, int(writer.log_normal(1400 if turn else 2500, 1.1)))
            answer = writer.turn(session, new, lambda: max(2, int(writer.log_normal(180, 0.9))), longest=LONGEST)
            session.time_s += 1.5 + answer * 0.03 + rng.expovariate(1 / 6.0)


def long_document(writer: Writer) -> None:
    rng = writer.rng
    for _ in range(1300):
        length = int(min(LONGEST, writer.log_normal(11_000, 1.0)))
        session = Session([], 0, rng.uniform(0, HOUR_HALF_S))
        session.blocks = writer.fresh(max(1, length // BLOCK))
        session.tokens = len(session.blocks) * BLOCK
        for _ in range(1 + int(rng.expovariate(1 / 1.8))):
            writer.turn(session, max(10, int(writer.log_normal(300, 0.8))), lambda: max(2, int(writer.log_normal(150, 0.7))))
            session.time_s += 5 + rng.expovariate(1 / 40.0)


def chat(writer: Writer) -> None:
    rng = writer.rng
    for _ in range(9000):
        session = Session([], 0, rng.uniform(0, HOUR_HALF_S))
        for _ in range(1 + int(rng.expovariate(1 / 1.5))):
            new = max(10, int(writer.log_normal(900, 1.2)))
            answer = writer.turn(session, new, lambda: max(2, int(writer.log_normal(600, 0.8))))
            session.time_s += answer * 0.03 + 5 + rng.expovariate(1 / 45.0)


KINDS: dict[str, tuple[int, Callable[[Writer], None]]] = {
    "tool-agent": (1, tool_agent),
    "long-document": (2, long_document),
    "chat": (3, chat),
}
"""Name → seed, and what draws it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for the trace files")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, (seed, draw) in KINDS.items():
        writer = Writer(Random(seed))
        draw(writer)
        path = out / f"{name}.jsonl"
        path.write_text("".join(writer.lines()))
        print(f"{path}: {len(writer.requests):,} requests")


if __name__ == "__main__":
    main()
