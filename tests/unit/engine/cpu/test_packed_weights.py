import pytest
import torch

from engine.cpu import packed_weights, vectors

pytestmark = pytest.mark.skipif(
    not vectors.has_bf16_dot(), reason="needs a CPU with AVX512-BF16, whose instruction it is"
)


def numbers(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).bfloat16()


@pytest.mark.parametrize("shape", [(576, 576), (96, 4), (5, 72), (33, 1536)], ids=str)
@pytest.mark.parametrize("rows", [*range(1, 14), 24, 25, 37, 200])
def test_the_product_is_that_of_the_weights_that_were_packed(
    shape: tuple[int, int], rows: int
) -> None:
    weight_OI, x_NI = numbers(*shape), numbers(rows, shape[1])
    got_NO = packed_weights.multiply(x_NI, packed_weights.pack(weight_OI), shape[0])
    want_NO = x_NI.double() @ weight_OI.double().T
    torch.testing.assert_close(got_NO.double(), want_NO, rtol=1e-2, atol=0.05)


def test_a_row_has_the_same_bits_with_any_others_and_on_any_number_of_threads() -> None:
    packed, x_NI = packed_weights.pack(numbers(3072, 576)), numbers(60, 576)
    alone_NO = torch.cat([packed_weights.multiply(row, packed, 3072) for row in x_NI.split(1)])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for rows in (2, 11, 12, 13, 60):
                got_NO = packed_weights.multiply(x_NI[-rows:], packed, 3072)
                assert torch.equal(got_NO, alone_NO[-rows:])
    finally:
        torch.set_num_threads(threads)


def test_rows_may_be_any_distance_apart_and_in_any_order_of_memory() -> None:
    packed, wide_NI = packed_weights.pack(numbers(64, 72)), numbers(9, 200)
    want_NO = packed_weights.multiply(wide_NI[:, 7:79].contiguous(), packed, 64)
    assert torch.equal(packed_weights.multiply(wide_NI[:, 7:79], packed, 64), want_NO)
    turned_NI = wide_NI[:, 7:79].t().contiguous().t()
    assert torch.equal(packed_weights.multiply(turned_NI, packed, 64), want_NO)


def test_what_the_kernel_cannot_read_is_left_to_others() -> None:
    assert packed_weights.serves(numbers(5, 72))
    assert not packed_weights.serves(numbers(5, 70))
    assert not packed_weights.serves(numbers(5, 72).float())
