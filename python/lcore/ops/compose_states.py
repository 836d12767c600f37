"""States of consecutive parts of a sequence, put together."""

from __future__ import annotations

import torch
from torch import Tensor

from lcore.errors import check_tensor

_NAME = "compose_states"


def compose_states(decay_a: Tensor, state_a: Tensor, decay_b: Tensor, state_b: Tensor) -> tuple[Tensor, Tensor]:
    """The effect on a state of part a of a sequence followed by part b, from the effect of each.

    Formula: a part takes the state before it, h, to decay * h + state, where state is what it leaves of h = 0. Both
        together: decay = decay_a * decay_b, state = decay_b * state_a + state_b. (1, 0) is the neutral element, and
        the operation is associative: parts may be computed anywhere and composed in any grouping, in order.

    Args:
        decay_a, state_a, decay_b, state_b: tensors of one dtype, float32, float64, float16 or bfloat16, whose shapes
            broadcast: elementwise decays of a selective scan or a gated linear attention, one decay a head of Mamba-2.
            For a part of a selective scan the decay is exp(A * sum_t delta_t), delta after bias and softplus.

    Returns:
        (decay, state), of the shape that decays broadcast to and of the shape that all four do.

    Raises:
        TypeError: dtypes. ValueError: devices, shapes that do not broadcast.

    Notes:
        Plain torch: gradients of any order. A sequence that is split over threads or ranks so has the state of the
        whole up to rounding, not to the bit: lcore's own kernels run a sequence in order instead (docs/recurrent.md).

    Source: Blelloch 1990, Prefix sums and their applications, section 1.4; Gu & Dao 2023, arXiv:2312.00752.
    """
    check_tensor(_NAME, "decay_a", decay_a)
    named = (("state_a", state_a), ("decay_b", decay_b), ("state_b", state_b))
    for argument, value in named:
        check_tensor(_NAME, argument, value, dtypes=(decay_a.dtype,), device=decay_a.device)
    try:
        torch.broadcast_shapes(decay_a.shape, *(value.shape for _, value in named))
    except RuntimeError:
        shapes = ", ".join(str(tuple(x.shape)) for x in (decay_a, *(value for _, value in named)))
        raise ValueError(f"lcore.{_NAME}: decays and states must have shapes that broadcast, got {shapes}") from None
    return decay_a * decay_b, torch.addcmul(state_b, decay_b, state_a)
