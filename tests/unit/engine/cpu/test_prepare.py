"""Kernels are there before the first request."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.collectives import ExpertGroup
from engine.cpu.threads import Kernel
from engine.kvcache.storage import KVStorage
from engine.loading import load
from engine.model_runner import ModelRunner, SequenceStep, batch_from

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", ["llama", "mixtral", "deepseek_v3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_step_waits_for_a_kernel_to_be_compiled(
    kind: str,
    dtype: str,
    tiny_checkpoint: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded = load(
        tiny_checkpoint(kind),
        device=CPU,
        dtype=dtype,  # type: ignore[arg-type]
        numerics="exact",
        group=ExpertGroup.single(CPU),
    )
    runner = ModelRunner(loaded.model, KVStorage(loaded.layout, 4, device=CPU))

    def refuse(*_: object) -> None:
        raise AssertionError("a kernel was compiled in a step")

    monkeypatch.setattr(Kernel, "__init__", refuse)
    for tokens, start in ([5, 6, 7], 0), ([8], 3):
        step = SequenceStep(token_ids=tokens, start=start, block_table=[2])
        logits = runner.run(batch_from([step], block_tokens=16, device=CPU))
        assert logits.isfinite().all()
