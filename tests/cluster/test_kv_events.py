"""KV events as vLLM speaks them: the bytes, what our cluster tells, and what a follower makes of anybody's stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import msgspec
import pytest
import zmq

from kvasir.cluster.kv_events import (
    AllBlocksCleared,
    Batch,
    BlockRemoved,
    BlockStored,
    EventStream,
    Follower,
    KvEventPublisher,
    KvEventSubscriber,
    Lineage,
    WireFormat,
)
from kvasir.cluster.kv_events.format import Malformed, decode, encode
from kvasir.cluster.kv_events.publisher import END
from kvasir.core.errors import ConfigError
from kvasir.core.events import BlocksRemoved, BlocksStored, Inventory, NodeLost
from kvasir.core.keys import block_keys
from kvasir.core.request import Role
from kvasir.core.tier import Tier
from kvasir.pool.directory import BlockDirectory
from tests.cluster.harness import SPEC, answer, cluster, submission
from tests.cluster.virtual_time import run_virtual

ROOT = b"r" * 16
BLOCK = 4
DEADLINE_S = 10.0

ARRAYS = bytes.fromhex(
    "93"  # a batch: three of
    "cb41d954fc40800000"  # ts 1700000002.0
    "93"  # three events
    "98ab426c6f636b53746f726564"  # [BlockStored,
    "92cfffffffffffffffff07c0"  # [2**64 - 1, 7], None,
    "94010203cd012c02c0a3475055c0"  # [1, 2, 3, 300], 2, None, "GPU", None]
    "93ac426c6f636b52656d6f7665649107a3475055"  # [BlockRemoved, [7], "GPU"]
    "91b0416c6c426c6f636b73436c6561726564"  # [AllBlocksCleared]
    "03"  # rank 3
)
"""As versions wrote it that know arrays, byte by byte."""

MAPS = bytes.fromhex(
    "93cb41d954fc40800000"
    "92"
    "88a474797065ab426c6f636b53746f726564"  # {type: BlockStored,
    "ac626c6f636b5f68617368657391c402abcd"  # block_hashes: [b"\xab\xcd"],
    "b1706172656e745f626c6f636b5f68617368c0"  # parent_block_hash: None,
    "a9746f6b656e5f69647392070aaa626c6f636b5f73697a6502"  # token_ids: [7, 10], block_size: 2,
    "a76c6f72615f6964c0a66d656469756da3435055a96c6f72615f6e616d65c0"  # lora_id: None, medium: CPU, lora_name: None}
    "82a474797065ae536f6d657468696e67206e657761780c"[:-6]
    + "a17801"  # {type: "Something new", x: 1}
    "00"
)
"""As versions write it that know maps, with an event of the future."""


def packed(*events: Any, rank: int = 0, ts: float = 1.0) -> bytes:
    return msgspec.msgpack.encode([ts, list(events), rank])


def stored(hashes: list[int | bytes], parent: int | bytes | None, tokens: list[int], medium: str = "GPU") -> list[Any]:
    return ["BlockStored", hashes, parent, tokens, BLOCK, None, medium]


class TestFormat:
    def test_arrays_of_earlier_versions_are_read(self) -> None:
        batch = decode(ARRAYS)
        assert batch == Batch(
            1700000002.0,
            (
                BlockStored([2**64 - 1, 7], None, [1, 2, 3, 300], 2, None, "GPU", None),
                BlockRemoved([7], "GPU"),
                AllBlocksCleared(),
            ),
            rank=3,
        )

    def test_arrays_are_written_as_they_were_read_but_for_fields_that_came_later(self) -> None:
        batch = decode(ARRAYS)
        event = ARRAYS.index(b"\x98\xabBlockStored")
        ours = bytearray(ARRAYS)
        ours[event] = 0x99  # a ninth field, extra_keys
        at = ARRAYS.index(b"\x93\xacBlockRemoved")
        ours[at:at] = b"\xc0"
        assert encode(batch, "array") == bytes(ours)

    def test_maps_of_later_versions_are_read_and_what_is_unknown_is_skipped(self) -> None:
        batch = decode(MAPS)
        assert batch.events == (BlockStored([b"\xab\xcd"], None, [7, 10], 2, None, "CPU", None),)
        assert batch.skipped == 1
        assert batch.rank == 0

    def test_maps_are_written_as_later_versions_write_them(self) -> None:
        batch = Batch(1700000002.0, decode(MAPS).events, 0)
        whole = MAPS.index(b"\x82\xa4type")
        assert encode(batch, "map") == MAPS[:10] + b"\x91" + MAPS[11:whole] + b"\x00"

    @pytest.mark.parametrize("shape", ["array", "map"])
    def test_what_is_written_is_read_again(self, shape: Any) -> None:
        events = (
            BlockStored([b"k" * 16], b"p" * 16, [1, 2, 3, 4], 4, None, "CPU", None, [["salt"]]),
            BlockRemoved([1, 2], "STORAGE"),
            AllBlocksCleared(),
        )
        assert decode(encode(Batch(2.5, events, 7), shape)) == Batch(2.5, events, 7)

    def test_a_batch_may_be_a_map_and_have_fields_that_we_do_not_know(self) -> None:
        whole = {"ts": 1.0, "events": [["AllBlocksCleared", "GPU"]], "publisher_id": b"x"}
        assert decode(msgspec.msgpack.encode(whole)).events == (AllBlocksCleared(),)
        assert decode(msgspec.msgpack.encode([1.0, [], 2, b"publisher"])).rank == 2
        assert decode(msgspec.msgpack.encode([1.0, []])).rank == 0

    @pytest.mark.parametrize(
        "payload",
        [
            b"",
            b"\xff",
            b"\x93",
            b"[1, 2]",
            msgspec.msgpack.encode([1.0, "x", 0]),
            packed(rank=-1),
            packed(rank=1 << 40),
            b"\x91" * 5000,
        ],
    )
    def test_what_is_no_batch_is_malformed(self, payload: bytes) -> None:
        with pytest.raises(Malformed):
            decode(payload)

    @pytest.mark.parametrize(
        "event",
        [
            [],
            ["BlockStored"],
            ["BlockStored", "x", None, [], 4],
            ["BlockStored", [1], None, ["a"], 4],
            [["BlockStored"], [1]],
            {"type": "BlockRemoved"},
            {"type": 5},
            {5: "type"},
            7,
            None,
            "BlockStored",
        ],
    )
    def test_an_event_that_makes_no_sense_does_not_spoil_the_others(self, event: Any) -> None:
        batch = decode(packed(["BlockRemoved", [1]], event))
        assert batch.events == (BlockRemoved([1], None),)
        assert batch.skipped == 1

    def test_random_bytes_are_malformed_or_a_batch_but_never_an_accident(self) -> None:
        rng = Random(1)
        for _ in range(3000):
            mutated = bytearray(rng.choice((ARRAYS, MAPS)))
            for _ in range(rng.randrange(1, 4)):
                mutated[rng.randrange(len(mutated))] = rng.randrange(256)
            try:
                decode(bytes(mutated[: rng.randrange(len(mutated) + 1)]))
            except Malformed:
                continue


class World:
    """A lineage that knows some prompts, and the stream of what nodes do with them."""

    def __init__(self, wire: WireFormat | None = None, capacity: int = 1000):
        self.lineage = Lineage(BLOCK, capacity)
        self.stream = EventStream(self.lineage, wire or WireFormat(hashes="bytes"))

    def prompt(self, first: int, blocks: int, *, salt: str = "") -> list[bytes]:
        tokens = list(range(first, first + blocks * BLOCK))
        keys = block_keys(ROOT + salt.encode(), tokens, BLOCK)
        self.lineage.learn(keys, tokens, parent=None, salt=salt)
        return keys

    def told(self, *events: Any) -> list[tuple[str, list[Any]]]:
        for event in events:
            self.stream.hear(event)
        return [(node, list(found)) for node, found in self.stream.take()]


class TestStream:
    def test_a_run_of_blocks_is_one_event_with_parent_and_tokens(self) -> None:
        world = World()
        keys = world.prompt(100, 3)
        (first,) = world.told(BlocksStored("n0", 1, tuple(keys[:2])))
        assert first == ("n0", [BlockStored(keys[:2], None, list(range(100, 108)), BLOCK, None, "CPU", None)])
        (later,) = world.told(BlocksStored("n0", 2, tuple(keys[2:])))
        assert later == ("n0", [BlockStored(keys[2:], keys[1], list(range(108, 112)), BLOCK, None, "CPU", None)])

    def test_blocks_of_two_prompts_are_two_events(self) -> None:
        world = World()
        a, b = world.prompt(0, 2), world.prompt(50, 2)
        ((_, events),) = world.told(BlocksStored("n0", 1, (*a, *b)))
        assert [event.block_hashes for event in events] == [a, b]
        assert [event.parent_block_hash for event in events] == [None, None]

    def test_what_a_decode_wrote_follows_on_its_prompt(self) -> None:
        world = World()
        keys = world.prompt(0, 2)
        (written,) = block_keys(keys[-1], [7, 7, 7, 7], BLOCK)
        world.lineage.learn([written], [7, 7, 7, 7], parent=keys[-1])
        ((_, events),) = world.told(BlocksStored("n0", 1, (*keys, written)))
        assert events == [BlockStored([*keys, written], None, [*range(8), 7, 7, 7, 7], BLOCK, None, "CPU", None)]

    def test_blocks_of_unknown_tokens_are_told_without_them(self) -> None:
        world = World()
        keys = world.prompt(0, 1)
        ((_, events),) = world.told(BlocksStored("n0", 1, (b"x" * 16, *keys, b"y" * 16)))
        assert events == [
            BlockStored(keys, None, [0, 1, 2, 3], BLOCK, None, "CPU", None),
            BlockStored([b"x" * 16, b"y" * 16], None, [], BLOCK, None, "CPU", None),
        ]
        assert world.stream.unknown_blocks == 2

    def test_a_salt_shows_as_an_extra_key_of_the_first_block_and_is_not_told(self) -> None:
        world = World()
        keys = world.prompt(0, 2, salt="tenant:secret")
        ((_, events),) = world.told(BlocksStored("n0", 1, tuple(keys)))
        (salted, nothing) = events[0].extra_keys
        assert nothing is None
        assert "secret" not in salted[0]
        other = world.prompt(0, 1, salt="tenant:other")
        ((_, events),) = world.told(BlocksStored("n0", 2, tuple(other)))
        assert events[0].extra_keys[0] != salted

    def test_tiers_are_mediums_and_nothing_is_told_twice(self) -> None:
        world = World()
        keys = tuple(world.prompt(0, 1))
        ((_, events),) = world.told(
            BlocksStored("n0", 1, keys),
            BlocksStored("n0", 2, keys),
            BlocksStored("n0", 3, keys, Tier.SSD),
            BlocksRemoved("n0", 4, keys),
            BlocksRemoved("n0", 5, keys),
        )
        kinds = [(type(event).__name__, event.medium) for event in events]
        assert kinds == [("BlockStored", "CPU"), ("BlockStored", "STORAGE"), ("BlockRemoved", "CPU")]

    def test_a_pool_that_starts_again_clears_its_rank_first(self) -> None:
        world = World()
        keys = tuple(world.prompt(0, 2))
        world.told(BlocksStored("n0", 1, ()), BlocksStored("n0", 2, keys), BlocksStored("n1", 1, keys))
        ((node, events),) = world.told(BlocksRemoved("n0", 1, ()), BlocksStored("n0", 2, keys[:1]))
        assert node == "n0"
        assert [type(event) for event in events] == [AllBlocksCleared, BlockStored]
        assert world.told(NodeLost("n1")) == [("n1", [AllBlocksCleared()])]
        assert (world.stream.rank_of("n0"), world.stream.rank_of("n1")) == (0, 1)

    def test_old_news_is_no_news(self) -> None:
        world = World()
        keys = tuple(world.prompt(0, 1))
        world.told(BlocksStored("n0", 1, keys), BlocksStored("n0", 5, ()))
        assert world.told(BlocksRemoved("n0", 4, keys)) == []

    def test_an_inventory_tells_only_what_is_different(self) -> None:
        world = World()
        a, b = world.prompt(0, 2), world.prompt(50, 1)
        world.told(BlocksStored("n0", 1, tuple(a)))
        ((_, events),) = world.told(Inventory("n0", 9, (a[0], *b), (a[1],)))
        assert [(type(event).__name__, event.block_hashes, event.medium) for event in events] == [
            ("BlockRemoved", [a[1]], "CPU"),
            ("BlockStored", b, "CPU"),
            ("BlockStored", [a[1]], "STORAGE"),
        ]

    def test_hashes_are_the_low_64_bits_as_vllm_has_them_unless_whole_ones_are_wanted(self) -> None:
        world = World(WireFormat(hashes="int"))
        keys = world.prompt(0, 1)
        ((_, events),) = world.told(BlocksStored("n0", 1, tuple(keys)))
        assert events[0].block_hashes == [int.from_bytes(keys[0], "big") & (2**64 - 1)]

    def test_the_lineage_forgets_what_was_not_used_for_longest(self) -> None:
        world = World(capacity=4)
        old, used = world.prompt(0, 2), world.prompt(50, 2)
        world.lineage.get(old[0])
        world.prompt(100, 2)
        assert len(world.lineage) == 4
        assert world.lineage.get(old[0]) is not None
        assert world.lineage.get(old[1]) is None
        assert world.lineage.get(used[0]) is None


def follower(**options: Any) -> tuple[Follower, BlockDirectory]:
    directory = BlockDirectory()
    return Follower(directory, lambda rank: f"vllm/{rank}", **options), directory


class TestFollower:
    def test_a_vllms_blocks_are_found_under_our_keys(self) -> None:
        found, directory = follower(root=ROOT, block_tokens=BLOCK)
        tokens = list(range(12))
        keys = block_keys(ROOT, tokens, BLOCK)
        found.take(packed(stored([11, 12], None, tokens[:8])))
        found.take(packed(stored([13], 12, tokens[8:])))
        assert all(directory.holders(key) == ("vllm/0",) for key in keys)
        found.take(packed(["BlockRemoved", [12], "GPU"]))
        assert [bool(directory.holders(key)) for key in keys] == [True, False, True]

    @pytest.mark.parametrize(
        "event",
        [
            stored([1], 99, [0, 1, 2, 3]),
            stored([1], None, [0, 1, 2]),
            stored([1], None, []),
            ["BlockStored", [1], None, list(range(16)), 16, None, "GPU"],
            ["BlockStored", [1], None, [0, 1, 2, 3], BLOCK, 5, "GPU"],
            ["BlockStored", [1], None, [0, 1, 2, 3], BLOCK, None, "GPU", "adapter"],
            ["BlockStored", [1], None, [0, 1, 2, 3], BLOCK, None, "GPU", None, [["salt"]]],
            ["BlockStored", [1], None, [0, 1, 2, -3], BLOCK, None, "GPU"],
        ],
    )
    def test_a_block_whose_key_cannot_be_known_is_left_out(self, event: Any) -> None:
        found, directory = follower(root=ROOT, block_tokens=BLOCK)
        found.take(packed(event))
        assert len(directory) == 0
        assert found.counts.orphans == 1

    def test_without_a_root_the_hashes_are_the_keys(self) -> None:
        found, directory = follower()
        found.take(packed(stored([b"k" * 16, 5, -1], None, [])))
        assert directory.holders(b"k" * 16) == ("vllm/0",)
        assert directory.holders((5).to_bytes(8, "big")) == ("vllm/0",)
        assert directory.holders(b"\xff" * 8) == ("vllm/0",)

    def test_a_block_in_two_mediums_is_gone_when_both_are(self) -> None:
        found, directory = follower()
        key = b"k" * 16
        for medium in ("GPU", "CPU", "STORAGE"):
            found.take(packed(stored([key], None, [], medium)))
        assert (directory.holders(key), directory.holders(key, Tier.SSD)) == (("vllm/0",), ("vllm/0",))
        found.take(packed(["BlockRemoved", [key], "GPU"]))
        assert directory.holders(key) == ("vllm/0",)
        found.take(packed(["BlockRemoved", [key], "CPU"]))
        assert (directory.holders(key), directory.holders(key, Tier.SSD)) == ((), ("vllm/0",))
        found.take(packed(["BlockRemoved", [key]]))
        assert len(directory) == 0

    def test_ranks_are_nodes_and_clearing_one_leaves_the_other(self) -> None:
        found, directory = follower()
        for rank in (0, 1):
            found.take(packed(stored([b"k" * 16], None, []), rank=rank))
        assert directory.holders(b"k" * 16) == ("vllm/0", "vllm/1")
        found.take(packed(["AllBlocksCleared"], rank=0))
        assert directory.holders(b"k" * 16) == ("vllm/1",)
        found.take(packed(stored([b"k" * 16], None, []), rank=0))
        assert set(directory.holders(b"k" * 16)) == {"vllm/0", "vllm/1"}
        directory.check()

    def test_garbage_is_counted_and_claims_are_bounded(self) -> None:
        found, directory = follower(max_blocks=3)
        found.take(b"\xff\xff")
        found.take(packed(stored([1, 2, 3, 4, 5], None, []), ["Nonsense"]))
        assert len(directory) == found.num_blocks() == 3
        assert (found.counts.garbage, found.counts.skipped, found.counts.overflow) == (1, 1, 2)

    def test_a_follower_of_our_stream_knows_what_the_nodes_have_after_any_history(self) -> None:
        rng = Random(5)
        world = World()
        found, directory = follower()
        keys = [key for first in range(0, 400, 40) for key in world.prompt(first, 3)] + [bytes([n]) * 16 for n in range(5)]
        holds: dict[str, dict[Tier, set[bytes]]] = {node: {tier: set() for tier in Tier} for node in ("n0", "n1")}
        seqs = dict.fromkeys(holds, 0)
        for _ in range(600):
            node, tier = rng.choice(sorted(holds)), rng.choice(list(Tier))
            some = tuple(rng.sample(keys, rng.randrange(6)))
            seqs[node] += 1
            match rng.randrange(12):
                case 0:
                    holds[node] = {other: set() for other in Tier}
                    seqs[node] = 1
                    event: Any = BlocksRemoved(node, 1, ())
                case 1:
                    ssd = tuple(rng.sample(keys, 4))
                    holds[node] = {Tier.DRAM: set(some), Tier.SSD: set(ssd)}
                    event = Inventory(node, seqs[node], some, ssd)
                case 2 | 3 | 4 | 5:
                    holds[node][tier] -= set(some)
                    event = BlocksRemoved(node, seqs[node], some, tier)
                case _:
                    holds[node][tier] |= set(some)
                    event = BlocksStored(node, seqs[node], some, tier)
            for name, events in world.told(event):
                found.take(encode(Batch(0.0, tuple(events), world.stream.rank_of(name)), "map"))
            for name in (name for name in holds if name in world.stream._ranks):
                place = f"vllm/{world.stream.rank_of(name)}"
                for where in Tier:
                    assert {key for key in keys if place in directory.holders(key, where)} == holds[name][where]
        directory.check()
        fresh, again = follower()
        for name, snapshot in world.stream.snapshot():
            fresh.take(encode(Batch(0.0, snapshot, world.stream.rank_of(name)), "array"))
        assert all(set(again.holders(key, tier)) == set(directory.holders(key, tier)) for key in keys for tier in Tier)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.005)


@asynccontextmanager
async def publishing(
    world: World, endpoint: str = "tcp://127.0.0.1:*", replay: str = "tcp://127.0.0.1:*", **options: Any
) -> AsyncIterator[KvEventPublisher]:
    wire = WireFormat(hashes="bytes")
    made = KvEventPublisher(world.stream, endpoint=endpoint, replay_endpoint=replay, model="m", wire=wire, **options)
    async with made.running():
        yield made


async def published_again(world: World, endpoint: str, replay: str) -> KvEventPublisher:
    """A publisher where another one was a moment ago: ZeroMQ gives a port back some time after its socket was closed."""
    wire = WireFormat(hashes="bytes")
    async with asyncio.timeout(DEADLINE_S):
        while True:
            try:
                return KvEventPublisher(world.stream, endpoint=endpoint, replay_endpoint=replay, model="m", wire=wire)
            except ConfigError:
                await asyncio.sleep(0.01)


@asynccontextmanager
async def following(
    publisher: Any, *, replay: bool = True, deadline_s: float = 2.0
) -> AsyncIterator[tuple[KvEventSubscriber, BlockDirectory]]:
    found, directory = follower()
    endpoint = publisher.replay_endpoint if replay else None
    subscriber = KvEventSubscriber(found, publisher.endpoint, endpoint, replay_deadline_s=deadline_s)
    running = asyncio.create_task(subscriber.run())
    try:
        yield subscriber, directory
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        subscriber.close()


class Script:
    """A publisher that says what a test wants: sockets and no sense."""

    def __init__(self, ports: tuple[str, str] = ("tcp://127.0.0.1:*", "tcp://127.0.0.1:*")):
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self.pub = context.socket(zmq.XPUB)  # tells of subscriptions, so that a test can wait for one
        self.router = context.socket(zmq.ROUTER)
        for socket, address in zip((self.pub, self.router), ports, strict=True):
            socket.setsockopt(zmq.LINGER, 0)
            socket.bind(address)
        self.endpoint = self.pub.getsockopt_string(zmq.LAST_ENDPOINT)
        self.replay_endpoint = self.router.getsockopt_string(zmq.LAST_ENDPOINT)
        self.kept: list[tuple[int, bytes]] = []

    async def subscribed(self) -> None:
        await self._polled(self.pub)
        self.pub.recv()

    def say(self, seq: int, payload: bytes) -> None:
        self.pub.send_multipart([b"kv", seq.to_bytes(8, "big"), payload])

    async def asked(self) -> tuple[bytes, int]:
        await self._polled(self.router)
        client, empty, start = self.router.recv_multipart()
        assert empty == b""
        return client, int.from_bytes(start, "big")

    async def repeat(self, messages: list[tuple[int, bytes]]) -> int:
        """Answer the next question with these; what was asked."""
        client, start = await self.asked()
        for seq, payload in messages:
            self.router.send_multipart([client, b"", seq.to_bytes(8, "big"), payload])
        self.router.send_multipart([client, b"", END, b""])
        return start

    def close(self) -> None:
        self.pub.close()
        self.router.close()

    async def _polled(self, socket: zmq.Socket[bytes]) -> None:
        await until(lambda: bool(socket.poll(0)))


@pytest.fixture
async def script() -> AsyncIterator[Script]:
    made = Script()
    yield made
    made.close()


def one(number: int) -> bytes:
    """A message that stores the block of this number."""
    return packed(stored([number.to_bytes(16, "big")], None, []), ts=float(number))


def numbers(directory: BlockDirectory, among: int = 40) -> set[int]:
    return {number for number in range(among) if directory.holders(number.to_bytes(16, "big"))}


class TestSubscriber:
    async def test_it_follows_our_publisher_from_before_it_was_there(self) -> None:
        world = World()
        a, b = world.prompt(0, 3), world.prompt(50, 2)
        async with publishing(world) as publisher:
            publisher.hear(BlocksStored("n0", 1, tuple(a)))
            publisher.flush()
            async with following(publisher) as (subscriber, directory):
                await until(lambda: subscriber.position == 0)
                for seq in range(2, 40):  # until the subscription has reached the publisher
                    publisher.hear(BlocksStored("n1", seq, (bytes([seq]) * 16,)))
                    publisher.flush()
                    await asyncio.sleep(0.01)
                publisher.hear(BlocksStored("n0", 2, tuple(b)))
                publisher.hear(BlocksRemoved("n0", 3, (a[2],)))
                publisher.flush()
                await until(lambda: directory.holders(b[-1]) != () and directory.holders(a[2]) == ())
                assert directory.holders(a[0]) == ("vllm/0",)
                assert directory.holders(bytes([39]) * 16) == ("vllm/1",)
                assert subscriber.counts.resets == subscriber.counts.garbage == 0

    async def test_the_messages_are_what_a_vllm_subscriber_reads(self) -> None:
        """With vLLM's own steps: SUB on the topic, REQ for what was missed."""
        world = World(WireFormat())
        keys = world.prompt(0, 1)
        wire = WireFormat()
        made = KvEventPublisher(
            world.stream, endpoint="tcp://127.0.0.1:*", replay_endpoint="tcp://127.0.0.1:*", model="m", wire=wire
        )
        async with made.running():
            made.hear(BlocksStored("n0", 1, tuple(keys)))
            made.flush()
            context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
            with context.socket(zmq.REQ) as req, context.socket(zmq.SUB) as sub:
                sub.setsockopt_string(zmq.SUBSCRIBE, "kv@n0@")
                sub.connect(made.endpoint)
                assert made.replay_endpoint is not None
                req.connect(made.replay_endpoint)
                req.send((0).to_bytes(8, "big"))
                await until(lambda: bool(req.poll(0)))
                seq, payload = req.recv_multipart()
                assert int.from_bytes(seq, "big") == 0
                ts, events, rank = msgspec.msgpack.decode(payload)
                assert (type(ts), rank) == (float, 0)
                low = int.from_bytes(keys[0][8:], "big")
                assert events == [["BlockStored", [low], None, [0, 1, 2, 3], BLOCK, None, "CPU", None, None]]
                told = 1
                while not sub.poll(0):
                    told += 1
                    assert told < 1000
                    made.hear(BlocksStored("n0", told, (told.to_bytes(16, "big"),)))
                    made.flush()
                    await asyncio.sleep(0.01)
                topic, _, _ = sub.recv_multipart()
                assert topic == b"kv@n0@m"

    async def test_a_gap_is_filled_from_the_replay_endpoint(self, script: Script) -> None:
        async with following(script) as (subscriber, directory):
            await script.subscribed()
            assert await script.repeat([]) == 0
            script.say(0, one(0))
            script.say(1, one(1))
            script.say(5, one(5))
            assert await script.repeat([(n, one(n)) for n in range(1, 7)]) == 1
            script.say(6, one(6))
            script.say(7, one(7))
            await until(lambda: subscriber.position == 7)
            assert numbers(directory) == {0, 1, 2, 3, 4, 5, 6, 7}
            counts = subscriber.counts
            assert (counts.gaps, counts.replayed, counts.duplicates, counts.resets) == (1, 5, 2, 0)

    async def test_what_cannot_be_had_any_more_makes_it_start_over(self, script: Script) -> None:
        async with following(script) as (subscriber, directory):
            await script.subscribed()
            await script.repeat([])
            script.say(0, one(0))
            script.say(9, one(9))
            assert await script.repeat([(n, one(n)) for n in (7, 8, 9)]) == 0
            assert await script.repeat([(n, one(n)) for n in (7, 8, 9)]) == 0
            await until(lambda: subscriber.position == 9)
            assert numbers(directory) == {7, 8, 9}
            assert subscriber.counts.resets == 1

    async def test_a_gap_without_a_replay_endpoint_makes_it_start_over(self, script: Script) -> None:
        async with following(script, replay=False) as (subscriber, directory):
            await script.subscribed()
            for seq in (3, 4, 8):
                script.say(seq, one(seq))
            await until(lambda: subscriber.position == 8)
            assert numbers(directory) == {8}

    async def test_a_replay_endpoint_that_is_silent_costs_a_deadline_and_no_more(self, script: Script) -> None:
        async with following(script, deadline_s=0.05) as (subscriber, directory):
            await script.subscribed()
            for seq in (0, 1, 5, 6):
                script.say(seq, one(seq))
            await until(lambda: subscriber.position == 6)
            assert numbers(directory) == {5, 6}

    async def test_a_publisher_that_started_again_is_noticed_by_its_numbers(self, script: Script) -> None:
        async with following(script) as (subscriber, directory):
            await script.subscribed()
            await script.repeat([])
            for seq in range(4):
                script.say(seq, one(seq))
            await until(lambda: subscriber.position == 3)
            script.say(1, one(21))
            assert await script.repeat([(0, one(20)), (1, one(21))]) == 0
            await until(lambda: subscriber.position == 1)
            assert numbers(directory) == {20, 21}
            assert (subscriber.counts.restarts, subscriber.counts.duplicates) == (1, 1)

    async def test_a_publisher_that_started_again_and_is_ahead_is_noticed_by_its_messages(self, script: Script) -> None:
        async with following(script) as (subscriber, directory):
            await script.subscribed()
            await script.repeat([])
            for seq in range(2):
                script.say(seq, one(seq))
            await until(lambda: subscriber.position == 1)
            script.say(3, one(23))
            other = [(n, one(20 + n)) for n in range(4)]
            assert await script.repeat(other[1:]) == 1
            assert await script.repeat(other) == 0
            await until(lambda: subscriber.position == 3)
            assert numbers(directory) == {20, 21, 22, 23}

    async def test_garbage_on_either_socket_is_counted_and_forgotten(self, script: Script) -> None:
        async with following(script) as (subscriber, directory):
            await script.subscribed()
            client, _ = await script.asked()
            script.router.send_multipart([client, b"what"])
            script.router.send_multipart([client, b"", b"short", b""])
            script.router.send_multipart([client, b"", (0).to_bytes(8, "big"), b"\xff"])
            script.router.send_multipart([client, b"", (0).to_bytes(8, "big"), one(3)])  # not later than the one before
            script.router.send_multipart([client, b"", END, b""])
            script.pub.send_multipart([b"kv"])
            script.pub.send_multipart([b"kv", b"1", one(1)])
            script.say(1, b"no batch")
            script.say(2, one(2))
            await until(lambda: subscriber.position == 2)
            assert numbers(directory) == {2}
            assert subscriber.counts.garbage == 7

    async def test_who_missed_more_than_is_kept_gets_a_snapshot(self) -> None:
        world = World()
        async with publishing(world, buffer_steps=5) as publisher:
            for seq in range(1, 31):
                publisher.hear(BlocksStored("n0", seq, (seq.to_bytes(16, "big"),)))
                publisher.flush()
            publisher.hear(BlocksRemoved("n0", 31, ((4).to_bytes(16, "big"),)))
            publisher.flush()
            async with following(publisher) as (subscriber, directory):
                await until(lambda: subscriber.position == 30)
                assert numbers(directory) == set(range(1, 31)) - {4}
                assert publisher.counts["snapshots"] == 1

    async def test_our_publisher_may_start_again_under_its_subscribers(self) -> None:
        first, second = World(), World()
        async with publishing(first) as publisher:
            assert publisher.replay_endpoint is not None
            addresses = (publisher.endpoint, publisher.replay_endpoint)
            for seq in range(1, 6):
                publisher.hear(BlocksStored("n0", seq, (seq.to_bytes(16, "big"),)))
                publisher.flush()
            async with following(publisher) as (subscriber, directory):
                await until(lambda: numbers(directory) == {1, 2, 3, 4, 5})
                publisher.close()
                async with (await published_again(second, *addresses)).running() as again:
                    seq = 0
                    while numbers(directory) & {1, 2, 3, 4, 5}:
                        seq += 1
                        assert seq < 1000
                        again.hear(BlocksStored("n0", 2 * seq - 1, ((20 + seq % 10).to_bytes(16, "big"),)))
                        again.hear(BlocksRemoved("n0", 2 * seq, ((19 + seq % 10).to_bytes(16, "big"),)))
                        again.flush()
                        await asyncio.sleep(0.01)
                    await until(lambda: subscriber.position == again.counts["batches"] - 1)
                    held = {key for key in range(20, 30) if key.to_bytes(16, "big") in second.stream._nodes["n0"].held}
                    assert numbers(directory) == held

    async def test_a_publisher_answers_no_garbage(self) -> None:
        async with publishing(World()) as publisher:
            context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
            with context.socket(zmq.DEALER) as dealer:
                dealer.setsockopt(zmq.LINGER, 0)
                assert publisher.replay_endpoint is not None
                dealer.connect(publisher.replay_endpoint)
                for frames in ([b"x"], [b"", b"short"], [b"", b"a" * 8, b"more"], [b"", b"\xff" * 8]):
                    dealer.send_multipart(frames)
                await until(lambda: bool(dealer.poll(0)))
                assert dealer.recv_multipart() == [b"", END, b""]
                assert publisher.counts["garbage"] == 3

    @pytest.mark.parametrize("address", ["nonsense", "tcp://127.0.0.1", "tcp://999.0.0.1:5"])
    async def test_an_address_that_is_none_is_a_config_error(self, address: str) -> None:
        with pytest.raises(ConfigError, match="--kv-events"):
            async with publishing(World(), address):
                pass

    async def test_a_port_in_use_is_a_config_error(self) -> None:
        async with publishing(World()) as publisher:
            with pytest.raises(ConfigError, match="--kv-events-replay: cannot listen"):
                async with publishing(World(), replay=publisher.endpoint):
                    pass


def test_a_follower_of_a_running_cluster_knows_the_blocks_of_every_node_by_their_tokens() -> None:
    """Prompts, answers, evictions and two nodes: whoever computes keys from the tokens has the directory that we have."""
    stream = EventStream(Lineage(16), WireFormat(hashes="int"))
    found, directory = follower(root=SPEC.root_key(""), block_tokens=16)

    def hear(brain: str, event: Any, now: float) -> None:
        if brain == "conductor" and stream.hear(event):
            for node, events in stream.take():
                found.take(encode(Batch(now, events, stream.rank_of(node)), "array"))

    def learn(keys: Any, tokens: Any, parent: Any, salt: str) -> None:
        stream.lineage.learn(keys, tokens, parent=parent, salt=salt)

    async def scenario() -> None:
        roles = {"prefill-0": Role.PREFILL, "decode-0": Role.DECODE, "mixed-0@node1": Role.MIXED}
        async with cluster(roles, num_slots=40, hear=hear) as running:
            running.hub.on_blocks = learn
            rng = Random(3)
            for number in range(12):
                prompt = [rng.randrange(1, 997) for _ in range(rng.randrange(10, 150))]
                asked = [submission(f"{number}.{turn}", prompt, 40) for turn in range(2)]
                await asyncio.gather(*(answer(running.hub, one) for one in asked))
            await asyncio.sleep(5.0)
            assert stream.unknown_blocks == found.counts.orphans == 0
            for node, host in running.hosts.items():
                place = f"vllm/{stream.rank_of(node)}"
                held = set(host.node.inventory())
                assert {key for key in held if place in directory.holders(key)} == held
                assert found.num_blocks(stream.rank_of(node)) == len(held) > 0

    run_virtual(scenario())
    assert found.counts.events > 50
