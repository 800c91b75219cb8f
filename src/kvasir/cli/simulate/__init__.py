"""`kvasir simulate`: a trace through the scheduler in virtual time."""

from kvasir.cli.simulate.command import simulate

__all__ = ["simulate"]
