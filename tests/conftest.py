"""The published conversation trace, where this machine has it."""

import os
from pathlib import Path

import pytest

import kvasir.simulator  # noqa: F401  # before kvasir.cli is: tests are of the sources, whatever was built
from kvasir.workload.trace import Trace, read_trace

_BESIDE_THE_REPOSITORY = Path(__file__).parents[2] / "shared" / "traces" / "conversation_trace.jsonl"


@pytest.fixture(scope="session")
def real_trace() -> Trace:
    """kvcache-ai/Mooncake, FAST25-release/traces/conversation_trace.jsonl."""
    path = Path(os.environ.get("KVASIR_TRACE", _BESIDE_THE_REPOSITORY))
    if not path.exists():
        pytest.skip("the conversation trace is not here; point KVASIR_TRACE at conversation_trace.jsonl")
    with path.open("rb") as lines:
        return read_trace(lines)
