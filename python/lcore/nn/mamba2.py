"""The Mamba-2 block: state space duality behind a short convolution, with a gated norm."""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from lcore.cache import LayerState
from lcore.errors import require
from lcore.nn.linear import Linear
from lcore.nn.mamba import check_hidden, decay_rates, initial_dt_bias, state_before, zero_state
from lcore.nn.norm import GroupedRMSNorm
from lcore.nn.token_by_token import conv_states, token_by_token
from lcore.ops import causal_conv1d, gated_linear_attention_update, ssd


class Mamba2(torch.nn.Module):
    """Mamba-2's mixer, with the parameter names of Hugging Face checkpoints.

    Formula:  z, xBC, dt = in(x); u, B, C = silu(conv(xBC));
              out = out_proj(norm(ssd(u, dt, -e^A_log, B, C, D, z, dt_bias))), with softplus of dt; the norm is an
              RMSNorm of each group's channels after the gate z
    Args:
        hidden_size: of x.
        num_heads, head_dim: of the recurrence.
        state_size: states of a channel.
        num_groups: of heads that share B and C; divides num_heads.
        conv_width: 1 to 8 tokens that the convolution sees.
        bias, conv_bias: whether in_proj and out_proj, and the convolution, have a bias.
        norm_eps: of the norm.
        dt_limit: bounds of the step size, in a step of decoding too.
    Source:   Dao and Gu 2024, Transformers are SSMs, arXiv:2405.21060.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int = 64,
        state_size: int = 128,
        *,
        num_groups: int = 1,
        conv_width: int = 4,
        bias: bool = False,
        conv_bias: bool = True,
        norm_eps: float = 1e-5,
        dt_limit: tuple[float, float] = (0.0, math.inf),
    ) -> None:
        super().__init__()
        rule = f"be a multiple of num_groups = {num_groups}"
        require(num_heads % num_groups == 0, "nn.Mamba2", "num_heads", rule, num_heads)
        inner = num_heads * head_dim
        channels = inner + 2 * num_groups * state_size
        self.num_heads, self.num_groups, self.state_size, self.dt_limit = num_heads, num_groups, state_size, dt_limit
        self.sizes = [inner, num_groups * state_size, num_groups * state_size]
        self.in_proj = Linear(hidden_size, inner + channels + num_heads, bias=bias)
        self.conv1d = torch.nn.Conv1d(channels, channels, conv_width, groups=channels, bias=conv_bias)
        self.dt_bias = torch.nn.Parameter(initial_dt_bias(num_heads))
        self.A_log = torch.nn.Parameter(torch.arange(1.0, num_heads + 1).log())
        self.D = torch.nn.Parameter(torch.ones(num_heads))
        self.norm = GroupedRMSNorm(inner, num_groups, norm_eps)
        self.out_proj = Linear(inner, hidden_size, bias=bias)

    def new_state(self, batch_size: int = 1) -> LayerState:
        """Zeros: the state before the first token of each row. recurrent is (batch, heads, states, head_dim)."""
        head_dim = self.sizes[0] // self.num_heads
        return zero_state(self.conv1d, self.A_log, (batch_size, self.num_heads, self.state_size, head_dim))

    @overload
    def forward(
        self, x: Tensor, state: LayerState | None = None, *, cu_seqlens: Tensor | None = None,
        return_final_state: Literal[False] = False,
    ) -> Tensor: ...  # fmt: skip

    @overload
    def forward(
        self, x: Tensor, state: LayerState | None = None, *, cu_seqlens: Tensor | None = None,
        return_final_state: Literal[True], each: bool = False,
    ) -> tuple[Tensor, LayerState]: ...  # fmt: skip

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        return_final_state: bool = False,
        each: bool = False,
    ) -> Tensor | tuple[Tensor, LayerState]:
        """Mixes each token of x with those before it; arguments, returns and gradients as `Mamba.forward`."""
        check_hidden("nn.Mamba2", x, self.in_proj.in_features)
        conv, recurrent = state_before(self, x, state, each)
        channels = self.conv1d.in_channels
        z, mixed, dt = self.in_proj(x).split([self.sizes[0], channels, self.num_heads], dim=-1)
        taps = self.conv1d.weight.squeeze(1)
        if each and conv is not None:
            after_each = conv_states(conv, mixed.transpose(1, 2))
        mixed, conv = causal_conv1d(
            mixed.transpose(1, 2), taps, self.conv1d.bias, activation="silu", initial_state=conv,
            cu_seqlens=cu_seqlens, return_final_state=True,
        )  # fmt: skip
        u, B, C = mixed.transpose(1, 2).split(self.sizes, dim=-1)
        u, z = (part.unflatten(-1, (self.num_heads, -1)) for part in (u, z))
        B, C = (part.unflatten(-1, (self.num_groups, -1)) for part in (B, C))
        if each and recurrent is not None:
            conv = after_each
            y, recurrent = token_by_token(self._step, recurrent, (u, dt, B, C, z), dim=1)
        elif recurrent is not None and x.shape[1] == 1 and cu_seqlens is None and not torch.is_grad_enabled():
            y, recurrent = self._step(recurrent, u, dt, B, C, z)
        else:
            y, recurrent = self._scan(recurrent, u, dt, B, C, z, cu_seqlens)
        out = self.out_proj(self.norm(y.flatten(2)))
        return (out, LayerState(conv, recurrent)) if return_final_state else out

    def _scan(
        self, state: Tensor | None, u: Tensor, dt: Tensor, B: Tensor, C: Tensor, z: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        tokens = (u, dt, B, C, z) if cu_seqlens is None else tuple(part.squeeze(0) for part in (u, dt, B, C, z))
        u, dt, B, C, z = tokens
        y, final = ssd(
            u, dt, decay_rates(self.A_log), B, C, D=self.D, z=z, dt_bias=self.dt_bias, dt_softplus=True,
            dt_limit=self.dt_limit, initial_state=None if state is None else state.transpose(2, 3),
            cu_seqlens=cu_seqlens, return_final_state=True,
        )  # fmt: skip
        return y if cu_seqlens is None else y.unsqueeze(0), final.transpose(2, 3).contiguous()

    def _step(self, state: Tensor, u: Tensor, dt: Tensor, B: Tensor, C: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """One token of each row, in the dtype of the state: as linear attention, which reads a state once."""
        state = state.clone()
        wide_u, wide_dt, wide_B, wide_C, wide_z = (part[:, 0].to(state.dtype) for part in (u, dt, B, C, z))
        step = F.softplus(wide_dt + self.dt_bias).clamp(*self.dt_limit)
        values = wide_u * step[..., None]
        y = gated_linear_attention_update(state, wide_C, wide_B, values, step * decay_rates(self.A_log), scale=1.0)
        y = (y + wide_u * self.D[:, None]) * F.silu(wide_z)
        return y.to(u.dtype)[:, None], state
