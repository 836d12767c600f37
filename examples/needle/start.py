"""Where training starts: weights under which retrieval forms within minutes on a CPU.

From independent random weights a model of this size sees millions of tokens before it first copies anything.  Three
changes to the random start, all of them trained on afterwards, shorten that to a few hundred steps:

 - dimension 0 of every embedding starts at 1, so that a head can act on positions alone;
 - head j of the first layer starts out looking j + 1 tokens back;
 - the second layer's heads start out copying what they look at into the residual stream.

Which tokens the second layer looks at, and all that the third does, is left to training.
"""

from __future__ import annotations

import torch

from lcore.models import Decoder

PAIRS = 10  # rotary pairs that tell near positions apart: the fastest ones
SHARPNESS = 8.0  # logit that each of them gives to the token the head looks at


@torch.no_grad()
def start_for_retrieval(model: Decoder) -> None:
    """Draws the weights anew from torch's global generator and arranges the first two layers."""
    config = model.config
    hidden, heads, kv_heads, dim = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            weight.normal_(std=hidden**-0.5)
            if name.endswith(("o_proj.weight", "down_proj.weight")) and ".layers.0.self_attn" not in name:
                weight.mul_((2 * config.num_layers) ** -0.5)
    model.model.embed_tokens.weight[:, 0] = 1.0

    # After the norm dimension 0 is about sqrt(hidden / 2): the other dimensions have norm 1 together.
    amplitude = (SHARPNESS * dim**0.5) ** 0.5 / (hidden / 2) ** 0.5
    first = model.model.layers[0].self_attn
    assert first.rotary is not None
    turns = first.rotary.inv_freq[:PAIRS]
    queries = first.q_proj.weight.mul_(0.3).view(heads, dim, hidden)
    keys = first.k_proj.weight.mul_(0.3).view(kv_heads, dim, hidden)
    keys[:, :PAIRS, 0] = amplitude
    keys[:, dim // 2 : dim // 2 + PAIRS, 0] = 0.0
    for head in range(heads):
        angle = -(head + 1) * turns
        queries[head, :PAIRS, 0] = amplitude * angle.cos()
        queries[head, dim // 2 : dim // 2 + PAIRS, 0] = amplitude * angle.sin()

    second = model.model.layers[1].self_attn
    group = heads // kv_heads
    values = second.v_proj.weight.view(kv_heads, dim, hidden)
    outputs = second.o_proj.weight.view(hidden, heads, dim)
    for head in range(kv_heads):
        basis = torch.linalg.qr(torch.randn(hidden, dim))[0]
        values[head] = basis.T
        outputs[:, head * group : (head + 1) * group] = basis[:, None] / group
