"""What all decoders have in common: tokens that are checked, logits, ties, saving."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch

from lcore.cache import PagedCache, StateCache, states_of
from lcore.errors import check_tensor, message, require, require_type
from lcore.models.tokenizer import Tokenizer
from lcore.nn import Linear

if TYPE_CHECKING:
    from lcore.models.config import ModelConfig
    from lcore.models.hybrid_config import HybridConfig
    from lcore.models.mamba_config import MambaConfig


class CausalLM(torch.nn.Module):
    """A causal language model, with the parameter names of Hugging Face checkpoints."""

    embedding_name: str  # of the parameter that the output projection may share
    cache_kind = "PagedCache"  # or "StateCache", "HybridCache"
    config: ModelConfig | MambaConfig | HybridConfig
    tokenizer: Tokenizer | None
    lm_head: Linear

    def tie_weights(self) -> None:
        """Makes the output projection share the embedding's parameter, where the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.get_parameter(self.embedding_name)

    @property
    def dtype(self) -> torch.dtype:
        return self.lm_head.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Writes a Hugging Face folder (config, weights, tokenizer) that `load_model` and transformers read.

        The folder appears whole or not at all: it is written beside its place and renamed. An existing folder is
        replaced only with overwrite=True, and only if it holds nothing but files that this method writes.
        """
        from lcore.models.saving import save_model

        save_model(self, path, overwrite=overwrite)

    def _logits(self, x: torch.Tensor, lengths: torch.Tensor | None, last_only: bool) -> torch.Tensor:
        return self.lm_head(_last(x, lengths) if last_only else x).float()

    def _checked(
        self, tokens: torch.Tensor, cache: PagedCache | StateCache | None, lengths: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Tokens with the padding set to 0, and lengths as int64; raises as `forward` says."""
        owner, vocab = type(self).__name__, self.config.vocab_size
        kinds = (torch.int64, torch.int32)
        check_tensor(owner, "tokens", tokens, dtypes=kinds, shape=("*", "*"), names="batch, seq", device=self.device)
        require(tokens.numel() > 0, owner, "tokens", "hold at least one token", tuple(tokens.shape))
        if cache is not None:
            kind = cache_kind(cache)
            rule = f"be a {self.cache_kind}, as new_cache() makes it"
            require_type(kind == self.cache_kind, owner, "cache", rule, kind)
            rule = f"have batch_size = {tokens.shape[0]}, the rows of tokens"
            require(cache.batch_size == tokens.shape[0], owner, "cache", rule, cache.batch_size)
        if lengths is not None:
            check_tensor(owner, "lengths", lengths, dtypes=kinds, shape=(tokens.shape[0],), names="batch")
            low, high = (int(value) for value in torch.aminmax(lengths))
            require(
                low >= 0 and high <= tokens.shape[1], owner, "lengths", f"be in 0 .. {tokens.shape[1]}", (low, high)
            )
            lengths = lengths.to(torch.int64)
            padding = torch.arange(tokens.shape[1], device=self.device) >= lengths.to(self.device)[:, None]
            tokens = tokens.masked_fill(padding, 0)
        low, high = (int(value) for value in torch.aminmax(tokens))
        if low < 0 or high >= vocab:
            rule = f"be ids in 0 .. {vocab - 1} (vocab_size {vocab})"
            raise ValueError(message(owner, "tokens", rule, low if low < 0 else high))
        return tokens, lengths


def cache_kind(cache: Any) -> str:
    """Which of the three kinds a cache, or a view of one, is."""
    states = states_of(cache)
    return "PagedCache" if states is None else "StateCache" if states is cache else "HybridCache"


def _last(x: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    """(batch, 1, hidden) at each row's last real token; zeros for a row without one."""
    if lengths is None:
        return x[:, -1:]
    lengths = lengths.to(x.device)
    index = (lengths - 1).clamp(min=0)[:, None, None].expand(-1, 1, x.shape[2])
    return x.gather(1, index).masked_fill((lengths == 0)[:, None, None], 0)
