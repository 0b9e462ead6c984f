import pytest

from capacity.load.address import parse_address
from capacity.load.arrivals import Arrivals, Ramp
from capacity.load.errors import WrongOption
from capacity.load.faults import Fault, parse_fault
from capacity.load.messages import ClosedLoop, OpenLoop
from capacity.load.objectives import parse_objectives
from capacity.load.plan import parse_rates, parse_users
from capacity.load.scrape import samples_of


@pytest.mark.parametrize(
    ("url", "host", "port", "prefix", "tls"),
    [
        ("http://localhost:8000", "localhost", 8000, "", False),
        ("localhost:8000/v1", "localhost", 8000, "", False),
        ("https://api.example/v1/", "api.example", 443, "", True),
        ("http://[::1]:80/models/a/v1", "::1", 80, "/models/a", False),
    ],
)
def test_urls_with_and_without_v1(url: str, host: str, port: int, prefix: str, tls: bool) -> None:
    found = parse_address(url)
    assert (found.host, found.port, found.prefix, found.tls) == (host, port, prefix, tls)


@pytest.mark.parametrize(
    "url", ["ftp://x", "http://", "http://x:99999", "http://x/?a=b", "", "http://x:y"]
)
def test_a_wrong_url_is_refused(url: str) -> None:
    with pytest.raises(WrongOption, match="URL"):
        parse_address(url)


def test_objectives_are_limits_and_a_share() -> None:
    found = parse_objectives("ttft=500ms, tpot<0.05s ,share=95%")
    assert found.limits_s == {"ttft": 0.5, "tpot": pytest.approx(0.05)}
    assert found.share == pytest.approx(0.95)
    assert found.text == "ttft 500 ms, tpot 50 ms for 95 % of requests"


@pytest.mark.parametrize(
    "written",
    [
        "",
        "ttft",
        "ttft=5",
        "ttft=5%",
        "share=50%",
        "ttft=5ms,share=101%",
        "p99=5ms",
        "ttft=0ms",
        "e2e=1.2.3s",
    ],
)
def test_a_wrong_objective_is_refused(written: str) -> None:
    with pytest.raises(WrongOption, match="--slo"):
        parse_objectives(written)


def test_users_are_a_number_a_sweep_or_a_ramp() -> None:
    assert [stage.load for stage in parse_users("1,4")] == [
        ClosedLoop(users=1),
        ClosedLoop(users=4),
    ]
    (ramp,) = parse_users("1..32")
    assert isinstance(ramp.load, ClosedLoop)
    assert (ramp.load.users, ramp.load.ramp_s < 0) == (32, True)
    for wrong in ("0", "", "1,,2", "x", "5..2", "1.5"):
        with pytest.raises(WrongOption, match="--concurrency"):
            parse_users(wrong)


def test_rates_are_a_number_a_sweep_or_a_ramp() -> None:
    (ramp,) = parse_rates("1..20", Arrivals())
    assert isinstance(ramp.load, OpenLoop)
    assert ramp.load.rate == Ramp(1, 20)
    assert len(parse_rates("0.5,1,2", Arrivals())) == 3
    for wrong in ("0", "-1", "x", "inf", "1,", ""):
        with pytest.raises(WrongOption, match="--rate"):
            parse_rates(wrong, Arrivals())


def test_faults_are_written_as_sentences() -> None:
    assert parse_fault("kill decode@30s") == Fault(action="kill", role="decode", at_s=30)
    paused = Fault(action="pause", role="prefill", at_s=1.5, pause_s=4)
    assert parse_fault("pause prefill @ 1.5s for 4s") == paused
    for wrong in ("kill", "kill decode", "kill pump@3s", "stop decode@3s", "kill decode@3s for 2s"):
        with pytest.raises(WrongOption, match="--fault"):
            parse_fault(wrong)


def test_metrics_are_samples_without_buckets() -> None:
    text = (
        "# HELP a things\n# TYPE a counter\n"
        'a_total{x="1 2"} 5\na_created{x="1"} 1e9\nlatency_bucket{le="1"} 3\nlatency_sum 2.5\n'
        "empty NaN\nbroken line here\n"
    )
    assert samples_of(text) == {'a_total{x="1 2"}': 5.0, "latency_sum": 2.5}
