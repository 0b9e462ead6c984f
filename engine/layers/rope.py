"""Rotary position embedding: plain, linear, Llama 3 and YaRN scaled.

Everything rotates by halves: dimension i turns with dimension i + width / 2. A checkpoint whose
pairs are neighbours (DeepSeek, GGUF's llama) has its projection rows reordered once at load by
``engine.weights.orders``; queries and keys get the same order, so scores do not change, and the KV
cache has one layout. Cosines and sines are computed once per step and shared by all layers.

Shape suffixes: N tokens   H heads   W rotated width   F frequencies, W / 2
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config import LinearScaling, Llama3Scaling, RopeConfig, YarnScaling


@dataclass(frozen=True, slots=True)
class Rotation:
    """One step's angles. The first half of ``sin`` is negated, so x*cos + swap(x)*sin rotates x."""

    cos_N1W: Tensor
    sin_N1W: Tensor

    def apply(self, x_NHW: Tensor) -> Tensor:
        """A new tensor of ``x``'s shape, rotated; ``x`` may be any strided view."""
        swapped_NHW = torch.roll(x_NHW, x_NHW.shape[-1] // 2, -1)
        return torch.addcmul(x_NHW * self.cos_N1W, swapped_NHW, self.sin_N1W)


class Rope:
    """Makes each step's ``Rotation`` from token positions, for heads of ``width`` elements."""

    def __init__(
        self, config: RopeConfig, width: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        frequencies_F, self._magnitude = scaled_frequencies(config, width)
        self._angles_1F = frequencies_F.to(device).unsqueeze(0)
        self._dtype = dtype

    def at(self, positions_N: Tensor) -> Rotation:
        angles_NF = positions_N.to(torch.float32).unsqueeze(1) * self._angles_1F
        cos_NF, sin_NF = angles_NF.cos(), angles_NF.sin()
        if self._magnitude != 1.0:
            cos_NF, sin_NF = cos_NF * self._magnitude, sin_NF * self._magnitude
        cos_NW = torch.cat((cos_NF, cos_NF), dim=1).to(self._dtype)
        sin_NW = torch.cat((-sin_NF, sin_NF), dim=1).to(self._dtype)
        return Rotation(cos_NW.unsqueeze(1), sin_NW.unsqueeze(1))


def scaled_frequencies(config: RopeConfig, width: int) -> tuple[Tensor, float]:
    """Angles per position of each pair, (W / 2,) float32, and the factor of cos and sin."""
    exponents_F = torch.arange(0, width, 2, dtype=torch.float32) / width
    plain_F = 1.0 / (config.theta**exponents_F)
    match config.scaling:
        case None:
            return plain_F, 1.0
        case LinearScaling(factor=factor):
            return plain_F / factor, 1.0
        case Llama3Scaling() as scaling:
            return _llama3_frequencies(plain_F, scaling), 1.0
        case YarnScaling() as scaling:
            return _yarn_frequencies(plain_F, scaling, config.theta), yarn_magnitude(scaling)


def yarn_mscale(factor: float, weight: float) -> float:
    """``0.1 * weight * ln(factor) + 1``: how much longer contexts sharpen attention."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def yarn_magnitude(scaling: YarnScaling) -> float:
    """The factor of cosines and sines."""
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dims:
        return yarn_mscale(scaling.factor, scaling.mscale) / yarn_mscale(
            scaling.factor, scaling.mscale_all_dims
        )
    return yarn_mscale(scaling.factor, 1.0)


def yarn_softmax_factor(config: RopeConfig) -> float:
    """What DeepSeek multiplies the softmax scale by: mscale squared, 1 where there is none."""
    scaling = config.scaling
    if not isinstance(scaling, YarnScaling) or not scaling.mscale_all_dims:
        return 1.0
    return yarn_mscale(scaling.factor, scaling.mscale_all_dims) ** 2


def _llama3_frequencies(plain_F: Tensor, scaling: Llama3Scaling) -> Tensor:
    turns_F = scaling.original_length * plain_F / (2 * math.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept_F = ((turns_F - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - kept_F) * plain_F / scaling.factor + kept_F * plain_F


def _yarn_frequencies(plain_F: Tensor, scaling: YarnScaling, theta: float) -> Tensor:
    """Pairs that turn often in the original length are kept, those that turn rarely slowed down."""
    width = 2 * plain_F.shape[0]

    def pair_that_turns(times: float) -> float:
        span = scaling.original_length / (times * 2 * math.pi)
        return width * math.log(span) / (2 * math.log(theta))

    low, high = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncated:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    if low == high:
        high += 0.001  # a step, without a division by zero
    ramp_F = torch.arange(plain_F.shape[0], dtype=torch.float32)
    slowed_F = ((ramp_F - low) / (high - low)).clamp(0.0, 1.0)
    return slowed_F * plain_F / scaling.factor + (1 - slowed_F) * plain_F
