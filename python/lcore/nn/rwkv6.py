"""RWKV-6's two blocks: time-mix, a decaying state read with a bonus for its own token, and channel-mix."""

from __future__ import annotations

from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from lcore.cache import LayerState
from lcore.errors import require
from lcore.nn.linear import Linear, linear
from lcore.nn.mamba import check_hidden, state_before
from lcore.nn.mlp import sigmoid
from lcore.nn.token_by_token import conv_states, token_by_token
from lcore.ops import causal_conv1d, rwkv6, rwkv6_update

_MIXES = ("w", "k", "v", "r", "g")  # what each token is mixed with the one before it for, in the order of time_maa_w2
_NORM_EPS = 64e-5  # of heads, whose values are 8 times as large as usual


class RWKV6TimeMix(torch.nn.Module):
    """RWKV-6's mixer of tokens, with the parameter names of its checkpoints.

    Formula:  x' is the token before x. d = x' - x; m = tanh((x + d maa_x) W1) W2 for each of w, k, v, r, g; y_i = x +
              d (maa_i + m_i); r, k, v = receptance(y_r), key(y_k), value(y_v); w = time_decay + tanh(y_w D1) D2;
              out = output(norm(rwkv6(r, k, v, -e^w, time_faaaa)) silu(gate(y_g))), the norm a LayerNorm of each head
    Args:
        hidden_size: of x, a multiple of head_dim.
        head_dim: of keys and values.
        mix_rank, decay_rank: of the narrow projections W1, W2 and D1, D2.
    Source:   Peng et al. 2024, Eagle and Finch, arXiv:2404.05892, section 4.
    """

    def __init__(self, hidden_size: int, head_dim: int = 64, *, mix_rank: int = 32, decay_rank: int = 64) -> None:
        super().__init__()
        rule = f"be a multiple of head_dim = {head_dim}"
        require(hidden_size % head_dim == 0, "nn.RWKV6TimeMix", "hidden_size", rule, hidden_size)
        self.num_heads = hidden_size // head_dim
        for name in ("x", *_MIXES):
            self.register_parameter(f"time_maa_{name}", torch.nn.Parameter(torch.full((1, 1, hidden_size), 0.5)))
        self.time_maa_w1 = torch.nn.Parameter(torch.zeros(hidden_size, len(_MIXES) * mix_rank))
        self.time_maa_w2 = torch.nn.Parameter(torch.empty(len(_MIXES), mix_rank, hidden_size).uniform_(-0.01, 0.01))
        # Of a head some channels forget within a token and some keep for hundreds.
        self.time_decay = torch.nn.Parameter(torch.linspace(-6, -1, hidden_size).view(1, 1, -1))
        self.time_decay_w1 = torch.nn.Parameter(torch.zeros(hidden_size, decay_rank))
        self.time_decay_w2 = torch.nn.Parameter(torch.empty(decay_rank, hidden_size).uniform_(-0.01, 0.01))
        self.time_faaaa = torch.nn.Parameter(torch.zeros(self.num_heads, head_dim))
        self.receptance = Linear(hidden_size, hidden_size, bias=False)
        self.key = Linear(hidden_size, hidden_size, bias=False)
        self.value = Linear(hidden_size, hidden_size, bias=False)
        self.output = Linear(hidden_size, hidden_size, bias=False)
        self.gate = Linear(hidden_size, hidden_size, bias=False)
        self.ln_x = torch.nn.GroupNorm(self.num_heads, hidden_size, eps=_NORM_EPS)

    def new_state(self, batch_size: int = 1) -> LayerState:
        """Zeros: the state before the first token. conv is (batch, hidden_size, 1), the last token; recurrent is
        (batch, heads, key_dim, value_dim)."""
        bonus = self.time_faaaa
        shape = (batch_size, self.num_heads, bonus.shape[1], bonus.shape[1])
        wide = torch.promote_types(bonus.dtype, torch.float32)
        return LayerState(bonus.new_zeros(batch_size, bonus.numel(), 1), bonus.new_zeros(shape, dtype=wide))

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
        check_hidden("nn.RWKV6TimeMix", x, self.key.in_features)
        last, recurrent = state_before(self, x, state, each)
        before, after = shifted(x, last, cu_seqlens)
        if each and last is not None:
            after = conv_states(last, x.transpose(1, 2))
        difference = before - x
        for_w, for_k, for_v, for_r, for_g = self._mixed(x, difference)
        wide = torch.promote_types(x.dtype, torch.float32)
        narrow = torch.tanh(linear(for_w, self.time_decay_w1.T))
        decay = -torch.exp((self.time_decay + linear(narrow, self.time_decay_w2.T)).to(wide))
        parts = (self.receptance(for_r), self.key(for_k), self.value(for_v), decay)
        r, k, v, g = (part.unflatten(-1, (self.num_heads, -1)) for part in parts)
        if each:
            o, recurrent = token_by_token(self._recur, recurrent, (r, k, v, g), dim=1)
        else:
            o, recurrent = self._recur(recurrent, r, k, v, g, cu_seqlens)
        normed = self.ln_x(o.flatten(2).flatten(0, 1)).view(x.shape)
        out = self.output(normed * F.silu(self.gate(for_g)))
        return (out, LayerState(after, recurrent)) if return_final_state else out

    def _mixed(self, x: Tensor, difference: Tensor) -> list[Tensor]:
        """What w, k, v, r and g are computed from."""
        narrow = torch.tanh(linear(x + difference * self.get_parameter("time_maa_x"), self.time_maa_w1.T))
        parts = zip(_MIXES, narrow.chunk(len(_MIXES), dim=-1), self.time_maa_w2, strict=True)
        return [
            x + difference * (self.get_parameter(f"time_maa_{name}") + linear(part, weight.T))
            for name, part, weight in parts
        ]

    def _recur(
        self, state: Tensor | None, r: Tensor, k: Tensor, v: Tensor, g: Tensor, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if state is not None and r.shape[1] == 1 and cu_seqlens is None and not torch.is_grad_enabled():
            state = state.clone()
            return rwkv6_update(state, r[:, 0], k[:, 0], v[:, 0], g[:, 0], self.time_faaaa)[:, None], state
        if cu_seqlens is None:
            return rwkv6(r, k, v, g, self.time_faaaa, initial_state=state, return_final_state=True)
        o, state = rwkv6(
            r[0], k[0], v[0], g[0], self.time_faaaa, initial_state=state, cu_seqlens=cu_seqlens, return_final_state=True
        )
        return o[None], state


class RWKV6ChannelMix(torch.nn.Module):
    """RWKV-6's feed-forward block, which sees the token before each too, with the parameter names of its checkpoints.

    Formula:  x' is the token before x; y_i = x + (x' - x) maa_i; out = sigmoid(receptance(y_r)) value(relu(key(y_k))²)
    Args:     hidden_size, intermediate_size (default 3.5 hidden_size).
    Source:   as `RWKV6TimeMix`.
    """

    def __init__(self, hidden_size: int, intermediate_size: int | None = None) -> None:
        super().__init__()
        inner = intermediate_size or hidden_size * 7 // 2
        self.time_maa_k = torch.nn.Parameter(torch.full((1, 1, hidden_size), 0.5))
        self.time_maa_r = torch.nn.Parameter(torch.full((1, 1, hidden_size), 0.5))
        self.key = Linear(hidden_size, inner, bias=False)
        self.receptance = Linear(hidden_size, hidden_size, bias=False)
        self.value = Linear(inner, hidden_size, bias=False)

    def forward(
        self, x: Tensor, last: Tensor | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x: (batch, seq, hidden_size). last: (batch, hidden_size, 1), the token before x; None for zeros. cu_seqlens
        as `Mamba.forward`. Returns the shape and dtype of x, and the last token of x."""
        check_hidden("nn.RWKV6ChannelMix", x, self.key.in_features)
        before, last = shifted(x, last, cu_seqlens)
        difference = before - x
        hidden = torch.relu(self.key(x + difference * self.time_maa_k)).square()
        return sigmoid(self.receptance(x + difference * self.time_maa_r)) * self.value(hidden), last


def shifted(x: Tensor, last: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """The token before each, and the last one: a convolution of width 2 that sees the other tap alone."""
    taps = x.new_tensor([1.0, 0.0]).expand(x.shape[2], 2).contiguous()
    before, last = causal_conv1d(
        x.transpose(1, 2), taps, initial_state=last, cu_seqlens=cu_seqlens, return_final_state=True
    )
    return before.transpose(1, 2), last
