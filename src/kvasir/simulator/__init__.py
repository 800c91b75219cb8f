"""The simulator body: the same brains as live, in virtual time over a heap of events. Deterministic and pure."""
