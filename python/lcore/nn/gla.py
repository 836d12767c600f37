"""The gated linear attention block: a decay for every key channel from a narrow projection, a norm and a gate."""

from __future__ import annotations

from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from lcore.cache import LayerState
from lcore.errors import require
from lcore.nn.linear import Linear
from lcore.nn.mamba import check_hidden, state_before
from lcore.nn.norm import RMSNorm
from lcore.nn.token_by_token import token_by_token
from lcore.ops import gated_linear_attention, gated_linear_attention_update


class GatedLinearAttention(torch.nn.Module):
    """GLA's mixer, with the parameter names of flash-linear-attention's layer.

    Formula:  q, k, v = q(x), k(x), v(x); g = log sigmoid(gk(x)) / gate_normalizer, gk two projections with gate_rank
              between them; out = o(norm(gated_linear_attention(q, k, v, g)) silu(g_proj(x))), the norm an RMSNorm of
              each head
    Args:
        hidden_size: of x.
        num_heads: divides the sizes of keys and values.
        key_size, value_size: of all heads together; default hidden_size / 2 and hidden_size.
        gate_rank: of the projection of the decays.
        gate_normalizer: the larger, the longer a fresh block remembers.
        norm_eps: of the norm.
    Source:   Yang et al. 2023, Gated Linear Attention Transformers, arXiv:2312.06635, section 4.4.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 4,
        key_size: int | None = None,
        value_size: int | None = None,
        *,
        gate_rank: int = 16,
        gate_normalizer: float = 16.0,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        keys, values = key_size or hidden_size // 2, value_size or hidden_size
        for name, size in (("key_size", keys), ("value_size", values)):
            rule = f"be a multiple of num_heads = {num_heads}"
            require(size % num_heads == 0, "nn.GatedLinearAttention", name, rule, size)
        self.num_heads, self.gate_normalizer = num_heads, gate_normalizer
        self.q_proj = Linear(hidden_size, keys, bias=False)
        self.k_proj = Linear(hidden_size, keys, bias=False)
        self.v_proj = Linear(hidden_size, values, bias=False)
        self.g_proj = Linear(hidden_size, values, bias=False)
        self.gk_proj = torch.nn.Sequential(Linear(hidden_size, gate_rank, bias=False), Linear(gate_rank, keys))
        self.g_norm = RMSNorm(values // num_heads, norm_eps)
        self.o_proj = Linear(values, hidden_size, bias=False)

    def new_state(self, batch_size: int = 1) -> LayerState:
        """Zeros: the state before the first token. recurrent is (batch, heads, key_dim, value_dim); there is no
        convolution, and conv is empty."""
        weight, heads = self.q_proj.weight, self.num_heads
        wide = torch.promote_types(weight.dtype, torch.float32)
        shape = (batch_size, heads, weight.shape[0] // heads, self.v_proj.out_features // heads)
        return LayerState(weight.new_zeros(batch_size, 0, 0), weight.new_zeros(shape, dtype=wide))

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
        check_hidden("nn.GatedLinearAttention", x, self.q_proj.in_features)
        _, recurrent = state_before(self, x, state, each)
        wide = torch.promote_types(x.dtype, torch.float32)
        decay = F.logsigmoid(self.gk_proj(x).to(wide)) / self.gate_normalizer
        parts = (self.q_proj(x), self.k_proj(x), self.v_proj(x), decay)
        q, k, v, g = (part.unflatten(-1, (self.num_heads, -1)) for part in parts)
        if each:
            o, recurrent = token_by_token(self._recur, recurrent, (q, k, v, g), dim=1)
        else:
            o, recurrent = self._recur(recurrent, q, k, v, g, cu_seqlens)
        out = self.o_proj(self.g_norm(o).flatten(2) * F.silu(self.g_proj(x)))
        if not return_final_state:
            return out
        rows = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        return out, LayerState(x.new_zeros((x.shape[1], rows, 0, 0) if each else (rows, 0, 0)), recurrent)

    def _recur(
        self, state: Tensor | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if state is not None and q.shape[1] == 1 and cu_seqlens is None and not torch.is_grad_enabled():
            state = state.clone()
            return gated_linear_attention_update(state, q[:, 0], k[:, 0], v[:, 0], g[:, 0])[:, None], state
        if cu_seqlens is None:
            return gated_linear_attention(q, k, v, g, initial_state=state, return_final_state=True)
        o, state = gated_linear_attention(
            q[0], k[0], v[0], g[0], initial_state=state, cu_seqlens=cu_seqlens, return_final_state=True
        )
        return o[None], state
