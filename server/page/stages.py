"""The stages that an attempt has gone through, from what was noted of it. Pure."""

from typing import NamedTuple

from server.page.records import AttemptRecord


class Stage(NamedTuple):
    """``begin`` is a time of the records' clock."""

    name: str
    begin: float
    seconds: float


def stages_of(attempt: AttemptRecord, *, until: float) -> list[Stage]:
    """Each stage begins where the one before ends; the last one that was reached ends ``until``."""
    begun = [
        ("wait", attempt.began),
        ("reserve", attempt.reserving),
        *_prefill_stages(attempt),
        ("hand-over", attempt.first_token),
        ("decode", attempt.decoding),
    ]
    reached = [(name, at) for name, at in begun if at is not None]
    ends = [at for _, at in reached[1:]] + [until]
    return [
        Stage(name, at, max(0.0, end - at)) for (name, at), end in zip(reached, ends, strict=True)
    ]


def _prefill_stages(attempt: AttemptRecord) -> list[tuple[str, float | None]]:
    """The worker tells with the first token how long the request has waited there. Until then
    both count as prefill.
    """
    asked = attempt.prefilling
    if asked is None or attempt.times is None or attempt.first_token is None:
        return [("prefill", asked)]
    computing = min(asked + attempt.times.queue_s, attempt.first_token)
    return [("queue", asked), ("prefill", computing)]
