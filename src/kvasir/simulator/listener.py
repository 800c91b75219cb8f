"""Whom the simulated nodes and instances tell what the live hub would hear."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvasir.core.keys import BlockKey
    from kvasir.core.tier import Tier
    from kvasir.simulator.jobs import Seq


class Listener:
    """The hub; a class and no protocol, so that machine code calls it directly."""

    def prefill_started(self, seq: Seq) -> None:
        raise NotImplementedError

    def stage_computed(self, seq: Seq, tokens: int) -> None:
        """A stage has computed the first `tokens` of its sequence."""
        raise NotImplementedError

    def first_token(self, seq: Seq) -> None:
        """The prompt is computed and a token of it is with the client; the sequence stays here to decode."""
        raise NotImplementedError

    def handed_off(self, seq: Seq) -> None:
        raise NotImplementedError

    def finished(self, seq: Seq) -> None:
        raise NotImplementedError

    def failed(self, seq: Seq, error: str) -> None:
        raise NotImplementedError

    def blocks_stored(self, node: str, seq: int, keys: tuple[BlockKey, ...], tier: Tier) -> None:
        """Block event `seq` of the node: these can be read there now."""
        raise NotImplementedError

    def blocks_removed(self, node: str, seq: int, keys: tuple[BlockKey, ...], tier: Tier) -> None:
        raise NotImplementedError
