"""The Engine interface and its implementations."""
