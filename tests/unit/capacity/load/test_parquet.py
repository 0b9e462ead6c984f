"""The records as columns say what the records said."""

from pathlib import Path

import msgspec
import pytest

from capacity.load.errors import WrongOption
from capacity.load.parquet import PARQUET_FILE, require_pyarrow, write_parquet
from capacity.load.records import Record
from tests.support.load_runs import a_record

parquet = pytest.importorskip("pyarrow.parquet")


def test_every_field_of_every_record_is_in_the_columns(tmp_path: Path) -> None:
    records = [
        a_record(0.0),
        Record(index=1, stage=0, intended_ns=7, error="http 503", status=503, message="full"),
        a_record(1.0, chunks_ns=[5, 9], server_ms={"queue": 1.5}, new_connection=True),
    ]
    write_parquet(records, tmp_path)

    table = parquet.read_table(tmp_path / PARQUET_FILE)
    found = [row | {"server_ms": dict(row["server_ms"])} for row in table.to_pylist()]
    assert found == [msgspec.structs.asdict(record) for record in records]
    assert str(table.schema.field("done_ns").type) == "int64"
    assert found[1]["output_tokens"] is None


def test_a_run_without_requests_has_the_columns(tmp_path: Path) -> None:
    write_parquet([], tmp_path)
    assert parquet.read_table(tmp_path / PARQUET_FILE).column_names == list(
        Record.__struct_fields__
    )


def test_what_is_missing_is_said_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    require_pyarrow()
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(WrongOption, match=r"pip install 'headrace\[parquet\]'"):
        require_pyarrow()
