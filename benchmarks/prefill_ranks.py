"""A long prompt's prefill by one rank and by several, on the same cores in the same run.

Each rank is a process with a core and a thread of its own, as a prefill worker of several ranks has
them: once all share every layer, once they are stages that have some layers each. Beside them one
rank computes with as many threads as there are ranks, on the same cores. The model is the
DeepSeek-V3-shaped one of ``benchmarks.engine_subjects``; nothing is served or sent. Reported are
tokens per second, and how much of the time ranks exchange rows, waiting included.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from benchmarks.report import Figure, print_report
from engine.collectives import ExpertGroup, StepGroup
from engine.kvcache.storage import KVStorage
from engine.loading import load
from engine.model_runner import ModelRunner
from engine.pipeline import ALL_LAYERS, Relay, Stage
from prefill.forward import Forward
from prefill.lockstep import Part
from protocol.ids import AttemptRef, BlockId, RequestId
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
    stages: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Of one rank, a prompt at a time."""

    seconds: list[float]
    exchanging: list[float]
    dtype: str


class Clock:
    """Put around the calls in which a rank gives rows to others and waits for theirs."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def timed(*arguments: object) -> Tensor:
            began = time.perf_counter()
            found = call(*arguments)
            self.seconds += time.perf_counter() - began
            return found

        return timed


def run_rank(group: StepGroup, work: Work) -> Outcome:
    ranks = group.expert_group
    own = work.cores if ranks.num_seats == 1 else (work.cores[ranks.seat],)
    os.sched_setaffinity(0, own)
    torch.set_num_threads(work.threads)
    clock, staged = Clock(), work.stages > 1
    # All ranks are stages of one rank each, or all share every layer.
    stage = Stage(index=ranks.seat, count=work.stages) if staged else ALL_LAYERS
    loaded = load(
        work.folder,
        device=CPU,
        dtype="auto",
        numerics="exact",
        group=ExpertGroup.single(CPU) if staged else ranks,
        tensor_parallel=not staged,
        stage=stage,
        block_tokens=BLOCK_TOKENS,
    )
    relay = None
    if staged:
        relay = Relay(ranks, stage, hidden=loaded.config.hidden_width, dtype=loaded.dtype)
        relay.pass_on = clock.around(relay.pass_on)  # type: ignore[method-assign]
    elif ranks.num_seats > 1:
        layers = list(loaded.model._layers.values())
        shared = layers[0].feed_forward._ranks  # type: ignore[attr-defined]
        shared.sum = clock.around(shared.sum)
        for layer in layers:
            layer.attention._sum = shared.sum  # type: ignore[attr-defined]
    storage = KVStorage(
        loaded.held, work.tokens // BLOCK_TOKENS, device=CPU, first_layer=loaded.layers.start
    )
    forward = Forward(
        ModelRunner(loaded.model, storage), layers_per_push=99, device=CPU, relay=relay
    )
    generator = torch.Generator().manual_seed(7)
    seconds, exchanging = [], []
    for _ in range(work.rounds + 1):
        prompt = torch.randint(VOCABULARY, (work.tokens,), generator=generator).tolist()
        group.exchange([0])  # all begin together
        before, began = clock.seconds, time.perf_counter()
        for start in range(0, work.tokens, CHUNK):
            forward.advance([_part(prompt, start)], lambda part, layers: None)
        while forward.busy:
            forward.advance([], lambda part, layers: None)
        seconds.append(time.perf_counter() - began)
        exchanging.append(clock.seconds - before)
    # The first round compiles and probes.
    return Outcome(seconds=seconds[1:], exchanging=exchanging[1:], dtype=str(loaded.dtype))


def _part(prompt: list[int], start: int) -> Part:
    stop = start + CHUNK
    return Part(
        ref=AttemptRef(RequestId("prompt"), 0),
        start=start,
        token_ids=tuple(prompt[start:stop]),
        blocks=tuple(BlockId(block) for block in range(stop // BLOCK_TOKENS)),
        first_block=start // BLOCK_TOKENS,
        final=stop == len(prompt),
        scored=False,
    )


def main() -> int:
    # Every rank's process imports this module, and transformers takes seconds.
    from benchmarks.engine_subjects import deepseek_checkpoint

    options = _options()
    folder = deepseek_checkpoint()
    cores = tuple(sorted(os.sched_getaffinity(0)))
    ranks = min(options.ranks, len(cores))
    figures: dict[str, Figure] = {"tokens": options.tokens, "ranks": ranks}
    runs = {
        "1 rank, 1 core": (1, cores[:1], 1, 1),
        f"1 rank, {ranks} cores": (1, cores[:ranks], ranks, 1),
        f"{ranks} ranks, {ranks} cores": (ranks, cores[:ranks], 1, 1),
        f"{ranks} stages, {ranks} cores": (ranks, cores[:ranks], 1, ranks),
    }
    for name, (width, own, threads, stages) in runs.items():
        work = Work(
            folder=folder,
            tokens=options.tokens,
            rounds=options.rounds,
            cores=own,
            threads=threads,
            stages=stages,
        )
        outcomes = run_ranks(run_rank, width, work, timeout_s=TIMEOUT_S)
        took = [max(each) for each in zip(*(found.seconds for found in outcomes), strict=True)]
        figures["dtype"] = outcomes[0].dtype
        figures[f"{name}: tokens/s"] = options.tokens / median(took)
        if width > 1:
            shares = [
                exchanging / whole
                for found in outcomes
                for exchanging, whole in zip(found.exchanging, found.seconds, strict=True)
            ]
            figures[f"{name}: share of time exchanging"] = median(shares)
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
