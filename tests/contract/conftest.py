"""What all contract tests of transports are run with."""

import importlib.util

import pytest

from kvtransfer.carrier import Transport


@pytest.fixture(params=["shm", "tcp", "nixl"])
def transport(request: pytest.FixtureRequest) -> Transport:
    chosen: Transport = request.param
    if chosen == "nixl" and importlib.util.find_spec("nixl") is None:
        pytest.skip("the extra nixl is not installed")
    return chosen
