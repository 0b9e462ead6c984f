"""What a rank's exchange of expert rows costs: seconds and bytes, since the process started.

A MoE layer's call is cut into dispatch (send, and wait for what arrives), compute, and combine
(return, and wait for what comes home). On a CPU every call is timed. On a GPU one call in
``SAMPLED`` is, by events that nobody waits for, and stands for the others; ``SAMPLED`` is a prime,
so that every layer comes by in turn. What is exchanged is unknown here.
"""

import time
from typing import Literal, Protocol

import torch

from protocol.workers import ExpertTraffic

Part = Literal["dispatch", "compute", "combine"]

SAMPLED = 61
_COMBINE_STRETCHES = 2  # results are sent off; results are home
_US = 1e-6


class Lap(Protocol):
    """One call of one layer, timed."""

    def end(self, part: Part) -> None:
        """``part`` is what was done since the last ``end`` or ``resume``."""
        ...

    def resume(self) -> None:
        """What was done since then is no part of the exchange."""
        ...


class ExchangeMeter:
    """Used by one thread. ``traffic`` may be called at any time and waits for nothing."""

    def __init__(
        self, device: torch.device, *, transport: str = "local", buffer_bytes: int = 0
    ) -> None:
        self.waited_us = 0  # in the last exchange of step rows
        self.computed_us = 0  # in the last step of decoding
        self._on_host = device.type == "cpu"
        self._transport = transport
        self._buffer_bytes = buffer_bytes
        self._seconds: dict[Part, float] = {"dispatch": 0.0, "compute": 0.0, "combine": 0.0}
        self._sent_bytes: dict[Part, int] = {"dispatch": 0, "compute": 0, "combine": 0}
        self._calls = 0
        self._sampled: _DeviceLap | None = None
        self._row_exchanges = 0
        self._row_exchange_s = 0.0
        self._skew_s = 0.0
        self._groups_formed = 0
        self._interrupted_s = 0.0
        self._steps = 0
        self._steps_in_two = 0

    def begin(self) -> Lap:
        """A layer's call begins."""
        self._calls += 1
        if self._on_host:
            return _HostLap(self._seconds)
        if torch.cuda.is_current_stream_capturing():
            return _UNTIMED
        self._read()
        if self._sampled is not None or self._calls % SAMPLED:
            return _UNTIMED
        self._sampled = _DeviceLap()
        return self._sampled

    def add_bytes(self, part: Part, sent: int) -> None:
        """So many were sent to other ranks."""
        self._sent_bytes[part] += sent

    def add_row_exchange(self, seconds: float, skew_us: int) -> None:
        """A row exchange took that long here; ranks came ``skew_us`` apart to the one before."""
        self.waited_us = round(seconds / _US)
        self._row_exchanges += 1
        self._row_exchange_s += seconds
        self._skew_s += skew_us * _US

    def add_step(self, seconds: float, *, in_two: bool) -> None:
        """A step of decoding took that long here, as one batch or as two."""
        self.computed_us = round(seconds / _US)
        self._steps += 1
        self._steps_in_two += in_two

    def add_group(self) -> None:
        """The group of ranks has formed, for the first time or again."""
        self._groups_formed += 1

    def add_interruption(self, seconds: float) -> None:
        """So long passed between two turns because the ranks had to meet again."""
        self._interrupted_s += seconds

    def traffic(self) -> ExpertTraffic:
        """All of it so far."""
        return ExpertTraffic(
            transport=self._transport,
            buffer_bytes=self._buffer_bytes,
            layer_calls=self._calls,
            dispatch_s=self._seconds["dispatch"],
            compute_s=self._seconds["compute"],
            combine_s=self._seconds["combine"],
            dispatch_bytes=self._sent_bytes["dispatch"],
            combine_bytes=self._sent_bytes["combine"],
            row_exchanges=self._row_exchanges,
            row_exchange_s=self._row_exchange_s,
            skew_s=self._skew_s,
            steps=self._steps,
            steps_in_two=self._steps_in_two,
            groups_formed=self._groups_formed,
            interrupted_s=self._interrupted_s,
        )

    def _read(self) -> None:
        """Add the sampled call's times when the device is through with it."""
        if self._sampled is None or not self._sampled.finished():
            return
        for part, seconds in self._sampled.seconds():
            self._seconds[part] += seconds * SAMPLED
        self._sampled = None


class _HostLap:
    __slots__ = ("_seconds", "_since")

    def __init__(self, seconds: dict[Part, float]) -> None:
        self._seconds = seconds
        self._since = time.perf_counter()

    def end(self, part: Part) -> None:
        now = time.perf_counter()
        self._seconds[part] += now - self._since
        self._since = now

    def resume(self) -> None:
        self._since = time.perf_counter()


class _DeviceLap:
    """Events on the current stream, between what is timed."""

    def __init__(self) -> None:
        self._stretches: list[tuple[Part, torch.cuda.Event, torch.cuda.Event]] = []
        self._since = _event()

    def end(self, part: Part) -> None:
        now = _event()
        self._stretches.append((part, self._since, now))
        self._since = now

    def resume(self) -> None:
        self._since = _event()

    def finished(self) -> bool:
        """Whether the device is through with the whole call."""
        parts = [part for part, _, _ in self._stretches]
        if parts.count("combine") < _COMBINE_STRETCHES:
            return False
        reached: bool = self._stretches[-1][2].query()  # type: ignore[no-untyped-call]
        return reached

    def seconds(self) -> list[tuple[Part, float]]:
        return [(part, began.elapsed_time(ended) / 1000) for part, began, ended in self._stretches]


class _NoLap:
    def end(self, part: Part) -> None:
        pass

    def resume(self) -> None:
        pass


_UNTIMED = _NoLap()


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event
