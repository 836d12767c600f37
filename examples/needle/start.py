"""Where training starts: weights under which retrieval forms within minutes on a CPU.

From independent random weights a model of this size sees millions of tokens before it first finds anything.  So the
first two layers start as a rough induction circuit, which training then makes exact and robust:

 - dimension 0 of every embedding starts at 1, so that a head can act on positions alone;
 - head j of the first layer starts out copying the token j + 1 places back into a random subspace of its own;
 - the second layer's heads start out comparing what stands before a key with what stands one place later before the
   query, through random projections into the rotary pairs that hardly turn, and copying the token they find.

All numbers are random but for these relations, none knows a word or a digit, and every weight is trained.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lcore.models import Decoder
from lcore.nn import Attention

PAIRS = 10  # rotary pairs that tell near positions apart: the fastest ones
SHARPNESS = 10.0  # logit that each of them gives to the token a head looks at
STILL = 14  # first rotary pair that turns less than one radian over 131072 positions
MATCH = 8.0  # gain of the comparison in the second layer
OTHERS = 0.3  # spread of the remaining query and key weights in both layers, relative to the other layers'


@torch.no_grad()
def start_for_retrieval(model: Decoder) -> None:
    """Draws all weights anew from torch's global generator and arranges the first two layers."""
    config = model.config
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            weight.normal_(std=config.hidden_size**-0.5)
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_((2 * config.num_layers) ** -0.5)
    model.model.embed_tokens.weight[:, 0] = 1.0
    first, second = (layer.self_attn for layer in model.model.layers[:2])
    read, written = look_back(first, config.num_heads, config.num_kv_heads)
    compare_and_copy(second, config.num_heads, config.num_kv_heads, read, written)


def look_back(layer: Attention, heads: int, kv_heads: int) -> tuple[list[Tensor], list[Tensor]]:
    """Head j copies the token j + 1 back; returns the (hidden, head_dim) bases that kv heads read and heads write."""
    hidden, dim = layer.q_proj.in_features, layer.head_dim
    queries, keys, values, outputs = _by_head(layer, heads, kv_heads)
    read = [_basis(hidden, dim) for _ in range(kv_heads)]
    written = [_basis(hidden, dim) for _ in range(heads)]
    # After the norm dimension 0 is about sqrt(hidden / 2): the other dimensions have norm 1 together.
    constant = (hidden / 2) ** 0.5
    amplitude = (SHARPNESS * dim**0.5) ** 0.5 / constant
    assert layer.rotary is not None
    cosines, sines = slice(0, PAIRS), slice(dim // 2, dim // 2 + PAIRS)
    keys[:, cosines, 0], keys[:, sines, 0] = amplitude, 0.0
    for head in range(heads):
        angles = -(head + 1) * layer.rotary.inv_freq[:PAIRS]
        queries[head, cosines, 0], queries[head, sines, 0] = amplitude * angles.cos(), amplitude * angles.sin()
        outputs[:, head] = written[head] * 2**0.5 / constant  # about as long as the token's own embedding
    for head in range(kv_heads):
        values[head] = read[head].T
        values[head, :, 0] = 0.0
    return read, written


def compare_and_copy(layer: Attention, heads: int, kv_heads: int, read: list[Tensor], written: list[Tensor]) -> None:
    """Key heads hold what was written j + 1 back where query heads hold what was written j back."""
    hidden, dim, group = layer.q_proj.in_features, layer.head_dim, heads // kv_heads
    queries, keys, values, outputs = _by_head(layer, heads, kv_heads)
    still = torch.cat([torch.arange(STILL, dim // 2), torch.arange(dim // 2 + STILL, dim)])
    for head in range(kv_heads):
        mine = slice(head * group, (head + 1) * group)
        copied = _basis(hidden, dim)
        values[head], outputs[:, mine] = copied.T, copied[:, None] / group
        # Heads of one group of the first layer read through one basis, so what they wrote can be compared.
        pairs = [(written[j - 1], written[j]) for j in range(1, heads) if j % group]
        if head:
            pairs.append((read[0], written[0]))
        rows = still[torch.randperm(len(still))].chunk(len(pairs))
        for (asked, held), row in zip(pairs, rows, strict=True):
            code = _basis(dim, len(row)).T * MATCH**0.5
            keys[head, row], queries[mine, row] = code @ held.T, code @ asked.T


def _by_head(layer: Attention, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Views of the four projections, split by head; queries and keys shrunk to OTHERS of their spread."""
    hidden, dim = layer.q_proj.in_features, layer.head_dim
    return (
        layer.q_proj.weight.mul_(OTHERS).view(heads, dim, hidden),
        layer.k_proj.weight.mul_(OTHERS).view(kv_heads, dim, hidden),
        layer.v_proj.weight.view(kv_heads, dim, hidden),
        layer.o_proj.weight.view(hidden, heads, dim),
    )


def _basis(size: int, count: int) -> Tensor:
    """(size, count) random orthonormal columns."""
    return torch.linalg.qr(torch.randn(size, count))[0]
