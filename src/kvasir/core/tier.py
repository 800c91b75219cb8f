"""Where on a node a block lies."""

from __future__ import annotations

from enum import StrEnum


class Tier(StrEnum):
    DRAM = "dram"
    SSD = "ssd"
