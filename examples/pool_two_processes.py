"""Two processes with a KVCache pool each: one hands blocks to the other, as from prefill to decode. Also between machines.

python examples/pool_two_processes.py
"""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection

import numpy as np

from kvasir.core.keys import block_keys, root_key
from kvasir.store.mempool import MemPool
from kvasir.store.remote_pool import RemotePool

BLOCK_TOKENS = 64
BLOCK_BYTES = 1 << 20
LISTEN = "127.0.0.1:0"  # where others reach this machine; port 0: the system chooses


def keys_of_prompt() -> list[bytes]:
    root = root_key(model="my-model", dtype="float16", layout="lkthd", block_tokens=BLOCK_TOKENS)
    return block_keys(root, np.arange(8 * BLOCK_TOKENS, dtype=np.uint32), BLOCK_TOKENS)


def decode(pipe: Connection) -> None:
    with MemPool(num_blocks=32, block_bytes=BLOCK_BYTES, listen=LISTEN) as pool:
        pipe.send(pool.address)
        pipe.recv()  # the blocks are here
        with pool.match(keys_of_prompt()) as found:
            pipe.send(f"decode has {len(found)} blocks; they begin with {[int(block[0]) for block in found.blocks]}")
        pool.check()


def main() -> None:
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=decode, args=(there,))
    process.start()
    there.close()
    keys = keys_of_prompt()
    with MemPool(num_blocks=32, block_bytes=BLOCK_BYTES, listen=LISTEN) as pool, RemotePool(here.recv()) as other:
        pool.batch_put(keys, [np.full(BLOCK_BYTES, number, np.uint8) for number in range(len(keys))])
        with pool.match(keys) as found:  # the lease keeps the source as it is
            pool.transfer_with_insert(other, keys, found.addresses)
        assert np.array_equal(other.get(keys[3]), pool.get(keys[3]))
        here.send("go on")
        print(here.recv())
    process.join()


if __name__ == "__main__":
    main()
