"""``summary.json``: everything of a run but its single requests, in a schema with a version.

A field may be added within a version; removing one or changing its meaning makes a new version.
"""

import platform
import sys
from importlib.metadata import version
from pathlib import Path

import msgspec
import psutil

from capacity.load.errors import WrongOption
from capacity.load.impact import FaultImpact
from capacity.load.search import SearchResult
from capacity.load.stage import StageResult
from capacity.load.text import Calibration
from capacity.load.verdict import Verdict

SCHEMA = "headrace.bench/1"
FILE = "summary.json"


class Target(msgspec.Struct, frozen=True, kw_only=True):
    url: str
    model: str
    endpoint: str
    stream: bool
    exact_length: bool
    calibration: Calibration


class Environment(msgspec.Struct, frozen=True, kw_only=True):
    headrace: str
    python: str
    system: str
    processor: str
    cores: int
    memory_bytes: int


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """``started`` is wall-clock time of day, RFC 3339, for people. All other times are those of the
    client machine's monotonic clock, counted from ``zero_ns``.
    """

    schema: str = SCHEMA
    started: str
    zero_ns: int
    duration_s: float
    partial: bool
    target: Target
    settings: dict[str, str]
    nonce: str
    environment: Environment
    gpus: int | None
    energy_j: float | None
    stages: list[StageResult]
    faults: list[FaultImpact]
    search: SearchResult | None
    server_counters: dict[str, float]
    objectives: str | None
    verdict: Verdict

    @property
    def tokens_per_joule(self) -> float | None:
        if not self.energy_j:
            return None
        made = sum(s.figures.output_tokens_per_s * s.figures.window_s for s in self.stages)
        return made / self.energy_j


def this_environment() -> Environment:
    return Environment(
        headrace=version("headrace"),
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()}",
        processor=_processor(),
        cores=psutil.cpu_count() or 1,
        memory_bytes=psutil.virtual_memory().total,
    )


def write_summary(summary: Summary, folder: Path) -> None:
    encoded = msgspec.json.format(msgspec.json.encode(summary), indent=2)
    (folder / FILE).write_bytes(encoded + b"\n")


def read_summary(folder: Path) -> Summary:
    """
    Raises:
        WrongOption: there is none, or of another schema.
    """
    file = folder / FILE if folder.is_dir() else folder
    try:
        content = file.read_bytes()
        known = msgspec.json.decode(content, type=dict[str, object]).get("schema")
        if known != SCHEMA:
            raise WrongOption(f"{file}: schema {known!r} is not {SCHEMA!r}")
        return msgspec.json.decode(content, type=Summary)
    except OSError as error:
        raise WrongOption(f"{file}: {error.strerror}") from None
    except msgspec.DecodeError as error:
        raise WrongOption(f"{file}: {error}") from None


def _processor() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
