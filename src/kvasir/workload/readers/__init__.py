"""Readers of other people's traces: one file per format, and the format found from the content."""

from kvasir.workload.readers.sniff import Options, read_any

__all__ = ["Options", "read_any"]
