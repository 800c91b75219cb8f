"""The KVCache pool's brain: which block is in which tier, leases, owners, eviction. Pure."""
