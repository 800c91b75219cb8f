"""Bytes: the DRAM arena and the messages that reach its owner."""
