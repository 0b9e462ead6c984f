"""Whether an independent client measures the same: ``headrace bench`` beside aiperf, in turns.

    python -m benchmarks.load_agreement --aiperf FILE [--tokenizer FOLDER] [--url URL] [--json]

``--aiperf`` is its command, in a virtual environment of its own: it is no dependency of ours.
Without ``--url`` both load a server with a scripted pace: first token after 100 ms, then one every
20 ms. Both keep as many users busy, with prompts and answers of the same lengths. Compared are the
medians, over the runs, of the TTFT's p50 and of output tokens per second.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.report import Bar, Figure, print_report
from tests.support.scripted_server import Script, scripted_server

PACE = Script(first_token_s=0.1, token_s=0.02)
MOST_DIFFERENCE = 0.03
RUN_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    url: str
    model: str
    users: int
    requests: int
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    ttft_p50_ms: float
    output_tokens_per_s: float


def by_headrace(load: Load, folder: Path) -> Told:
    run(
        [
            *(sys.executable, "-m", "deploy.cli", "bench", load.url, "--model", load.model),
            *("--concurrency", str(load.users), "--requests", str(load.requests)),
            *("--input", str(load.input_tokens), "--output", str(load.output_tokens)),
            *("--nonce", "request", "--out", str(folder)),
        ],
        folder / "summary.json",
    )
    figures = json.loads((folder / "summary.json").read_text())["stages"][0]["figures"]
    return Told(
        ttft_p50_ms=figures["ttft"]["percentiles"]["p50"],
        output_tokens_per_s=figures["output_tokens_per_s"],
    )


def by_aiperf(load: Load, folder: Path, *, command: str, tokenizer: str) -> Told:
    exact = ("ignore_eos:true", f"min_tokens:{load.output_tokens}")
    written = folder / "profile_export_aiperf.json"
    run(
        [
            *(command, "profile", "--model", load.model, "--url", load.url),
            *("--endpoint-type", "chat", "--streaming", "--use-server-token-count"),
            *("--concurrency", str(load.users), "--request-count", str(load.requests)),
            *("--synthetic-input-tokens-mean", str(load.input_tokens)),
            *("--output-tokens-mean", str(load.output_tokens), "--tokenizer", tokenizer),
            *(part for field in exact for part in ("--extra-inputs", field)),
            *("--ui", "simple", "--artifact-dir", str(folder)),
        ],
        written,
    )
    told = json.loads(written.read_text())
    return Told(
        ttft_p50_ms=told["time_to_first_token"]["p50"],
        output_tokens_per_s=told["output_token_throughput"]["avg"],
    )


def run(command: Sequence[str], written: Path) -> None:
    """
    Raises:
        RuntimeError: it has not written its results.
    """
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=RUN_S)
    if not written.exists():
        raise RuntimeError(
            f"{command[0]} ended with {ended.returncode}: {ended.stdout[-2000:]}"
            f"{ended.stderr[-2000:]}"
        )


@contextmanager
def server_at(url: str | None) -> Generator[str]:
    if url is not None:
        yield url
    else:
        with scripted_server(PACE) as reference:
            yield reference.url


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--aiperf", metavar="FILE", required=True, help="its command")
    parser.add_argument("--tokenizer", default="builtin", help="aiperf's (default: builtin)")
    parser.add_argument("--url", help="of a server to load (default: one with a scripted pace)")
    parser.add_argument("--model", default="scripted", help="its model (default: scripted)")
    parser.add_argument("--users", type=int, default=8, help="default: 8")
    parser.add_argument("--requests", type=int, default=240, help="of a run (default: 240)")
    parser.add_argument("--input", type=int, default=128, help="tokens (default: 128)")
    parser.add_argument("--output", type=int, default=32, help="tokens (default: 32)")
    parser.add_argument("--runs", type=int, default=3, help="of each client (default: 3)")
    parser.add_argument("--json", action="store_true", help="print only the line of JSON")
    chosen = parser.parse_args()
    told: dict[str, list[Told]] = {"headrace": [], "aiperf": []}
    with server_at(chosen.url) as url, tempfile.TemporaryDirectory(prefix="headrace-") as folder:
        load = Load(
            url=url,
            model=chosen.model,
            users=chosen.users,
            requests=chosen.requests,
            input_tokens=chosen.input,
            output_tokens=chosen.output,
        )
        for number in range(chosen.runs):
            ours, theirs = Path(folder) / f"headrace-{number}", Path(folder) / f"aiperf-{number}"
            told["headrace"].append(by_headrace(load, ours))
            told["aiperf"].append(
                by_aiperf(load, theirs, command=chosen.aiperf, tokenizer=chosen.tokenizer)
            )
    figures: dict[str, Figure] = {}
    bars = []
    for measure in ("ttft_p50_ms", "output_tokens_per_s"):
        values = {client: [getattr(one, measure) for one in runs] for client, runs in told.items()}
        for client, found in values.items():
            figures[f"{measure}_{client}"] = ", ".join(f"{value:.1f}" for value in found)
        ours_, theirs_ = median(values["headrace"]), median(values["aiperf"])
        difference = abs(ours_ - theirs_) / theirs_
        bars.append(Bar(f"difference in {measure}", difference, at_most=MOST_DIFFERENCE))
    return print_report("load_agreement", figures, bars, only_json=chosen.json)


if __name__ == "__main__":
    sys.exit(main())
