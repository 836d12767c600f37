"""A recurrence one token at a time, with what it knows after each: for tokens that may be taken back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def token_by_token(
    scan: Callable[..., tuple[Tensor, Tensor]], state: Tensor | None, tokens: Sequence[Tensor], dim: int
) -> tuple[Tensor, Tensor]:
    """scan(state, *token) for one token after the other; what it gives along dim, and (seq, ...) all states."""
    outs, states = [], []
    for token in zip(*(x.split(1, dim) for x in tokens), strict=True):
        out, state = scan(state, *token)
        outs.append(out)
        states.append(state)
    return torch.cat(outs, dim), torch.stack(states)


def conv_states(before: Tensor, x: Tensor) -> Tensor:
    """(seq, batch, channels, width - 1): the state of a convolution after each token of its input x.

    before: (batch, channels, width - 1). x: (batch, channels, seq).
    """
    inputs = torch.cat([before, x], dim=2)
    return inputs.unfold(2, before.shape[2], 1)[:, :, 1:].permute(2, 0, 1, 3)
