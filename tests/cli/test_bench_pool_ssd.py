"""The measurement of the SSD, on a few blocks: that it measures, not what."""

from pathlib import Path

import pytest

from kvasir.cli.bench.pool_ssd import SsdFigure, measure_ssd
from kvasir.core.errors import ConfigError
from kvasir.store.ssd import SsdFile, SsdOutcome


def test_a_figure_for_each_size_and_direction_and_nothing_left_on_the_disk(tmp_path: Path) -> None:
    try:
        figures = measure_ssd(tmp_path, block_bytes=(4096, 65536), depth=2, file_bytes=1 << 19, turns=2)
    except ConfigError as error:
        pytest.skip(str(error))
    assert [(f.block_bytes, f.direction) for f in figures] == [(s, d) for s in (4096, 65536) for d in ("write", "read")]
    assert all(len(f.ours) == len(f.direct) == 2 and min(*f.ours, *f.direct) > 0 for f in figures)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_refuses_ends_the_measurement_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SsdFile, "write_valid", lambda _, writes: [SsdOutcome.FAILED] * len(writes))
    with pytest.raises(ConfigError, match="is the disk healthy"):
        measure_ssd(tmp_path, block_bytes=(4096,), depth=2, file_bytes=1 << 16, turns=1)


def test_ratios_are_medians_of_the_turns_ratios() -> None:
    figure = SsdFigure(4096, "read", 8, ours=(1.0, 9.0, 4.0), direct=(2.0, 9.0, 5.0), fio=())
    assert (figure.over_direct, figure.over_fio) == (0.8, None)
    assert figure.to_json()["ssd_read_over_direct"] == 0.8
