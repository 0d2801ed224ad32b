"""Rotary position embedding: the table of cosines and sines, for every scaling that is built.

    angle(m, i) = m * f_i      f_i = theta^(-2i/H)   for i in 0..H/2
    linear:  f_i / factor                                     (positions are interpolated)
    llama3:  long waves / factor, short ones as they are, a smooth blend between
    yarn:    a ramp over i between f_i and f_i / factor; the table times an attention factor

Source: RoFormer (arXiv 2104.09864), position interpolation (arXiv 2306.15595), YaRN (arXiv
2309.00071), Llama 3.1's reference code; checked against transformers' modeling_rope_utils.

Legend: M positions, H head size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from batchgen.models.config import ModelConfig, RopeConfig


def cos_sin_table(config: ModelConfig, max_positions: int, device: torch.device | str) -> Tensor:
    """cos_sin_MH in fp32: row m holds H/2 cosines, then H/2 sines, of position m.

    For heads whose two halves are rotated against each other (GPT-NeoX's layout). YaRN's
    attention factor is multiplied in. Computed on the CPU, so that it is the same on any device.
    """
    inverse_frequency = inverse_frequencies(config.rope, config.head_dim)
    angles = torch.outer(torch.arange(max_positions, dtype=torch.float32), inverse_frequency)
    cos_sin_MH = torch.cat((angles.cos(), angles.sin()), dim=-1)
    return (cos_sin_MH * attention_factor(config.rope)).to(device)


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """The H/2 angles per position, in fp32 on the CPU."""
    frequencies = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    match rope.rope_type:
        case "default":
            return frequencies
        case "linear":
            return frequencies / rope.factor
        case "llama3":
            return _llama3(rope, frequencies)
        case "yarn":
            return _yarn(rope, frequencies, head_dim)


def attention_factor(rope: RopeConfig) -> float:
    """What the cosines and sines are multiplied with: 1 but for YaRN."""
    if rope.rope_type != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor

    def mscale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)


def _llama3(rope: RopeConfig, frequencies: Tensor) -> Tensor:
    original = rope.original_max_position_embeddings
    wavelengths = 2 * math.pi / frequencies
    blend = (original / wavelengths - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - blend) * frequencies / rope.factor + blend * frequencies
    scaled = torch.where(
        wavelengths > original / rope.low_freq_factor, frequencies / rope.factor, blended
    )
    return torch.where(wavelengths < original / rope.high_freq_factor, frequencies, scaled)


def _yarn(rope: RopeConfig, frequencies: Tensor, head_dim: int) -> Tensor:
    def dimension_of(rotations: float) -> float:
        """The index i whose wave turns this often within the original context."""
        turns = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # as the reference: no division by zero
    ramp = ((torch.arange(head_dim // 2).float() - low) / (high - low)).clamp(0, 1)
    return frequencies / rope.factor * ramp + frequencies * (1 - ramp)
