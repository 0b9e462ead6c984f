"""KV as 8-bit floats: half the bytes, an error that is bounded row by row."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.fp8 import pack, packed_bytes, unpack
from protocol.kv import KVLayout

WIDTH = 16
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


def a_layout(dtype: str) -> KVLayout:
    return KVLayout(
        kind="gqa",
        dtype=dtype,
        num_layers=1,
        block_tokens=4,
        kv_heads=2,
        key_width=WIDTH,
        value_width=WIDTH,
    )


@given(seed=st.integers(0, 1000), scale=st.sampled_from([1e-6, 1e-2, 1.0, 300.0]))
def test_an_element_comes_back_within_a_sixteenth_of_itself(seed: int, scale: float) -> None:
    layout = a_layout("float32")
    rows = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(seed)) * scale
    back = unpack(layout, pack(layout, rows.flatten().view(torch.uint8))).view(torch.float32)
    error = (back.view(5, WIDTH) - rows).abs()
    largest = rows.abs().amax(1, keepdim=True)
    assert (error <= torch.maximum(rows.abs() / 16, largest * 2**-10 / 448 * 1.01)).all()


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_packed_bytes_are_scales_and_one_byte_an_element(dtype: str) -> None:
    layout = a_layout(dtype)
    contents = torch.randn(8, WIDTH).to(DTYPES[dtype]).flatten().view(torch.uint8)
    packed = pack(layout, contents)
    assert packed.numel() == packed_bytes(layout, contents.numel()) == 8 * (4 + WIDTH)
    assert unpack(layout, packed).numel() == contents.numel()


def test_zeros_stay_zeros_and_a_damaged_row_spoils_itself_alone() -> None:
    layout = a_layout("float32")
    rows = torch.zeros(3, WIDTH)
    rows[1, 3] = float("nan")
    rows[2, 0] = 5.0
    back = unpack(layout, pack(layout, rows.flatten().view(torch.uint8))).view(torch.float32)
    back = back.view(3, WIDTH)
    assert torch.equal(back[0], rows[0])
    assert back[1].isnan().all()
    assert torch.equal(back[2], rows[2])


def test_half_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="not whole rows"):
        unpack(a_layout("bfloat16"), torch.zeros(21, dtype=torch.uint8))
