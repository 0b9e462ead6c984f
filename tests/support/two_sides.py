"""What ``headrace bench`` told of a run beside what the scripted server did for each request.

The command must have run with ``SAME_PROMPTS``: its prompts can then be made again, and each record
is put beside the server's by its prompt, never by order or time.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from capacity.load.lengths import parse_lengths
from capacity.load.text import Calibration
from capacity.load.workload import Workload, WorkloadSpec
from tests.support.scripted_server import Reference, Sent

MS = 1e6
SAME_PROMPTS = ("--nonce", "same", "--seed", "0", "--input", "128")
OUTPUT_TOKENS = 10

Record = dict[str, Any]
Sides = list[tuple[Record, Sent]]


def command(url: str, out: Path, *options: str) -> list[str]:
    """The command line; answers have ``OUTPUT_TOKENS`` unless the options say otherwise."""
    given = [sys.executable, "-m", "deploy.cli", "bench", url, "--out", str(out), *options]
    return given if "--output" in options else [*given, "--output", str(OUTPUT_TOKENS)]


def summary_in(out: Path) -> Record:
    found = json.loads((out / "summary.json").read_text())
    assert isinstance(found, dict)
    return found


def requests_in(out: Path) -> list[Record]:
    lines = (out / "requests.jsonl").read_text().splitlines()
    return sorted(map(json.loads, lines), key=lambda record: record["index"])


def both_sides(reference: Reference, out: Path) -> Sides:
    """Each record, in the server's clock, with what the server did for it."""
    summary = summary_in(out)
    calibration = Calibration(**summary["target"]["calibration"])
    length = parse_lengths("128", "--input")
    spec = WorkloadSpec(input=length, output=length, seed=0, nonce="same")
    workload = Workload(spec, calibration)
    by_prompt = {str(sent.body["messages"][0]["content"]): sent for sent in reference.generations}  # type: ignore[index]
    records = requests_in(out)
    for record in records:
        for name in [name for name in record if name.endswith("_ns") and name != "chunks_ns"]:
            record[name] += summary["zero_ns"]
        record["chunks_ns"] = [at + summary["zero_ns"] for at in record.get("chunks_ns", [])]
    assert len(records) == len(by_prompt)
    prompts = [workload.session(record.get("session", 0))[0].prompt for record in records]
    return [(r, by_prompt[str(p)]) for r, p in zip(records, prompts, strict=True)]


def truths(sides: Sides) -> dict[str, list[float]]:
    """By figure, its values in ns by the server's record, of requests that did not fail there."""
    whole = [(record, sent) for record, sent in sides if not sent.failed]
    return {
        "ttft": [sent.chunks_ns[0] - record["intended_ns"] for record, sent in whole],
        "ttft_from_sent": [sent.chunks_ns[0] - record["sent_ns"] for record, sent in whole],
        "e2e": [sent.chunks_ns[-1] - record["intended_ns"] for record, sent in whole],
        "e2e_from_sent": [sent.chunks_ns[-1] - record["sent_ns"] for record, sent in whole],
        "tpot": [
            (sent.chunks_ns[-1] - sent.chunks_ns[0]) / (OUTPUT_TOKENS - 1) for _, sent in whole
        ],
        "icl": [float(gap) for _, sent in whole for gap in np.diff(sent.chunks_ns)],
    }


def told_and_true(figures: Record, sides: Sides) -> list[tuple[str, str, float, float]]:
    """(figure, percentile, told, true) in ms of every percentile that the summary tells."""
    return [
        (name, quantile, told, float(np.percentile(values, float(quantile[1:]))) / MS)
        for name, values in truths(sides).items()
        for quantile, told in figures[name]["percentiles"].items()
    ]


def due_in(sides: Sides, begin_ns: int, end_ns: int) -> Sequence[tuple[Record, Sent]]:
    """Those that were meant to be sent then."""
    return [side for side in sides if begin_ns <= side[0]["intended_ns"] < end_ns]
