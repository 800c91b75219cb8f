"""The block sizes that are measured, and their names."""

from __future__ import annotations

KIB, MIB = 1 << 10, 1 << 20
SIZES = (64 * KIB, MIB, 16 * MIB)


def size_name(num_bytes: int) -> str:
    """`64 KiB`, `1 MiB`."""
    return f"{num_bytes // MIB} MiB" if num_bytes >= MIB else f"{num_bytes // KIB} KiB"
