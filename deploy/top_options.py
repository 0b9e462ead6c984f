"""The options of ``headrace top``, apart from what runs it: parsing imports next to nothing."""

import argparse
from pathlib import Path


def add_top_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "url",
        nargs="?",
        default="http://127.0.0.1:8000",
        metavar="URL",
        help="of a gateway (default: %(default)s)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print everything that is known as JSON, once"
    )
    parser.add_argument(
        "--interval",
        type=float,
        default=2.0,
        metavar="SECONDS",
        help="between two looks, at least 0.2 (default: %(default)s)",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=5.0,
        metavar="SECONDS",
        help="for each question to the gateway (default: %(default)s)",
    )
    parser.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="holds the API key, where the gateway asks for one",
    )
