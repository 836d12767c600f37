"""Causal self-attention with rotary positions, over a window of tokens or over a paged cache."""

from __future__ import annotations

from typing import Any

import torch

from lcore.cache import PagedCache
from lcore.errors import message, require
from lcore.nn.linear import Linear
from lcore.nn.mlp import sigmoid
from lcore.nn.norm import RMSNorm
from lcore.nn.rotary import Rotary
from lcore.ops import attention
from lcore.positions import RopeConfig


class Attention(torch.nn.Module):
    """Grouped-query causal self-attention.

    Formula:  out = o(attention(rope(norm(q(x))), rope(norm(k(x))), v(x))); the norms are optional; gated, what goes
              through o is first multiplied by the sigmoid of a gate, which q computes beside each head
    Args:
        hidden_size, num_heads, num_kv_heads, head_dim: sizes; num_heads is a multiple of num_kv_heads.
        layer: index of this layer's keys and values in a cache.
        bias, output_bias: whether q, k, v, and o, have a bias.
        qk_norm_eps: normalise each head of q and k with this eps (Qwen3); None for no norm. norm: the kind of it.
        gated: the output gate (Qwen3-Next).
        window: a token sees itself and the window - 1 tokens before it; None for all.
        rope: rotary settings; None for no positions.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        layer: int = 0,
        bias: bool = False,
        output_bias: bool = False,
        qk_norm_eps: float | None = None,
        norm: type[RMSNorm] = RMSNorm,
        gated: bool = False,
        window: int | None = None,
        rope: RopeConfig | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_kv_heads or num_heads
        head_dim = head_dim or hidden_size // num_heads
        got = f"{num_heads} and {num_kv_heads}"
        require(num_heads % num_kv_heads == 0, "nn.Attention", "num_heads", "be a multiple of num_kv_heads", got)
        require(window is None or window > 0, "nn.Attention", "window", "be positive or None", window)
        self.layer, self.head_dim, self.gated = layer, head_dim, gated
        self.window_size = (-1, -1) if window is None else (window - 1, 0)
        self.q_proj = Linear(hidden_size, num_heads * head_dim * (2 if gated else 1), bias=bias)
        self.k_proj = Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.v_proj = Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.o_proj = Linear(num_heads * head_dim, hidden_size, bias=output_bias)
        self.q_norm = None if qk_norm_eps is None else norm(head_dim, qk_norm_eps)
        self.k_norm = None if qk_norm_eps is None else norm(head_dim, qk_norm_eps)
        self.rotary = None if rope is None else Rotary(rope, head_dim)

    def forward(
        self,
        x: torch.Tensor,
        positions: torch.Tensor | None = None,
        cache: PagedCache | None = None,
        *,
        lengths: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attends from each token of x to itself and the tokens before it.

        Args:
            x: (batch, seq, hidden_size).
            positions: (seq,) or (batch, seq) for the rotation; default 0 .. seq - 1 without a cache, and the
                number of tokens seen onwards with one. Not read where the cache rotates (`PagedCache(rope=...)`).
            cache: keys and values of x are appended to it and all it holds is attended to; without one, x is all
                there is and the call is differentiable.
            lengths: (batch,) tokens of each row that are real, the rest being padding on the right.
        Returns: (batch, seq, hidden_size), the dtype of x.
        """
        if x.dim() != 3:
            raise ValueError(message("nn.Attention", "x", "have shape (batch, seq, hidden_size)", tuple(x.shape)))
        heads = (*x.shape[:2], -1, self.head_dim)
        q, k, v = self.q_proj(x).view(heads), self.k_proj(x).view(heads), self.v_proj(x).view(heads)
        gate = None
        if self.gated:
            q, gate = q.unflatten(2, (-1, 2)).unbind(3)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary is not None and (cache is None or cache.layer_rope(self.layer) is None):
            if positions is None:
                positions = next_positions(x.shape[1], x.device, cache, self.layer)
            q, k = self.rotary(q, positions), self.rotary(k, positions)
        out: Any
        if cache is None:
            out = attention(q, k, v, causal=True, window_size=self.window_size)
        else:
            cache.append(self.layer, k, v, lengths=lengths)
            out = cache.attend(self.layer, q, lengths=lengths, window_size=self.window_size)
        if gate is not None:
            out = out * sigmoid(gate)
        return self.o_proj(out.flatten(2))


def next_positions(new: int, device: torch.device, cache: PagedCache | None = None, layer: int = 0) -> torch.Tensor:
    """Positions of the next `new` tokens: (new,) from 0 without a cache, (batch, new) after those seen with one."""
    steps = torch.arange(new, device=device)
    return steps if cache is None else cache.seen(layer).to(device)[:, None] + steps
