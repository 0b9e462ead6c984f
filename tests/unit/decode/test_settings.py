"""What a rank's settings refuse."""

import pytest
from pydantic import ValidationError

from decode.settings import DecodeSettings
from runtime.settings import host_of


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]"])
def test_a_rank_does_not_tell_others_an_address_that_is_every_interface(host: str) -> None:
    with pytest.raises(ValidationError, match="name the one at which they reach this worker"):
        DecodeSettings(bind=f"tcp://{host}:7000")


@pytest.mark.parametrize(
    ("address", "host"),
    [
        ("tcp://10.0.0.7:0", "10.0.0.7"),
        ("tcp://[fe80::1]:7", "fe80::1"),
        ("tcp://node-3:9", "node-3"),
    ],
)
def test_kv_is_listened_for_where_the_bus_is(address: str, host: str) -> None:
    assert host_of(DecodeSettings(bind=address).bind) == host
