"""`kvasir bench`: a group of commands that measure or redraw."""

from kvasir.cli.bench.command import bench

__all__ = ["bench"]
