"""`kvasir top`: a running cluster, live in the terminal."""

from kvasir.cli.top.command import top

__all__ = ["top"]
