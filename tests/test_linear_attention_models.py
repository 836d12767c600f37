"""Models that are gated_linear_attention with particular q, k, v and g: each against the recurrence of its paper."""

import pytest
import torch
import torch.nn.functional as F

import lcore

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS, HEADS, KEY, VALUE = 130, 3, 8, 12


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def against(recurrence, inputs, call):
    """Values and gradients of a call against those of a recurrence in plain torch, both in float64."""
    leaves = [x.requires_grad_() for x in inputs]
    got, want = call(*leaves), recurrence(*leaves)
    torch.testing.assert_close(got, want)
    dout = torch.randn_like(want)
    for x, y in zip(torch.autograd.grad(got, leaves, dout), torch.autograd.grad(want, leaves, dout), strict=True):
        torch.testing.assert_close(x, y)


def qkv():
    return draw(TOKENS, HEADS, KEY), draw(TOKENS, HEADS, KEY), draw(TOKENS, HEADS, VALUE)


def test_retnet():
    """S_n = gamma S_(n-1) + k_n^T v_n, o_n = q_n S_n, gamma_h = 1 - 2^(-5-h) (Sun et al. 2023, eqs. 3 and 8)."""
    gamma = 1 - 2.0 ** (-5 - torch.arange(HEADS, dtype=torch.float64))

    def recurrence(q, k, v):
        state, outs = torch.zeros(HEADS, KEY, VALUE, dtype=torch.float64), []
        for n in range(TOKENS):
            state = gamma[:, None, None] * state + k[n, :, :, None] * v[n, :, None]
            outs.append(torch.einsum("hk,hkv->hv", q[n], state))
        return torch.stack(outs)

    def call(q, k, v):
        return lcore.gated_linear_attention(q[None], k[None], v[None], gamma.log(), scale=1.0)[0]

    against(recurrence, qkv(), call)


def test_lightning_attention():
    """o_n = q_n sum_(m<=n) lambda^(n-m) k_m^T v_m, lambda_h = e^-slope_h (Qin et al. 2024, eq. 2)."""
    slopes = 2.0 ** -torch.arange(1, HEADS + 1, dtype=torch.float64)
    distance = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)
    weights = torch.exp(-slopes[:, None, None] * distance).tril()

    def recurrence(q, k, v):
        return torch.einsum("hnm,nhk,mhk,mhv->nhv", weights, q, k, v)

    def call(q, k, v):
        return lcore.gated_linear_attention(q[None], k[None], v[None], -slopes, scale=1.0)[0]

    against(recurrence, qkv(), call)


def test_simple_gla():
    """One data-dependent decay a head and token: S_t = alpha_t S_(t-1) + k_t v_t^T, alpha_t = sigmoid(x_t)^(1/16)."""

    def recurrence(q, k, v, x):
        alpha = torch.sigmoid(x) ** (1 / 16)
        state, outs = torch.zeros(HEADS, KEY, VALUE, dtype=torch.float64), []
        for t in range(TOKENS):
            state = alpha[t, :, None, None] * state + k[t, :, :, None] * v[t, :, None]
            outs.append(torch.einsum("hk,hkv->hv", q[t], state) * KEY**-0.5)
        return torch.stack(outs)

    def call(q, k, v, x):
        return lcore.gated_linear_attention(q[None], k[None], v[None], F.logsigmoid(x)[None] / 16)[0]

    against(recurrence, (*qkv(), draw(TOKENS, HEADS)), call)


def test_hgrn2():
    """h_t = Diag(f_t) h_(t-1) + (1 - f_t) i_t^T, y_t = o_t h_t, f above a lower bound (Qin et al. 2024, eqs. 2, 6)."""
    bound = 0.3

    def recurrence(o, x, i):
        forget = bound + (1 - bound) * torch.sigmoid(x)
        state, outs = torch.zeros(HEADS, KEY, VALUE, dtype=torch.float64), []
        for t in range(TOKENS):
            state = forget[t, :, :, None] * state + (1 - forget[t])[..., None] * i[t, :, None]
            outs.append(torch.einsum("hk,hkv->hv", o[t], state))
        return torch.stack(outs)

    def call(o, x, i):
        forget = bound + (1 - bound) * torch.sigmoid(x)
        return lcore.gated_linear_attention(o[None], 1 - forget[None], i[None], forget.log()[None], scale=1.0)[0]

    against(recurrence, qkv(), call)


def test_hgrn():
    """h_t = f_t h_(t-1) + (1 - f_t) i_t for each channel (Qin et al. 2023, eq. 3): heads of one key and one value."""
    channels = 7

    def recurrence(x, i):
        forget = torch.sigmoid(x)
        state, outs = torch.zeros(channels, dtype=torch.float64), []
        for t in range(TOKENS):
            state = forget[t] * state + (1 - forget[t]) * i[t]
            outs.append(state)
        return torch.stack(outs)

    def call(x, i):
        q = torch.ones(1, TOKENS, channels, 1, dtype=torch.float64)
        rows = [y[None, ..., None] for y in (torch.sigmoid(-x), i)]
        return lcore.gated_linear_attention(q, *rows, F.logsigmoid(x)[None], scale=1.0)[0, ..., 0]

    against(recurrence, (draw(TOKENS, channels), draw(TOKENS, channels)), call)
