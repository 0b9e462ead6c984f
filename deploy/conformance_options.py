"""Options of ``headrace conformance``, apart from what they run, so that --help stays quick."""

import argparse
from pathlib import Path


def add_conformance_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base-url",
        default="http://127.0.0.1:8000/v1",
        metavar="URL",
        help="of the API, as clients are given it (default: %(default)s)",
    )
    parser.add_argument(
        "--model", metavar="NAME", help="the model to ask (default: the first that is listed)"
    )
    parser.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help="holds the API key, if one is needed"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=120.0,
        metavar="SECONDS",
        help="for each answer (default: %(default)s)",
    )
    parser.add_argument(
        "--only",
        action="append",
        metavar="NAME",
        help="the cases whose names begin so, such as stream or tools.deltas; may be repeated",
    )
    parser.add_argument(
        "--list", action="store_true", help="show what would be asked and why, and ask nothing"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
