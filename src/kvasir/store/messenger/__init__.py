"""Moves blocks between the arenas of nodes."""
