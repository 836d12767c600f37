"""A mixture of experts: each token through a few feed-forward blocks out of many."""

from __future__ import annotations

import torch

from lcore.errors import require
from lcore.nn.linear import Linear
from lcore.nn.mlp import GatedMLP, sigmoid


class SparseMLP(torch.nn.Module):
    """A mixture of GatedMLPs, with the parameter names of Hugging Face checkpoints.

    Formula:  p = softmax(router(x)) in float32; y = sum over the top_k experts e of largest p of p_e expert_e(x), with
              p of those scaled to sum 1 where normalize; and sigmoid(shared_expert_gate(x)) shared_expert(x), if there
              is one
    Args:
        hidden_size, intermediate_size: of x, and of an expert.
        num_experts, top_k: of which a token takes top_k.
        normalize: scale the chosen experts' parts to sum 1.
        shared_size: intermediate size of an expert that all tokens take; 0 for none.
        router_name: of the router's projection among the parameters.
        x (..., hidden_size).
    Returns:  the shape and dtype of x. Experts gather their tokens and add to them in the order of their numbers, so
              that a token's result does not depend on the others, and nothing of size tokens x experts x hidden is
              made.
    Source:   Shazeer et al. 2017, arXiv:1701.06538; Fedus et al. 2021, Switch Transformers, arXiv:2101.03961.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        *,
        normalize: bool = False,
        shared_size: int = 0,
        router_name: str = "gate",
    ) -> None:
        super().__init__()
        require(1 <= top_k <= num_experts, "nn.SparseMLP", "top_k", f"be in 1 .. {num_experts}", top_k)
        self.top_k, self.normalize, self.router_name = top_k, normalize, router_name
        self.add_module(router_name, Linear(hidden_size, num_experts, bias=False))
        self.experts = torch.nn.ModuleList(GatedMLP(hidden_size, intermediate_size) for _ in range(num_experts))
        self.shared_expert = GatedMLP(hidden_size, shared_size) if shared_size else None
        self.shared_expert_gate = Linear(hidden_size, 1, bias=False) if shared_size else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(0, -2)
        wide = torch.promote_types(x.dtype, torch.float32)
        logits = self.get_submodule(self.router_name)(tokens)
        parts, chosen = logits.softmax(dim=-1, dtype=wide).topk(self.top_k, dim=-1)
        if self.normalize:
            parts = parts / parts.sum(-1, keepdim=True)
        parts = parts.to(x.dtype).flatten()
        out = torch.zeros_like(tokens)
        chosen = chosen.flatten()
        order, counts = chosen.argsort(stable=True), chosen.bincount(minlength=len(self.experts)).tolist()
        for expert, places in zip(self.experts, order.split(counts), strict=True):
            if len(places) > 0:
                rows = places // self.top_k
                out.index_add_(0, rows, expert(tokens[rows]) * parts[places, None])
        if self.shared_expert is not None and self.shared_expert_gate is not None:
            out = out + sigmoid(self.shared_expert_gate(tokens)) * self.shared_expert(tokens)
        return out.view(x.shape)
