import json
import re
from pathlib import Path

from capacity.load.records import Record
from capacity.load.report import cdf, write_report
from capacity.load.summary import Summary, read_summary, write_summary
from capacity.load.table import lines_of
from tests.support.load_runs import a_record, a_summary


def page_of(folder: Path, summary: Summary, records: list[Record]) -> str:
    write_report(summary, records, None, folder)
    return (folder / "report.html").read_text()


def data_in(page: str) -> dict[str, object]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    data = json.loads(found[1])
    assert isinstance(data, dict)
    return data


def test_the_page_needs_nothing_from_outside(tmp_path: Path) -> None:
    records = [a_record(0.1 * n) for n in range(20)]
    page = page_of(tmp_path, a_summary(records), records)
    without_data = page.replace("http://www.w3.org/2000/svg", "").replace("http://localhost:1", "")
    assert re.findall(r"https?://|//[a-z]+\.[a-z]|@import|url\(", without_data) == []
    assert "default-src 'none'" in page


def test_what_a_server_says_cannot_become_code(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script>"
    records = [a_record(0.1 * n, error=evil if n == 3 else "") for n in range(20)]
    page = page_of(tmp_path, a_summary(records, model=evil), records)
    assert page.count("<script>") == 1
    assert "alert(1)</script>" not in page


def test_the_page_shows_the_figures_of_the_summary(tmp_path: Path) -> None:
    records = [a_record(0.1 * n, error="http 503" if n == 3 else "") for n in range(20)]
    data = data_in(page_of(tmp_path, a_summary(records), records))
    assert data["failures"] == [[0.3, 91.0, "http 503"]]
    assert ["95", "%", "of 20 requests succeeded"] in data["cards"]  # type: ignore[operator]
    assert len(data["latency"]) == 19  # type: ignore[arg-type]


def test_a_distribution_ends_at_one_and_is_thinned() -> None:
    points = cdf(1e6 * n for n in range(1, 5001))
    assert len(points) <= 201
    assert points[0] == [1.0, 0.0]
    assert points[-1] == [5000.0, 1.0]
    assert cdf([None, None]) == []


def test_a_summary_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    summary = a_summary([a_record(0.1 * n) for n in range(20)])
    write_summary(summary, tmp_path)
    assert read_summary(tmp_path) == summary


def test_the_table_says_what_it_cannot_say() -> None:
    lines = lines_of(a_summary([a_record(0.1 * n) for n in range(20)]))
    assert lines[1].split()[:2] == ["x", "20/20"]
    assert "–" in lines[1]
    assert lines[-1] == "verdict: valid"


def test_a_stage_of_the_server_that_contains_the_others_is_no_part_of_the_bar(
    tmp_path: Path,
) -> None:
    stages = {"queue": 1.0, "prefill": 20.0, "ttft": 21.0}
    records = [a_record(0.1 * n, server_ms=stages) for n in range(20)]
    data = data_in(page_of(tmp_path, a_summary(records), records))
    parts = [{"name": "queue", "value": 1.0}, {"name": "prefill", "value": 20.0}]
    assert data["server"] == [{"name": "x", "parts": parts}]
