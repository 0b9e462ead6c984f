"""How much of a 4096-token prompt's KV transfer hides behind computing it.

The real engine computes the demo model's prompt in chunks, and pushes each group of layers when it
is final, with the sizes that a prefill worker has by default. Exposed is the time from the end of
the computing to the decode rank's commit. It is compared with the time that the same blocks take
when they are pushed in one piece with nothing to hide behind, which is far stricter than with the
whole span of the push.
"""

import random
import statistics
import time

import torch

from benchmarks.kv_peers import Pool, crc_of_blocks, decode_rank, finish
from deploy.demo import demo_weights
from engine.collectives import ExpertGroup
from engine.kvcache.storage import KVStorage
from engine.loading import load
from engine.model_runner import ModelRunner, SequenceStep, batch_from
from kvtransfer.carrier import Transport
from kvtransfer.interface import Push
from kvtransfer.memory import buffer, wrap
from kvtransfer.source import make_source
from prefill.settings import PrefillSettings
from protocol.ids import BlockId, WorkerId, WorkerRef, new_incarnation

PROMPT_TOKENS = 4096
TRANSPORTS: tuple[Transport, ...] = ("shm", "tcp")


def hidden_figures(repetitions: int) -> dict[str, float]:
    """For each transport: milliseconds alone and exposed, and their quotient."""
    device = torch.device("cpu")
    loaded = load(
        demo_weights(),
        device=device,
        dtype="auto",
        numerics="exact",
        group=ExpertGroup.single(device),
    )
    layout = loaded.layout
    num_blocks = layout.blocks_for(PROMPT_TOKENS)
    blocks = [BlockId(block) for block in range(num_blocks)]
    storage = KVStorage(layout, num_blocks, device=device)
    memory = wrap(layout, num_blocks, address=storage.memory_address, owner=storage)
    runner = ModelRunner(loaded.model, storage)
    dice = random.Random(7)
    prompt = [dice.randrange(loaded.config.vocab_size) for _ in range(PROMPT_TOKENS)]
    pool = Pool(layout=layout, num_blocks=num_blocks, sinks={"hidden": ("auto", "auto")})
    worker = WorkerRef(WorkerId("prefill-0"), new_incarnation())
    alone: dict[str, list[float]] = {name: [] for name in TRANSPORTS}
    exposed: dict[str, list[float]] = {name: [] for name in TRANSPORTS}
    with decode_rank({"prompt": pool}, "prompt") as peer:
        sources = {name: make_source(memory, worker, transport=name) for name in TRANSPORTS}
        try:
            for source in sources.values():  # connect and warm up
                _alone(source.open(peer.grant("hidden", blocks)), blocks, layout.num_layers)
            for _ in range(repetitions):
                for name, source in sources.items():
                    push = source.open(peer.grant("hidden", blocks))
                    _compute(runner, prompt, blocks, push)
                    computed = time.perf_counter()
                    finish(push)
                    exposed[name].append(time.perf_counter() - computed)
                    if peer.crc("prompt", blocks) != crc_of_blocks(buffer(memory), layout, blocks):
                        raise AssertionError("the decode rank has other bytes than were computed")
                    for _ in range(5):
                        push = source.open(peer.grant("hidden", blocks))
                        alone[name].append(_alone(push, blocks, layout.num_layers))
        finally:
            for source in sources.values():
                source.close()
    figures: dict[str, float] = {}
    for name in TRANSPORTS:
        late, took = statistics.median(exposed[name]), statistics.median(alone[name])
        figures[f"{name}_prompt_alone_ms"] = round(took * 1e3, 2)
        figures[f"{name}_prompt_exposed_ms"] = round(late * 1e3, 2)
        figures[f"{name}_prompt_exposed_share"] = round(late / took, 3)
    return figures


def _compute(runner: ModelRunner, prompt: list[int], blocks: list[BlockId], push: Push) -> None:
    defaults, layout = PrefillSettings(), runner.storage.layout
    tokens = layout.block_tokens
    for start in range(0, len(prompt), defaults.max_batch_tokens):
        stop = min(start + defaults.max_batch_tokens, len(prompt))
        first, last = start // tokens, layout.blocks_for(stop)
        sequence = SequenceStep(
            token_ids=prompt[start:stop],
            start=start,
            block_table=blocks[:last],
            wants_logits=stop == len(prompt),
        )
        batch = batch_from([sequence], block_tokens=tokens, device=torch.device("cpu"))
        pushed = 0

        def after_layer(layer: int, first: int = first, last: int = last) -> None:
            nonlocal pushed
            done = layer + 1
            if done - pushed >= defaults.layers_per_push or done == layout.num_layers:
                push.send(range(pushed, done), first, blocks[first:last])
                pushed = done

        runner.run(batch, after_layer)


def _alone(push: Push, blocks: list[BlockId], num_layers: int) -> float:
    started = time.perf_counter()
    push.send(range(num_layers), 0, blocks)
    finish(push)
    return time.perf_counter() - started
