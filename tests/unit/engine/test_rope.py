import math

import pytest
import torch
from transformers import DeepseekV3Config, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from engine.config import LinearScaling, Llama3Scaling, RopeConfig, YarnScaling
from engine.layers.rope import Rope, scaled_frequencies, yarn_softmax_factor
from engine.weights.orders import half_split_rows

CPU = torch.device("cpu")
DEEPSEEK_V3 = YarnScaling(factor=40.0, original_length=4096, mscale=1.0, mscale_all_dims=1.0)
KIMI_K2 = YarnScaling(
    factor=32.0, original_length=4096, beta_fast=1.0, mscale=1.0, mscale_all_dims=1.0
)


@pytest.mark.parametrize(
    ("theta", "scaling", "expected"),
    [
        (10000.0, DEEPSEEK_V3, [1, 1e-1, 2.687936e-2, 5.5e-3, 7.905694e-4, 2.5e-5, 3.333804e-6]),
        (
            50000.0,
            KIMI_K2,
            [1, 6.687403e-2, 1.729363e-2, 4.472136e-3, 3.614047e-5, 9.345930e-6, 8.764413e-7],
        ),
    ],
    ids=["DeepSeek-V3", "Kimi K2"],
)
def test_yarn_gives_the_frequencies_of_published_models(
    theta: float, scaling: YarnScaling, expected: list[float]
) -> None:
    frequencies_F, magnitude = scaled_frequencies(RopeConfig(theta=theta, scaling=scaling), 64)
    indices = [0, 8, 12, 16, 20, 24, 31]
    torch.testing.assert_close(frequencies_F[indices], torch.tensor(expected), rtol=1e-6, atol=0)
    assert magnitude == 1.0


@pytest.mark.parametrize(
    ("scaling", "parameters"),
    [
        (LinearScaling(factor=4.0), {"rope_type": "linear", "factor": 4.0}),
        (
            Llama3Scaling(
                factor=8.0,
                low_frequency_factor=1.0,
                high_frequency_factor=4.0,
                original_length=8192,
            ),
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        ),
        (
            YarnScaling(factor=4.0, original_length=32768, beta_fast=24.0, truncated=False),
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "beta_fast": 24.0,
                "truncate": False,
                "original_max_position_embeddings": 32768,
            },
        ),
        (
            YarnScaling(factor=16.0, original_length=8192, mscale=1.0, mscale_all_dims=0.7),
            {
                "rope_type": "yarn",
                "factor": 16.0,
                "mscale": 1.0,
                "mscale_all_dim": 0.7,
                "original_max_position_embeddings": 8192,
            },
        ),
    ],
    ids=["linear", "llama3", "yarn untruncated", "yarn with two mscales"],
)
def test_scalings_agree_with_transformers(
    scaling: LinearScaling | Llama3Scaling | YarnScaling, parameters: dict[str, float | str]
) -> None:
    config = LlamaConfig(
        hidden_size=512,
        num_attention_heads=4,
        max_position_embeddings=131072,
        rope_parameters={"rope_theta": 500000.0, **parameters},
    )
    wanted_F, wanted_magnitude = ROPE_INIT_FUNCTIONS[str(parameters["rope_type"])](config, CPU)
    got_F, magnitude = scaled_frequencies(RopeConfig(theta=500000.0, scaling=scaling), 128)
    torch.testing.assert_close(got_F, wanted_F, rtol=1e-6, atol=0)
    assert magnitude == pytest.approx(wanted_magnitude)


def test_deepseek_sharpens_its_softmax_by_the_square_of_mscale() -> None:
    assert DeepseekV3Config().qk_head_dim == 192
    factor = yarn_softmax_factor(RopeConfig(theta=1e4, scaling=DEEPSEEK_V3))
    assert 192**-0.5 * factor == pytest.approx(0.13523378)
    assert yarn_softmax_factor(RopeConfig(theta=1e4)) == 1.0
    no_mscale = YarnScaling(factor=36.0, original_length=8192)
    assert yarn_softmax_factor(RopeConfig(theta=1e4, scaling=no_mscale)) == 1.0


def test_rotation_turns_pairs_of_halves_by_position_times_frequency() -> None:
    rope = Rope(RopeConfig(theta=100.0), 4, device=CPU, dtype=torch.float32)
    x_NHW = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    first, second = 5.0, 5.0 * 100.0**-0.5
    expected = [
        1 * math.cos(first) - 3 * math.sin(first),
        2 * math.cos(second) - 4 * math.sin(second),
        3 * math.cos(first) + 1 * math.sin(first),
        4 * math.cos(second) + 2 * math.sin(second),
    ]
    rotated_NHW = rope.at(torch.tensor([5])).apply(x_NHW)
    torch.testing.assert_close(rotated_NHW[0, 0], torch.tensor(expected))


def test_neighbouring_pairs_moved_to_halves_keep_every_score() -> None:
    """Rotating 2i with 2i + 1 gives the scores of rotating halves of reordered projections."""
    generator = torch.Generator().manual_seed(1)
    heads, width, hidden = 2, 8, 5
    weights = torch.randn(2, heads * width, hidden, generator=generator)
    x_ND = torch.randn(6, hidden, generator=generator)
    positions_N = torch.arange(100, 106)
    rotation = Rope(RopeConfig(theta=100.0), width, device=CPU, dtype=torch.float32).at(positions_N)

    frequencies_F, _ = scaled_frequencies(RopeConfig(theta=100.0), width)
    turn_N1F = torch.polar(torch.ones(6, 4), positions_N[:, None] * frequencies_F)[:, None]
    queries, keys = (
        torch.view_as_real(
            torch.view_as_complex((x_ND @ w.T).view(6, heads, width // 2, 2)) * turn_N1F
        ).flatten(2)
        for w in weights
    )
    halves = [
        rotation.apply((x_ND @ half_split_rows(w, heads=heads).T).view(6, heads, width))
        for w in weights
    ]
    torch.testing.assert_close(
        torch.einsum("qhw,khw->hqk", *halves), torch.einsum("qhw,khw->hqk", queries, keys)
    )


def test_a_step_without_tokens_has_an_empty_rotation() -> None:
    rotation = Rope(RopeConfig(theta=100.0), 4, device=CPU, dtype=torch.bfloat16).at(
        torch.empty(0, dtype=torch.int64)
    )
    assert rotation.apply(torch.empty(0, 3, 4, dtype=torch.bfloat16)).shape == (0, 3, 4)
