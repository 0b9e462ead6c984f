"""The options of ``headrace bench``, by what they are about. ``deploy.bench`` reads them."""

import argparse
from pathlib import Path

from capacity.load.api import PATHS

_EXAMPLES = """\
examples:
  headrace bench http://localhost:8000
  headrace bench http://localhost:8000 --rate 1,2,4 --slo ttft=1s,tpot=100ms
  headrace bench http://localhost:8000 --search --slo ttft=1s,tpot=100ms,share=95%
  headrace bench http://localhost:8000 --trace mooncake.jsonl --speed 0.5
  headrace bench http://localhost:8000 --rate 2 --duration 90 --fault 'kill decode@30s'
  headrace bench compare headrace-bench/BEFORE headrace-bench/AFTER

exit codes: 0 valid and objectives met, 1 objectives missed, 2 invalid or not possible"""


def add_bench_options(parser: argparse.ArgumentParser) -> None:
    """The options of the verb, by what they are about."""
    parser.epilog = _EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "url",
        metavar="URL",
        nargs="+",
        help="of an OpenAI-compatible server; or `compare A B`, two folders of earlier runs",
    )
    server = parser.add_argument_group("server")
    add = server.add_argument
    add("--model", metavar="NAME", default="", help="default: the first that the server lists")
    add(
        "--endpoint",
        choices=tuple(PATHS),
        default="chat",
        help="which API to call (default: %(default)s)",
    )
    add("--no-stream", action="store_true", help="ask for whole answers instead of streams")
    add(
        "--timeout", metavar="SECONDS", type=float, default=120.0, help="a request's (default: 120)"
    )
    add("--api-key-file", metavar="FILE", type=Path, help="holds the API key")
    add("--ca-file", metavar="FILE", help="certificate authority to trust for https")

    load = parser.add_argument_group("load")
    add = load.add_argument
    add(
        "--concurrency",
        metavar="N",
        help="closed loop: users who wait for their answers; 1,4,16 is a sweep, 1..32 a ramp "
        "(default: a sweep 1,4,16 of 12 s each)",
    )
    add(
        "--rate",
        metavar="R",
        help="open loop: requests per second, whatever the server does; 1,2,4 is a sweep, 1..20 a "
        "ramp",
    )
    add(
        "--arrivals",
        metavar="KIND",
        default="poisson",
        help="with --rate: poisson, constant or gamma:SHAPE, bursty below 1 (default: poisson)",
    )
    add("--trace", metavar="FILE", help="Mooncake, Azure, BurstGPT, ShareGPT or our own format")
    add("--speed", metavar="X", type=float, default=1.0, help="of a trace's times (default: 1)")
    add("--duration", metavar="SECONDS", type=float, help="of a stage (default: 30; in a sweep 15)")
    add("--requests", metavar="N", type=int, help="end a stage after so many sessions or requests")
    add("--warmup", metavar="SECONDS", type=float, help="left out of figures (default: a tenth)")

    asked = parser.add_argument_group("requests")
    add = asked.add_argument
    lengths = "512, 100-500, normal:512,64, '70%%:128 30%%:2048'"
    add(
        "--input", metavar="TOKENS", default="128", help=f"{lengths} or pairs:512/64 (default: 128)"
    )
    add(
        "--output",
        metavar="TOKENS",
        help=f"{lengths} (default: 64, from a server slower than 20 tokens/s for one user 16)",
    )
    add("--prefix", metavar="NxTOKENS", help="begin every prompt with one of N shared prefixes")
    add("--turns", metavar="N", help="turns of a conversation, a number or a range like --input")
    add(
        "--think",
        metavar="SECONDS",
        type=float,
        default=0.0,
        help="before a next turn (default: 0)",
    )
    add("--seed", metavar="N", type=int, default=0, help="equal seeds, equal load (default: 0)")
    add(
        "--nonce",
        metavar="WHICH",
        default="run",
        help="words first in every prompt that keep prefix caches out: of earlier runs (run), of "
        "this one too (request), or none; any other text is the nonce (default: run)",
    )

    goal = parser.add_argument_group("goal and result")
    add = goal.add_argument
    add("--slo", metavar="LIMITS", help="such as ttft=500ms,tpot=50ms,share=99%%; also icl and e2e")
    add("--search", action="store_true", help="find the highest rate that meets --slo")
    add(
        "--fault",
        metavar="WHAT@WHEN",
        action="append",
        default=[],
        help="'kill decode@30s' or 'pause prefill@10s for 3s', in a system of this machine",
    )
    add("--gpus", metavar="N", type=int, help="of the server, for tokens/s per GPU")
    add("--workers", metavar="N", type=int, default=1, help="load processes (default: 1)")
    add("--out", metavar="DIR", type=Path, help="default: headrace-bench/DATE-TIME")
    add("--parquet", action="store_true", help="write requests.parquet too; needs pyarrow")
    add("--json", action="store_true", help="print summary.json on stdout instead of the table")
