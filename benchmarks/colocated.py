"""The reference of the interference benchmark: both phases in one process, on all cores.

The same engine, the same chunked prefill, no transfer: each turn computes one prefill chunk if a
prompt waits, then one decode step of the running streams, as an aggregated server does.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.collectives import ExpertGroup
from engine.kvcache.storage import KVStorage
from engine.loading import load
from engine.model_runner import ModelRunner, SequenceStep, batch_from

BLOCK_TOKENS = 16
CPU = torch.device("cpu")


@dataclass(slots=True)
class _Sequence:
    tokens: list[int]
    blocks: list[int]
    cached: int = 0

    def step(self, stop: int) -> SequenceStep:
        blocks = self.blocks[: -(-stop // BLOCK_TOKENS)]
        return SequenceStep(
            token_ids=self.tokens[self.cached : stop], start=self.cached, block_table=blocks
        )


def run(
    model: Path, *, streams: int, prompt: int, alone: int, long_prompt: int, chunk: int
) -> dict[str, list[float]]:
    """Seconds between the tokens of a stream, before and while a long prompt is computed."""
    loaded = load(
        model,
        device=CPU,
        dtype="auto",
        numerics="fast",
        group=ExpertGroup.single(CPU),
        block_tokens=BLOCK_TOKENS,
    )
    length = prompt + 4 * alone + long_prompt
    per_sequence = -(-length // BLOCK_TOKENS)
    storage = KVStorage(loaded.layout, per_sequence * (streams + 1), device=CPU)
    runner = ModelRunner(loaded.model, storage)
    vocabulary = loaded.config.vocab_size
    sequences = [
        _Sequence(
            tokens=torch.randint(vocabulary, (size,)).tolist(),
            blocks=list(range(index * per_sequence, (index + 1) * per_sequence)),
        )
        for index, size in enumerate([prompt] * streams + [long_prompt])
    ]
    *running, arriving = sequences

    def compute(batch: list[_Sequence], stops: list[int]) -> list[int]:
        steps = [one.step(stop) for one, stop in zip(batch, stops, strict=True)]
        logits = runner.run(batch_from(steps, block_tokens=BLOCK_TOKENS, device=CPU))
        for one, stop in zip(batch, stops, strict=True):
            one.cached = stop
        next_tokens: list[int] = logits.argmax(dim=-1).tolist()
        return next_tokens

    def decode() -> None:
        next_tokens = compute(running, [len(one.tokens) for one in running])
        for one, token in zip(running, next_tokens, strict=True):
            one.tokens.append(token)

    for one in running:
        one.tokens.append(compute([one], [prompt])[0])
    gaps: dict[str, list[float]] = {"alone": [], "during": []}
    last = time.perf_counter()
    for _ in range(alone):
        decode()
        now = time.perf_counter()
        gaps["alone"].append(now - last)
        last = now
    while arriving.cached < long_prompt:
        compute([arriving], [min(arriving.cached + chunk, long_prompt)])
        decode()
        now = time.perf_counter()
        gaps["during"].append(now - last)
        last = now
    return gaps


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    print(json.dumps(run(Path(arguments.pop("model")), **arguments)))
