"""The Mamba block: a gated selective scan behind a short convolution."""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor

from lcore.cache import LayerState
from lcore.errors import message
from lcore.nn.linear import Linear, linear
from lcore.nn.norm import RMSNorm
from lcore.nn.token_by_token import conv_states, token_by_token
from lcore.ops import causal_conv1d, selective_scan

# Bounds of the step sizes that a fresh block starts with, and the least one.
DT_RANGE, DT_FLOOR = (1e-3, 0.1), 1e-4


class Mamba(torch.nn.Module):
    """Mamba's mixer, with the parameter names of Hugging Face checkpoints.

    Formula:  u, z = in(x); u = silu(conv(u)); dt, B, C = x_proj(u); delta = dt_proj(dt);
              out = out_proj(selective_scan(u, delta, -e^A_log, B, C, D, z)), with softplus of delta
    Args:
        hidden_size: of x.
        intermediate_size: channels of the scan; default 2 hidden_size.
        state_size: states of a channel.
        conv_width: 1 to 8 tokens that the convolution sees.
        dt_rank: size of dt before its projection; default hidden_size / 16, rounded up.
        bias, conv_bias: whether in_proj and out_proj, and the convolution, have a bias.
        norm_eps: normalise dt, B and C with this eps (Falcon Mamba); None for no norm. norm_weights: with weights
            (Jamba).
    Source:   Gu & Dao 2023, Mamba, arXiv:2312.00752; Zuo et al. 2024, Falcon Mamba, arXiv:2410.05355.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int | None = None,
        state_size: int = 16,
        *,
        conv_width: int = 4,
        dt_rank: int | None = None,
        bias: bool = False,
        conv_bias: bool = True,
        norm_eps: float | None = None,
        norm_weights: bool = False,
    ) -> None:
        super().__init__()
        inner = intermediate_size or 2 * hidden_size
        self.state_size, self.norm_eps = state_size, norm_eps
        self.dt_rank = dt_rank or math.ceil(hidden_size / 16)
        self.in_proj = Linear(hidden_size, 2 * inner, bias=bias)
        self.conv1d = torch.nn.Conv1d(inner, inner, conv_width, groups=inner, bias=conv_bias)
        self.x_proj = Linear(inner, self.dt_rank + 2 * state_size, bias=False)
        self.dt_proj = Linear(self.dt_rank, inner)
        self.A_log = torch.nn.Parameter(torch.arange(1.0, state_size + 1).log().repeat(inner, 1))
        self.D = torch.nn.Parameter(torch.ones(inner))
        self.out_proj = Linear(inner, hidden_size, bias=bias)
        weighted = norm_eps is not None and norm_weights
        sizes = {"dt_layernorm": self.dt_rank, "b_layernorm": state_size, "c_layernorm": state_size}
        self.norms = tuple(sizes) if weighted else ()
        for name in self.norms:
            self.add_module(name, RMSNorm(sizes[name], norm_eps or 0.0))
        with torch.no_grad():
            self.dt_proj.weight.uniform_(-(self.dt_rank**-0.5), self.dt_rank**-0.5)
            self.dt_proj.bias.copy_(initial_dt_bias(inner))

    def new_state(self, batch_size: int = 1) -> LayerState:
        """Zeros: the state before the first token of each row. recurrent is (batch, channels, states)."""
        return zero_state(self.conv1d, self.A_log, (batch_size, *self.A_log.shape))

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
        """Mixes each token of x with those before it.

        Args:
            x: (batch, seq, hidden_size).
            state: of the tokens before x, as `new_state` or an earlier call gives it; not written. None for none.
            cu_seqlens: (sequences + 1,) int32 from 0: batch is 1, sequence i is tokens cu_seqlens[i] to
                cu_seqlens[i + 1], and the state has one row a sequence. A sequence may be empty.
            return_final_state: return the state after x too.
            each: let it be the states after each token, (seq, batch, ...), which then are taken one by one, with the
                bits that they have one call at a time. Not with cu_seqlens.
        Returns: (batch, seq, hidden_size), the dtype of x; with return_final_state (out, state).
        Gradients: for x, the parameters and the state, through out and the final state.
        """
        check_hidden("nn.Mamba", x, self.in_proj.in_features)
        conv, recurrent = state_before(self, x, state, each)
        u, z = self.in_proj(x).transpose(1, 2).chunk(2, dim=1)
        before, inputs = conv, u
        u, conv = causal_conv1d(
            u, self.conv1d.weight.squeeze(1), self.conv1d.bias, activation="silu", initial_state=conv,
            cu_seqlens=cu_seqlens, return_final_state=True,
        )  # fmt: skip
        sizes = [self.dt_rank, self.state_size, self.state_size]
        dt, B, C = self._normed(*self.x_proj(u.transpose(1, 2)).split(sizes, dim=-1))
        # The bias joins inside the scan, in float32.
        delta = linear(dt, self.dt_proj.weight).transpose(1, 2)
        A = decay_rates(self.A_log)

        def scan(
            recurrent: Tensor | None, u: Tensor, delta: Tensor, B: Tensor, C: Tensor, z: Tensor
        ) -> tuple[Tensor, Tensor]:
            return selective_scan(
                u, delta, A, B, C, self.D, z, self.dt_proj.bias, True,
                initial_state=recurrent, cu_seqlens=cu_seqlens, return_final_state=True,
            )  # fmt: skip

        tokens = (u, delta, B.transpose(1, 2), C.transpose(1, 2), z)
        if each and before is not None:
            conv = conv_states(before, inputs)
            y, recurrent = token_by_token(scan, recurrent, tokens, dim=2)
        else:
            y, recurrent = scan(recurrent, *tokens)
        out = self.out_proj(y.transpose(1, 2))
        return (out, LayerState(conv, recurrent)) if return_final_state else out

    def _normed(self, dt: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.norms:
            dt, B, C = (self.get_submodule(name)(part) for name, part in zip(self.norms, (dt, B, C), strict=True))
        elif self.norm_eps is not None:
            dt, B, C = (torch.nn.functional.rms_norm(part, part.shape[-1:], None, self.norm_eps) for part in (dt, B, C))
        return dt, B, C


def check_hidden(owner: str, x: Tensor, hidden_size: int) -> None:
    if x.dim() != 3 or x.shape[2] != hidden_size:
        rule = f"have shape (batch, seq, hidden_size) = (*, *, {hidden_size})"
        raise ValueError(message(owner, "x", rule, tuple(x.shape)))


def state_before(block: Any, x: Tensor, state: LayerState | None, each: bool) -> LayerState | tuple[None, None]:
    """The state that a block goes on from: zeros where it gives one after each token and has none."""
    if state is None and each:
        return block.new_state(x.shape[0])
    return (None, None) if state is None else state


def decay_rates(A_log: Tensor) -> Tensor:
    """-e^A_log, in float32 at least."""
    return -A_log.to(torch.promote_types(A_log.dtype, torch.float32)).exp()


def zero_state(conv: torch.nn.Conv1d, like: Tensor, shape: tuple[int, ...]) -> LayerState:
    weight = conv.weight
    wide = torch.promote_types(like.dtype, torch.float32)
    return LayerState(
        weight.new_zeros(shape[0], weight.shape[0], weight.shape[2] - 1), like.new_zeros(shape, dtype=wide)
    )


def initial_dt_bias(size: int) -> Tensor:
    """What softplus takes to step sizes spread evenly, by their logarithm, over DT_RANGE."""
    low, high = (math.log(bound) for bound in DT_RANGE)
    dt = torch.empty(size).uniform_(low, high).exp().clamp(min=DT_FLOOR)
    return dt + torch.log(-torch.expm1(-dt))
