"""``headrace plan --placement``: slots, bytes and KV room of published models on so many ranks."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict

from capacity.expert_placement import PlacementRow, placement_row, table_of
from capacity.model_shapes import MODELS, ModelShape
from deploy.config import WrongSetting

RANKS = (8, 16, 32, 64, 72)
REDUNDANT = 32
MEMORY_GB = 186.0  # of a GB200's GPU, as drivers report it
RESERVED = 0.1


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--placement",
        action="store_true",
        required=True,
        help="how published models' experts are placed, and what that leaves for KV cache",
    )
    parser.add_argument(
        "--only",
        metavar="MODEL",
        action="append",
        help=f"one of {', '.join(model.name for model in MODELS)} (may be repeated; default: all)",
    )
    parser.add_argument(
        "--on",
        metavar="RANKS",
        default=",".join(map(str, RANKS)),
        help="numbers of ranks, one GPU each (default: %(default)s)",
    )
    parser.add_argument(
        "--redundant",
        type=int,
        metavar="SLOTS",
        default=REDUNDANT,
        help="slots beyond one for each expert, over all ranks (default: %(default)s)",
    )
    parser.add_argument(
        "--gpu-memory",
        type=float,
        metavar="GB",
        default=MEMORY_GB,
        help="of one GPU, in 10^9 bytes (default: %(default)s, a GB200's)",
    )
    parser.add_argument(
        "--reserved",
        type=float,
        metavar="SHARE",
        default=RESERVED,
        help="of that memory for activations, buffers and graphs (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def show_plan(chosen: argparse.Namespace) -> None:
    """
    Raises:
        ConfigError: an option has no meaning.
    """
    groups = [(model, rows_of(model, chosen)) for model in models_named(chosen.only)]
    if chosen.json:
        print(json.dumps([asdict(row) for _, rows in groups for row in rows], indent=2))
    else:
        print("\n\n".join(section(model, rows) for model, rows in groups))


def rows_of(model: ModelShape, chosen: argparse.Namespace) -> list[PlacementRow]:
    if not (chosen.gpu_memory > 0 and 0 <= chosen.reserved < 1):
        raise WrongSetting(
            f"--gpu-memory {chosen.gpu_memory} and --reserved {chosen.reserved}: memory must be "
            "above 0, the reserved share at least 0 and below 1"
        )
    return [
        placement_row(
            model,
            ranks,
            redundant=chosen.redundant,
            memory_bytes=chosen.gpu_memory * 1e9,
            reserved=chosen.reserved,
        )
        for ranks in _numbers(chosen.on)
    ]


def section(model: ModelShape, rows: Sequence[PlacementRow]) -> str:
    return (
        f"### {model.name}\n\n"
        f"{model.experts} experts, top {model.experts_per_token}, in {model.expert_layers} of "
        f"{model.layers} layers; {model.weights / 1e9:.1f} billion weights, experts in "
        f"{model.expert_format}; {model.kv_bytes_per_token:,} bytes of KV a token.\n\n"
        f"{table_of(rows)}"
    )


def models_named(names: Sequence[str] | None) -> list[ModelShape]:
    known = {model.name.lower(): model for model in MODELS}
    unknown = [name for name in names or () if name.lower() not in known]
    if unknown:
        listed = ", ".join(model.name for model in MODELS)
        raise WrongSetting(f"--only {unknown[0]}: no such model here; known are {listed}")
    return [known[name.lower()] for name in names] if names else list(MODELS)


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise WrongSetting(f"--on {text}: write numbers with commas, as 8,16,72") from None
