"""What people see while a system starts and runs: one line a phase, and a bar for the weights.

Everything goes to stderr. The bar, over all processes together, is drawn only on a terminal.
"""

import time
from typing import TextIO

from deploy.processes import Report

_BAR_CELLS = 30
_MB = 1_000_000


class Console:
    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._terminal = out.isatty()
        self._started = time.monotonic()
        self._restarted: dict[str, float] = {}
        self._weights: dict[str, tuple[float, float]] = {}  # process -> bytes done, bytes in all
        self._bar_shown = False

    def say(self, text: str) -> None:
        self._clear_bar()
        print(text, file=self._out, flush=True)

    def phase(self, process: str, text: str) -> None:
        self.say(f"  {process:<12} {text}")

    def reported(self, process: str, report: Report) -> None:
        if report.event == "weights":
            self._weights_read(process, report)
        elif report.event == "listening":
            self.phase(process, f"listening on {report.fields.get('address')}")
        elif report.event == "ready":
            since = self._restarted.get(process, self._started)
            self.phase(process, f"ready after {time.monotonic() - since:.1f} s")

    def starting(self, process: str) -> None:
        """The process is not one of those that started with the system."""
        self._restarted[process] = time.monotonic()

    def restarting(self, process: str, reason: str, pause_s: float) -> None:
        self._weights.pop(process, None)
        self.starting(process)
        self.phase(process, f"{reason}; starting it again in {pause_s:.1f} s")

    def _weights_read(self, process: str, report: Report) -> None:
        done, total = report.fields.get("done"), report.fields.get("total")
        if not isinstance(done, int | float) or not isinstance(total, int | float):
            return
        known = self._weights.get(process, (0.0, 0.0))
        self._weights[process] = (done, total)
        if done >= total and known != (done, total):
            self.phase(process, f"weights loaded, {total / _MB:.0f} MB")
        self._draw_bar()

    def _draw_bar(self) -> None:
        done = sum(done for done, _ in self._weights.values())
        total = sum(total for _, total in self._weights.values())
        if not self._terminal or done >= total:
            return
        cells = int(_BAR_CELLS * done / total)
        bar = "█" * cells + "░" * (_BAR_CELLS - cells)
        text = f"  {'weights':<12} {bar} {done / _MB:.0f} of {total / _MB:.0f} MB"
        print(f"\r\x1b[K{text}", end="", file=self._out, flush=True)
        self._bar_shown = True

    def _clear_bar(self) -> None:
        if self._bar_shown:
            print("\r\x1b[K", end="", file=self._out)
            self._bar_shown = False
