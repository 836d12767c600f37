"""The effect of two parts of a sequence on a state, one after the other."""

from __future__ import annotations

import torch
from torch import Tensor


def compose_states(decay_a: Tensor, state_a: Tensor, decay_b: Tensor, state_b: Tensor) -> tuple[Tensor, Tensor]:
    """What lcore.compose_states computes, with its arguments, in float32 (float64 when they are).

    Formula: h -> decay_b (decay_a h + state_a) + state_b, as the pair of what multiplies h and what is added to it.
    """
    dtype = decay_a.dtype
    work = torch.promote_types(dtype, torch.float32)
    decay_a, state_a, decay_b, state_b = (x.to(work) for x in (decay_a, state_a, decay_b, state_b))
    return (decay_b * decay_a).to(dtype), (decay_b * state_a + state_b).to(dtype)
