"""`kvasir plan`: the adviser."""

from kvasir.cli.plan.command import plan

__all__ = ["plan"]
