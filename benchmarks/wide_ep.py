"""What a step of wide expert parallelism is made of, and how even the experts' work is.

``--ranks 1,8,32,72``: so many real processes on this machine, each with a model of DeepSeek-V3's
shape but tiny (256 experts, eight chosen, three layers of them), decode a fixed batch in lock-step
over the memory that they share. Processes share the cores, so times show what a step waits for, not
what a rack does. Reported are

- the parts of a step: attention, dispatch, experts, combine, row exchange (from the last rank's
  arrival on), skew (first to last rank's arrival), and the rest;
- a step of 2 and of 8 ranks over that memory, and over gloo in the same run;
- bytes that a token sends to other ranks, over those of the formula;
- the longest step over the median, with experts at rest and moving every three steps, and the
  longest time that a step waited for experts to move;
- max / mean of ranks' tokens on 72 ranks with 288 slots, evenly placed and balanced, over a window
  of tokens that choose by Zipf's law, over the next window, and over one step.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from itertools import accumulate, count
from pathlib import Path
from statistics import fmean, median

import torch
from torch import Tensor

from benchmarks.report import Bar, Figure, print_report
from benchmarks.wide_ep_rank import Outcome, Work, run_rank
from decode.rebalance import RebalanceRule
from engine.backends import RowsChoice
from engine.experts.balancer import balance, balance_of
from engine.experts.exchange import TransportChoice
from engine.experts.placement import ExpertPlacement, Topology, place_evenly
from engine.experts.replicas import ReplicaTable, token_keys
from tests.support.ranks import run_ranks

MODEL = "deepseek_v3_256_experts"
EXPERTS, CHOSEN, HIDDEN = 256, 8, 64  # of that model
BATCH, REDUNDANT, STEPS, QUICK_STEPS = 4, 32, 40, 15
TIMEOUT_S = 900.0
CARRIED = (2, 8)  # ranks that also decode over gloo
ROUNDS = 2  # of each, in turn: the machine may be busier in one
_MOVE = "longest move / median step"
PARTS = ("attention", "dispatch", "experts", "combine")
MOVING = RebalanceRule(window=3, interval=3, above=1.0)

NVL72 = Topology(72, 4)
SLOTS = 4
EXPONENT, STEEP = 0.9, 1.0  # at the second, 288 slots do not allow 1.05
TOKENS_OF_RANK = 128
WINDOW_STEPS, QUICK_WINDOW_STEPS = 200, 30

FLOAT_BYTES, SLOT_BYTES, COUNT_BYTES = 4, 4, 8


def main() -> int:
    # Every rank's process imports this module, and transformers takes seconds.
    from tests.support.checkpoints import make_checkpoint

    options = _options()
    figures: dict[str, Figure] = {"batch of a rank": BATCH, "steps": options.steps}
    bars: list[Bar] = []
    with tempfile.TemporaryDirectory(prefix="headrace-") as folder:
        checkpoint = make_checkpoint(MODEL, Path(folder))
        for ranks in options.ranks:
            print(f"{ranks} ranks", file=sys.stderr, flush=True)
            at_rest = _run(checkpoint, ranks, options.steps, None, options.transport)
            figures |= _named(_parts(at_rest), ranks)
            if ranks > 1:
                figures |= _named(_sent(at_rest, options.transport), ranks)
                moving = _run(checkpoint, ranks, options.steps, MOVING, options.transport)
                figures |= _named(_moving(at_rest, moving), ranks)
            if ranks == max(options.ranks):
                figures |= _recorded(at_rest)
        carried = {n: _carried(checkpoint, n, options) for n in options.carried}
    for ranks, steps in carried.items():
        figures |= {f"{ranks} ranks: step over {rows}, ms": ms for rows, ms in steps.items()}
        over_gloo = steps["shared_memory"] / steps["gloo"]
        bars.append(Bar(f"{ranks} ranks: shared memory / gloo", over_gloo, at_most=1.0))
    skewed = _skewed(EXPONENT, options.window_steps)
    figures |= {f"Zipf {EXPONENT}: {name}": value for name, value in skewed.items()}
    if not options.quick:
        steep = _skewed(STEEP, options.window_steps)
        figures |= {f"Zipf {STEEP}: {name}": value for name, value in steep.items()}
        over_least = steep["balanced, planned"] / steep["balanced, least by estimate"]
        bars.append(Bar(f"Zipf {STEEP}: planned / least by estimate", over_least, at_most=1.01))
    bars.append(Bar("max / mean, balanced, window", skewed["balanced, window"], at_most=1.05))
    if isinstance(recorded := figures["recorded, balanced"], float):
        bars.append(Bar("max / mean, balanced, recorded", recorded, at_most=1.05))
    bars += [
        Bar(f"{ranks} ranks: longest move / median step", value, at_most=0.5)
        for ranks in options.ranks
        if isinstance(value := figures.get(f"{ranks} ranks: {_MOVE}"), float)
    ]
    return print_report("wide_ep", figures, bars, only_json=options.json)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", default="1,8,32,72", help="default: %(default)s")
    parser.add_argument(
        "--transport",
        default="all_to_all",
        choices=("all_to_all", "padded", "all_gather"),
        help="how rows travel (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="only the line of JSON")
    parser.add_argument("--quick", action="store_true", help="1 and 4 ranks, fewer steps")
    chosen = parser.parse_args()
    chosen.ranks = [1, 4] if chosen.quick else [int(ranks) for ranks in chosen.ranks.split(",")]
    chosen.steps = QUICK_STEPS if chosen.quick else STEPS
    chosen.carried = CARRIED[:1] if chosen.quick else CARRIED
    chosen.window_steps = QUICK_WINDOW_STEPS if chosen.quick else WINDOW_STEPS
    return chosen


def _run(
    folder: Path,
    ranks: int,
    steps: int,
    rule: RebalanceRule | None,
    transport: TransportChoice,
    *,
    rows: RowsChoice = "auto",
) -> list[Outcome]:
    work = Work(
        folder=folder,
        batch=BATCH,
        steps=steps,
        redundant=REDUNDANT,
        rule=rule,
        transport=transport,
    )
    return run_ranks(run_rank, ranks, work, timeout_s=TIMEOUT_S, rows=rows)


def _carried(folder: Path, ranks: int, options: argparse.Namespace) -> dict[RowsChoice, float]:
    """Milliseconds of a step by what carries rows: the medians' least, of some rounds."""
    found: dict[RowsChoice, float] = {}
    carriers: tuple[RowsChoice, ...] = ("gloo", "shared_memory")
    for rows in carriers * ROUNDS:
        print(f"{ranks} ranks over {rows}", file=sys.stderr, flush=True)
        outcomes = _run(folder, ranks, options.steps, None, options.transport, rows=rows)
        step = 1000 * median(_durations(outcomes))
        found[rows] = min(step, found.get(rows, step))
    return found


def _named(figures: dict[str, Figure], ranks: int) -> dict[str, Figure]:
    return {f"{ranks} ranks: {name}": value for name, value in figures.items()}


# -- what a step is made of -----------------------------------------------------------------------


def _parts(outcomes: Sequence[Outcome]) -> dict[str, Figure]:
    """Milliseconds of a step, means over ranks and steps."""
    steps = list(zip(*(outcome.steps for outcome in outcomes), strict=True))
    whole = fmean(_durations(outcomes))
    parts = {
        part: fmean(step.parts.get(part, 0.0) for of_ranks in steps for step in of_ranks)
        for part in PARTS
    }
    skew = fmean(max(s.arrived for s in of) - min(s.arrived for s in of) for of in steps)
    exchange = fmean(fmean(s.left for s in of) - max(s.arrived for s in of) for of in steps)
    waited = fmean(max(s.arrived for s in of) - fmean(s.arrived for s in of) for of in steps)
    rest = whole - sum(parts.values()) - exchange - waited
    named = {"step": whole, **parts, "row exchange": exchange, "skew": skew, "rest": rest}
    return {f"{part}, ms": 1000 * seconds for part, seconds in named.items()}


def _durations(outcomes: Sequence[Outcome]) -> list[float]:
    """Of each step, from the first rank's arrival to the last rank's end."""
    return [
        max(step.ended for step in of_ranks) - min(step.arrived for step in of_ranks)
        for of_ranks in zip(*(outcome.steps for outcome in outcomes), strict=True)
    ]


def _moving(at_rest: Sequence[Outcome], moving: Sequence[Outcome]) -> dict[str, Figure]:
    resting, busy = _durations(at_rest), _durations(moving)
    return {
        "layers moved": moving[0].layers_moved,
        "median step moving, ms": 1000 * median(busy),
        "longest / median step, at rest": max(resting) / median(resting),
        "longest / median step, moving": max(busy) / median(busy),
        _MOVE: _longest_move(moving) / median(busy),
    }


def _longest_move(outcomes: Sequence[Outcome]) -> float:
    """What moving experts adds to a step at most: from the first rank's begin to the last's end."""
    return max(step.moving_s for outcome in outcomes for step in outcome.steps)


# -- bytes ----------------------------------------------------------------------------------------


def _sent(outcomes: Sequence[Outcome], transport: TransportChoice) -> dict[str, Figure]:
    ranks = len(outcomes)
    tokens = sum(outcome.tokens for outcome in outcomes) * outcomes[0].layers
    measured = sum(outcome.sent_bytes for outcome in outcomes) / tokens
    if transport != "all_to_all":
        return {"form of exchange": transport, "bytes a token and layer": measured}
    padded = outcomes[0].padded_layers > 0
    expected = _expected_bytes(ranks, padded=padded)
    return {
        "form of exchange": "padded" if padded else "counted",
        "bytes a token and layer": measured,
        "bytes over the formula": measured / expected,
    }


def _expected_bytes(ranks: int, *, padded: bool) -> float:
    """To other ranks, for one token in one layer, when experts are chosen evenly and results return
    one per expert: the token to each rank that has one of its experts, padded to every rank.
    """
    row = HIDDEN * FLOAT_BYTES + CHOSEN * SLOT_BYTES
    others = ranks - 1
    reached = others if padded else others * (1 - (1 - 1 / ranks) ** CHOSEN)
    counts = 0 if padded else others * COUNT_BYTES / BATCH
    return reached * row + counts + CHOSEN * HIDDEN * FLOAT_BYTES * others / ranks


# -- balance --------------------------------------------------------------------------------------


def _recorded(outcomes: Sequence[Outcome]) -> dict[str, Figure]:
    """The model's own choices: the worst layer."""
    layers = [
        [float(sum(tokens)) for tokens in zip(*counts, strict=True)]
        for counts in zip(*(outcome.counts for outcome in outcomes), strict=True)
    ]
    even = place_evenly(EXPERTS, NVL72.num_ranks, REDUNDANT)
    found = [balance_of(load, balance(load, NVL72, SLOTS, mode="hierarchical")) for load in layers]
    which, worst = max(enumerate(found), key=lambda layer: layer[1].max_over_mean)
    return {
        "recorded, evenly placed": max(balance_of(load, even).max_over_mean for load in layers),
        "recorded, balanced": worst.max_over_mean,
        "recorded, bound": worst.bound,
        "recorded, least by estimate": _estimated_least(layers[which]),
    }


def _skewed(exponent: float, window_steps: int) -> dict[str, float]:
    """Tokens really counted on ranks, as the hash spreads them over replicas."""
    generator = torch.Generator().manual_seed(1)
    popularity_E = torch.arange(1, EXPERTS + 1).float().pow(-exponent)
    popularity_E = popularity_E[torch.randperm(EXPERTS, generator=generator)]
    request = count()
    load_E = torch.zeros(EXPERTS, dtype=torch.int64)
    window = [_a_step(popularity_E, generator, next(request)) for _ in range(window_steps)]
    for ids_TK, _ in window:
        load_E += ids_TK.flatten().bincount(minlength=EXPERTS)
    following = [_a_step(popularity_E, generator, next(request)) for _ in range(window_steps)]
    even = place_evenly(EXPERTS, NVL72.num_ranks, REDUNDANT)
    balanced = balance(load_E.tolist(), NVL72, SLOTS, mode="hierarchical")
    found = balance_of(load_E.tolist(), balanced)
    return {
        "busiest expert's share": float(load_E.max() / load_E.sum()),
        "evenly placed, window": _max_over_mean(even, window),
        "balanced, planned": found.max_over_mean,
        "balanced, bound": found.bound,
        "balanced, least by estimate": _estimated_least(load_E.tolist()),
        "balanced, window": _max_over_mean(balanced, window),
        "balanced, next window": _max_over_mean(balanced, following),
        "balanced, one step": _max_over_mean(balanced, window[:1]),
    }


def _estimated_least(load: Sequence[float]) -> float:
    """About the least max / mean that a skewed load allows on these slots.

    The ranks that hold an expert carry it, and in their other slots as many of the lightest
    experts, whatever the shares; that tells how many replicas a limit needs, and the slots how many
    there may be. It is no bound: a slot that is empty, or that holds a small share of some expert,
    makes room for more.
    """
    mean = sum(load) / NVL72.num_ranks
    lightest = [0.0, *accumulate(amount / mean for amount in sorted(load))]

    def copies(amount: float, limit: float) -> int:
        ranks = range(1, len(load) // SLOTS)
        return next((n for n in ranks if n * limit >= amount + lightest[(SLOTS - 1) * n]), SLOTS**6)

    low, high = 1.0, 1.0 + max(load) / mean
    for _ in range(40):
        limit = (low + high) / 2
        fits = sum(copies(amount / mean, limit) for amount in load) <= NVL72.num_ranks * SLOTS
        low, high = (low, limit) if fits else (limit, high)
    return high


def _a_step(popularity_E: Tensor, generator: torch.Generator, number: int) -> tuple[Tensor, Tensor]:
    """The experts and keys of one step's tokens on all ranks; no expert twice for a token."""
    tokens = NVL72.num_ranks * TOKENS_OF_RANK
    waits_TE = torch.empty(tokens, EXPERTS).exponential_(generator=generator)
    requests_T = torch.arange(tokens) * 7919 + 1
    keys_T = token_keys(requests_T, torch.full((tokens,), number))
    return (popularity_E / waits_TE).topk(CHOSEN).indices, keys_T


def _max_over_mean(placement: ExpertPlacement, steps: Sequence[tuple[Tensor, Tensor]]) -> float:
    table = ReplicaTable(placement, layer=3, device=torch.device("cpu"))
    tokens_N = torch.zeros(placement.num_ranks, dtype=torch.int64)
    for ids_TK, keys_T in steps:
        rank_TK = table(ids_TK, keys_T) // placement.slots_per_rank
        tokens_N += rank_TK.flatten().bincount(minlength=placement.num_ranks)
    return float(tokens_N.max() / tokens_N.double().mean())


if __name__ == "__main__":
    sys.exit(main())
