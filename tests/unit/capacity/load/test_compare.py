from pathlib import Path
from random import Random

import pytest

from capacity.load.compare import Comparison, compare, lines_of, load_run, write_page
from capacity.load.errors import WrongOption
from capacity.load.records import Record
from tests.support.load_runs import MS, a_record, write_run


def slower_by(ms: float, *, seed: int, count: int = 300) -> list[Record]:
    source = Random(seed)
    records = []
    for number in range(count):
        record = a_record(0.05 * number)
        shift = round((ms + source.gauss(0, 5)) * MS)
        record.first_token_ns += shift
        record.last_token_ns += shift
        record.chunks_ns = [at + shift for at in record.chunks_ns]
        records.append(record)
    return records


def compared(folder: Path, b: list[Record], *, label: str = "x") -> Comparison:
    first = write_run(folder / "a", slower_by(0, seed=1))
    second = write_run(folder / "b", b, label=label)
    return compare(load_run(first), load_run(second))


def test_a_slower_run_is_worse_by_about_as_much(tmp_path: Path) -> None:
    found = {one.measure: one for one in compared(tmp_path, slower_by(10, seed=2)).differences}
    median = found["TTFT p50"]
    assert median.better is False
    assert median.low < 60 / 50 < median.high
    assert median.ratio == pytest.approx(1.2, abs=0.05)
    assert found["TPOT p50"].better is None


def test_two_runs_of_the_same_show_no_difference(tmp_path: Path) -> None:
    found = compared(tmp_path, slower_by(0, seed=3))
    assert {one.better for one in found.differences} == {None}
    assert "no difference shown" in "\n".join(lines_of(found))


def test_the_page_is_written_and_names_both_runs(tmp_path: Path) -> None:
    found = compared(tmp_path, slower_by(10, seed=2))
    write_page(found, load_run(tmp_path / "a"), load_run(tmp_path / "b"), tmp_path / "page")
    page = (tmp_path / "page" / "compare.html").read_text()
    assert str(tmp_path / "a") in page
    assert "TTFT p50" in page


def test_single_stages_are_compared_whatever_they_are_called(tmp_path: Path) -> None:
    found = compared(tmp_path, slower_by(0, seed=3), label="y")
    assert {one.stage for one in found.differences} == {"x / y"}


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WrongOption, match="No such file"):
        load_run(tmp_path / "nowhere")
    (tmp_path / "summary.json").write_text('{"schema": "other/9"}')
    with pytest.raises(WrongOption, match="schema 'other/9'"):
        load_run(tmp_path)
