"""Kernels over rows and experts against the same in float32 PyTorch operations."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from engine.cpu import rows
from engine.cpu.experts import apply_experts, serves
from engine.cpu.packed_weights import in_tiles
from engine.cpu.vectors import has_bf16_dot

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
needs_bf16_dot = pytest.mark.skipif(not has_bf16_dot(), reason="needs AVX512-BF16")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


def close(got: Tensor, want: Tensor) -> None:
    tolerance = TOLERANCE[got.dtype]
    torch.testing.assert_close(got.float(), want, atol=tolerance, rtol=tolerance)


@DTYPES
@pytest.mark.parametrize("width", [1, 7, 64, 576])
def test_norms_of_any_width(dtype: torch.dtype, width: int) -> None:
    torch.manual_seed(1)
    x_ND, residual_ND = torch.randn(2, 5, width).to(dtype)
    weight_D = torch.rand(width).to(dtype)
    want = functional.rms_norm(x_ND.float(), (width,), weight_D.float(), 1e-5)
    close(rows.rms_norm(x_ND, weight_D, 1e-5), want)
    normed, added = rows.add_rms_norm(x_ND, residual_ND, weight_D, 1e-5)
    assert torch.equal(added, x_ND + residual_ND)
    close(normed, functional.rms_norm(added.float(), (width,), weight_D.float(), 1e-5))


@DTYPES
def test_a_norm_reads_rows_that_are_apart(dtype: torch.dtype) -> None:
    wide = torch.randn(4, 100).to(dtype)
    weight = torch.ones(64, dtype=dtype)
    part = wide[:, 20:84]
    assert torch.equal(rows.rms_norm(part, weight, 1e-5), rows.rms_norm(part.clone(), weight, 1e-5))


@DTYPES
def test_the_gate_holds_at_its_extremes(dtype: torch.dtype) -> None:
    gates = torch.tensor([-1e4, -90.0, -20.0, -1.0, -0.0, 0.0, 1e-3, 1.0, 20.0, 90.0, 1e4, 2.0] * 4)
    values = torch.linspace(-3, 3, len(gates))
    both = torch.cat((gates, values)).unsqueeze(0).to(dtype)
    gate, value = both.float().chunk(2, dim=1)
    close(rows.silu_and_mul(both), functional.silu(gate) * value)


def reference(x_BD: Tensor, slot_BK: Tensor, gate_up_SJD: Tensor, down_SDI: Tensor) -> Tensor:
    """(B, K, D) float32; zeros where the slot is -1."""
    results = []
    for row, slots in zip(x_BD.float(), slot_BK.tolist(), strict=True):
        for slot in slots:
            gate, up = (gate_up_SJD[slot].float() @ row).chunk(2)
            result = down_SDI[slot].float() @ (functional.silu(gate) * up)
            results.append(result if slot >= 0 else torch.zeros_like(result))
    return torch.stack(results).view(*slot_BK.shape, -1)


@DTYPES
@pytest.mark.parametrize("num_rows", [1, 2, 3, 5, 40])
@pytest.mark.parametrize(("hidden", "width"), [(64, 32), (96, 160)])
def test_experts_agree_with_one_product_at_a_time(
    dtype: torch.dtype, num_rows: int, hidden: int, width: int
) -> None:
    torch.manual_seed(num_rows)
    gate_up = (torch.randn(6, 2 * width, hidden) / hidden**0.5).to(dtype)
    down = (torch.randn(6, hidden, width) / width**0.5).to(dtype)
    assert serves(gate_up, down)
    x = torch.randn(num_rows, hidden).to(dtype)
    slots = torch.stack([torch.randperm(7)[:3] - 1 for _ in range(num_rows)])  # -1: elsewhere
    results, places = apply_experts(x, slots, gate_up, down)
    here = slots >= 0
    close(results[places[here]], reference(x, slots, gate_up, down)[here])


@DTYPES
def test_a_rows_result_has_the_same_bits_in_any_company(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    gate_up, down = torch.randn(4, 64, 64).to(dtype), torch.randn(4, 64, 32).to(dtype)
    x = torch.randn(37, 64).to(dtype)
    slots = torch.stack([torch.randperm(4)[:2] for _ in range(37)])
    together, places = apply_experts(x, slots, gate_up, down)
    for row in range(37):
        alone, place = apply_experts(x[row : row + 1], slots[row : row + 1], gate_up, down)
        assert torch.equal(alone[place[0]], together[places[row]])


@needs_bf16_dot
@pytest.mark.parametrize("num_rows", [1, 2, 5, 12, 13, 60])
def test_experts_whose_weights_lie_in_tiles_agree_too(num_rows: int) -> None:
    torch.manual_seed(num_rows)
    hidden, width = 96, 160
    gate_up = (torch.randn(6, 2 * width, hidden) / hidden**0.5).bfloat16()
    down = (torch.randn(6, hidden, width) / width**0.5).bfloat16()
    tiled = torch.stack([in_tiles(part) for part in gate_up])
    tiled_down = torch.stack([in_tiles(part) for part in down])
    x = torch.randn(num_rows, hidden).bfloat16()
    slots = torch.stack([torch.randperm(7)[:3] - 1 for _ in range(num_rows)])  # -1: elsewhere
    results, places = apply_experts(x, slots, tiled, tiled_down, in_tiles=True)
    here = slots >= 0
    close(results[places[here]], reference(x, slots, gate_up, down)[here])
    for row in range(num_rows):
        alone, place = apply_experts(
            x[row : row + 1], slots[row : row + 1], tiled, tiled_down, in_tiles=True
        )
        mine = here[row]
        assert torch.equal(alone[place[0][mine]], results[places[row][mine]])


def test_no_rows_and_no_expert_here_are_no_trouble() -> None:
    gate_up, down = torch.randn(4, 64, 64), torch.randn(4, 64, 32)
    results, places = apply_experts(
        torch.empty(0, 64), torch.empty(0, 2, dtype=torch.int64), gate_up, down
    )
    assert results.shape == (0, 64)
    assert places.shape == (0, 2)
    elsewhere = torch.full((3, 2), -1)
    apply_experts(torch.randn(3, 64), elsewhere, gate_up, down)
