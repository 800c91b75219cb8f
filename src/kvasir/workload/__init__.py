"""Traffic: trace formats, seeded synthesis, scaling. Pure."""
