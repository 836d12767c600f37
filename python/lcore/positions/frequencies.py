"""RoPE frequencies: how fast each pair of dimensions turns, and how the known scalings slow the turning.

The order of the float32 operations is that of transformers' `ROPE_INIT_FUNCTIONS`, so the frequencies are equal to
the bit: a checkpoint was trained with exactly these numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from lcore.errors import require
from lcore.positions.rope_config import RopeConfig


def rope_frequencies(rope: RopeConfig | Mapping[str, Any], head_dim: int) -> tuple[torch.Tensor, float]:
    """Computes the angle by which each rotary pair turns per position.

    Formula, with d = int(head_dim * partial_rotary_factor), base = rope_theta, m = 0 .. d/2 - 1, f_m = base^(-2m/d):
        default   f_m
        linear    f_m / factor
        llama3    f_m where the wavelength 2 pi / f_m is below L / high_freq_factor, f_m / factor where it is above
                  L / low_freq_factor, and a linear blend between (L = original_max_position_embeddings)
        yarn      f_m / factor * r_m + f_m * (1 - r_m), where r_m rises from 0 to 1 between the dimensions that make
                  beta_fast and beta_slow turns over L positions; the attention scaling is attention_factor, or
                  g(mscale) / g(mscale_all_dim), or g(1), with g(a) = 0.1 a ln(factor) + 1

    Args:
        rope: a RopeConfig, or one `rope_parameters` / `rope_scaling` dict of a config.json.
        head_dim: size of a head.
    Returns:
        inv_freq: (d / 2,) float32 on the CPU, radians per position.
        attention_scaling: factor on cos and sin, so on q·k squared; 1.0 except for yarn.
    Raises:
        NotImplementedError for another rope type; ValueError for a missing value or an odd d.
    Source: Su et al. 2021, arXiv:2104.09864; Peng et al. 2023, "YaRN", arXiv:2309.00071; the llama3 rule is from
        Meta's Llama 3.1 release.
    """
    if not isinstance(rope, RopeConfig):
        rope = RopeConfig.from_dict(rope)
    dim = int(head_dim * rope.partial_rotary_factor)
    got = f"{head_dim} * {rope.partial_rotary_factor} = {dim}"
    rule = "be even and at least 2"
    require(dim >= 2 and dim % 2 == 0, "rope_frequencies", "head_dim * partial_rotary_factor", rule, got)
    exponents = torch.arange(0, dim, 2, dtype=torch.int64, device="cpu").to(torch.float32) / dim
    powers = rope.theta**exponents
    if rope.rope_type == "linear":
        assert rope.factor is not None
        return 1.0 / powers / rope.factor, 1.0
    if rope.rope_type == "llama3":
        return _llama3(1.0 / powers, rope), 1.0
    if rope.rope_type == "yarn":
        return _yarn(powers, rope, dim)
    return 1.0 / powers, 1.0


def _llama3(inv_freq: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    low, high = rope.low_freq_factor, rope.high_freq_factor
    length, factor = rope.original_max_position_embeddings, rope.factor
    assert low is not None and high is not None and length is not None and factor is not None
    wavelength = 2 * math.pi / inv_freq
    scaled = torch.where(wavelength > length / low, inv_freq / factor, inv_freq)
    blend = (length / wavelength - low) / (high - low)
    between = (wavelength >= length / high) & (wavelength <= length / low)
    return torch.where(between, (1 - blend) * scaled / factor + blend * scaled, scaled)


def _yarn(powers: torch.Tensor, rope: RopeConfig, dim: int) -> tuple[torch.Tensor, float]:
    length = rope.original_max_position_embeddings
    assert length is not None
    factor = rope.factor
    if factor is None:
        assert rope.max_position_embeddings is not None
        factor = rope.max_position_embeddings / length

    def magnitude(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    def dimension_of(turns: float) -> float:
        return (dim * math.log(length / (turns * 2 * math.pi))) / (2 * math.log(rope.theta))

    scaling = rope.attention_factor
    if scaling is None:
        scaling = magnitude(1.0)
        if rope.mscale and rope.mscale_all_dim:
            scaling = magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)

    low, high = dimension_of(rope.beta_fast or 32), dimension_of(rope.beta_slow or 1)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a step instead of a division by zero
    ramp = torch.clamp((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low), 0, 1)
    keep = 1 - ramp
    return 1.0 / (factor * powers) * (1 - keep) + 1.0 / powers * keep, scaling
