import pytest
import torch

from engine.layers.activation import silu_and_mul
from engine.layers.norm import add_rms_norm, rms_norm

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
EPSILON = 1e-5


def reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    x, weight = x.double(), weight.double()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPSILON) * weight


@DTYPES
@pytest.mark.parametrize("shape", [(1, 576), (33, 512), (4, 9, 64), (0, 16)], ids=str)
@pytest.mark.parametrize("offset", [0.0, 50.0], ids=["centred", "with a mean"])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4], ids=["tiny", "usual", "huge"])
def test_rows_are_divided_by_their_root_mean_square(
    dtype: torch.dtype, shape: tuple[int, ...], offset: float, size: float
) -> None:
    generator = torch.Generator().manual_seed(5)
    x = ((torch.randn(shape, generator=generator) + offset) * size).to(dtype)
    weight = torch.rand(shape[-1], generator=generator).to(dtype)
    got = rms_norm(x, weight, EPSILON)
    assert got.dtype == dtype
    tolerance = 1.2e-2 if dtype == torch.bfloat16 else 2e-6
    torch.testing.assert_close(got.double(), reference(x, weight), rtol=tolerance, atol=1e-6)


def test_a_row_of_zeros_stays_zero() -> None:
    assert torch.equal(rms_norm(torch.zeros(2, 8), torch.ones(8), EPSILON), torch.zeros(2, 8))


@DTYPES
def test_a_row_has_the_same_bits_in_any_batch(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(200, 576, generator=generator).to(dtype)
    weight = torch.rand(576, generator=generator).to(dtype)
    together = rms_norm(x, weight, EPSILON)
    assert torch.equal(together, torch.cat([rms_norm(row, weight, EPSILON) for row in x.split(1)]))


@DTYPES
def test_adding_first_returns_the_norm_and_the_sum(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(8)
    x, residual = (torch.randn(5, 32, generator=generator).to(dtype) for _ in range(2))
    weight = torch.rand(32, generator=generator).to(dtype)
    before = residual.clone()
    normed, total = add_rms_norm(x, residual, weight, EPSILON)
    assert torch.equal(total, x + before)
    assert torch.equal(residual, before)
    assert torch.equal(normed, rms_norm(total, weight, EPSILON))


def test_the_gate_half_comes_first() -> None:
    gate, up = torch.randn(3, 6), torch.randn(3, 6)
    want = gate * torch.sigmoid(gate) * up
    torch.testing.assert_close(silu_and_mul(torch.cat((gate, up), 1)), want)


@pytest.mark.gpu
def test_the_norm_on_a_gpu_is_the_norm() -> None:
    x, weight = torch.randn(7, 512).cuda(), torch.rand(512).cuda()
    got = rms_norm(x, weight, EPSILON)
    torch.testing.assert_close(got.double(), reference(x, weight), rtol=1e-5, atol=1e-6)
