"""Where training starts: every mixer as a rough induction circuit, as examples/needle arranges its attention layers.

 - dimension 0 of every embedding starts at 1, so that a gate can start open;
 - keys start as what queries were one token before: a query finds what followed the words that stand before it;
 - values start as the token itself and are written back through the transpose of what read them;
 - states start to fade over hundreds of tokens and more.

All numbers are random but for these relations, none knows a word or a digit, and every weight is trained.
"""

from __future__ import annotations

import torch
from hybrid_model import CONV_WIDTH, ConvAttention, HybridDecoder
from torch import Tensor

from lcore.nn import GatedDeltaNet

WRITE = 0.5  # gain of what a mixer writes
OPEN = 2.0  # what an output gate starts around, before its silu
OTHERS = 0.3  # spread of the remaining weights of a gate, and around it
FADE = 1 / 16  # a state's log decay over its step size, which starts between 0.001 and 0.1


@torch.no_grad()
def start_for_retrieval(model: HybridDecoder) -> None:
    """Draws all matrices anew from torch's global generator and arranges the mixers."""
    hidden = model.sizes.hidden_size
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            weight.normal_(std=hidden**-0.5)
            if name.endswith("down_proj.weight"):
                weight.mul_((2 * len(model.layers)) ** -0.5)
    model.lm_head.weight[:, 0] = 1.0
    for layer in model.layers:
        mixer = layer.mixer
        if isinstance(mixer, ConvAttention):
            rows, taps = mixer.in_proj.weight.chunk(3), mixer.conv1d.weight.chunk(3)
        elif isinstance(mixer, GatedDeltaNet):
            values = mixer.share * mixer.value_dim
            by_head = mixer.in_proj_qkvz.weight.unflatten(0, (mixer.num_key_heads, -1))
            *rows, gate = by_head.split([mixer.key_dim, mixer.key_dim, values, values], dim=1)
            taps = mixer.conv1d.weight.split(mixer.sizes)
            mixer.in_proj_ba.weight[:, 0] = 0.0
        else:
            inner, states, _ = mixer.sizes
            gate, v, k, q, step = mixer.in_proj.weight.split([inner, inner, states, states, mixer.num_heads])
            rows, taps = (q, k, v), mixer.conv1d.weight.split(mixer.sizes)[::-1]
            step[:, 0] = 0.0
        look_back(*rows[:2], *taps[:2])
        copy(rows[2], taps[2], mixer.out_proj.weight)
        if not isinstance(mixer, ConvAttention):
            gate[..., 1:].mul_(OTHERS)
            gate[..., 0] = OPEN / (hidden / 2) ** 0.5  # dimension 0 is sqrt(hidden / 2) after the norm
            mixer.A_log.fill_(FADE).log_()


def look_back(q_rows: Tensor, k_rows: Tensor, q_taps: Tensor, k_taps: Tensor) -> None:
    """Queries hold a token and the two before it, keys the three before theirs, mixed alike."""
    q_rows[..., 0] = 0.0
    k_rows.copy_(q_rows)
    q_taps[..., 0] = 0.0
    q_taps[..., 1:].normal_(std=(CONV_WIDTH - 1) ** -0.5)
    k_taps[..., -1] = 0.0
    k_taps[..., :-1] = q_taps[..., 1:]


def copy(rows: Tensor, taps: Tensor, written: Tensor) -> None:
    """Values are projections on orthonormal directions, which are written back."""
    hidden, inner = written.shape
    blocks = [torch.linalg.qr(torch.randn(hidden, min(hidden, inner)))[0] for _ in range(0, inner, hidden)]
    basis = torch.cat(blocks, dim=1)
    rows.copy_(basis.T.view_as(rows))
    rows[..., 0] = 0.0
    taps[..., :-1].mul_(OTHERS)
    taps[..., -1] = 1.0
    written.copy_(WRITE * basis)
