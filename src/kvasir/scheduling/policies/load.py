"""How busy instances are, as routers count it: in requests."""

from __future__ import annotations

import numpy as np

from kvasir.scheduling.view import Ints, PrefillColumns


def in_flight(prefills: PrefillColumns) -> Ints:
    """Requests given to each instance and not done.

    Where nothing decodes these are the prefills; where everything decodes on the spot, the batch, which holds a place for
    those still in prefill.
    """
    return np.maximum(prefills.queued, prefills.batch)
