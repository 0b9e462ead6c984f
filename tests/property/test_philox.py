import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.sampling.philox import philox4x32, uniform

WORD = 2**32
words = st.integers(0, WORD - 1)

KNOWN_ANSWERS = [  # kat_vectors of the Random123 library, philox 4x32 10
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([WORD - 1] * 4, [WORD - 1] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS, ids=["0", "max", "pi"])
def test_the_published_answers_come_out(
    counter: list[int], key: list[int], answer: list[int]
) -> None:
    assert philox4x32(torch.tensor(counter), torch.tensor(key)).tolist() == answer


def reference(counter: tuple[int, ...], key: tuple[int, ...]) -> list[int]:
    """The paper's definition, on Python's unbounded integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        first, second = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [
            (second // WORD) ^ c[1] ^ k[0],
            second % WORD,
            (first // WORD) ^ c[3] ^ k[1],
            first % WORD,
        ]
        k = [(k[0] + 0x9E3779B9) % WORD, (k[1] + 0xBB67AE85) % WORD]
    return c


@settings(max_examples=50, deadline=None)
@given(
    batch=st.lists(
        st.tuples(st.tuples(words, words, words, words), st.tuples(words, words)),
        min_size=1,
        max_size=5,
    )
)
def test_each_row_of_a_batch_is_what_the_definition_says(
    batch: list[tuple[tuple[int, ...], tuple[int, ...]]],
) -> None:
    counters = torch.tensor([counter for counter, _ in batch])
    keys = torch.tensor([key for _, key in batch])
    assert philox4x32(counters, keys).tolist() == [reference(*one) for one in batch]


def test_uniform_numbers_are_uniform_and_differ_by_seed_choice_and_index() -> None:
    index = torch.arange(4096)[None, :]
    numbers = torch.cat(
        [
            uniform(torch.tensor([[seed]]), torch.tensor([[choice]]), index)
            for seed, choice in [(0, 0), (1, 0), (0, 1), (-1, 0), (2**40, 0)]
        ]
    )
    assert numbers.dtype == torch.float64
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert len(numbers.unique()) == numbers.numel()
    counts = np.histogram(numbers.numpy(), bins=64, range=(0, 1))[0]
    expected = numbers.numel() / 64
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 103.4, "63 degrees of freedom, one in a thousand"
    streams = np.corrcoef(numbers.numpy())
    assert np.abs(streams - np.eye(5)).max() < 0.06
