"""A long prompt's prefill by one rank and by several, on the same cores in the same run.

Each rank is a process with a core and a thread of its own, as a prefill worker of several ranks has
them; beside them one rank computes with as many threads as there are ranks, on the same cores. The
model is the DeepSeek-V3-shaped one of ``benchmarks.engine_subjects``; nothing is served or sent.
Reported are tokens per second, and how much of a step the sums over ranks take, waiting included.
"""

import argparse
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from benchmarks.report import Figure, print_report
from engine.collectives import StepGroup
from engine.kvcache.storage import KVStorage
from engine.loading import load
from engine.model_runner import ModelRunner, SequenceStep, batch_from
from engine.tensor_parallel import TensorGroup, TensorRanks
from tests.support.ranks import run_ranks

CPU = torch.device("cpu")
BLOCK_TOKENS = 16
CHUNK = 512  # tokens, prefill.max_batch_tokens' default
VOCABULARY = 49152
TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    folder: Path
    tokens: int
    rounds: int
    cores: tuple[int, ...]
    threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Of one rank, a prompt at a time."""

    seconds: list[float]
    in_sums: list[float]
    dtype: str


class TimedRanks:
    """Ranks with a clock around their sums. It is put into a model that has been built."""

    def __init__(self, ranks: TensorRanks) -> None:
        self.rank, self.size = ranks.rank, ranks.size
        self.seconds = 0.0
        self._ranks = ranks

    def sum(self, x: Tensor) -> Tensor:
        began = time.perf_counter()
        total = self._ranks.sum(x)
        self.seconds += time.perf_counter() - began
        return total


def run_rank(group: StepGroup, work: Work) -> Outcome:
    own = work.cores if group.world_size == 1 else (work.cores[group.rank],)
    os.sched_setaffinity(0, own)
    torch.set_num_threads(work.threads)
    loaded = load(
        work.folder,
        device=CPU,
        dtype="auto",
        numerics="exact",
        group=group.expert_group,
        tensor_parallel=True,
        block_tokens=BLOCK_TOKENS,
    )
    clock = TimedRanks(TensorGroup(group.expert_group, exact=True))
    if group.world_size > 1:
        for layer in loaded.model._layers:
            layer.attention._sum = clock.sum  # type: ignore[attr-defined]
            layer.feed_forward._ranks = clock  # type: ignore[attr-defined]
    num_blocks = work.tokens // BLOCK_TOKENS
    runner = ModelRunner(loaded.model, KVStorage(loaded.held, num_blocks, device=CPU))
    generator = torch.Generator().manual_seed(7)
    seconds, in_sums = [], []
    for _ in range(work.rounds + 1):
        prompt = torch.randint(VOCABULARY, (work.tokens,), generator=generator).tolist()
        group.exchange([0])  # all begin together
        before, began = clock.seconds, time.perf_counter()
        for start in range(0, work.tokens, CHUNK):
            step = SequenceStep(
                token_ids=prompt[start : start + CHUNK],
                start=start,
                block_table=range((start + CHUNK) // BLOCK_TOKENS),
                wants_logits=start + CHUNK == work.tokens,
            )
            runner.run_hidden(batch_from([step], block_tokens=BLOCK_TOKENS, device=CPU))
        seconds.append(time.perf_counter() - began)
        in_sums.append(clock.seconds - before)
    # The first round compiles and probes.
    return Outcome(seconds=seconds[1:], in_sums=in_sums[1:], dtype=str(loaded.dtype))


def main() -> int:
    # Every rank's process imports this module, and transformers takes seconds.
    from benchmarks.engine_subjects import deepseek_checkpoint

    options = _options()
    folder = deepseek_checkpoint()
    cores = tuple(sorted(os.sched_getaffinity(0)))
    ranks = min(options.ranks, len(cores))
    figures: dict[str, Figure] = {"tokens": options.tokens, "ranks": ranks}
    runs = {
        "1 rank, 1 core": (1, cores[:1], 1),
        f"1 rank, {ranks} cores": (1, cores[:ranks], ranks),
        f"{ranks} ranks, {ranks} cores": (ranks, cores[:ranks], 1),
    }
    for name, (width, own, threads) in runs.items():
        work = Work(
            folder=folder, tokens=options.tokens, rounds=options.rounds, cores=own, threads=threads
        )
        outcomes = run_ranks(run_rank, width, work, timeout_s=TIMEOUT_S)
        took = [max(each) for each in zip(*(found.seconds for found in outcomes), strict=True)]
        figures["dtype"] = outcomes[0].dtype
        figures[f"{name}: tokens/s"] = options.tokens / median(took)
        if width > 1:
            shares = [
                in_sums / whole
                for found in outcomes
                for in_sums, whole in zip(found.in_sums, found.seconds, strict=True)
            ]
            figures[f"{name}: share of time in sums"] = median(shares)
    return print_report("prefill_ranks", figures, [], only_json=options.json)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=4096, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="only the line of JSON")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
