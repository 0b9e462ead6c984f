"""``requests.parquet``: the records of ``requests.jsonl`` as columns, for data frames and DuckDB.

Needs pyarrow, which is asked for by name before a run begins and imported only then.
"""

import importlib.util
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import msgspec

from capacity.load.errors import WrongOption
from capacity.load.records import Record

PARQUET_FILE = "requests.parquet"
_ROWS = 16_384  # of a row group
_COUNTED = ("input_tokens", "output_tokens", "cached_tokens")  # null where the server gave none


def require_pyarrow() -> None:
    """
    Raises:
        WrongOption: it is not installed.
    """
    if importlib.util.find_spec("pyarrow") is None:
        raise WrongOption("--parquet needs pyarrow: pip install 'headrace[parquet]'")


def write_parquet(records: Iterable[Record], folder: Path) -> None:
    """One row a request, columns as the fields of ``Record``; times are int64 nanoseconds."""
    import pyarrow as pa
    from pyarrow import parquet

    numbers = {
        name: pa.int64()
        for name, kind in Record.__annotations__.items()
        if kind is int or name in _COUNTED
    }
    schema = pa.schema(
        {
            name: numbers.get(name)
            or {
                "chunks_ns": pa.list_(pa.int64()),
                "server_ms": pa.map_(pa.string(), pa.float64()),
                "new_connection": pa.bool_(),
            }.get(name, pa.string())
            for name in Record.__struct_fields__
        }
    )
    with parquet.ParquetWriter(folder / PARQUET_FILE, schema, compression="zstd") as writer:
        for group in _groups(records):
            rows = [msgspec.structs.asdict(record) for record in group]
            writer.write_table(pa.Table.from_pylist(rows, schema))


def _groups(records: Iterable[Record]) -> Iterator[list[Record]]:
    left = iter(records)
    while group := list(islice(left, _ROWS)):
        yield group
