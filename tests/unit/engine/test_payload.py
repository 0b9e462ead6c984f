"""What a row's values lose on the way, and that rows do not see each other."""

import pytest
import torch

from engine.experts.payload import decode, encode

# E4M3 has three bits of fraction: half a step is a sixteenth of the value, and of values that
# share a scale the smallest normal one is 2^-6 of 448.
RELATIVE, ABSOLUTE = 2**-4, 2**-9 / 448


def rows(count: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    sizes = 10 ** torch.empty(count, width // 128, 1).uniform_(-6, 6, generator=generator)
    return (torch.randn(count, width // 128, 128, generator=generator) * sizes).flatten(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eight_bits_keep_each_value_to_a_sixteenth(dtype: torch.dtype) -> None:
    x = rows(17, 512).to(dtype)
    values, scales = encode(x, "fp8")
    assert (values.dtype, scales.shape) == (torch.float8_e4m3fn, (17, 4))
    got = decode((values, scales), torch.float32)
    largest = x.float().view(17, 4, 128).abs().amax(dim=2, keepdim=True).expand(-1, -1, 128)
    allowed = x.float().abs() * RELATIVE + largest.flatten(1) * ABSOLUTE
    assert ((got - x.float()).abs() <= allowed).all()


def test_a_rows_scales_depend_on_that_row_alone() -> None:
    x = rows(9, 256)
    together = decode(encode(x, "fp8"), torch.float32)
    alone = torch.cat([decode(encode(row[None], "fp8"), torch.float32) for row in x])
    assert torch.equal(together, alone)


def test_a_damaged_row_spoils_itself_only() -> None:
    x = rows(4, 256)
    wanted = decode(encode(x, "fp8"), torch.float32)
    x[2, 7] = float("nan")
    got = decode(encode(x, "fp8"), torch.float32)
    assert torch.equal(got[[0, 1, 3]], wanted[[0, 1, 3]])
    assert got[2].isnan().any()


def test_zeros_and_no_rows_travel() -> None:
    assert decode(encode(torch.zeros(2, 128), "fp8"), torch.float32).eq(0).all()
    assert decode(encode(torch.zeros(0, 128), "fp8"), torch.bfloat16).shape == (0, 128)


def test_native_values_are_not_touched() -> None:
    x = rows(3, 128)
    (travelled,) = encode(x, "native")
    assert travelled is x
    assert decode((travelled,), torch.float32) is x
