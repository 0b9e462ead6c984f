"""The report of a load test in a real browser: drawn, without an error, without the network."""

import shutil
import subprocess
from pathlib import Path

import pytest

from capacity.load.report import write_report
from tests.support.load_runs import S, a_record, a_summary

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
LOADING_MS = 8000  # of the page's own clock
BROWSER_S = 100.0
REQUESTS = 60

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(120),
    pytest.mark.skipif(BROWSER is None, reason="needs Chromium"),
]


@pytest.mark.parametrize("width", [1200, 390], ids=["desktop", "phone"])
def test_a_browser_draws_the_report_and_has_nothing_to_complain_of(
    tmp_path: Path, width: int
) -> None:
    records = [a_record(number / 10, index=number) for number in range(REQUESTS)]
    records += [a_record(7.0, index=REQUESTS, error="http 503", done_ns=7 * S)]
    write_report(a_summary(records), records, None, tmp_path)
    assert BROWSER is not None
    ended = subprocess.run(
        [
            BROWSER,
            *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *(f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr"),
            *("--log-level=0", f"--window-size={width},1200"),
            *(f"--virtual-time-budget={LOADING_MS}", "--dump-dom"),
            (tmp_path / "report.html").as_uri(),
        ],
        capture_output=True,
        timeout=BROWSER_S,
        check=True,
    )
    drawn, log = ended.stdout.decode(), ended.stderr.decode()
    assert "CONSOLE" not in log
    assert drawn.count("<svg") >= 3
    assert "Time to first token" in drawn
    assert drawn.count("<circle") == REQUESTS
