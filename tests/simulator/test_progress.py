"""Whoever waits for a simulation hears how far it is."""

from kvasir.core.request import Role, Slo
from kvasir.scheduling.strategy import strategy
from kvasir.simulator import simulate
from kvasir.simulator.simulation import NUM_REPORTS
from tests.simulator.tiny import cluster, random_trace


def reports_of(num_requests: int) -> list[int]:
    heard: list[int] = []
    played = random_trace(1, num_requests)
    spec = cluster([Role.PREFILL, Role.DECODE])
    simulate(played, spec, strategy("mooncake").with_parts(admission="off"), slo=Slo(), on_progress=heard.append)
    return heard


def test_progress_is_heard_of_again_and_again_though_few_end_within_a_tick() -> None:
    heard = reports_of(1000)  # 4 a second, 10 to a report
    assert NUM_REPORTS // 2 < len(heard) <= NUM_REPORTS
    assert heard == sorted(set(heard))
    assert 0 < heard[0] < 50
    assert heard[-1] > 900


def test_a_short_trace_is_not_reported_without_news() -> None:
    heard = reports_of(20)
    assert heard == sorted(set(heard))
    assert heard
    assert heard[0] > 0
