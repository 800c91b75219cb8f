"""The KVCache pool from a bare Python process: numpy arrays in, numpy arrays out, no model.

python examples/pool_numpy.py
"""

from __future__ import annotations

import tempfile

import numpy as np

from kvasir.core.keys import block_keys, root_key
from kvasir.store.mempool import MemPool

BLOCK_TOKENS = 64
LAYERS, HEADS, DIM = 4, 2, 64
SHAPE = (LAYERS, 2, BLOCK_TOKENS, HEADS, DIM)  # K and V of one block, layer by layer
BLOCK_BYTES = int(np.prod(SHAPE)) * 2


def main() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 32000, 4 * BLOCK_TOKENS, dtype=np.uint32)
    root = root_key(model="my-model", dtype="float16", layout="lkthd", block_tokens=BLOCK_TOKENS, salt="tenant-a")
    keys = block_keys(root, tokens, BLOCK_TOKENS)
    kv = [rng.standard_normal(SHAPE).astype(np.float16) for _ in keys]

    with tempfile.TemporaryDirectory() as disk:
        options = {"num_blocks": 64, "block_bytes": BLOCK_BYTES, "ssd_path": disk, "ssd_blocks": 256}
        with MemPool(**options) as pool:
            pool.batch_put(keys, kv)
            with pool.match(keys) as found:  # leased, in place
                print(f"{len(found)} of {len(keys)} blocks cached, first value {found.blocks[0].view(np.float16)[0]:.3f}")
            print(f"{pool.swap_out(keys)} blocks are on the SSD")

            with MemPool(num_blocks=16, block_bytes=BLOCK_BYTES) as other, pool.match(keys) as found:
                pool.transfer_with_insert(other, keys, found.addresses)
                assert np.array_equal(other.get(keys[3]), pool.get(keys[3]))
                print("and another pool has them, too")

        with MemPool(**options) as pool:  # a restart: DRAM is empty, the SSD is not
            print(f"after a restart {pool.swap_in(keys)} blocks are back")
            assert np.array_equal(pool.get(keys[0]).view(np.float16).reshape(SHAPE), kv[0])
            pool.check()


if __name__ == "__main__":
    main()
