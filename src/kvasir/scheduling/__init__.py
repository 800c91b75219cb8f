"""The scheduler's brains: Conductor, Batcher and their policies. Pure."""
