"""A chunked pipeline driven by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvasir.engine.interface import Engine, SequenceSlice, Stage, StreamRows
from tests.engine.conftest import Arena, Sequence_

BESIDE = 17  # tokens of another sequence in each step


class Pipeline:
    """Engines over one arena that compute the stages of one prompt: for each its layers and where its chunks end.

    The rows between two stages lie in two slots of the arena, and go from one to the other in the middle of the prompt.
    """

    def __init__(
        self, engines: Sequence[Engine], arena: Arena, sequence: Sequence_, *, stages: Mapping[tuple[int, int], Sequence[int]]
    ) -> None:
        self.engines, self.sequence = engines, sequence
        self.done = [sequence.computed] * len(engines)
        self.row_slots = [arena.reserve(2 * arena.spec.block_tokens) for _ in engines[1:]]
        self._row_of_first_token = arena.spec.rows_per_slot - len(sequence.tokens) // 2
        self._layers = list(stages)
        self._ends = [[end for end in ends if end > sequence.computed] for ends in stages.values()]

    def slice(self, stage: int, end: int) -> SequenceSlice:
        """The tokens up to `end` that this stage has not computed; the prompt's last one samples."""
        start, is_last = self.done[stage], stage == len(self.row_slots)
        edges = (None, *(StreamRows(slots, self._row_of_first_token + start) for slots in self.row_slots), None)
        sampling = self.sequence.sampling if is_last and end == self.sequence.num_prompt else None
        work = Stage(*self._layers[stage], reads=edges[stage], writes=edges[stage + 1])
        return SequenceSlice(
            self.sequence.name, self.sequence.tokens[start:end], start, self.sequence.pages, sampling, stage=work
        )

    async def run(self, *, beside: Sequence[Sequence_] = ()) -> None:
        """Each stage computes its next chunk when the one before has; `beside` has a sequence of each engine's own."""
        while any(self._ends):
            for stage, ends in enumerate(self._ends):
                if ends and (stage == 0 or self.done[stage - 1] >= ends[0]):
                    await self._step(stage, ends.pop(0), *beside[stage : stage + 1])
        self.sequence.computed = self.sequence.num_prompt

    async def _step(self, stage: int, end: int, *beside: Sequence_) -> None:
        slices = [self.slice(stage, end), *(other.slice(BESIDE) for other in beside)]
        result = await self.engines[stage].step(slices)
        assert set(result.tokens) == {s.request_id for s in slices if s.sampling is not None}
        self.done[stage] = end
        for sequence, part in zip((self.sequence, *beside), slices, strict=True):
            if sequence is not self.sequence:
                sequence.computed += len(part.tokens)
            if part.sampling is not None:
                sequence.sampled.append(result.tokens[sequence.name])
                sequence.tokens.append(result.tokens[sequence.name].token)
