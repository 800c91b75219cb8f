"""Block keys: what makes KVCache reusable, as a chained hash (DESIGN: KVCache pool, keys).

A key is the first 16 bytes of SHA-256 over (parent key, token ids of the block). The root key hashes
everything else that the KV depends on, and the tenant's salt, so that equal keys mean equal KV and no
tenant can hit another tenant's blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from typing import Final

import numpy as np
import numpy.typing as npt

BlockKey = bytes
"""16 bytes; names a block together with everything before it."""

KEY_BYTES: Final = 16


def root_key(*, model: str, dtype: str, layout: str, block_tokens: int, salt: str = "") -> BlockKey:
    """The parent of a prompt's first block.

    `model` names weights and revision, `layout` how a block lies in memory; each part is length-prefixed,
    so that no two different tuples serialise alike.
    """
    digest = sha256(b"kvasir-block-key-1")
    for part in (model, dtype, layout, str(block_tokens), salt):
        raw = part.encode()
        digest.update(len(raw).to_bytes(4, "little") + raw)
    return digest.digest()[:KEY_BYTES]


def block_keys(parent: BlockKey, tokens: Sequence[int] | npt.NDArray[np.uint32], block_tokens: int) -> list[BlockKey]:
    """Keys of the full blocks of `tokens`, chained from `parent`; a partial last block has none."""
    raw = np.asarray(tokens, dtype="<u4").tobytes()
    step = 4 * block_tokens
    keys = []
    for start in range(0, len(raw) - step + 1, step):
        parent = sha256(parent + raw[start : start + step]).digest()[:KEY_BYTES]
        keys.append(parent)
    return keys
