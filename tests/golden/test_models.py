"""Logits against transformers, in float32, through the paged cache."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from engine.collectives import ExpertGroup
from engine.kvcache.storage import KVStorage
from engine.layers.linear import Numerics
from engine.loading import LoadedModel, load
from engine.model_runner import ModelRunner, SequenceStep, batch_from
from tests.support.checkpoints import KINDS, VOCABULARY, YARN_ORIGINAL, demo_gguf

CPU = torch.device("cpu")
BLOCK_TOKENS = 16
NUM_BLOCKS = 24
LENGTHS = (YARN_ORIGINAL + 21, 7, 30)  # ragged; the first goes past yarn's original length
RTOL, ATOL = 1e-4, 2e-4
NUMERICS: tuple[Numerics, ...] = ("exact", "fast")


@dataclass(frozen=True, slots=True)
class Reference:
    """What transformers says of some sequences: logits (length, V) of each."""

    sequences: tuple[tuple[int, ...], ...]
    logits: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Case:
    loaded: LoadedModel
    reference: Reference

    @property
    def sequences(self) -> tuple[tuple[int, ...], ...]:
        return self.reference.sequences

    def runner(self) -> ModelRunner:
        return ModelRunner(self.loaded.model, KVStorage(self.loaded.layout, NUM_BLOCKS, device=CPU))

    def expect(self, logits_RV: Tensor, ends: list[tuple[int, int]]) -> None:
        """``ends`` names the rows: (sequence, number of its tokens so far)."""
        wanted_RV = torch.stack([self.reference.logits[which][end - 1] for which, end in ends])
        torch.testing.assert_close(logits_RV, wanted_RV, rtol=RTOL, atol=ATOL)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """On a busy machine two threads wait for each other far longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tables() -> list[list[int]]:
    """Block tables that are neither contiguous nor in order."""
    blocks = torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(3)).tolist()
    needed = [-(-length // BLOCK_TOKENS) for length in LENGTHS]
    return [[blocks.pop() for _ in range(count)] for count in needed]


def ask(model: torch.nn.Module, vocabulary: int) -> Reference:
    generator = torch.Generator().manual_seed(5)
    sequences = tuple(
        tuple(torch.randint(vocabulary, (length,), generator=generator).tolist())
        for length in LENGTHS
    )
    with torch.inference_mode():
        logits = tuple(model.eval()(torch.tensor([tokens])).logits[0] for tokens in sequences)
    return Reference(sequences, logits)


def loaded_from(path: Path, numerics: Numerics, split_dense_experts: int = 0) -> LoadedModel:
    return load(
        path,
        device=CPU,
        dtype="float32",
        numerics=numerics,
        group=ExpertGroup.single(CPU),
        split_dense_experts=split_dense_experts,
        block_tokens=BLOCK_TOKENS,
    )


@pytest.fixture(scope="module", params=[(k, n) for k in KINDS for n in NUMERICS], ids="-".join)
def case(request: pytest.FixtureRequest, tiny_checkpoint: Callable[[str], Path]) -> Case:
    kind, numerics = request.param
    folder = tiny_checkpoint(kind)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return Case(loaded_from(folder, numerics), ask(model, VOCABULARY))


def test_a_prefill_of_several_prompts_gives_the_reference_logits_of_every_token(
    case: Case,
) -> None:
    steps = [
        SequenceStep(token_ids=tokens, start=0, block_table=table)
        for tokens, table in zip(case.sequences, tables(), strict=True)
    ]
    batch = batch_from(steps, block_tokens=BLOCK_TOKENS, device=CPU)
    every_row = replace(batch, logits_rows=torch.arange(batch.num_tokens))
    ends = [(which, end) for which in range(3) for end in range(1, LENGTHS[which] + 1)]
    case.expect(case.runner().run(every_row), ends)


@pytest.mark.parametrize("chunk", [5, 16, 37])
def test_a_prefill_in_chunks_gives_the_reference_logits(case: Case, chunk: int) -> None:
    runner, block_tables = case.runner(), tables()
    for start in range(0, max(LENGTHS), chunk):
        step_of = {
            which: SequenceStep(
                token_ids=tokens[start : start + chunk], start=start, block_table=table
            )
            for which, (tokens, table) in enumerate(zip(case.sequences, block_tables, strict=True))
            if start < len(tokens)
        }
        batch = batch_from(list(step_of.values()), block_tokens=BLOCK_TOKENS, device=CPU)
        ends = [(which, start + len(step.token_ids)) for which, step in step_of.items()]
        case.expect(runner.run(batch), ends)


def test_decoding_token_by_token_gives_the_reference_logits(case: Case) -> None:
    """All three are decoded together; one is prefilled while another already decodes."""
    runner, block_tables = case.runner(), tables()
    prompts = (YARN_ORIGINAL - 4, 5, 17)
    done = [0, 0, 0]
    for step in range(14):
        wanted: dict[int, SequenceStep] = {}
        for which, tokens in enumerate(case.sequences):
            if step < which or done[which] == len(tokens):
                continue  # sequence i joins at step i, and leaves when it has no more tokens
            end = done[which] + 1 if done[which] else prompts[which]
            wanted[which] = SequenceStep(
                token_ids=tokens[done[which] : end],
                start=done[which],
                block_table=block_tables[which],
            )
            done[which] = end
        batch = batch_from(list(wanted.values()), block_tokens=BLOCK_TOKENS, device=CPU)
        case.expect(runner.run(batch), [(which, done[which]) for which in wanted])
    assert done[0] > YARN_ORIGINAL, "the longest must have crossed yarn's original length"


def test_a_step_without_tokens_gives_no_logits_and_still_passes_every_layer(case: Case) -> None:
    layers: list[int] = []
    batch = batch_from([], block_tokens=BLOCK_TOKENS, device=CPU)
    logits_RV = case.runner().run(batch, layers.append)
    assert logits_RV.shape == (0, case.loaded.config.vocab_size)
    assert layers == list(range(case.loaded.config.num_layers))


def test_a_layers_cache_is_final_when_after_layer_is_called(case: Case) -> None:
    runner, table = case.runner(), tables()[0]
    step = SequenceStep(token_ids=case.sequences[0], start=0, block_table=table)
    batch = batch_from([step], block_tokens=BLOCK_TOKENS, device=CPU)
    at_call: list[Tensor] = []
    runner.run(batch, lambda layer: at_call.append(runner.storage.read_blocks(table)[layer]))
    for contents, later in zip(at_call, runner.storage.read_blocks(table), strict=True):
        assert torch.equal(contents, later)
        assert contents.any(), "nothing was written"


@pytest.fixture(scope="module")
def demo_reference() -> Reference:
    path = demo_gguf()
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    return ask(model, model.config.vocab_size)


@pytest.mark.slow
@pytest.mark.timeout(300)  # transformers unpacks the file for tens of seconds on a busy machine
@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize("split", [0, 24], ids=["dense", "as 24 experts"])
def test_the_demo_weights_give_the_reference_logits(
    demo_reference: Reference, numerics: Numerics, split: int
) -> None:
    case = Case(loaded_from(demo_gguf(), numerics, split), demo_reference)
    runner, block_tables = case.runner(), tables()
    for start, end in ((0, 20), (20, 29), (29, 30)):
        steps = [
            SequenceStep(
                token_ids=case.sequences[which][start:end],
                start=start,
                block_table=block_tables[which],
            )
            for which in (0, 2)
        ]
        batch = batch_from(steps, block_tokens=BLOCK_TOKENS, device=CPU)
        case.expect(runner.run(batch), [(0, end), (2, end)])
