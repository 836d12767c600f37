"""A wrong kernel must not get a time: some rows of a result, computed again in float64 as the formula says."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Relative error, in the 2-norm of a row, that no right kernel comes near: 4 to 8 units of the dtype's own rounding.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2**-8, torch.bfloat16: 2**-6}


# torch's kernels may round more often: some keep the scores in the inputs' dtype.
PEER_SLACK = 8.0


class Checker:
    """Attention of one sequence: the first of (batch, seq, heads, head_dim) tensors, its first and last kv head.

    bounds: keys to the left and right of a query's own position that it sees; it stands at row + seq_k - seq_q.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, bounds: tuple[int, int]) -> None:
        self.kv_heads = k.shape[2]
        self.q, self.k, self.v = self._cut(q), self._cut(k), self._cut(v)
        self.scale = 1 / math.sqrt(q.shape[-1])
        self.bound = TOLERANCE[q.dtype]
        at = torch.arange(q.shape[1]) + k.shape[1] - q.shape[1]
        self.first, self.last = (at - bounds[0]).clamp(min=0), (at + bounds[1] + 1).clamp(max=k.shape[1])

    def _cut(self, x: Tensor) -> Tensor:
        """(seq, 2, heads a kv head, head_dim)."""
        return x[0].unflatten(1, (self.kv_heads, -1))[:, [0, -1]]

    def _compare(self, name: str, got: Tensor, want: Tensor, bound: float) -> None:
        error = ((got.double() - want).norm(dim=-1) / want.norm(dim=-1)).max().item()
        if not error <= bound:  # also for a NaN
            raise AssertionError(f"bench: {name} is wrong: relative error {error:.2e}, {bound:.2e} is allowed")

    def _weights(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        """The weights of a row over the keys that it sees, these keys and their values, in float64."""
        seen = slice(int(self.first[row]), int(self.last[row]))
        k, v = self.k[seen, :, 0].double(), self.v[seen, :, 0].double()
        scores = torch.einsum("hgd,nhd->hgn", self.q[row].double(), k) * self.scale
        return scores.softmax(-1), k, v

    def forward(self, out: Tensor, slack: float = 1.0) -> None:
        """Raises AssertionError unless out (batch, seq, heads, head_dim) is right in its first, middle and last row."""
        cut = self._cut(out)
        for row in {0, len(cut) // 2, len(cut) - 1}:
            p, _, v = self._weights(row)
            self._compare(f"out of row {row}", cut[row], torch.einsum("hgn,nhd->hgd", p, v), slack * self.bound)

    def backward(self, out: Tensor, lse: Tensor, dout: Tensor, grads: tuple[Tensor, ...]) -> None:
        """The same for the gradients of q, k and v. out and lse (batch, heads, seq) are the forward's, checked."""
        cut_out, cut_dout = self._cut(out).double(), self._cut(dout).double()
        dq, dk, dv = (self._cut(grad) for grad in grads)
        delta = (cut_dout * cut_out).sum(-1)  # (seq, 2, group)
        for row in {0, len(dq) // 2, len(dq) - 1}:
            p, k, v = self._weights(row)
            if p.shape[-1] > 1:  # of one key alone dq is 0
                ds = p * (torch.einsum("hgd,nhd->hgn", cut_dout[row], v) - delta[row, :, :, None])
                want = torch.einsum("hgn,nhd->hgd", ds, k) * self.scale
                self._compare(f"dq of row {row}", dq[row], want, 2 * self.bound)
        q, cut_lse = self.q.double(), self._cut(lse.transpose(1, 2).unsqueeze(-1))[..., 0].double()
        for key in {0, len(dk) // 2, len(dk) - 1}:
            k, v = self.k[key, :, 0].double(), self.v[key, :, 0].double()
            sees = ((self.first <= key) & (key < self.last))[:, None, None]
            p = (torch.einsum("nhgd,hd->nhg", q, k) * self.scale - cut_lse).exp() * sees
            ds = p * (torch.einsum("nhgd,hd->nhg", cut_dout, v) - delta) * self.scale
            self._compare(f"dk of key {key}", dk[key, :, 0], torch.einsum("nhg,nhgd->hd", ds, q), 2 * self.bound)
            self._compare(f"dv of key {key}", dv[key, :, 0], torch.einsum("nhg,nhgd->hd", p, cut_dout), 2 * self.bound)
