"""`kvasir replay`: load any OpenAI-compatible server with a trace, at the trace's own times."""

from kvasir.cli.replay.command import replay

__all__ = ["replay"]
