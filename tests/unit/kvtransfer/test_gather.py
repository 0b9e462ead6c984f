"""Blocks to a row and back, on the CPU and by the Triton kernel in Triton's interpreter."""

import importlib
from collections.abc import Sequence
from types import ModuleType

import pytest
import torch
from torch import Tensor

from kvtransfer import gather as gathering
from kvtransfer.gather import gather, scatter, words
from kvtransfer.plan import Chunk
from protocol.ids import BlockId

LAYERS, BLOCKS = 3, 6


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    module = importlib.import_module("kvtransfer.gather_kernels")
    return importlib.reload(module)


def some_pages(unit: int) -> Tensor:
    generator = torch.Generator().manual_seed(unit)
    return torch.randint(0, 256, (LAYERS, BLOCKS, unit), dtype=torch.uint8, generator=generator)


def as_row(pages: Tensor, chunk: Chunk, blocks: Sequence[int]) -> Tensor:
    layers = range(chunk.first_layer, chunk.first_layer + chunk.num_layers)
    return torch.cat([pages[layer, block] for layer in layers for block in blocks])


CASES = [
    (Chunk(0, 3, 0, 2), [4, 1]),
    (Chunk(1, 2, 5, 6), [0, 1, 2, 3, 4, 5]),
    (Chunk(2, 1, 0, 1), [5]),
]


@pytest.mark.parametrize(("chunk", "blocks"), CASES)
def test_a_row_is_layer_by_layer_and_goes_back(chunk: Chunk, blocks: list[BlockId]) -> None:
    pages = some_pages(24)
    row = torch.zeros(LAYERS * BLOCKS * 24, dtype=torch.uint8)
    gather(pages, chunk, blocks, row)
    expected = as_row(pages, chunk, blocks)
    assert torch.equal(row[: len(expected)], expected)
    other = torch.zeros_like(pages)
    scatter(row, other, chunk, blocks)
    assert torch.equal(as_row(other, chunk, blocks), expected)
    assert int((other != 0).sum()) == int((expected != 0).sum())


@pytest.mark.parametrize("unit", [24, 10, 7, 9000], ids=["8", "2", "1", "several tiles"])
@pytest.mark.parametrize(("chunk", "blocks"), CASES)
def test_the_kernel_copies_what_indexing_copies(
    kernels: ModuleType, chunk: Chunk, blocks: list[int], unit: int
) -> None:
    pages, index = some_pages(unit), torch.tensor(blocks)
    layers = slice(chunk.first_layer, chunk.first_layer + chunk.num_layers)
    row = torch.zeros(chunk.num_layers, len(blocks), unit, dtype=torch.uint8)
    kernels.copy_blocks(pages[layers], index, row, to_row=True)
    assert torch.equal(row.flatten(), as_row(pages, chunk, blocks))
    other = torch.zeros_like(pages)
    kernels.copy_blocks(other[layers], index, row, to_row=False)
    assert torch.equal(as_row(other, chunk, blocks), row.flatten())
    assert int((other != 0).sum()) == int((row != 0).sum())


def test_a_strip_of_each_block_is_copied_alone(kernels: ModuleType) -> None:
    pages, index = some_pages(32), torch.tensor([3, 0])
    row = torch.zeros(LAYERS, 2, 16, dtype=torch.uint8)
    kernels.copy_blocks(pages[:, :, 8:16], index, row[:, :, 8:16], to_row=True)
    assert torch.equal(row[:, :, 8:16], pages[:, [3, 0], 8:16])
    assert not row[:, :, :8].any()


def test_words_are_as_wide_as_every_stride_allows() -> None:
    even, odd = torch.zeros(2, 4, 16, dtype=torch.uint8), torch.zeros(2, 4, 6, dtype=torch.uint8)
    assert words(even)[0].dtype == torch.int64
    assert [word.dtype for word in words(even, odd)] == [torch.int16] * 2


def test_the_kernels_are_not_imported_for_pages_on_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gathering, "kernels", lambda: pytest.fail("imported"))
    gather(some_pages(8), Chunk(0, 1, 0, 1), [BlockId(0)], torch.zeros(8, dtype=torch.uint8))
