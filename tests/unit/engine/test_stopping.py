import pytest

from engine.sampling.stopping import finish_reason
from protocol.requests import StopConditions


@pytest.mark.parametrize(
    ("token_id", "num_output_tokens", "reason"),
    [(5, 1, None), (2, 1, None), (2, 3, "stop"), (2, 4, "stop"), (5, 4, "length")],
    ids=["goes on", "stop token too early", "stop token", "both: it stopped", "out of tokens"],
)
def test_a_request_ends_for_the_right_reason(
    token_id: int, num_output_tokens: int, reason: str | None
) -> None:
    stop = StopConditions(max_tokens=4, min_tokens=2, stop_token_ids=(2, 3))
    assert finish_reason(stop, token_id, num_output_tokens) == reason


def test_without_stop_tokens_only_the_length_ends_it() -> None:
    stop = StopConditions(max_tokens=2)
    assert [finish_reason(stop, 0, count) for count in (1, 2)] == [None, "length"]
