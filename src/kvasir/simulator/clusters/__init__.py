"""Clusters to simulate: the TOML format, the ones that ship, and prefill:decode splits."""

from kvasir.simulator.clusters.load import load_cluster, shipped_names
from kvasir.simulator.clusters.split import with_split

__all__ = ["load_cluster", "shipped_names", "with_split"]
