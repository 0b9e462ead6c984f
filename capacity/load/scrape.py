"""The server's own Prometheus metrics before, during and after a test.

Buckets of histograms are left out. The server may have none: then nothing is kept and nobody is
told off. Each scrape is one line of ``server-metrics.jsonl``; what counters gained over the test
goes into the summary.
"""

import re
from typing import BinaryIO

import orjson

from capacity.load.client import Client
from capacity.load.connection import Broken

PATH = "/metrics"
_OK = 200
_SAMPLE = re.compile(r"^([a-zA-Z_:][a-zA-Z0-9_:]*(?:\{[^}]*\})?)\s+(\S+)", re.MULTILINE)
_TYPE = re.compile(r"^# TYPE (\S+) counter", re.MULTILINE)
_MOST_BYTES = 8 << 20


class Scraper:
    """Asks when told to and writes what it gets; ``gains`` compares the last with the first."""

    def __init__(self, client: Client, out: BinaryIO) -> None:
        self._client = client
        self._out = out
        self._counters: set[str] = set()
        self._first: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self.available = True

    async def scrape(self, at_s: float) -> None:
        if not self.available:
            return
        try:
            status, body = await self._client.get(PATH)
        except Broken:
            return  # it may be back: a fault is being tried, or the server is busy
        text = body.decode(errors="replace")
        samples = samples_of(text) if status == _OK and len(body) < _MOST_BYTES else {}
        if not samples:
            self.available = bool(self._first)
            return
        self._counters |= set(_TYPE.findall(text))
        self._first = self._first or samples
        self._last = samples
        self._out.write(orjson.dumps({"t_s": round(at_s, 3), "samples": samples}) + b"\n")

    def gains(self) -> dict[str, float]:
        """By how much each counter rose; one that a restarted process lost is left out."""
        rises = {
            name: self._last[name] - before
            for name, before in self._first.items()
            if name in self._last and self._is_counter(name)
        }
        return {name: rise for name, rise in rises.items() if rise > 0}

    def _is_counter(self, sample: str) -> bool:
        family = sample.partition("{")[0]
        return family in self._counters or family.endswith(("_total", "_sum", "_count"))


def samples_of(text: str) -> dict[str, float]:
    """Values by name and labels, without histogram buckets and what is no number."""
    samples: dict[str, float] = {}
    for name, value in _SAMPLE.findall(text):
        if "_bucket{" in name or name.endswith("_created") or "_created{" in name:
            continue
        try:
            number = float(value)
        except ValueError:
            continue
        if abs(number) < float("inf"):
            samples[name] = number
    return samples
