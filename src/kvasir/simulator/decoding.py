"""Who decodes on an instance, and how long they waited for each token: accounts kept by slices of one log, not by tokens."""

from __future__ import annotations

from collections.abc import Callable

from kvasir.simulator.gaps import GapLog
from kvasir.simulator.jobs import Seq


class Decoding:
    """All decoding sequences of an instance. Those in `_joining` have no open account; it opens with their next step.

    A prompt of which a single token is left to compute is in the decode batch, too (`_singles`), but its token is its first.
    """

    def __init__(self, list_step: Callable[[], set[str]]):
        """`list_step` names the members of the present step; it is asked only when somebody is left out."""
        self._list_step = list_step
        self._members: dict[Seq, None] = {}
        self._singles: dict[Seq, None] = {}
        self._joining: dict[Seq, None] = {}
        self._log = GapLog()
        self._idle_s = 0.0

    def __len__(self) -> int:
        return len(self._members)

    def add(self, seq: Seq) -> None:
        seq.is_decoding = True
        self._members[seq] = self._joining[seq] = None

    def add_single(self, seq: Seq) -> None:
        """All of its prompt but one token is computed."""
        self._singles[seq] = None

    def remove(self, seq: Seq) -> None:
        """It leaves, with all tokens so far; who is not here is ignored."""
        if seq in self._singles:
            del self._singles[seq]
        if not seq.is_decoding:
            return
        seq.is_decoding = False
        del self._members[seq]
        if seq in self._joining:
            del self._joining[seq]
        self._close(seq)

    def begin(self, batch: int, now: float) -> list[Seq]:
        """A step with `batch` decoding sequences begins: all of them, unless pages are short. Returns the singles in it."""
        left_out: dict[Seq, None] = {}
        singles = list(self._singles) if self._singles else []
        if batch != len(self._members) + len(singles):
            in_step = self._list_step()
            singles = [seq for seq in singles if seq.name in in_step]
            left_out = {seq: None for seq in self._members if seq.name not in in_step}
            for seq in left_out:
                self._joining.pop(seq, None)
                self._close(seq)
        log, joining = self._log, self._joining
        if not joining and not singles:
            self._idle_s = now - log.ended_s
            self._joining = left_out
            return singles
        self._idle_s = now - log.ended_s if batch > len(joining) + len(singles) else 0.0
        for seq in joining:
            seq.is_joined = True
            seq.log_at, seq.passes_at = len(log), log.passes
            seq.extra_s = now - seq.job.last_token_s - self._idle_s
        self._joining = left_out
        for seq in singles:
            del self._singles[seq]
        return singles

    def end(self, passes: int, seconds: float, now: float) -> None:
        """`passes` of the step were made, in `seconds` together."""
        log = self._log
        log.add(passes, seconds / passes, idle_s=self._idle_s, now=now)
        if log.is_long:
            log.drop_before(min([seq.log_at for seq in self._members if seq.is_joined], default=len(log)))

    def close(self) -> None:
        """Everybody leaves."""
        for seq in list(self._members):
            self.remove(seq)

    def _close(self, seq: Seq) -> None:
        """Write the tokens of its account to the job."""
        if not seq.is_joined:
            return
        seq.is_joined = False
        log, job = self._log, seq.job
        if log.passes > seq.passes_at:
            job.gaps += log.since(seq.log_at, seq.extra_s)
            job.emitted += log.passes - seq.passes_at
            job.last_token_s = log.ended_s
