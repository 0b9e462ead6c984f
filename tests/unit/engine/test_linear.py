import pytest
import torch

from engine.exact import HEIGHTS, REFERENCE_HEIGHT, RowTiles, cancelling
from engine.layers.linear import Linear, Numerics

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
# (out, in) of SmolLM2's and of the DeepSeek-V3-shaped model's layers.
SHAPES = pytest.mark.parametrize(
    "shape", [(960, 576), (3072, 576), (576, 1536), (1536, 384), (64, 512), (5, 7)], ids=str
)


def weights(shape: tuple[int, int], dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(shape, generator=generator).to(device=device, dtype=dtype)


@DTYPES
@pytest.mark.parametrize("numerics", ["exact", "fast"])
@pytest.mark.parametrize("rows", [1, 3, 17, 600])
@pytest.mark.parametrize("shape", [(40, 72), (96, 70)], ids=str)
def test_the_product_is_that_of_the_plain_matrix(
    dtype: torch.dtype, numerics: Numerics, rows: int, shape: tuple[int, int]
) -> None:
    weight_OI, x_NI = weights(shape, dtype), weights((rows, shape[1]), dtype)
    got_NO = Linear(weight_OI, numerics=numerics)(x_NI)
    want_NO = x_NI.double() @ weight_OI.double().T
    assert got_NO.dtype == dtype
    torch.testing.assert_close(
        got_NO.double(), want_NO, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-4
    )


@DTYPES
@SHAPES
def test_an_exact_row_has_the_same_bits_in_any_batch(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    linear = Linear(weights(shape, dtype), numerics="exact")
    generator = torch.Generator().manual_seed(11)
    x_NI = torch.randn(70, shape[1], generator=generator).to(dtype)
    alone_NO = torch.cat([linear(row) for row in x_NI.split(1)])
    for count in (2, 3, 5, 8, 9, 31, 33, 70):
        rows = torch.randperm(70, generator=generator)[:count]
        assert torch.equal(linear(x_NI[rows]), alone_NO[rows]), f"{count} rows"


@pytest.mark.parametrize("numerics", ["exact", "fast"])
def test_no_rows_give_no_rows(numerics: Numerics) -> None:
    assert Linear(torch.ones(4, 6), numerics=numerics)(torch.ones(0, 6)).shape == (0, 4)


def test_a_height_that_gives_other_bits_is_never_used() -> None:
    """A product that adds one to more than 16 rows stands for another kernel's rounding."""
    heights: list[int] = []

    def product(x_NI: torch.Tensor) -> torch.Tensor:
        heights.append(x_NI.shape[0])
        return 2 * x_NI + (1 if x_NI.shape[0] > 16 else 0)

    x_NI = torch.arange(140.0).view(70, 2)
    tiles = RowTiles(lambda rows: (torch.ones(rows, 2), product))
    tiles.multiply(x_NI, product)
    heights.clear()
    assert torch.equal(tiles.multiply(x_NI, product), 2 * x_NI)
    assert set(heights) <= {height for height in HEIGHTS if height <= 16}


def test_when_no_height_agrees_the_reference_height_is_used() -> None:
    heights: list[int] = []

    def product(x_NI: torch.Tensor) -> torch.Tensor:
        heights.append(x_NI.shape[0])
        return x_NI * x_NI.shape[0]

    x_NI = torch.ones(19, 2)
    tiles = RowTiles(lambda rows: (torch.ones(rows, 2), product))
    assert torch.equal(tiles.multiply(x_NI, product), x_NI * REFERENCE_HEIGHT)
    heights.clear()
    tiles.multiply(x_NI, product)
    assert heights == [REFERENCE_HEIGHT] * 3


@pytest.mark.parametrize("size", [64, 7])
def test_cancelling_rows_show_the_order_of_a_sum_in_bfloat16(size: int) -> None:
    left, right = cancelling((5, size), (3, size))
    assert (left.double() @ right.double().T).abs().max() < 1e-12
    terms = (left[0] * right[0])[left[0] != 0]
    forward = torch.tensor(0.0)
    for term in terms:
        forward = forward + term
    halves = terms[: len(terms) // 2].sum() + terms[len(terms) // 2 :].sum()
    assert size < 8 or forward.bfloat16() != halves.bfloat16()


@pytest.mark.gpu
@SHAPES
def test_an_exact_row_has_the_same_bits_in_any_batch_on_a_gpu(shape: tuple[int, int]) -> None:
    linear = Linear(weights(shape, torch.bfloat16, "cuda"), numerics="exact")
    x_NI = weights((150, shape[1]), torch.bfloat16, "cuda")
    alone_NO = torch.cat([linear(row) for row in x_NI.split(1)])
    for count in (2, 5, 33, 150):
        assert torch.equal(linear(x_NI[-count:]), alone_NO[-count:]), f"{count} rows"
