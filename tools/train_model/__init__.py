"""Trains the small checkpoint that ships with the package, from text that may be used freely."""
