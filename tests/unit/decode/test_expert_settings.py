"""Settings of experts are checked before a rank loads anything."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from decode.settings import DecodeSettings, ExpertSettings, GroupSettings
from decode.worker import _spread
from engine.experts.recorded_load import RecordedLoad
from engine.experts.spread import ExpertSpread
from protocol.errors import ConfigError


def test_experts_stay_unless_they_are_told_to_move() -> None:
    assert not spread(ExpertSettings(), 4).movable
    assert spread(ExpertSettings(rebalance=True), 4).movable
    assert not spread(ExpertSettings(rebalance=True), 1).movable  # there is nowhere else


def spread(experts: ExpertSettings, ranks: int) -> ExpertSpread:
    return _spread(DecodeSettings(experts=experts, group=GroupSettings(ranks=ranks)))


def test_from_four_ranks_on_the_others_have_room_for_the_experts_of_one() -> None:
    assert [spread(ExpertSettings(), ranks).least_ranks for ranks in (1, 3, 4, 72)] == [1, 3, 3, 71]
    few = DecodeSettings(group=GroupSettings(ranks=2, least_ranks=1))
    assert _spread(few).least_ranks == 1
    with pytest.raises(ValidationError, match="least_ranks 3 is more than ranks 2: lower it"):
        GroupSettings(ranks=2, least_ranks=3)


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
        spread(ExpertSettings(load_file=file), 2)
    file.write_bytes(load.to_json())
    assert spread(ExpertSettings(load_file=file), 2).load == load
    file.write_bytes(b"{}")
    with pytest.raises(ConfigError, match=r"load.json: is not a recorded expert load"):
        spread(ExpertSettings(load_file=file), 2)
