"""PoolNode with pins, priorities and watermarks against a naive model, on top of all that happens to a node with an SSD."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule

from kvasir.core.pool_events import Pin, Pinned, PoolTick, Priority, Removed, Unpin
from kvasir.pool.node import PoolNode
from tests.pool.test_node_machine import COUNTS, EPOCHS, MAX_SPILLING, NUM_SLOTS, NUM_SSD_SLOTS, OWNERS, PATHS, SsdNodeMachine

LOW_FREE = 2
HIGH_FREE = 3


class RetentionMachine(SsdNodeMachine):
    def __init__(self) -> None:
        super().__init__()
        self.node = PoolNode(
            NUM_SLOTS, ssd_slots=NUM_SSD_SLOTS, max_spilling=MAX_SPILLING, low_free=LOW_FREE, high_free=HIGH_FREE
        )
        self.marks: dict[bytes, float] = {}  # until when a block is pinned
        self.over: set[bytes] = set()  # those of the marks whose pin is over

    @rule(
        owner=OWNERS,
        older=EPOCHS,
        path=PATHS,
        count=COUNTS,
        seconds=st.sampled_from([0.0, 2.0, 5.0]),
        rank=st.sampled_from(Priority),
    )
    def pin(self, owner: str, older: int, path: bytes, count: int, seconds: float, rank: Priority) -> None:
        keys = [path[: i + 1] for i in range(count)]
        until_s = self.now + seconds
        answers = self.ask(Pin(owner, self.epoch(owner, older), tuple(keys), until_s, rank))
        if answers is None:
            return
        here = keys[: next((i for i, key in enumerate(keys) if key not in self.published), count)]
        if seconds and len(self.held() | set(here)) > NUM_SLOTS // 2:
            assert self.refused(answers) == "pins_full"
            return
        assert answers == [Pinned(len(here))]
        for key in here:
            if until_s > max(self.now, self.marks.get(key, 0.0)):
                self.over.discard(key)
                self.marks[key] = until_s
            elif key not in self.marks:
                self.marks[key] = 0.0
                self.over.add(key)

    @rule(owner=OWNERS, path=PATHS, count=st.integers(1, 3), release=st.booleans())
    def pin_a_prompt(self, owner: str, path: bytes, count: int, release: bool) -> None:
        """What an agent's system prompt is for."""
        if owner in self.alive and "r0" not in self.leases:
            self.prefill(owner, "r0", path, count)
            self.pin(owner, 0, path, count, 5.0, Priority.NORMAL)
            if release:
                self.release(owner, 0, "r0", 0, None)
            self.reserve(owner, 0, NUM_SLOTS)
            self.revoke(owner, 0, sorted(self.reserved[owner]))

    @rule(owner=OWNERS, older=EPOCHS, path=PATHS, count=COUNTS)
    def unpin(self, owner: str, older: int, path: bytes, count: int) -> None:
        keys = [path[: i + 1] for i in range(count)]
        if self.ask(Unpin(owner, self.epoch(owner, older), tuple(keys))) is None:
            return
        for key in reversed(keys):
            if any(other[:-1] == key for other in self.marks):
                break
            self.marks.pop(key, None)
            self.over.discard(key)

    @rule(owner=OWNERS, path=PATHS, written=st.integers(0, 2))
    def make_room_ahead_of_need(self, owner: str, path: bytes, written: int) -> None:
        """The pool fills up, and the SSD has a part of what is idle."""
        if owner in self.alive and "r1" not in self.leases:
            self.prefill(owner, "r1", path, 4)
            for _ in range(written):
                if self.writing:
                    self.write_ends(0, True)
            self.release(owner, 0, "r1", 0, None)
            self.reserve(owner, 0, max(0, len(self.free) - 1))
            self.tick()
            self.revoke(owner, 0, sorted(self.reserved[owner]))

    @rule(owner=OWNERS, path=PATHS)
    def unpin_a_part(self, owner: str, path: bytes) -> None:
        if owner in self.alive:
            self.pin(owner, 0, path, 3, 5.0, Priority.NORMAL)
            self.unpin(owner, 0, path, 1)

    def held(self) -> set[bytes]:
        return self.marks.keys() - self.over

    def kept(self) -> set[bytes]:
        return self.pinned() | self.held()

    def evict(self, keys: tuple[bytes, ...]) -> None:
        super().evict(keys)
        for gone in [marked for marked in self.marks if marked.startswith(keys)]:
            del self.marks[gone]
            self.over.discard(gone)

    @rule()
    def tick(self) -> None:
        self.expire()
        self.over |= {key for key, until_s in self.marks.items() if until_s <= self.now}
        may_go = self.on_ssd.keys() - self.kept()  # and may have to leave the SSD as soon as they are gone from DRAM
        for gone in self.tell(PoolTick("body", 0)):
            assert isinstance(gone, Removed)
            assert gone.reason == "demoted"
            assert len(self.free) < LOW_FREE
            assert set(gone.keys) <= may_go
            self.evict(gone.keys)

    @invariant()
    def pins_are_counted(self) -> None:
        assert self.node.stats().pinned == len(self.held())


TestRetentionMachine = RetentionMachine.TestCase
TestRetentionMachine.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
