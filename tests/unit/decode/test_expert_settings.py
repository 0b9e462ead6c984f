"""Settings of experts are checked before a rank loads anything."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from decode.settings import ExpertSettings
from decode.worker import _spread
from engine.experts.recorded_load import RecordedLoad
from protocol.errors import ConfigError


def test_experts_stay_unless_they_are_told_to_move() -> None:
    assert not _spread(ExpertSettings(), 4).movable
    assert _spread(ExpertSettings(rebalance=True), 4).movable
    assert not _spread(ExpertSettings(rebalance=True), 1).movable  # there is nowhere else


def test_a_window_longer_than_the_interval_is_refused_with_the_fix() -> None:
    with pytest.raises(ValidationError, match="lower the window or raise the interval"):
        ExpertSettings(rebalance=True, rebalance_window=10, rebalance_interval=9)


@pytest.mark.parametrize(
    "values", [{"redundant": -1}, {"ranks_per_tray": 0}, {"rebalance_above": 0.9}]
)
def test_a_setting_out_of_range_is_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        ExpertSettings(**values)  # type: ignore[arg-type]


def test_the_load_file_is_read_and_its_faults_are_named(tmp_path: Path) -> None:
    load = RecordedLoad(num_experts=2, layers={0: [3, 1]})
    file = tmp_path / "load.json"
    with pytest.raises(ConfigError, match=r"load_file .*load.json: No such file"):
        _spread(ExpertSettings(load_file=file), 2)
    file.write_bytes(load.to_json())
    assert _spread(ExpertSettings(load_file=file), 2).load == load
    file.write_bytes(b"{}")
    with pytest.raises(ConfigError, match=r"load.json: is not a recorded expert load"):
        _spread(ExpertSettings(load_file=file), 2)
