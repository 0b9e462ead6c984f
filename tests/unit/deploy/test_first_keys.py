"""Keys are made once, match one another, and each consumer finds its own."""

from pathlib import Path

import pytest

from deploy.first_keys import (
    API_KEYS,
    CLUSTER_KEY,
    GRAFANA_PASSWORD,
    METRICS_KEY,
    OPERATOR_KEY,
    main,
    make_missing,
)
from runtime.keys import ClusterKey
from server.access import ApiKeys

ALL = {CLUSTER_KEY, API_KEYS, METRICS_KEY, GRAFANA_PASSWORD, OPERATOR_KEY}


def bearer(file: Path) -> dict[bytes, bytes]:
    return {b"authorization": b"Bearer " + file.read_bytes()}


def test_the_gateway_knows_the_keys_that_were_given_out(tmp_path: Path) -> None:
    assert set(make_missing(tmp_path)) == ALL
    ClusterKey.load(tmp_path / CLUSTER_KEY)
    keys = ApiKeys.read(tmp_path / API_KEYS)
    for file, name in ((OPERATOR_KEY, "operator"), (METRICS_KEY, "prometheus")):
        found = keys.find(bearer(tmp_path / file))
        assert found is not None
        assert found.caller.name == name


def test_the_gateway_holds_digests_only(tmp_path: Path) -> None:
    make_missing(tmp_path)
    held = (tmp_path / API_KEYS).read_text()
    assert (tmp_path / OPERATOR_KEY).read_text().strip() not in held
    assert (tmp_path / METRICS_KEY).read_text().strip() not in held


def test_a_second_start_changes_nothing(tmp_path: Path) -> None:
    make_missing(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in ALL}
    assert make_missing(tmp_path) == []
    assert {name: (tmp_path / name).read_bytes() for name in ALL} == before


def test_digests_that_were_lost_are_made_for_the_keys_that_are_out(tmp_path: Path) -> None:
    make_missing(tmp_path)
    (tmp_path / API_KEYS).unlink()
    assert make_missing(tmp_path) == [API_KEYS]
    assert ApiKeys.read(tmp_path / API_KEYS).find(bearer(tmp_path / OPERATOR_KEY)) is not None


def test_only_what_people_need_can_be_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path)]) == 0
    assert main([str(tmp_path), "show", OPERATOR_KEY]) == 0
    assert capsys.readouterr().out == (tmp_path / OPERATOR_KEY).read_text()
    assert main([str(tmp_path), "show", CLUSTER_KEY]) == 2
    assert capsys.readouterr().out == ""


def test_a_folder_that_cannot_be_written_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cluster").write_text("a file where the folder should be")
    assert main([str(tmp_path)]) == 1
    assert str(tmp_path) in capsys.readouterr().err
