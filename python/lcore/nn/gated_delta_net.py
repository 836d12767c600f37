"""The Gated DeltaNet block: the gated delta rule behind a short convolution, with a gated norm of every head."""

from __future__ import annotations

from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from lcore.cache import LayerState
from lcore.errors import require
from lcore.nn.linear import Linear
from lcore.nn.mamba import check_hidden, decay_rates, initial_dt_bias, state_before, zero_state
from lcore.nn.norm import RMSNorm
from lcore.nn.token_by_token import conv_states, token_by_token
from lcore.ops import causal_conv1d, gated_delta_rule, gated_delta_rule_update

_NORM_EPS = 1e-6  # of the length of q and k


class GatedDeltaNet(torch.nn.Module):
    """Gated DeltaNet's mixer, with the parameter names and the order of rows of Qwen3-Next's checkpoints.

    Formula:  q, k, v, z = in_qkvz(x); b, a = in_ba(x); q, k, v = silu(conv(q, k, v)); q, k = q / |q|, k / |k|;
              o = gated_delta_rule(q, k, v, -e^A_log softplus(a + dt_bias), sigmoid(b));
              out = out_proj(norm(o) silu(z)), the norm an RMSNorm of each head
    Args:
        hidden_size: of x.
        num_key_heads, num_value_heads: of q and k, and of v and z; the latter a multiple of the former.
        key_dim, value_dim: of a head.
        conv_width: 1 to 8 tokens that the convolution sees.
        norm_eps: of the norm.
    Source:   Yang et al. 2024, Gated Delta Networks, arXiv:2412.06464.
    """

    def __init__(
        self,
        hidden_size: int,
        num_key_heads: int,
        num_value_heads: int,
        key_dim: int = 128,
        value_dim: int = 128,
        *,
        conv_width: int = 4,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        rule = f"be a multiple of num_key_heads = {num_key_heads}"
        require(num_value_heads % num_key_heads == 0, "nn.GatedDeltaNet", "num_value_heads", rule, num_value_heads)
        share = num_value_heads // num_key_heads
        self.num_key_heads, self.num_value_heads = num_key_heads, num_value_heads
        self.key_dim, self.value_dim, self.share = key_dim, value_dim, share
        keys, values = num_key_heads * key_dim, num_value_heads * value_dim
        channels = 2 * keys + values
        self.sizes = [keys, keys, values]
        self.in_proj_qkvz = Linear(hidden_size, 2 * keys + 2 * values, bias=False)
        self.in_proj_ba = Linear(hidden_size, 2 * num_value_heads, bias=False)
        self.conv1d = torch.nn.Conv1d(channels, channels, conv_width, groups=channels, bias=False)
        self.dt_bias = torch.nn.Parameter(initial_dt_bias(num_value_heads))
        self.A_log = torch.nn.Parameter(torch.empty(num_value_heads).uniform_(0.01, 16).log())
        self.norm = RMSNorm(value_dim, norm_eps)
        self.out_proj = Linear(values, hidden_size, bias=False)

    def new_state(self, batch_size: int = 1) -> LayerState:
        """Zeros: the state before the first token. recurrent is (batch, value heads, key_dim, value_dim)."""
        return zero_state(self.conv1d, self.A_log, (batch_size, self.num_value_heads, self.key_dim, self.value_dim))

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
        check_hidden("nn.GatedDeltaNet", x, self.in_proj_qkvz.in_features)
        conv, recurrent = state_before(self, x, state, each)
        mixed, z, b, a = self._project(x)
        if each and conv is not None:
            after_each = conv_states(conv, mixed.transpose(1, 2))
        mixed, conv = causal_conv1d(
            mixed.transpose(1, 2), self.conv1d.weight.squeeze(1), activation="silu",
            initial_state=conv, cu_seqlens=cu_seqlens, return_final_state=True,
        )  # fmt: skip
        tokens = (mixed.transpose(1, 2), z, b, a)
        if each:
            conv = after_each
            y, recurrent = token_by_token(self._recur, recurrent, tokens, dim=1)
        else:
            y, recurrent = self._recur(recurrent, *tokens, cu_seqlens)
        out = self.out_proj(y)
        return (out, LayerState(conv, recurrent)) if return_final_state else out

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k and v (batch, seq, channels); z (batch, seq, value heads, value_dim); b and a (batch, seq, value heads).
        Rows of the projections stand by key head, each with its value heads.
        """
        by_head = self.in_proj_qkvz(x).unflatten(-1, (self.num_key_heads, -1))
        values = self.share * self.value_dim
        *qkv, z = (part.flatten(2) for part in by_head.split([self.key_dim, self.key_dim, values, values], dim=-1))
        b, a = (part.flatten(2) for part in self.in_proj_ba(x).unflatten(-1, (self.num_key_heads, -1)).chunk(2, -1))
        return torch.cat(qkv, dim=-1), z.unflatten(-1, (self.num_value_heads, -1)), b, a

    def _recur(
        self, state: Tensor | None, mixed: Tensor, z: Tensor, b: Tensor, a: Tensor, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What out_proj takes, (batch, seq, value channels), and the state after it."""
        wide = torch.promote_types(mixed.dtype, torch.float32)
        beta, g = b.to(wide).sigmoid(), decay_rates(self.A_log) * F.softplus(a.to(wide) + self.dt_bias)
        q, k, v = mixed.split(self.sizes, dim=-1)
        q, k = (_unit(part.unflatten(-1, (self.num_key_heads, -1))) for part in (q, k))
        v = v.unflatten(-1, (self.num_value_heads, -1))
        if state is not None and mixed.shape[1] == 1 and cu_seqlens is None and not torch.is_grad_enabled():
            state = state.clone()
            o = gated_delta_rule_update(state, q[:, 0], k[:, 0], v[:, 0], g[:, 0], beta[:, 0])[:, None]
        elif cu_seqlens is None:
            o, state = gated_delta_rule(q, k, v, g, beta, initial_state=state, return_final_state=True)
        else:
            o, state = gated_delta_rule(
                q[0], k[0], v[0], g[0], beta[0], initial_state=state, cu_seqlens=cu_seqlens, return_final_state=True
            )
            o = o[None]
        gate = F.silu(z.to(wide))
        return (self.norm(o) * gate).to(mixed.dtype).flatten(2), state


def _unit(x: Tensor) -> Tensor:
    """Heads of length 1, in float32 at least, rounded once."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + _NORM_EPS)).to(x.dtype)
